"""Benchmark of `actcache run`: against the bare forward pass, SAELens' cache runner, the plan.

A host of about 20 M parameters (GPT-NeoX, random weights: speed does not depend on them) reads the
documents of the demo corpus. Every side does the same tokens with the same batch size and threads:

  ours      run(): read parquet, tokenize, pack, forward, checksum, fsync, commit, snapshot
  bare      the host's forward pass over the same packed batches, cut above the same block
  SAELens   CacheActivationsRunner over the same text, equal token ids asserted; no fsync

Weights are loaded, and their digest taken, before the clock on all sides. Against the forward pass
each turn continues a store that holds its first segment, so that what is done once per store (its
identity, the canary) does not count into the rate. Against SAELens each turn makes a whole store.
Stores are in bfloat16, SAELens' cache in float32, each one's default. Memory is the growth of a
fresh process above what its imports take, against weights, batch and segments in flight as
`actcache plan` states them.

    python -m pipelines.bench_cache [--quick] [--json FILE]
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import actcache.run
from actcache.data import PackSettings
from actcache.demo import demo_paths
from actcache.demo.corpus import build_corpus
from actcache.demo.train_host import END_OF_TEXT, train_tokenizer
from actcache.hooks import HookPoint, resolve
from actcache.host import Host, HostSettings, new_causal_lm, save_host
from actcache.plan import plan
from actcache.run import CacheSettings, LayoutSettings, run
from actcache.sources import DataSettings
from actcache.store import Store
from pipelines.bench import Measure, Peer, command, in_turn, ratios, why_absent

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work. One turn of one side takes about ten seconds on two cores at full size."""

    d: int = 512
    layers: int = 6
    heads: int = 8
    vocab: int = 4096
    segments: int = 5
    segment_rows: int = 8192
    context: int = 128
    batch_tokens: int = 4096
    turns: int = 7
    hook: str = "resid.3"  # the one hook; all hooks: the residual stream behind every block

    @property
    def tokens(self) -> int:
        return self.segments * self.segment_rows


QUICK = Scale(
    d=32,
    layers=2,
    heads=4,
    vocab=400,
    segments=2,
    segment_rows=256,
    context=32,
    batch_tokens=128,
    turns=2,
    hook="resid.0",
)


def make_host(folder: Path, texts: Sequence[str], scale: Scale) -> None:
    """A Hugging Face folder: random GPT-NeoX of the scale, byte-level BPE of the texts."""
    tokenizer = train_tokenizer(texts, scale.vocab, progress=False)
    config = {
        "model_type": "gpt_neox",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": scale.d,
        "intermediate_size": 4 * scale.d,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "max_position_embeddings": 2 * scale.context,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    save_host(new_causal_lm(config, seed=0), tokenizer, folder, **special)


def make_data(folder: Path, documents: Sequence[tuple[str, str]], host: Path, tokens: int) -> None:
    """A folder with one parquet file: as many (id, text) as give `tokens` tokens, no more."""
    tokenizer = Host(HostSettings(model=str(host))).tokenizer
    table: dict[str, list[str]] = {"id": [], "text": []}
    have = 0
    for key, text in documents:
        table["id"].append(key)
        table["text"].append(text)
        have += len(tokenizer(text, verbose=False).input_ids) + 1  # and its separator
        if have > tokens:
            break
    if have <= tokens:
        raise ValueError(f"the documents give {have:,} tokens, {tokens:,} are needed")
    folder.mkdir()
    pq.write_table(pa.table(table), folder / "train.parquet")


class LoadedHost(Host):
    """A host whose weights are read and digested before the clock starts."""

    def __init__(self, settings: HostSettings) -> None:
        super().__init__(settings)
        self._models: dict[int, nn.Module] = {}
        assert self.identity

    def load(self, points: list[HookPoint]) -> nn.Module:
        deepest = self._truncated(points).get_text_config().num_hidden_layers
        if deepest not in self._models:
            self._models[deepest] = super().load(points)
        return self._models[deepest]


class Bench:
    """One host, one folder of text, and the sides that cache them."""

    def __init__(self, folder: Path, host: Path, data: Path, scale: Scale) -> None:
        """`folder` is for stores and caches; they are removed after each turn."""
        self.folder, self.data, self.scale = folder, data, scale
        self.processor: dict[str, list[float]] = {}  # seconds a token, by side
        self.host = LoadedHost(HostSettings(model=str(host), batch_tokens=scale.batch_tokens))

    def settings(self, hooks: Sequence[str], store: Path, segments: int) -> CacheSettings:
        return CacheSettings(
            host=self.host.settings,
            data=DataSettings(files=str(self.data), id_column="id"),
            store=str(store),
            hooks=tuple(hooks),
            tokens=segments * self.scale.segment_rows,
            context=self.scale.context,
            layout=LayoutSettings(segment_rows=self.scale.segment_rows),
            progress=False,
        )

    @property
    def one(self) -> tuple[str, ...]:
        return (self.scale.hook,)

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(f"resid.{i}" for i in range(self.scale.layers))

    @contextmanager
    def clock(self, side: str, tokens: int) -> Iterator[Callable[[], float]]:
        """Times the block; the function that it gives returns tokens a second, afterwards."""
        wall, cpu = time.perf_counter(), time.process_time()
        took: list[float] = []
        yield lambda: tokens / took[0]
        took.append(time.perf_counter() - wall)
        self.processor.setdefault(side, []).append((time.process_time() - cpu) / tokens)

    # -- ours -------------------------------------------------------------------------------------

    def run(
        self,
        hooks: tuple[str, ...],
        look: Callable[[Store], Any] | None = None,
        begun: Path | None = None,
    ) -> float:
        """Tokens a second of `actcache run`; `look` sees the store before it is removed.

        The store is new, or continues a copy of `begun`, which holds one segment.
        """
        tokens = (self.scale.segments - (begun is not None)) * self.scale.segment_rows
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            store = Path(folder, "store")
            if begun is not None:
                shutil.copytree(begun, store)
            with self._loaded(folder), self.clock("ours", tokens) as rate:
                done = run(self.settings(hooks, store, self.scale.segments))
            if done.computed != tokens:
                raise RuntimeError(f"expected {tokens:,} tokens, got {done.computed:,}")
            if look is not None:
                look(done.store)
        return rate()

    def begin(self, hooks: tuple[str, ...]) -> Path:
        """A store with one segment of the hooks, and its canary."""
        store = Path(tempfile.mkdtemp(dir=self.folder), "store")
        with self._loaded(str(store.parent)):
            run(self.settings(hooks, store, 1))
        return store

    @contextmanager
    def _loaded(self, home: str) -> Iterator[None]:
        """`run` finds the host loaded, and an empty catalog."""
        with (
            patch.dict(os.environ, ACTCACHE_HOME=f"{home}/home"),
            patch.object(actcache.run, "Host", lambda _: self.host),
        ):
            yield

    # -- the forward pass alone -------------------------------------------------------------------

    @cached_property
    def contexts(self) -> list[NDArray[np.uint32]]:
        """Token ids of every context in the order in which `run` feeds them."""
        found: list[NDArray[np.uint32]] = []

        def look(store: Store) -> None:
            for segment in store.snapshot().segments:
                tokens = segment.tokens()
                rows = np.lexsort((tokens.pos, tokens.ctx))
                starts = np.flatnonzero(np.diff(tokens.ctx[rows])) + 1
                found.extend(np.split(tokens.token_id[rows], starts))

        self.run(self.one, look)
        return found

    def batches(self) -> list[Tensor]:
        """Token ids (B, T) of each forward pass behind the first segment.

        All contexts are full, because the data does not end within the run.
        """
        of_segment = self.scale.segment_rows // self.scale.context
        of_batch = self.scale.batch_tokens // self.scale.context
        found: list[Tensor] = []
        for first in range(of_segment, len(self.contexts), of_segment):
            segment = np.stack(self.contexts[first : first + of_segment]).astype(np.int64)
            found += torch.split(torch.from_numpy(segment), of_batch)
        return found

    def bare(self, model: nn.Module, batches: Sequence[Tensor]) -> float:
        """Tokens a second of a forward loop: no hooks, no mask, nothing kept."""
        tokens = sum(b.numel() for b in batches)
        with torch.inference_mode(), self.clock("bare", tokens) as rate:
            for ids_BT in batches:
                model(input_ids=ids_BT, use_cache=False)
        return rate()

    def against_bare(self, hooks: tuple[str, ...], say: Say) -> tuple[float, ...]:
        """Ratios of tokens a second."""
        begun, batches = self.begin(hooks), self.batches()
        model = self.host.load(resolve(hooks, None, self.host.skeleton()))
        sides = {
            "ours": lambda: self.run(hooks, begun=begun),
            "bare": lambda: self.bare(model, batches),
        }
        in_turn(sides, 1, lambda _: None)  # warm up: lazy imports, page cache
        self.processor.clear()
        found = in_turn(sides, self.scale.turns, say)
        cpu = statistics.median(ratios(self.processor["ours"], self.processor["bare"]))
        say(f"  processor time a token, ours / bare: {cpu:.3f}")
        return ratios(found["ours"], found["bare"])

    # -- SAELens ----------------------------------------------------------------------------------

    def against_saelens(self, peer: Peer, say: Say) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Ratios of tokens a second, and of bytes on disk."""
        sizes: dict[str, list[int]] = {"ours": [], "saelens": []}
        ids = hashlib.sha256(np.concatenate(self.contexts).astype("<i4").tobytes()).hexdigest()
        point = resolve(self.one, None, self.host.skeleton())[0]
        prefix = getattr(self.host.skeleton(), "base_model_prefix", "")

        def ours() -> float:
            return self.run(self.one, lambda store: sizes["ours"].append(_bytes(Path(store.path))))

        def theirs() -> float:
            answer = peer.ask(
                do="cache",
                host=self.host.settings.model,
                data=str(self.data),
                out=str(self.folder / "saelens"),
                hook=f"{prefix}.{point.module}".removeprefix("."),
                d=self.scale.d,
                tokens=self.scale.tokens,
                context=self.scale.context,
                batch_tokens=self.scale.batch_tokens,
                buffer_tokens=self.scale.segment_rows,
                dtype="float32",
                threads=torch.get_num_threads(),
            )
            if (answer["tokens"], answer["ids"]) != (self.scale.tokens, ids):
                raise RuntimeError("SAELens cached other tokens than ours: nothing to compare")
            sizes["saelens"].append(answer["bytes"])
            return float(answer["tokens"] / answer["seconds"])

        in_turn({"ours": ours, "saelens": theirs}, 1, lambda _: None)
        found = in_turn({"ours": ours, "saelens": theirs}, self.scale.turns, say)
        in_bytes = ratios(sizes["ours"][1:], sizes["saelens"][1:])
        return ratios(found["ours"], found["saelens"]), in_bytes

    # -- memory -----------------------------------------------------------------------------------

    def against_plan(self, say: Say) -> tuple[float, ...]:
        """Peak growth of a fresh process, over the plan's figure for the same settings."""
        found = []
        for turn in range(self.scale.turns):
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                settings = self.settings(self.all, Path(folder, "store"), self.scale.segments)
                memory = plan(settings).memory
                planned = memory.replicated + memory.segment_buffers
                code = "from pipelines.bench_cache import grow; grow()"
                asked = json.dumps(asdict(settings))
                env = {**os.environ, "ACTCACHE_HOME": f"{folder}/home"}
                grown = subprocess.run(
                    [sys.executable, "-c", code], input=asked, env=env, text=True,
                    stdout=subprocess.PIPE, check=True,
                )  # fmt: skip
            found.append(int(grown.stdout) / planned)
            say(f"  {turn + 1}/{self.scale.turns}  grew {int(grown.stdout):,}  planned {planned:,}")
        return tuple(found)


def grow() -> None:
    """In a fresh process: print by how many bytes a run with the settings on stdin grew it."""
    asked = json.load(sys.stdin)
    for name, kind in (("host", HostSettings), ("data", DataSettings), ("layout", LayoutSettings)):
        asked[name] = kind(**asked[name])
    asked["pack"] = PackSettings(**asked["pack"])
    settings = CacheSettings(**asked | {"hooks": tuple(asked["hooks"])})
    host = Host(settings.host)
    resolve(settings.hooks, None, host.skeleton())  # imports the model's code
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run(settings)
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(f"{field}:")).split()[1]) * 1024


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def measures(bench: Bench, say: Say) -> list[Measure]:
    """All rows of the table."""
    fast: dict[str, Any] = {"better": "higher", "unit": "x tokens/s"}
    say(f"ours / bare, {bench.scale.hook}: tokens a second")
    one = bench.against_bare(bench.one, say)
    say(f"ours / bare, {len(bench.all)} hooks: tokens a second")
    every = bench.against_bare(bench.all, say)
    rows = [
        Measure(name="vs_bare_forward_1_hook", goal=0.97, ratios=one, **fast),
        Measure(name="vs_bare_forward_all_hooks", goal=0.90, ratios=every, **fast),
    ]
    small: dict[str, Any] = {"goal": 1.0, "better": "lower"}
    speed: dict[str, Any] = {"skipped": why_absent("sae-lens")}
    size = speed
    if speed["skipped"] is None:
        say(f"ours / SAELens, {bench.scale.hook}: tokens a second")
        with Peer(Path(__file__).with_name("peer_saelens.py")) as peer:
            faster, smaller = bench.against_saelens(peer, say)
        speed, size = {"ratios": faster}, {"ratios": smaller}
    rows.append(Measure(name="vs_saelens", goal=2.0, **fast, **speed))
    rows.append(Measure(name="bytes_vs_saelens", unit="x bytes on disk", **small, **size))
    memory: dict[str, Any] = {"skipped": "this system has no /proc to read peak memory from"}
    if Path("/proc/self/clear_refs").exists():
        say("peak memory / plan, all hooks: bytes")
        memory = {"ratios": bench.against_plan(say)}
    rows.append(Measure(name="peak_memory_vs_plan", unit="x bytes", **small, **memory))
    return rows


def measure(quick: bool, say: Say) -> list[Measure]:
    """Make host and data in a scratch folder, and measure there."""
    scale = QUICK if quick else Scale()
    corpus = build_corpus(demo_paths().corpus.parent, progress=False)
    columns = pq.read_table(corpus, columns=["id", "text"]).to_pydict()
    documents = list(zip(columns["id"], columns["text"], strict=True))
    folder = Path(tempfile.mkdtemp(prefix="bench_cache."))
    try:
        host, data = folder / "host", folder / "data"
        make_host(host, columns["text"], scale)
        make_data(data, documents, host, scale.tokens)
        return measures(Bench(folder, host, data, scale), say)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(command(__doc__, measure))
