"""Encoders in one product against each by itself; see test_sweep.py for whole runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from saes_rows import END, HOOK, SPACES, X
from torch import Tensor

from saetrain.dictionary import Dictionary
from saetrain.kernels import encode
from saetrain.saes import make_sae
from saetrain.stack import Stack


def group() -> list[Dictionary]:
    """Different k, biases and dead latents: none, fewer than AuxK takes, more."""
    made = []
    for i, k in enumerate((2, 4, 3)):
        torch.manual_seed(i)
        values = {"name": "topk", "n_latents": 96, "k": k, "aux_k": 6, "dead_after_tokens": 9}
        sae = cast(Dictionary, make_sae(values, SPACES).double())
        sae.b_enc.data += 0.1 * torch.randn(96)
        sae.b_dec.data += 0.1 * torch.randn(16)
        sae.tokens_since_fired[: (0, 4, 50)[i]] = 99
        made.append(sae)
    return made


def step(sae: Dictionary, x: dict[str, Tensor]) -> dict[str, Tensor]:
    losses = sae.losses(x, END)
    losses.total.backward()
    return losses.terms | {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}


def test_stacked_steps_equal_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:  # F116
    monkeypatch.setattr(encode, "LEAST", 16)
    monkeypatch.setattr(encode, "CACHED", 16 * 3 * 96)  # several pieces
    together, alone, x = group(), group(), {HOOK: X[:60].double()}
    stack = Stack(together)
    assert len(stack) == 3
    stack.encode(together, cast(Any, SimpleNamespace(inputs=x)))
    assert all(sae.found is not None for sae in together)
    for mine, theirs in zip(together, alone, strict=True):
        assert torch.equal(mine.W_enc, theirs.W_enc)
        assert mine.W_enc.T.is_contiguous()  # as the fastest product wants it
        got, want = step(mine, x), step(theirs, x)
        assert mine.found is None
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")
    assert step(together[2], x)["auxk"] > 0


def test_those_who_leave_go_on_by_themselves() -> None:
    saes, x = group(), {HOOK: X[:60].double()}
    stack = Stack(saes)
    before = [sae.W_enc.detach().clone() for sae in saes]
    stack.encode(saes[:2], cast(Any, SimpleNamespace(inputs=x)))
    assert [sae.found is None for sae in saes] == [False, False, True]
    saes[0].W_enc.data += 1  # in place: the stack sees it
    stack.encode(saes[:2], cast(Any, SimpleNamespace(inputs=x)))
    assert stack.shelves[0].W_JFD[0].T.equal(before[0] + 1)
    assert saes[2].W_enc.equal(before[2])
    stack.encode(saes[:1], cast(Any, SimpleNamespace(inputs=x)))
    assert len(stack) == 0
