"""The host model: load any Hugging Face model and its tokenizer, and say which one it is.

The only module (with data.py) that imports transformers. A hub name is first resolved to a local
snapshot, so local folders and hub models go through the same code and the same weights have the
same identity wherever they lie. The host is truncated above the deepest hook before its weights
are read, by its config; it is never stopped by an exception.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from actcache.errors import HostError
from actcache.hooks import HookPoint, deepest_block
from actcache.store.ids import digest, file_digest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """Which model to run. `conf/host/*.yaml` are examples."""

    model: str  # local folder, or hub repository
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    device: str = "auto"  # auto: cuda if there is one
    batch_tokens: int = 4096  # tokens of one forward pass
    trust_remote_code: bool = False


class Host:
    """A model's files, config and tokenizer. Weights are read by `load` only."""

    def __init__(self, settings: HostSettings) -> None:
        """Raises HostError if the model is not there or its tokenizer does not fit it."""
        from transformers import AutoConfig, AutoTokenizer

        self.settings = settings
        self.folder = _resolve(settings)
        trust = settings.trust_remote_code
        with _explained(settings):
            self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=trust)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=trust
            )
        self._check_tokenizer()

    # -- identity ---------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations: weights, config, number type, attention kernel."""
        return {
            "architecture": self.config.model_type,
            "config": digest(self._plain_config()),
            "weights": digest(_digests(self._weight_files())),
            "dtype": self.settings.dtype,
            "attention": self.settings.attention,
        }

    @cached_property
    def tokenizer_identity(self) -> str:
        """Digest of the tokenizer's own serialisation and its special tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab())
        return digest([rules, {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}])

    def _plain_config(self) -> dict[str, Any]:
        noise = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
        config = json.loads(self.config.to_json_string(use_diff=True))
        return {k: v for k, v in config.items() if k not in noise}

    def _weight_files(self) -> list[Path]:
        files = [f for pattern in _WEIGHTS for f in sorted(self.folder.glob(pattern))]
        if not files:
            raise HostError(f"host.model={self.settings.model}: no weight files in {self.folder}")
        return files

    # -- the model --------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        if self.settings.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.settings.device)

    def skeleton(self) -> nn.Module:
        """The whole base model on the meta device: its module names, no weights."""
        from transformers import AutoModel

        with torch.device("meta"), _explained(self.settings):
            model = AutoModel.from_config(  # type: ignore[no-untyped-call]
                self.config, trust_remote_code=self.settings.trust_remote_code
            )
        return _module(model)

    def load(self, points: list[HookPoint]) -> nn.Module:
        """The base model (no LM head), cut above the deepest of `points`, ready to run."""
        from transformers import AutoModel

        config = self._truncated(points)
        with _explained(self.settings), _quiet():
            model = _module(
                AutoModel.from_pretrained(
                    self.folder,
                    config=config,
                    dtype=DTYPES[self.settings.dtype],
                    attn_implementation=self.settings.attention,
                    trust_remote_code=self.settings.trust_remote_code,
                )
            )
        return model.to(self.device).eval().requires_grad_(False)

    def _truncated(self, points: list[HookPoint]) -> Any:
        deepest = deepest_block(points, self.skeleton())
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        if deepest is not None and deepest + 1 < text.num_hidden_layers:
            text.num_hidden_layers = deepest + 1
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[: deepest + 1]
        return config

    def _check_tokenizer(self) -> None:
        vocab = getattr(self.config.get_text_config(), "vocab_size", None)
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if vocab is not None and largest >= vocab:
            raise HostError(
                f"host.model={self.settings.model}: its tokenizer has token ids up to {largest}, "
                f"the model embeds {vocab}. They do not belong together"
            )

    def check_context(self, context: int) -> None:
        """HostError if the model has fewer positions than a context has tokens."""
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and context > most:
            raise HostError(
                f"context={context} is longer than the {most} positions of "
                f"host.model={self.settings.model}; use at most context={most}"
            )

    def vocab(self) -> list[bytes]:
        """The exact bytes of every token id, padded to the model's vocabulary."""
        return token_bytes(self.tokenizer)


def forward(model: nn.Module, ids_BT: Tensor, mask: Tensor, positions_BT: Tensor | None) -> None:
    """Run the model for its hooks. `mask` is (B, T) of ones and zeros, or (B, 1, T, T) bool."""
    extra = {} if positions_BT is None else {"position_ids": positions_BT}
    with torch.inference_mode():
        model(input_ids=ids_BT, attention_mask=mask, use_cache=False, **extra)


# -- tokens as bytes -------------------------------------------------------------------------------


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes each token id stands for, from the tokenizer's decoder rather than its vocabulary.

    Byte-level BPE spells bytes as printable letters, SentencePiece spells a space as U+2581 and
    bytes as <0xNN>, WordPiece marks continuations with ##.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = str(getattr(backend, "decoder", None))
    spelled = _byte_level if "ByteLevel" in decoder else _sentence_piece
    if "WordPiece" in decoder:
        spelled = _word_piece
    added = {i: t.content.encode() for i, t in tokenizer.added_tokens_decoder.items()}
    pieces = {i: spelled(piece) for piece, i in tokenizer.get_vocab().items()} | added
    return [pieces.get(i, b"") for i in range(max(pieces, default=-1) + 1)]


def _byte_alphabet() -> dict[str, int]:
    """Printable letter -> byte, GPT-2's table: bytes that print stand for themselves."""
    keep = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in keep}
    rest = [b for b in range(256) if b not in set(keep)]
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    if all(c in _ALPHABET for c in piece):
        return bytes(_ALPHABET[c] for c in piece)
    return piece.encode()


def _sentence_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _word_piece(piece: str) -> bytes:
    return piece[2:].encode() if piece.startswith("##") else b" " + piece.encode()


# -- making and finding models ---------------------------------------------------------------------


def new_causal_lm(config: Mapping[str, Any], seed: int) -> nn.Module:
    """A freshly initialised causal LM from a config mapping such as {"model_type": "gpt_neox"}."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    cfg = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    return _module(AutoModelForCausalLM.from_config(cfg))  # type: ignore[no-untyped-call]


def save_host(model: nn.Module, tokenizer: Any, folder: Path, **special_tokens: str) -> None:
    """Write model and tokenizer (a `tokenizers.Tokenizer`) as an ordinary HF folder."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)  # type: ignore[no-untyped-call]
    with _quiet():
        wrapped.save_pretrained(folder)
        model.save_pretrained(folder)  # type: ignore[operator]


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _resolve(settings: HostSettings) -> Path:
    """The local folder of the model, downloading a hub repository if need be."""
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise HostError(f"host.model={settings.model}: this folder has no config.json")
        return folder
    if settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1:
        raise HostError(f"host.model={settings.model}: there is no such folder")
    from huggingface_hub import snapshot_download

    with _explained(settings):
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py"]
        found = snapshot_download(
            settings.model, revision=settings.revision, allow_patterns=patterns
        )
    return Path(found)


def _digests(files: list[Path]) -> list[dict[str, Any]]:
    """Name, size and digest of each file; a bar where there is enough to wait for."""
    sizes = [f.stat().st_size for f in files]
    found = []
    with tqdm(
        total=sum(sizes),
        unit="B",
        unit_scale=True,
        desc="reading weights for their digest",
        disable=sum(sizes) < 2 << 30,
    ) as bar:
        for file, size in zip(files, sizes, strict=True):
            found.append({"name": file.name, "bytes": size, "sha256": file_digest(file)})
            bar.update(size)
    return found


@contextmanager
def _explained(settings: HostSettings) -> Iterator[None]:
    """Library errors, in the words of the setting that caused them."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as e:
        first = str(e).strip().split("\n")[0]
        raise HostError(f"host.model={settings.model} cannot be loaded: {first}") from e


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, and no report of weights left out: truncation and the dropped head are meant."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
