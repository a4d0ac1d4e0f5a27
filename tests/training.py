"""Small training runs for tests: a store, settings, what two equal runs share, Ctrl-C at a step."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from fakes import planted
from safetensors.torch import load_file
from stores import make_store

from saetrain import train
from saetrain.interrupt import Interrupted
from saetrain.log import METRICS, TIMING_KEYS, read_metrics
from saetrain.settings import TrainSettings
from saetrain.trainer import Trainer

D = 16


def planted_store(path: Path, hooks: tuple[str, ...] = ("resid.2",), segments=(1024, 1024, 512)):
    """A store of planted features, the same rows each time."""

    def acts(hook, rng, tokens, d):
        return planted(len(tokens), d, seed=int(rng.integers(1 << 30)))

    return make_store(path, hooks=dict.fromkeys(hooks, D), segments=segments, acts=acts)


def settings(store: Path | None, runs_dir: Path, **changes) -> TrainSettings:
    values = {
        "store": None if store is None else str(store),
        "runs_dir": str(runs_dir),
        "sae": {"name": "topk", "n_latents": 48, "k": 4, "dead_after_tokens": 300},
        "batch_tokens": 64,
        "tokens": 64 * 30,
        "optim": {"lr": 3e-3},
        "held_out_fraction": 0.2,
        "log_every": 4,
        "checkpoint": {"every_steps": 7, "keep": 2},
        "progress": False,
        "report": False,
    }
    return TrainSettings.from_mapping(values | changes)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "sae" / "sae.safetensors")


def rows(run_dir: Path) -> list[dict]:
    """Metric rows without what is allowed to differ between two equal runs."""
    found = read_metrics(run_dir / METRICS)
    return [{k: v for k, v in row.items() if k not in TIMING_KEYS} for row in found]


def same(a: Path, b: Path) -> None:
    assert rows(a) == rows(b)
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    assert all(torch.equal(wa[n], wb[n]) for n in wa)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the middle of step number `step`."""
    original = Trainer._train_step

    def train_step(self, batch):
        if self.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", train_step)


def interrupted(cfg: TrainSettings, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted, match=f"stopped at step {step} of .*same command"):
            train(cfg)
