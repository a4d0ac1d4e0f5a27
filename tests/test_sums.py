"""Sums against math.fsum, and the same bits for any number of threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from saetrain.optim import Optimizer
from saetrain.optim_settings import OptimSettings
from saetrain.sums import length, total

SHAPES = [(0,), (1,), (4096,), (4097,), (70_000,), (300, 700), (40, 30, 50)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_against_exact_sums(shape: tuple[int, ...], turned: bool) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    x = x.T if turned and x.dim() == 2 else x
    values = x.reshape(-1).tolist()
    assert float(total(x)) == pytest.approx(math.fsum(values), abs=1e-9)
    assert float(length(x)) == pytest.approx(math.sqrt(math.fsum(v * v for v in values)))


@pytest.mark.parametrize("shape", [(70_000,), (300, 7000), (7000, 300)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_same_bits_for_any_number_of_threads(shape: tuple[int, ...], turned: bool) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    x = x.T if turned and x.dim() == 2 else x
    found, plain = set(), set()
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.add((float(total(x)), float(length(x))))
        plain.add(float(x.sum()))
    assert len(found) == 1
    assert len(plain) > 1  # or there would be nothing to do


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(0.01, 100))
def test_clipping_is_torchs(widths: list[int], limit: float) -> None:
    torch.manual_seed(0)
    modules = [nn.ParameterList(torch.ones(w, 3) for w in widths) for _ in range(2)]
    for mine, theirs in zip(*(m.parameters() for m in modules), strict=True):
        mine.grad = torch.randn_like(mine)
        theirs.grad = mine.grad.clone()
    norm = Optimizer(modules[0], OptimSettings(lr=0.1, clip_norm=limit), 8).clip()
    assert float(norm) == pytest.approx(
        float(nn.utils.clip_grad_norm_(modules[1].parameters(), limit)), rel=1e-5
    )
    for mine, theirs in zip(*(m.parameters() for m in modules), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
