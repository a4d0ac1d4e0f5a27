"""The demo host: a small GPT-NeoX and its tokenizer, trained on the demo corpus in minutes.

Byte-level BPE, then AdamW on packed contexts, both on the training documents only; what was learnt
is measured on the held-out ones as cross-entropy in nats per token, beside the unigram entropy of
the same tokens (Shannon 1951: the best any model can do that ignores context). The result is an
ordinary Hugging Face folder, so it loads through the same path as any other model.

Cost: 1.4 M tokens, 3.1 M + 2.1 M parameters. Equal for equal seed, threads, precision and CPU kind
as long as the time limit is not reached; `report.json` says whether it was.

Shapes: B contexts in a batch, T tokens of a context, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from actcache.errors import ActcacheError
from actcache.host import new_causal_lm, save_host
from actcache.store.split import doc_key, held_out

END_OF_TEXT = "<|endoftext|>"
REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """Size and training of the demo host; the defaults fit two cores and two minutes."""

    vocab: int = 4096
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    context: int = 128
    batch: int = 16  # contexts in a step
    steps: int = 700
    # A slow machine stops early, its learning-rate decay included, but not before `min_steps`.
    minutes: float = 2.4
    min_steps: int = 300
    lr: float = 3e-3
    warmup: int = 40  # steps
    seed: int = 0
    held_out_fraction: float = 0.05
    min_gain: float | None = 1.5  # nats below unigram, or building fails


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """What was trained and what it learnt; entropies in nats per held-out token."""

    cross_entropy: float
    unigram_entropy: float  # of the held-out tokens themselves: the lower, stricter yardstick
    unigram_cross_entropy: float  # of add-one counts of the training tokens
    held_out_documents: int
    held_out_tokens: int
    train_documents: int
    train_tokens: int  # in one pass
    tokens_seen: int
    steps: int
    seconds: float  # of training
    stopped_by: str  # "steps" or "time"
    precision: str
    threads: int
    parameters: int
    settings: dict[str, float]

    @property
    def gain(self) -> float:
        """Nats per token below the unigram entropy."""
        return min(self.unigram_entropy, self.unigram_cross_entropy) - self.cross_entropy

    def __str__(self) -> str:
        return (
            f"held-out cross-entropy {self.cross_entropy:.3f} nats per token, unigram entropy "
            f"{self.unigram_entropy:.3f}: {self.gain:.2f} below ({self.held_out_tokens:,} tokens "
            f"of {self.held_out_documents} documents)"
        )


def build_host(
    folder: Path, corpus: Path, settings: HostSettings | None = None, progress: bool = True
) -> HostReport:
    """Train a host on `corpus` (parquet with id and text) into `folder`, unless it is there.

    Raises ActcacheError when it learnt less than `settings.min_gain`; nothing is kept then.
    """
    folder = Path(folder)
    if (folder / REPORT).exists():
        return load_report(folder)
    settings = settings or HostSettings()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        report = _build(part, corpus, settings, progress)
        part.chmod(0o755)  # mkdtemp's own is for one user
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return report


def load_report(folder: Path) -> HostReport:
    """The report beside a host that `build_host` made."""
    values = json.loads((Path(folder) / REPORT).read_text("utf-8"))
    return HostReport(**values)


def _build(folder: Path, corpus: Path, cfg: HostSettings, progress: bool) -> HostReport:
    train, held = split_documents(corpus, cfg.held_out_fraction)
    tokenizer = train_tokenizer(train, cfg.vocab, progress)
    train_ids, held_ids = pack(tokenizer, train), pack(tokenizer, held)
    model = new_causal_lm(_model_config(cfg, tokenizer.get_vocab_size()), cfg.seed)
    run = _train(model, train_ids, cfg, progress)
    predicted = contexts(held_ids, cfg.context)[:, 1:]
    report = HostReport(
        cross_entropy=_evaluate(model, contexts(held_ids, cfg.context)),
        unigram_entropy=unigram_entropy(predicted),
        unigram_cross_entropy=unigram_cross_entropy(
            train_ids, predicted, tokenizer.get_vocab_size()
        ),
        held_out_documents=len(held),
        held_out_tokens=predicted.size,
        train_documents=len(train),
        train_tokens=train_ids.size,
        tokens_seen=run.steps * cfg.batch * cfg.context,
        steps=run.steps,
        seconds=round(run.seconds, 1),
        stopped_by=run.stopped_by,
        precision="bfloat16 autocast" if _fast_bfloat16() else "float32",
        threads=torch.get_num_threads(),
        parameters=sum(p.numel() for p in model.parameters()),
        settings=dataclasses.asdict(cfg),
    )
    if cfg.min_gain is not None and not report.gain >= cfg.min_gain:
        raise ActcacheError(
            f"the demo host learnt too little: {report}; expected {cfg.min_gain} below after "
            f"{run.steps} steps. Give it more steps or minutes (actcache.demo.HostSettings)"
        )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    save_host(model, tokenizer, folder, **special)
    (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", "utf-8")
    return report


# -- text to tokens -------------------------------------------------------------------------------


def split_documents(corpus: Path, fraction: float) -> tuple[list[str], list[str]]:
    """Texts of the training and of the held-out documents, by a hash of the document id."""
    table = pq.read_table(corpus, columns=["id", "text"])
    keys = np.array([doc_key(i) for i in table["id"].to_pylist()], dtype=np.uint64)
    chosen = held_out(keys, fraction)
    texts = table["text"].to_pylist()
    train = [t for t, h in zip(texts, chosen, strict=True) if not h]
    held = [t for t, h in zip(texts, chosen, strict=True) if h]
    if not train or not held:
        raise ActcacheError(
            f"{corpus}: {len(train)} training and {len(held)} held-out documents at "
            f"held_out_fraction={fraction}; expected some of both, give more documents"
        )
    return train, held


def train_tokenizer(texts: Sequence[str], vocab: int, progress: bool = True) -> Tokenizer:
    """Byte-level BPE (every byte has a token, so nothing is unknown); `<|endoftext|>` is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bar = tqdm(texts, desc="training tokenizer", unit="doc", disable=not progress)
    tokenizer.train_from_iterator(bar, trainer=trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """All texts as one row of ids, each closed by `<|endoftext|>`."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [i for e in tokenizer.encode_batch(list(texts)) for i in (*e.ids, end)]
    return np.array(ids, dtype=np.int64)


def contexts(ids: npt.NDArray[np.int64], context: int) -> npt.NDArray[np.int64]:
    """(B, T) ids cut into contexts in order; the incomplete last one is dropped."""
    n = len(ids) // context
    if n == 0:
        raise ActcacheError(f"{len(ids)} tokens do not fill a context of {context}; give more text")
    return ids[: n * context].reshape(n, context)


def unigram_entropy(ids: npt.NDArray[np.int64]) -> float:
    """H = -sum p ln p of the tokens' own frequencies, nats."""
    p = np.unique(ids, return_counts=True)[1] / ids.size
    return float(-(p * np.log(p)).sum())


def unigram_cross_entropy(
    train: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], vocab: int
) -> float:
    """Mean of -ln q over `ids`, q from the training tokens' counts plus one, nats."""
    counts = np.bincount(train.ravel(), minlength=vocab) + 1
    return float(-np.log(counts / counts.sum())[ids].mean())


# -- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Run:
    steps: int
    seconds: float
    stopped_by: str


def _model_config(cfg: HostSettings, vocab: int) -> dict[str, object]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": 4 * cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "max_position_embeddings": 2 * cfg.context,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: 2.7 times the tokens per second."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _loss(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Mean next-token cross-entropy, nats."""
    with torch.autocast("cpu", torch.bfloat16, enabled=_fast_bfloat16()):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def _train(model: nn.Module, ids: npt.NDArray[np.int64], cfg: HostSettings, progress: bool) -> _Run:
    """AdamW with warm-up and linear decay to zero over steps, or over the minutes if they end."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batches = _batches(ids, cfg)
    start, done, step = time.perf_counter(), 0.0, 0
    with tqdm(total=cfg.steps, desc="training host", unit="step", disable=not progress) as bar:
        while done < 1:
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min((step + 1) / cfg.warmup, 1 - done)
            loss = _loss(model, next(batches))
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            done = _done(cfg, step, time.perf_counter() - start)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.eval()
    stopped_by = "steps" if step >= cfg.steps else "time"
    return _Run(steps=step, seconds=time.perf_counter() - start, stopped_by=stopped_by)


def _done(cfg: HostSettings, step: int, seconds: float) -> float:
    """Share of the training that is over, by steps or by time, whichever is further."""
    by_time = min(seconds / (60 * cfg.minutes), step / cfg.min_steps)
    return max(step / cfg.steps, by_time)


def _batches(ids: npt.NDArray[np.int64], cfg: HostSettings) -> Iterator[Tensor]:
    """Endless (B, T) batches: each pass cuts the row at another offset and shuffles contexts."""
    rng = np.random.default_rng(cfg.seed)
    rows: list[npt.NDArray[np.int64]] = []
    while True:
        offset = int(rng.integers(min(cfg.context, len(ids) - cfg.context + 1)))
        rows += list(rng.permutation(contexts(ids[offset:], cfg.context)))
        while len(rows) >= cfg.batch:
            batch, rows = rows[: cfg.batch], rows[cfg.batch :]
            yield torch.from_numpy(np.stack(batch))


@torch.no_grad()
def _evaluate(model: nn.Module, ids_BT: npt.NDArray[np.int64]) -> float:
    """Mean cross-entropy of every predicted token, in float32."""
    model.eval()
    total = 0.0
    for chunk in torch.split(torch.from_numpy(ids_BT), 32):
        logits_BTV = model(input_ids=chunk, use_cache=False).logits
        each = cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"
        )
        total += each.item()
    return total / ids_BT[:, 1:].size
