"""Benchmark of one training step: against the cost of finding the top k, and against other tools.

A step is loss, backward, projection, clipping, Adam, renormalisation and bookkeeping, as the
trainer runs it; TopK in float32, k = 32, batches of 2,048. Sides, each in its own process, run by
turns, one step a turn:

  vs_floor_*       over x @ W and torch.topk, which nobody who encodes with torch gets below (less)
  vs_best_floor_*  over the fastest product known here and torch.topk: what is left to gain (less)
  vs_TOOL          tokens a second over those of sparsify, SAELens, dictionary_learning (more)
  fve_vs_TOOL      held-out FVE after equal rows over theirs, each with its own defaults (more)
  fve_same_lr_*    the same with our learning rate given to them
  bf16_speedup_*   tokens a second under bf16 over float32; bf16_fve: FVE over that of float32
  jumprelu_sparse_vs_dense_*  tokens a second of a JumpReLU at L0 = k, as it is over dense codes

    python -m pipelines.bench_step [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.bench import (
    ROOT,
    Measure,
    Worker,
    clock,
    command,
    peer_python,
    private_stdout,
    rate,
    ratios,
    serve,
    turns,
    why_absent,
)
from saetrain.activations import JumpReLU
from saetrain.kernels import above
from saetrain.kernels.gemm import product
from saetrain.optim import Optimizer, base_lr, schedule_factor
from saetrain.optim_settings import OptimSettings, ScheduleSettings
from saetrain.saes import make_sae
from saetrain.saes.base import HookSpace, Progress
from saetrain.saes.sae import Autoencoder
from saetrain.window import Window, step_numbers

Say = Callable[[str], None]
PEERS = {
    "sparsify": ("eai-sparsify", 2.0),
    "saelens": ("sae-lens", 5.0),
    "dictionary_learning": ("dictionary-learning", 5.0),
}
HOOK = "resid.0"
LONG = 1 << 20  # steps that a schedule is laid out for where only the first ones are timed


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work."""

    sizes: tuple[tuple[int, int], ...] = ((384, 16), (384, 64), (768, 16), (768, 64))  # d, factor
    peer_sizes: tuple[tuple[int, int], ...] = ((384, 16),)
    batch: int = 2048
    k: int = 32
    turns: int = 20
    threads: int = 1
    fve_size: tuple[int, int] = (128, 16)
    fve_steps: int = 200


QUICK = Scale(
    sizes=((32, 16),),
    peer_sizes=((32, 16),),
    batch=128,
    k=8,
    turns=2,
    fve_size=(32, 8),
    fve_steps=4,
)


# -- our sides, in processes of their own ----------------------------------------------------------


class Ours:
    """The steps of `saetrain.trainer`, without a store around them."""

    def __init__(
        self,
        space: HookSpace,
        n_latents: int,
        k: int,
        lr: float | None = None,
        bf16: bool = False,
        preset: str = "topk",
        steps: int = LONG,
    ) -> None:
        torch.manual_seed(0)
        self.bf16, self.k, self.steps = bf16, k, steps
        own = {"k": k} if preset == "topk" else {}
        self.sae = make_sae({"name": preset, "n_latents": n_latents, **own}, {HOOK: space})
        self.optim = Optimizer(self.sae, OptimSettings(lr=lr), n_latents, steps)
        self.window, self.done = Window(), 0

    def step(self, x: torch.Tensor) -> None:
        if self.done == 0:
            with torch.no_grad():
                self.sae.init_from_data({HOOK: x})
        progress = Progress(step=self.done, n_steps=self.steps, tokens=self.done * len(x))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            losses = self.sae.losses({HOOK: x}, progress)
        total = losses.total
        total.backward()  # type: ignore[no-untyped-call]
        self.sae.before_step()
        norm = self.optim.clip()
        self.optim.step(schedule_factor(self.done, self.steps, ScheduleSettings()))
        self.sae.after_step()
        self.sae.note_firing(losses.codes)
        self.window.add(step_numbers(losses, total, norm))
        self.done += 1

    @torch.no_grad()
    def set_thresholds(self, x: torch.Tensor) -> None:
        """Make a JumpReLU fire k times a token, on average over x."""
        assert isinstance(self.sae, Autoencoder)
        assert isinstance(self.sae.activation, JumpReLU)
        h = self.sae.pre_activations(self.sae.inputs({HOOK: x}), self.sae.weights())
        self.sae.activation.threshold.fill_(h.flatten().topk(self.k * len(x))[0][-1])

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.sae.to_inference()(x)["sae_out"]
        return out


class Floor:
    """Product and exact selection, nothing else."""

    def __init__(self, d: int, n_latents: int, k: int, best: bool) -> None:
        self.W_FD, self.k, self.best = torch.randn(n_latents, d), k, best
        self.W_DF, self.b_F = self.W_FD.T.contiguous(), torch.zeros(n_latents)

    def step(self, x: torch.Tensor) -> None:
        h = product(x, self.W_FD.T, self.b_F) if self.best else x @ self.W_DF
        h.topk(self.k, dim=-1, sorted=False)


class Side:
    """What a worker does."""

    def make(
        self,
        kind: str,
        rows: str,
        threads: int,
        batch: int,
        d: int,
        dense: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        torch.set_num_threads(threads)
        if dense:  # the twin of the sparse step
            above.DENSE = -1.0
        x = torch.from_numpy(np.load(rows))
        if kind == "ours":  # what a store would know of its rows
            more["space"] = HookSpace(
                name=HOOK,
                d=d,
                mean=x.mean(0),
                mean_norm=float(x.norm(dim=1).mean()),
                variance=float((x - x.mean(0)).square().sum(1).mean()),
            )
            self.tool: Ours | Floor = Ours(**more)
            if more.get("preset") == "jumprelu":
                self.tool.set_thresholds(x[:512])
        else:
            self.tool = Floor(d=d, **more)
        self.batches, self.done = torch.split(x, batch), 0
        return {}

    def train(self, steps: int) -> dict[str, Any]:
        tokens = 0
        with clock() as times:
            for _ in range(steps):
                x = self.batches[self.done % len(self.batches)]
                self.tool.step(x)
                self.done, tokens = self.done + 1, tokens + len(x)
        return times | {"tokens": tokens}

    @torch.no_grad()
    def fve(self, rows: str) -> dict[str, Any]:
        assert isinstance(self.tool, Ours)
        x = torch.from_numpy(np.load(rows))
        error = (x - self.tool.reconstruct(x)).double().square().sum()
        return {"fve": 1 - float(error / (x - x.mean(0)).double().square().sum())}


# -- what is compared ------------------------------------------------------------------------------


class Bench:
    """The scratch folder and the sides."""

    def __init__(self, scratch: Path, scale: Scale, say: Say) -> None:
        self.scratch, self.scale, self.say = scratch, scale, say

    def rows(self, d: int, n: int, seed: int = 0) -> str:
        """A file of n rows of norm √d: sparse sums of planted directions, and noise."""
        path = self.scratch / f"rows-{d}-{n}-{seed}.npy"
        if not path.exists():
            directions = np.random.default_rng(99).standard_normal((8 * d, d), dtype=np.float32)
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            rng = np.random.default_rng(seed)
            x = 0.1 / d**0.5 * rng.standard_normal((n, d), dtype=np.float32)
            for _ in range(24):
                size = rng.exponential(size=(n, 1)).astype(np.float32)
                x += size * directions[rng.zipf(1.3, size=n) % (8 * d)]
            x *= d**0.5 / np.linalg.norm(x, axis=1).mean()
            np.save(path, x)
        return str(path)

    def setup(self, size: tuple[int, int], rows: str, **more: Any) -> dict[str, Any]:
        d, factor = size
        shape = {"d": d, "n_latents": d * factor, "k": self.scale.k, "batch": self.scale.batch}
        return {"do": "make", "rows": rows, "threads": self.scale.threads, **shape, **more}

    def compare(self, name: str, **sides: tuple[Any, ...]) -> dict[str, Any]:
        """Turns of one step of each side, given as (command, setup)."""
        self.say(name)
        step = {"do": "train", "steps": 1}
        with ExitStack() as stack:
            workers = {side: stack.enter_context(Worker(*how)) for side, (how, _) in sides.items()}
            for side, (_, setup) in sides.items():
                workers[side].ask(**setup)
            return turns({s: (w, step) for s, w in workers.items()}, self.scale.turns, self.say)

    def own(self, size: tuple[int, int], **more: Any) -> tuple[Any, ...]:
        rows = self.rows(size[0], 8 * self.scale.batch)
        return OWN, self.setup(size, rows, **more)

    def ours(self, size: tuple[int, int], **more: Any) -> tuple[Any, ...]:
        return self.own(size, kind="ours", **more)

    def one_size(self, size: tuple[int, int], bf16: bool) -> list[Measure]:
        """Ours against both floors, and in bf16 if asked, all by turns."""
        at = f"d{size[0]}_x{size[1]}"
        sides = {
            "ours": self.ours(size),
            "floor": self.own(size, kind="floor", best=False),
            "best_floor": self.own(size, kind="floor", best=True),
        }
        if bf16:
            sides["bf16"] = self.ours(size, bf16=True)
        found = self.compare(at, **sides)
        less: dict[str, Any] = {"goal": 1.3, "better": "lower", "unit": "x time"}
        measures = [
            Measure(name=f"vs_{floor}_fp32_{at}", ratios=_rates(found, floor, "ours"), **less)
            for floor in ("floor", "best_floor")
        ]
        if bf16:
            more: dict[str, Any] = {"goal": 2.0, "better": "higher", "unit": "x tokens/s"}
            speed = _rates(found, "bf16", "ours")
            measures.append(Measure(name=f"bf16_speedup_{at}", ratios=speed, **more))
        return measures

    def peer(self, peer: str, size: tuple[int, int]) -> Measure:
        package, goal = PEERS[peer]
        name = f"vs_{peer}_d{size[0]}_x{size[1]}"
        row: dict[str, Any] = {"goal": goal, "better": "higher", "unit": "x tokens/s"}
        if absent := why_absent(package):
            return Measure(name=name, **row, skipped=absent)
        rows = self.rows(size[0], 8 * self.scale.batch)
        theirs = THEIRS, self.setup(size, rows, peer=peer)
        found = self.compare(name, ours=self.ours(size), theirs=theirs)
        return Measure(name=name, **row, ratios=_rates(found, "ours", "theirs"))

    def jumprelu(self, size: tuple[int, int]) -> Measure:
        name = f"jumprelu_sparse_vs_dense_d{size[0]}_x{size[1]}"
        sides = {
            form: self.ours(size, preset="jumprelu", dense=form == "dense")
            for form in ("sparse", "dense")
        }
        found = _rates(self.compare(name, **sides), "sparse", "dense")
        return Measure(name=name, goal=2.0, better="higher", unit="x tokens/s", ratios=found)

    # -- quality ---------------------------------------------------------------------------------

    def fve(self, side: str, lr: float | None) -> float:
        """On held-out rows, after one pass over the same rows in the same order."""
        d, factor = self.scale.fve_size
        steps, batch = self.scale.fve_steps, self.scale.batch
        rows = self.rows(d, steps * batch)
        if side in PEERS:
            how: tuple[str | Path, ...] = THEIRS
            more: dict[str, Any] = {"peer": side, "steps": steps}
        else:
            how, more = OWN, {"kind": "ours", "bf16": side == "bf16", "steps": steps}
        with Worker(*how) as worker:
            worker.ask(**self.setup((d, factor), rows, lr=lr, **more))
            worker.ask(do="train", steps=steps)
            found: float = worker.ask(do="fve", rows=self.rows(d, 4096, seed=1))["fve"]
        self.say(f"  FVE {side} lr={lr}: {found:.4f}")
        return found

    def quality(self) -> list[Measure]:
        self.say("FVE at equal tokens")
        d, factor = self.scale.fve_size
        rate_of_ours = base_lr(OptimSettings(), d * factor, self.scale.fve_steps)
        ours = self.fve("ours", None)
        found = [self._fve("bf16_fve", 0.997, self.fve("bf16", None) / ours)]
        for peer, (package, _) in PEERS.items():
            for label, lr in (("fve_vs", None), ("fve_same_lr", rate_of_ours)):
                absent = why_absent(package)
                value = None if absent else ours / self.fve(peer, lr)
                found.append(self._fve(f"{label}_{peer}", 1.0, value, absent))
        return found

    def _fve(
        self, name: str, goal: float, value: float | None, absent: str | None = None
    ) -> Measure:
        row: dict[str, Any] = {"skipped": absent} if value is None else {"ratios": (value,)}
        return Measure(name=name, goal=goal, better="higher", unit="x FVE", **row)


def _rates(found: Mapping[str, Any], first: str, second: str) -> tuple[float, ...]:
    """Tokens a second of one side over another's, turn by turn."""
    return ratios({side: found[side] for side in (first, second)}, rate)


OWN = (sys.executable, "-m", "pipelines.bench_step", "side")
THEIRS = (peer_python(), ROOT / "pipelines" / "peer_step.py")


def measure(quick: bool, say: Say) -> list[Measure]:
    """All rows of the table."""
    with tempfile.TemporaryDirectory(prefix="bench_step.") as scratch:
        scale = QUICK if quick else Scale()
        say(json.dumps(asdict(scale)))
        bench = Bench(Path(scratch), scale, say)
        ends = (scale.sizes[0], scale.sizes[-1])
        found = [m for size in scale.sizes for m in bench.one_size(size, bf16=size in ends)]
        for size in scale.peer_sizes:
            found += [bench.peer(peer, size) for peer in PEERS] + [bench.jumprelu(size)]
        return found + bench.quality()


if __name__ == "__main__":
    if sys.argv[1:] == ["side"]:
        answers, side = private_stdout(), Side()
        serve(answers, make=side.make, train=side.train, fve=side.fve)
    else:
        sys.exit(command(__doc__, measure))
