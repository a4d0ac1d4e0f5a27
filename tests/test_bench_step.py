"""The sides of the benchmark of steps do the work that it says they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.bench_step import HOOK, QUICK, Bench, Floor, Ours, Side
from saetrain.codes import SparseCodes, l0
from saetrain.kernels import above
from saetrain.progress import Progress


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, QUICK, print)


def test_our_side_trains_and_its_fve_rises(bench: Bench) -> None:
    side, held_out = Side(), bench.rows(32, 512, seed=1)
    setup = bench.own((32, 16), kind="ours", lr=3e-3, bf16=False, steps=30)[1]
    side.make(**{k: v for k, v in setup.items() if k != "do"})
    assert isinstance(side.tool, Ours)
    before, start = side.fve(held_out)["fve"], side.tool.sae.W_dec.detach().clone()
    answer = side.train(30)
    assert answer["tokens"] == 30 * QUICK.batch
    assert side.fve(held_out)["fve"] > before
    assert not torch.equal(side.tool.sae.W_dec, start)
    torch.testing.assert_close(side.tool.sae.W_dec.norm(dim=1), torch.ones(512))
    assert len(side.tool.window) == 30


def test_the_floors_work_on_the_same_shapes(bench: Bench) -> None:
    for best in (False, True):
        side = Side()
        setup = bench.own((32, 16), kind="floor", best=best)[1]
        side.make(**{k: v for k, v in setup.items() if k != "do"})
        assert isinstance(side.tool, Floor)
        assert side.tool.W_DF.shape == (32, 512)
        assert side.train(2)["tokens"] == 2 * QUICK.batch


@pytest.mark.parametrize("dense", [False, True])
def test_a_jumprelu_side_fires_k_times_in_the_form_it_was_asked_for(
    dense: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(above, "DENSE", 1.0)  # at these sizes all would be dense
    side = Side()
    setup = bench.ours((32, 16), preset="jumprelu", dense=dense)[1]
    side.make(**{k: v for k, v in setup.items() if k != "do"})
    assert isinstance(side.tool, Ours)
    losses = side.tool.sae.losses({HOOK: side.batches[0]}, Progress(step=0, n_steps=1, tokens=0))
    assert isinstance(losses.codes, Tensor if dense else SparseCodes)
    assert l0(losses.codes).float().mean() == pytest.approx(QUICK.k, rel=0.2)
    assert side.train(2)["tokens"] == 2 * QUICK.batch


def test_rows_are_planted_once_and_differ_by_seed(bench: Bench) -> None:
    assert bench.rows(32, 64) == bench.rows(32, 64)
    assert Path(bench.rows(32, 64)).read_bytes() != Path(bench.rows(32, 64, seed=1)).read_bytes()
