"""Benchmark of `actcache run`: against the bare forward pass, SAELens' cache runner, the plan.

A host of about 20 M parameters (GPT-NeoX, random weights: speed does not depend on them) reads the
documents of the demo corpus. Every side does the same tokens with the same batch size and threads:

  ours      run(): read parquet, tokenize, pack, forward, checksum, fsync, commit, snapshot
  bare      the host's forward pass over the same packed batches, cut above the same block
  SAELens   CacheActivationsRunner over the same token ids, packed beforehand: no text to read
            or tokenize, no fsync; with its default model class (HookedTransformer), and with the
            same transformers model as ours; several hooks take it as many runs

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import actcache.run
from actcache.data import PackSettings
from actcache.hooks import HookPoint, resolve
from actcache.host import Host, HostSettings
from actcache.plan import plan
from actcache.run import CacheSettings, LayoutSettings, run
from actcache.sources import DataSettings
from actcache.store import Store
from pipelines.bench import (
    NO_PEAK,
    ROOT,
    Measure,
    Worker,
    can_measure_peak,
    clock,
    command,
    peak_growth,
    peer_python,
    private_stdout,
    rate,
    ratios,
    serve,
    turns,
    why_absent,
)
from pipelines.bench_data import corpus, make_data, make_host

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work. One side of a turn takes about 20 seconds on two cores at full size."""

    d: int = 512
    layers: int = 6
    heads: int = 8
    vocab: int = 4096
    segments: int = 9
    segment_rows: int = 8192
    context: int = 128
    batch_tokens: int = 4096
    turns: int = 5
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


class LoadedHost(Host):
    """A host whose weights are read and digested before the clock starts."""

    def __init__(self, settings: HostSettings) -> None:
        super().__init__(settings)
        self._models: dict[tuple[str, ...], nn.Module] = {}
        assert self.identity

    def load(self, points: list[HookPoint]) -> nn.Module:
        names = tuple(p.name for p in points)
        if names not in self._models:
            self._models[names] = super().load(points)
        return self._models[names]


class Bench:
    """One host, one folder of text, and what caches them; one object in each process."""

    def __init__(self, folder: Path, host: Path, data: Path, scale: Scale) -> None:
        """`folder` is for stores and caches; they are removed after each turn."""
        self.folder, self.data, self.scale = folder, data, scale
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

    # -- sides: called in the workers -------------------------------------------------------------

    def run(
        self, hooks: Sequence[str], begun: str | None = None, segments: int | None = None
    ) -> dict[str, Any]:
        """`actcache run` into a new store, or continuing a copy of `begun`, which has a segment."""
        segments = segments or self.scale.segments
        tokens = (segments - (begun is not None)) * self.scale.segment_rows
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            store = Path(folder, "store")
            if begun is not None:
                shutil.copytree(begun, store)
            with self._loaded(folder), clock() as times:
                done = run(self.settings(hooks, store, segments))
            if done.computed != tokens:
                raise RuntimeError(f"expected {tokens:,} tokens, got {done.computed:,}")
            size = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
            ids = token_ids(done.store).astype("<i4").tobytes()
        return times | {"tokens": tokens, "bytes": size, "ids": hashlib.sha256(ids).hexdigest()}

    def bare(self, hooks: Sequence[str], ids: str) -> dict[str, Any]:
        """A forward loop over the contexts in the file `ids`: no hooks, no mask, nothing kept.

        The model is cut as `run` cuts it for the hooks; batches end where segments do.
        """
        batches = self.batches(np.load(ids))
        model = self.host.load(resolve(tuple(hooks), None, self.host.skeleton()))
        with torch.inference_mode(), clock() as times:
            for ids_BT in batches:
                model(input_ids=ids_BT, use_cache=False)
        return times | {"tokens": sum(b.numel() for b in batches)}

    def batches(self, ids: NDArray[np.uint32]) -> list[Tensor]:
        """Token ids (B, T) of each forward pass; all contexts are full: the data does not end."""
        of_segment = self.scale.segment_rows // self.scale.context
        of_batch = self.scale.batch_tokens // self.scale.context
        contexts = torch.from_numpy(ids.astype(np.int64)).reshape(-1, self.scale.context)
        segments = torch.split(contexts, of_segment)
        return [batch for segment in segments for batch in torch.split(segment, of_batch)]

    @contextmanager
    def _loaded(self, home: str) -> Iterator[None]:
        """`run` finds the host loaded, and an empty catalog."""
        with (
            patch.dict(os.environ, ACTCACHE_HOME=f"{home}/home"),
            patch.object(actcache.run, "Host", lambda _: self.host),
        ):
            yield

    # -- comparisons: called in the main process --------------------------------------------------

    def worker(self) -> Worker:
        """A process with a Bench like this one."""
        code = "from pipelines.bench_cache import serve_sides; serve_sides()"
        paths = (self.folder, self.host.settings.model, self.data)
        about = json.dumps([*map(str, paths), asdict(self.scale)])
        return Worker(sys.executable, "-c", code, about)

    def begin(self, hooks: Sequence[str]) -> str:
        """A store with one segment of the hooks, and its canary."""
        store = Path(tempfile.mkdtemp(dir=self.folder), "store")
        with self._loaded(str(store.parent)):
            run(self.settings(hooks, store, 1))
        return str(store)

    @cached_property
    def ids(self) -> NDArray[np.uint32]:
        """Token ids of all segments, in the order in which `run` feeds them."""
        store = Path(tempfile.mkdtemp(dir=self.folder), "store")
        with self._loaded(str(store.parent)):
            return token_ids(run(self.settings(self.one, store, self.scale.segments)).store)

    def against_bare(
        self, ours: Worker, bare: Worker, hooks: Sequence[str], say: Say
    ) -> tuple[float, ...]:
        """Ratios of tokens a second."""
        file = self.folder / "ids.npy"
        np.save(file, self.ids[self.scale.segment_rows :])
        sides = {
            "ours": (ours, {"do": "run", "hooks": hooks, "begun": self.begin(hooks)}),
            "bare": (bare, {"do": "bare", "hooks": hooks, "ids": str(file)}),
        }
        found = turns(sides, self.scale.turns, say)
        cpu = statistics.median(ratios(found, lambda a: a["processor"]))
        say(f"  processor time, ours / bare: median {cpu:.3f}")
        return ratios(found, rate)

    def against_saelens(
        self, ours: Worker, hooks: Sequence[str], model_class: str, say: Say
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Ratios of tokens a second, and of bytes on disk.

        `model_class` is SAELens' word for what runs the host: its default is HookedTransformer.
        Its runner caches one hook, so several take as many runs, of a third of the tokens here.
        """
        say(f"ours / SAELens ({model_class}), {', '.join(hooks)}: tokens a second")
        segments = self.scale.segments if len(hooks) == 1 else -(-self.scale.segments // 3)
        with self._saelens() as peer:
            question = self._question(hooks, model_class, segments)
            asked: dict[str, Any] = {"do": "run", "hooks": hooks, "segments": segments}
            sides = {"ours": (ours, asked), "saelens": (peer, question)}
            found = turns(sides, self.scale.turns, say)
        if len({(a["tokens"], a["ids"]) for answers in found.values() for a in answers}) != 1:
            raise RuntimeError("SAELens cached other tokens than ours: nothing to compare")
        return ratios(found, rate), ratios(found, lambda a: a["bytes"])

    def bare_against_saelens(self, bare: Worker, say: Say) -> tuple[float, ...]:
        """What an `actcache run` that costs nothing would reach."""
        say(f"bare forward pass / SAELens, {self.scale.hook}: tokens a second")
        with self._saelens() as peer:
            question = self._question(self.one, "HookedTransformer", self.scale.segments)
            asked: dict[str, Any] = {"do": "bare", "hooks": self.one, "ids": question["ids"]}
            sides = {"bare": (bare, asked), "saelens": (peer, question)}
            return ratios(turns(sides, self.scale.turns, say), rate)

    @staticmethod
    def _saelens() -> Worker:
        return Worker(peer_python(), Path(__file__).with_name("peer_saelens.py"))

    def _question(self, hooks: Sequence[str], model_class: str, segments: int) -> dict[str, Any]:
        file = self.folder / "all_ids.npy"
        np.save(file, self.ids)
        return {
            "do": "cache",
            "host": self.host.settings.model,
            "model_class": model_class,
            "ids": str(file),
            "out": str(self.folder / "saelens"),
            "hooks": [self._hook_of(hook, model_class) for hook in hooks],
            "d": self.scale.d,
            "tokens": segments * self.scale.segment_rows,
            "context": self.scale.context,
            "batch_tokens": self.scale.batch_tokens,
            "buffer_tokens": self.scale.segment_rows,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
        }

    def _hook_of(self, hook: str, model_class: str) -> str:
        """A hook as SAELens names it for that class."""
        if model_class == "HookedTransformer":
            return f"blocks.{hook.removeprefix('resid.')}.hook_resid_post"
        skeleton = self.host.skeleton()
        module = resolve((hook,), None, skeleton)[0].module
        return f"{getattr(skeleton, 'base_model_prefix', '')}.{module}".removeprefix(".")

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
                paths = {"ACTCACHE_HOME": f"{folder}/home", "PYTHONPATH": str(ROOT)}
                grown = subprocess.run(
                    [sys.executable, "-c", code], input=asked, env=os.environ | paths, text=True,
                    stdout=subprocess.PIPE, check=True,
                )  # fmt: skip
            found.append(int(grown.stdout) / planned)
            say(f"  {turn + 1}/{self.scale.turns}  grew {int(grown.stdout):,}  planned {planned:,}")
        return tuple(found)


def serve_sides() -> None:
    """In a worker: answer `run` and `bare`."""
    answers = private_stdout()
    folder, host, data, scale = json.loads(sys.argv[1])
    bench = Bench(Path(folder), Path(host), Path(data), Scale(**scale))
    serve(answers, run=bench.run, bare=bench.bare)


def token_ids(store: Store) -> NDArray[np.uint32]:
    """Token ids of all rows, in the order in which the host saw them."""
    tables = [segment.tokens() for segment in store.snapshot().segments]
    return np.concatenate([t.token_id[np.lexsort((t.pos, t.ctx))] for t in tables])


def grow() -> None:
    """In a fresh process: print by how many bytes a run with the settings on stdin grew it."""
    asked = json.load(sys.stdin)
    for name, kind in (("host", HostSettings), ("data", DataSettings), ("layout", LayoutSettings)):
        asked[name] = kind(**asked[name])
    asked["pack"] = PackSettings(**asked["pack"])
    settings = CacheSettings(**asked | {"hooks": tuple(asked["hooks"])})
    host = Host(settings.host)
    resolve(settings.hooks, None, host.skeleton())  # imports the model's code
    with peak_growth() as grown:
        run(settings)
    print(grown["bytes"])


def measures(bench: Bench, say: Say) -> list[Measure]:
    """All rows of the table."""
    fast: dict[str, Any] = {"better": "higher", "unit": "x tokens/s"}
    small: dict[str, Any] = {"goal": 1.0, "better": "lower"}
    absent = why_absent("sae-lens")
    skip: dict[str, Any] = {"skipped": absent}
    speed = size = on_hf = several = bound = skip
    with bench.worker() as ours:
        with bench.worker() as bare:
            say(f"ours / bare, {bench.scale.hook}: tokens a second")
            one = bench.against_bare(ours, bare, bench.one, say)
            say(f"ours / bare, {len(bench.all)} hooks: tokens a second")
            every = bench.against_bare(ours, bare, bench.all, say)
            if absent is None:
                bound = {"ratios": bench.bare_against_saelens(bare, say)}
        if absent is None:
            default, on_transformers = "HookedTransformer", "AutoModelForCausalLM"
            faster, smaller = bench.against_saelens(ours, bench.one, default, say)
            speed, size = {"ratios": faster}, {"ratios": smaller}
            on_hf = {"ratios": bench.against_saelens(ours, bench.one, on_transformers, say)[0]}
            several = {"ratios": bench.against_saelens(ours, bench.all, default, say)[0]}
    memory: dict[str, Any] = {"skipped": NO_PEAK}
    if can_measure_peak():
        say("peak memory / plan, all hooks: bytes")
        memory = {"ratios": bench.against_plan(say)}
    return [
        Measure(name="vs_bare_forward_1_hook", goal=0.97, ratios=one, **fast),
        Measure(name="vs_bare_forward_all_hooks", goal=0.90, ratios=every, **fast),
        Measure(name="vs_saelens", goal=2.0, **fast, **speed),
        Measure(name="bare_forward_vs_saelens", goal=2.0, **fast, **bound),
        Measure(name="vs_saelens_on_hf_model", goal=2.0, **fast, **on_hf),
        Measure(name="vs_saelens_all_hooks", goal=2.0, **fast, **several),
        Measure(name="bytes_vs_saelens", unit="x bytes on disk", **small, **size),
        Measure(name="peak_memory_vs_plan", unit="x bytes", **small, **memory),
    ]


def measure(quick: bool, say: Say) -> list[Measure]:
    """Make host and data in a scratch folder, and measure there."""
    scale, documents = QUICK if quick else Scale(), corpus()
    with tempfile.TemporaryDirectory(prefix="bench_cache.") as scratch:
        folder = Path(scratch)
        host, data = folder / "host", folder / "data"
        make_host(host, [text for _, text in documents], scale)
        make_data(data, documents, host, scale.tokens)
        return measures(Bench(folder, host, data, scale), say)


if __name__ == "__main__":
    sys.exit(command(__doc__, measure))
