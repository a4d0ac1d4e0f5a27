"""Sparse codes against their dense twins; the sparse backward against dense autograd."""

from __future__ import annotations

import pytest
import torch
from saes_reference import topk_oracle
from torch import Tensor

from saetrain.codes import (
    SparseCodes,
    decode_codes,
    dense,
    firing_counts,
    input_bias,
    l0,
    select_topk,
    topk_codes,
)
from saetrain.losses import auxk
from saetrain.saes import make_sae
from saetrain.saes.base import HookSpace, Progress


def some_codes(lead: tuple[int, ...] = (5,), k: int = 3, n_latents: int = 11) -> SparseCodes:
    values = torch.rand(*lead, k, dtype=torch.float64)
    values[..., 0] = 0.0  # an unused slot
    return SparseCodes(values, torch.rand(*lead, n_latents).argsort(-1)[..., :k], n_latents)


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
def test_sparse_codes_equal_loops(lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    codes, W_FE = some_codes(lead), torch.randn(11, 4, dtype=torch.float64)
    want = torch.zeros(*lead, 11, dtype=torch.float64).reshape(-1, 11)
    rows = zip(codes.values.reshape(-1, 3), codes.indices.reshape(-1, 3), strict=True)
    for n, (values, indices) in enumerate(rows):
        for value, i in zip(values, indices, strict=True):
            want[n, i] = value
    want = want.reshape(*lead, 11)
    assert torch.equal(dense(codes), want)
    assert torch.equal(dense(want), want)
    torch.testing.assert_close(decode_codes(codes, W_FE), want @ W_FE)
    torch.testing.assert_close(decode_codes(want, W_FE), want @ W_FE)
    for form in (codes, want):
        assert torch.equal(l0(form), torch.full(lead, 2))
        assert torch.equal(firing_counts(form), (want.reshape(-1, 11) > 0).sum(0))


def test_decode_gradients() -> None:
    torch.manual_seed(1)
    codes = some_codes()
    values = codes.values.clone().requires_grad_()
    W_FE = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)

    def decode(values: Tensor, W_FE: Tensor) -> Tensor:
        return decode_codes(SparseCodes(values, codes.indices, 11), W_FE)

    assert torch.autograd.gradcheck(decode, (values, W_FE))


@pytest.mark.parametrize("k", [1, 3, 17])
def test_topk_equals_the_sorted_loop(k: int) -> None:  # F22, F44
    torch.manual_seed(2)
    h_BF = torch.randn(20, 17) - 0.5
    h_BF[0] = -1.0  # nothing positive: nothing fires
    codes = topk_codes(h_BF, k)
    assert torch.equal(codes.dense(), topk_oracle(h_BF, k))
    assert torch.equal(l0(codes), (h_BF > 0).sum(1).clamp(max=k))


DEAD = torch.tensor([i % 4 == 1 for i in range(64)])


@pytest.mark.parametrize(("n_aux", "n_latents"), [(0, 64), (1, 64), (6, 64), (64, 64)])
def test_sparse_backward_equals_dense_autograd(n_aux: int, n_latents: int) -> None:
    torch.manual_seed(3)
    dead_F = DEAD if n_aux else None
    x_BD = torch.randn(9, 5, dtype=torch.float64)
    W_DF, b_F = torch.randn(5, n_latents).double(), 0.3 * torch.randn(n_latents).double()
    out_F = torch.randn(n_latents, dtype=torch.float64)  # any function of the codes

    def value(codes: SparseCodes) -> Tensor:
        return ((codes.dense() @ out_F).sin() + codes.values.square().sum(-1)).sum()

    fast = W_DF.clone().requires_grad_(), b_F.clone().requires_grad_()
    codes, aux = select_topk(x_BD, *fast, 4, dead_F, n_aux)
    (value(codes) + (0 if aux is None else value(aux))).backward()
    slow = W_DF.clone().requires_grad_(), b_F.clone().requires_grad_()
    h_BF = x_BD @ slow[0] + slow[1]
    total = value(topk_codes(h_BF, 4))
    torch.testing.assert_close(codes.dense(), topk_oracle(h_BF.detach(), 4))
    if dead_F is not None:
        dead_only = topk_codes(h_BF.where(dead_F, -torch.inf), min(n_aux, 16))
        total = total + value(dead_only)
        assert aux is not None
        torch.testing.assert_close(aux.dense(), dead_only.dense())
        assert not aux.dense()[:, ~dead_F].any()
    total.backward()
    for got, want in zip(fast, slow, strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_sparse_backward_is_the_true_derivative() -> None:
    torch.manual_seed(4)
    x_BD = torch.randn(6, 3, dtype=torch.float64)
    W_DF = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    b_F = torch.randn(40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda W, b: select_topk(x_BD, W, b, 2)[0].values, (W_DF, b_F))


def test_select_refuses_an_input_that_wants_a_gradient() -> None:
    x_BD = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="topk_codes"):
        select_topk(x_BD, torch.randn(3, 8), torch.zeros(8), 2)


def test_input_bias_carries_the_gradient_of_the_decoder_bias() -> None:
    torch.manual_seed(5)
    x_BD, W_DF = torch.randn(7, 4).double(), torch.randn(4, 6).double()
    b_enc = torch.randn(6).double()
    fast, slow = (torch.arange(4.0).double().requires_grad_() for _ in range(2))
    h_fast = (x_BD - fast.detach()) @ W_DF + input_bias(b_enc, fast, W_DF)
    h_slow = (x_BD - slow) @ W_DF + b_enc
    assert torch.equal(h_fast, h_slow)
    h_fast.relu().square().sum().backward()
    h_slow.relu().square().sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad)


@pytest.mark.parametrize("n_dead", [1, 5, 8])
def test_few_dead_latents_take_a_shorter_way_to_the_same_auxk(n_dead):  # F53
    """Up to aux_k dead latents are all chosen directly; losses and gradients are those of the
    search over every latent."""
    torch.manual_seed(n_dead)
    space = HookSpace(name="h", d=16, mean=torch.zeros(16), mean_norm=4.0, variance=16.0)
    values = {"name": "topk", "n_latents": 64, "k": 4, "aux_k": 8, "dead_after_tokens": 10}
    sae = make_sae(values, {"h": space})
    sae.tokens_since_fired[torch.randperm(64)[:n_dead]] = 99
    x = torch.randn(32, 16)
    losses = sae.losses({"h": x}, Progress(step=5, n_steps=10, tokens=160))
    losses.total.backward()
    short = {n: p.grad.clone() for n, p in sae.named_parameters()}
    sae.zero_grad()
    x_in = sae.standardise(x) - sae.b_dec.detach()
    bias = input_bias(sae.b_enc, sae.b_dec, sae.W_enc)
    codes, aux = select_topk(x_in, sae.W_enc, bias, 4, sae.dead, 8)
    error = sae.standardise(x) - (decode_codes(codes, sae.W_dec) + sae.b_dec)
    long = sae.cfg.auxk_alpha * auxk(error, aux, sae.W_dec, sae.dead)
    torch.testing.assert_close(losses.terms["auxk"], long)
    (long + error.square().sum(1).mean() / sae.in_variance).backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(short[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(700,), (3, 700), (2, 3, 700), (0, 700), (2, 0, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_topk_codes_without_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The quick way of inference finds what the differentiable one does."""
    torch.manual_seed(0)
    h = torch.randn(shape).to(dtype)
    quick, plain = topk_codes(h, 5), topk_codes(h.clone().requires_grad_(), 5)
    assert quick.values.shape == quick.indices.shape == (*shape[:-1], 5)
    assert torch.equal(quick.dense(), plain.dense().detach())
    with pytest.raises((RuntimeError, IndexError), match="out of range"):
        topk_codes(h, shape[-1] + 1)
