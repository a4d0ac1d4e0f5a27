"""Loss terms against closed forms and identities; AuxK where a denominator vanishes."""

from __future__ import annotations

import pytest
import torch
from saes_reference import auxk_reference, planted, reference_reconstruction, space_of

from saetrain.codes import SparseCodes, select_topk
from saetrain.losses import auxk, l1, reconstruction


def test_fvu_is_one_for_the_mean_and_does_not_depend_on_the_batch_size() -> None:
    x_BD, _ = planted(96, 8, 12, 3)
    space = space_of(x_BD)
    e_BD = x_BD - space.mean
    whole = reconstruction(e_BD, "fvu", space.variance, 8)
    torch.testing.assert_close(whole, torch.tensor(1.0))
    parts = [reconstruction(part, "fvu", space.variance, 8) for part in e_BD.split(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    assert reconstruction(torch.zeros(4, 8), "fvu", space.variance, 8) == 0


def test_mse_and_sse_by_hand() -> None:
    e_BE = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert reconstruction(e_BE, "mse", 7.0, 2) == 21 / 4
    assert reconstruction(e_BE, "sse", 7.0, 2) == 21 / 2
    assert reconstruction(e_BE, "fvu", 7.0, 2) == 21 / 14
    for kind in ("mse", "sse", "fvu"):
        torch.testing.assert_close(
            reconstruction(e_BE, kind, 7.0, 2), reference_reconstruction(e_BE, kind, 7.0)
        )


def test_l1_by_hand_dense_and_sparse() -> None:
    codes = SparseCodes(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([[0, 2], [1, 0]]), 3)
    norms_F = torch.tensor([1.0, 10.0, 100.0])
    for form in (codes, codes.dense(), codes.dense().reshape(2, 1, 3)):
        assert l1(form) == (4 + 2) / 2
        assert l1(form, norms_F) == (103 + 20) / 2


def test_l1_keeps_float32_when_latents_are_bfloat16() -> None:
    f_BF = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    assert l1(f_BF) == 2.0
    assert l1(f_BF).dtype == torch.float32


W_DEC = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)).double()


def candidates(dead_F: torch.Tensor, k_aux: int = 4, rows: int = 10) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(1)
    x_BD = torch.randn(rows, 6, generator=gen).double()
    W_enc = W_DEC.T.clone().requires_grad_()
    _, aux = select_topk(x_BD, W_enc, torch.zeros(32).double(), 2, dead_F, k_aux)
    assert aux is not None
    return x_BD, W_enc, aux  # type: ignore[return-value]


@pytest.mark.parametrize("k_aux", [1, 2, 4, 32])
def test_auxk_equals_the_formula_and_reaches_dead_columns(k_aux: int) -> None:  # F53
    dead_F = torch.arange(32) % 5 == 0
    x_BD, W_enc, aux = candidates(dead_F, k_aux)
    e_BE, W_dec = x_BD * 0.5 + 0.1, W_DEC.clone().requires_grad_()
    term = auxk(e_BE, aux, W_dec, dead_F)
    term.backward()
    w = {"W_enc": W_DEC.T.clone().requires_grad_(), "W_dec": W_DEC.clone().requires_grad_()}
    want = auxk_reference(w, e_BE, x_BD @ w["W_enc"], dead_F, k_aux)
    want.backward()
    torch.testing.assert_close(term, want)
    torch.testing.assert_close(W_enc.grad, w["W_enc"].grad)
    torch.testing.assert_close(W_dec.grad, w["W_dec"].grad)
    assert W_enc.grad[:, dead_F].abs().sum() > 0
    assert not W_enc.grad[:, ~dead_F].any()


@pytest.mark.parametrize("case", ["nothing dead", "zero residual", "constant residual", "one row"])
def test_auxk_is_exactly_zero_where_it_means_nothing(case: str) -> None:  # F53
    dead_F = torch.zeros(32, dtype=torch.bool) if case == "nothing dead" else torch.arange(32) < 9
    x_BD, W_enc, aux = candidates(dead_F, rows=1 if case == "one row" else 10)
    e_BE = {"zero residual": 0 * x_BD, "constant residual": 0 * x_BD + 0.5}.get(case, x_BD)
    W_dec = W_DEC.clone().requires_grad_()
    term = auxk(e_BE, aux, W_dec, dead_F)
    term.backward()
    assert term == 0
    assert not W_enc.grad.any()
    assert not W_dec.grad.any()


def test_auxk_does_not_train_through_the_residual() -> None:
    dead_F = torch.arange(32) < 9
    x_BD, _, aux = candidates(dead_F)
    e_BE = x_BD.clone().requires_grad_()
    auxk(e_BE, aux, W_DEC.clone().requires_grad_(), dead_F).backward()
    assert e_BE.grad is None


def test_auxk_does_not_hide_a_nan() -> None:
    dead_F = torch.arange(32) < 9
    x_BD, _, aux = candidates(dead_F)
    e_BE = x_BD.clone()
    e_BE[0, 0] = torch.nan
    assert auxk(e_BE, aux, W_DEC, dead_F).isnan()
