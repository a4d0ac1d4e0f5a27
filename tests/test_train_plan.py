"""How long a step is said to take by `saetrain plan`: what steps after the first ones take."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from training import planted_store, settings

from saetrain import plan
from saetrain.sweep import Opener
from saetrain.trainer import Trainer


@pytest.fixture
def probed(tmp_path: Path, monkeypatch):
    """`lengths` of steps in turn, the last one again and again -> what `probe` says, steps done."""
    planted_store(tmp_path / "store", segments=(1024,))

    def probe(lengths, **changes) -> tuple[float, list[int]]:
        job = Opener().open(settings(tmp_path / "store", tmp_path / "runs", **changes))
        now, done = [0.0], []
        durations = itertools.chain(lengths, itertools.repeat(lengths[-1]))

        def step(self, batch):
            assert batch.acts["resid.2"].shape == (64, 16)
            assert self.step < self.n_steps
            done.append(self.step)
            self.step += 1
            now[0] += next(durations)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_train_step", step)
            found = plan.probe(job.settings, job.source, torch.device("cpu"), clock=lambda: now[0])
        return found, done

    return probe


def test_steps_that_warm_up_do_not_count(probed) -> None:  # F116
    slow_start = [3.0] * plan.WARM_UP
    assert probed([*slow_start, 1.0, 2.0, 4.0])[0] == 2.0
    # The median: a step that something else delayed does not count either.
    assert probed([*slow_start, 0.25, 7.0, 0.25])[0] == 0.25


def test_long_steps_are_few_and_short_ones_many(probed) -> None:
    assert len(probed([3.0])[1]) == plan.WARM_UP + 3
    assert len(probed([60.0])[1]) == 2  # nobody waits minutes for a plan
    assert probed([90.0, 60.0])[0] == 60.0
    assert len(probed([0.25])[1]) == plan.WARM_UP + 8  # two seconds of them
    assert len(probed([1e-4])[1]) == plan.WARM_UP + plan.MOST


def test_a_run_shorter_than_the_probe(probed) -> None:
    found, steps = probed([1e-4], tokens=64 * 4)
    assert found == pytest.approx(1e-4)
    assert max(steps) == 3


def test_real_steps_are_timed(tmp_path: Path) -> None:
    planted_store(tmp_path / "store", segments=(1024,))
    job = Opener().open(settings(tmp_path / "store", tmp_path / "runs"))
    before = set(tmp_path.rglob("*"))
    assert 0 < plan.probe(job.settings, job.source, job.device, seconds=0.0) < 10
    assert set(tmp_path.rglob("*")) == before


def test_steps_of_whole_contexts_are_timed(tmp_path: Path) -> None:
    planted_store(tmp_path / "store", hooks=("resid.1", "attn.1"), segments=(1024,))
    sae = {"name": "lorsa", "n_latents": 32, "heads_per_qk": 8, "d_qk": 4, "k": 4}
    sae |= {"hook_out": "attn.1"}
    cfg = settings(tmp_path / "store", tmp_path / "runs", hook="resid.1", sae=sae)
    job = Opener().open(cfg)
    assert 0 < plan.probe(job.settings, job.source, job.device, seconds=0.0) < 10


def test_memory_of_an_average_and_of_pieces(tmp_path: Path) -> None:  # F51
    planted_store(tmp_path / "store", segments=(1024,))

    def memory(**changes) -> plan.Memory:
        job = Opener().open(settings(tmp_path / "store", tmp_path / "runs", **changes))
        return plan.memory(job.settings, job.source)

    whole, averaged = memory(), memory(optim={"ema_decay": 0.9})
    parameters = whole.optimizer // 8
    assert parameters == 2 * 48 * 16 + 48 + 16
    assert averaged.optimizer == 12 * parameters
    cut = memory(grad_acc_steps=2, micro_acc_steps=4)
    assert whole.activations == 8 * cut.activations
    assert cut.weights == whole.weights
