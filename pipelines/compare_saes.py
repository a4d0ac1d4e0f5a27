"""FVE of every architecture that SAELens or sparsify also have, all trained on the same rows.

Rows of the demo store (or --store) are taken once, in the order of our stream, scaled to a mean
length of √d, and kept as two arrays: training and held-out documents. Each library trains each
architecture on them with its own trainer and defaults, at equal width, batch and number of rows.
The learning rate is chosen per architecture and library from the same three, by held-out FVE: 600
steps are far fewer than peers' defaults are made for. Where k sets L0, k is given, and our default
rate (of this number of steps) is tried, too; where a penalty does, its coefficient is searched
until the held-out L0 is within 10 % of k.

FVE is 1 - Σ|x - x̂|² / Σ|x - mean|² over all held-out rows, computed alike for all.

    python -m pipelines.compare_saes --store stores/demo [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import saetrain
from actcache.store import TokenTable, open_store
from pipelines.bench import Worker, machine, peer_python, why_absent
from saetrain.artefact import load_sae
from saetrain.codes import dense
from saetrain.saes.base import HookSpace
from saetrain.settings import EvalSettings, OptimSettings, TrainSettings
from saetrain.stream import Batch, Stream

F32 = NDArray[np.float32]
HOOK = "rows"
BY_K = ("topk", "batchtopk", "matryoshka")
# Where the search for the coefficient starts: (ours, SAELens).
BY_PENALTY = {"vanilla": (0.02, 1.0), "gated": (0.02, 1.0), "jumprelu": (6e-4, 0.1)}
RATES = (1e-3, 3e-3, 1e-2)
LOOKS = 6  # coefficients tried at most


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work."""

    rows: int = 600_000
    held_out: int = 30_000
    batch: int = 1024
    n_latents: int = 1024
    k: int = 32
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Score:
    """One trained SAE on the held-out rows."""

    fve: float
    l0: float
    dead: float
    lr: float | None
    number: float


class Rows:
    """A stream over an array that is shuffled already."""

    def __init__(self, x: F32, batch: int) -> None:
        self.x, self.batch, self.step = x, batch, 0
        self.n_rows, self.batches_per_epoch = len(x), len(x) // batch

    def space(self, hook: str) -> HookSpace:
        mean = self.x.mean(0, dtype=np.float64)
        return HookSpace(
            name=hook,
            d=self.x.shape[1],
            mean=torch.from_numpy(mean.astype(np.float32)),
            mean_norm=float(np.linalg.norm(self.x, axis=1).mean()),
            variance=float(np.square(self.x - mean).sum(1).mean()),
        )

    def _batch(self, first: int, end: int, step: int) -> Batch:
        n = end - first
        zeros = np.zeros(n, np.uint32)
        row = np.arange(first, end, dtype=np.uint32)
        tokens = TokenTable(zeros, row.astype(np.uint64), row, zeros, np.zeros(n, np.uint8))
        acts = {HOOK: torch.from_numpy(self.x[first:end])}
        return Batch(acts, tokens, np.zeros(n, np.int32), 0, step)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            first = self.step % self.batches_per_epoch * self.batch
            self.step += 1
            yield self._batch(first, first + self.batch, self.step - 1)

    def one_pass(self) -> Iterator[Batch]:
        for i, first in enumerate(range(0, len(self.x), self.batch)):
            yield self._batch(first, min(first + self.batch, len(self.x)), i)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])


class Comparison:
    """All trainers on one pair of arrays."""

    def __init__(self, train: F32, held_out: F32, scale: Scale, folder: Path) -> None:
        self.train, self.held_out, self.scale, self.folder = train, held_out, scale, folder
        np.save(folder / "train.npy", train)
        np.save(folder / "held_out.npy", held_out)
        # The same nested widths for both: Fibonacci-like shares are nobody's default.
        self.widths = [scale.n_latents // 8, scale.n_latents // 4, scale.n_latents]

    def ours(self, arch: str, number: float, lr: float | None) -> Score:
        """One of our presets; lr None is its default."""
        sae: dict[str, Any] = {"name": arch, "n_latents": self.scale.n_latents}
        sae["dead_after_tokens"] = self.scale.rows // 10
        if arch in BY_K:
            sae["k"] = int(number)
        elif arch == "jumprelu":
            sae["penalty"] = {"name": "l0", "coefficient": number, "warmup_fraction": 0.05}
        else:
            sae["l1_coefficient"] = number
        if arch == "matryoshka":
            steps = np.diff([0, *self.widths])
            sae["group_sizes"] = steps.tolist()
        with tempfile.TemporaryDirectory(dir=self.folder) as runs:
            result = saetrain.train(
                TrainSettings(
                    sae=sae,
                    hook=HOOK,
                    batch_tokens=self.scale.batch,
                    epochs=1,
                    optim=OptimSettings(lr=lr),
                    eval=EvalSettings(bootstrap=0, pca_tokens=0),
                    runs_dir=runs,
                    progress=False,
                    report=False,
                    device="cpu",
                ),
                stream=Rows(self.train, self.scale.batch),
                held_out=Rows(self.held_out, self.scale.batch),
            )
            return self._score(load_sae(result.run_dir / "sae"), lr, number)

    def _score(self, sae: Any, lr: float | None, number: float) -> Score:
        lost, fired = 0.0, 0.0
        alive = torch.zeros(self.scale.n_latents, dtype=torch.bool)
        with torch.no_grad():
            for first in range(0, len(self.held_out), self.scale.batch):
                x = torch.from_numpy(self.held_out[first : first + self.scale.batch])
                codes = sae.encode(x)
                lost += float((x - sae.decode(codes)).double().square().sum())
                on = dense(codes) > 0
                fired += float(on.sum())
                alive |= on.any(0)
        rows = self.held_out
        total = float(np.square(rows - rows.mean(0, dtype=np.float64)).sum())
        dead = 1 - float(alive.float().mean())
        return Score(fve=1 - lost / total, l0=fired / len(rows), dead=dead, lr=lr, number=number)

    def saelens(self, worker: Worker, arch: str, number: float, lr: float) -> Score:
        """The same architecture of SAELens."""
        found = worker.ask(
            do="saelens",
            arch=arch,
            n_latents=self.scale.n_latents,
            number=int(number) if arch in BY_K else number,
            lr=lr,
            widths=self.widths,
            **self._files(),
        )
        return Score(**found, lr=lr, number=number)

    def sparsify(self, worker: Worker, lr: float | None, alpha: float) -> Score:
        """TopK of sparsify; lr None is its default."""
        found = worker.ask(
            do="sparsify",
            n_latents=self.scale.n_latents,
            k=self.scale.k,
            lr=lr,
            alpha=alpha,
            **self._files(),
        )
        return Score(**found, lr=lr, number=self.scale.k)

    def _files(self) -> dict[str, Any]:
        return {
            "train": str(self.folder / "train.npy"),
            "held_out": str(self.folder / "held_out.npy"),
            "batch": self.scale.batch,
            "threads": self.scale.threads,
        }

    # -- the best of each -------------------------------------------------------------------------

    def best(
        self,
        arch: str,
        run: Callable[[float, Any], Score],
        start: float,
        rates: Sequence[float | None] = RATES,
    ) -> Score:
        """The largest FVE over learning rates, at L0 = k; `rates` where k is given."""
        if arch in BY_K:
            return max((run(self.scale.k, lr) for lr in rates), key=lambda s: s.fve)
        tried = [self._at_k(partial(_swapped, run, lr), start) for lr in RATES[1:]]
        return max(tried, key=lambda s: (self._near(s), s.fve))

    def _near(self, score: Score) -> bool:
        return abs(score.l0 / self.scale.k - 1) <= 0.1

    def _at_k(self, run: Callable[[float], Score], start: float) -> Score:
        """Search the coefficient on a logarithmic scale; the nearest L0 that was found."""
        found: list[Score] = []
        c = start
        for _ in range(LOOKS):
            found.append(run(c))
            if self._near(found[-1]):
                break
            c = self._next(found)
        return min(found, key=lambda s: abs(math.log(max(s.l0, 1e-3) / self.scale.k)))

    def _next(self, found: Sequence[Score]) -> float:
        """Between the tightest bracket if there is one, else four times farther."""
        k = self.scale.k
        dense_ = [s for s in found if s.l0 > k]
        sparse = [s for s in found if s.l0 <= k]
        if not sparse:
            return 4 * max(s.number for s in dense_)
        if not dense_:
            return min(s.number for s in sparse) / 4
        low = max(dense_, key=lambda s: s.number)
        high = min(sparse, key=lambda s: s.number)
        share = math.log(low.l0 / k) / math.log(low.l0 / max(high.l0, 1e-3))
        return float(low.number * (high.number / low.number) ** min(0.8, max(0.2, share)))


def _swapped(run: Callable[[float, float], Score], lr: float, number: float) -> Score:
    return run(number, lr)


def rows_of(store: str, hook: str, scale: Scale) -> tuple[F32, F32]:
    """Training rows in the order of the stream, and held-out rows; mean length √d."""
    snapshot = open_store(store).snapshot()
    train = Stream(snapshot, [hook], batch_tokens=scale.batch)
    held = Stream(snapshot, [hook], batch_tokens=scale.batch, split="held_out")
    (name,) = train.hooks
    n = min(scale.rows // scale.batch, train.batches_per_epoch)
    x = np.concatenate([b.acts[name].numpy() for b in islice(train, n)])
    y = np.concatenate([b.acts[name].numpy() for b in held.one_pass()])[: scale.held_out]
    factor = np.float32(x.shape[1] ** 0.5 / np.linalg.norm(x, axis=1).mean())
    return x * factor, y * factor


def compare(it: Comparison, say: Callable[[str], None]) -> dict[str, dict[str, Score]]:
    """Library -> architecture -> its best."""
    found: dict[str, dict[str, Score]] = {"ours": {}}

    def keep(who: str, arch: str, score: Score) -> None:
        found.setdefault(who, {})[arch] = score
        say(f"{who:9} {arch:11} FVE {score.fve:.4f}  L0 {score.l0:.1f}  lr {score.lr}")

    starts = dict.fromkeys(BY_K, (0.0, 0.0)) | BY_PENALTY
    for arch, (start, _) in starts.items():
        best = it.best(arch, partial(it.ours, arch), start, (None, *RATES))
        keep("ours", arch, best)
    absent = why_absent("sae-lens") or why_absent("eai-sparsify")
    if absent:
        say(f"SAELens and sparsify left out: {absent}")
        return found
    with Worker(peer_python(), Path(__file__).with_name("peer_saes.py")) as peer:
        for arch, (_, start) in starts.items():
            keep("SAELens", arch, it.best(arch, partial(it.saelens, peer, arch), start))
        tried = [it.sparsify(peer, lr, a) for lr in (None, *RATES) for a in (0.0, 1 / 32)]
        keep("sparsify", "topk", max(tried, key=lambda s: s.fve))
    return found


def table(found: Mapping[str, Mapping[str, Score]]) -> str:
    """Markdown: a row for each architecture."""
    who = list(found)
    lines = [f"| architecture | {' | '.join(who)} |", f"|---|{'---|' * len(who)}"]
    for arch in found["ours"]:
        cells = []
        for name in who:
            s = found[name].get(arch)
            cells.append("" if s is None else f"{s.fve:.4f} (L0 {s.l0:.1f}, {s.dead:.1%} dead)")
        lines.append(f"| {arch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--hook", default="resid.2")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    asked = parser.parse_args(argv)
    scale = (
        Scale(rows=8192, held_out=2000, batch=256, n_latents=64, k=4) if asked.quick else Scale()
    )
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    say(machine())
    torch.set_num_threads(scale.threads)
    train, held_out = rows_of(asked.store, asked.hook, scale)
    say(f"{len(train):,} rows of width {train.shape[1]}, {len(held_out):,} held out")
    with tempfile.TemporaryDirectory(prefix="compare.") as folder:
        found = compare(Comparison(train, held_out, scale, Path(folder)), say)
    print(table(found))
    if asked.json is not None:
        rows = {w: {a: vars(s) for a, s in some.items()} for w, some in found.items()}
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
