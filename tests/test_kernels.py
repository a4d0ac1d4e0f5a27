"""Every kernel of the sparse step against its plain twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saetrain.activations import BatchTopK, BatchTopKConfig
from saetrain.init import transposed
from saetrain.kernels import adam, encode, latents, rows
from saetrain.kernels.batchtopk import Best, encode_batchtopk
from saetrain.kernels.decode import decode, input_bias
from saetrain.kernels.encode import encode_topk, pieces
from saetrain.kernels.gemm import product
from saetrain.kernels.latents import dot_rows, sum_by_latent
from saetrain.kernels.rows import project_rows_, renormalise_rows_
from saetrain.kernels.topk import exact_topk


def same_choice(h_BF: Tensor, values: Tensor, indices: Tensor, k: int) -> None:
    """Distinct indices, with the values found there, which are torch.topk's as a multiset."""
    assert torch.equal(h_BF.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(values.sort(1)[0], h_BF.topk(k)[0].sort(1)[0])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("n_latents", [40, 257, 1024, 4099])
@pytest.mark.parametrize("k", [1, 4, 32])
def test_the_tournament_finds_the_k_largest(n_latents: int, k: int) -> None:  # F44, F118
    torch.manual_seed(n_latents + k)
    h_BF = torch.randn(17, n_latents)
    h_BF[0] = 2.0  # all tie
    h_BF[1] = torch.arange(n_latents)  # the largest are neighbours
    h_BF[2] = torch.arange(n_latents).flip(0)
    h_BF[3] = torch.randint(3, (n_latents,)).float()  # many tie
    h_BF[4, ::4] += 10  # the largest share groups of a strided kind
    h_BF[5] = -torch.inf
    same_choice(h_BF, *exact_topk(h_BF, k), k)


@pytest.mark.usefixtures("uncompiled")
def test_the_tournament_lets_no_nan_pass_unseen() -> None:
    h_BF = torch.randn(3, 4096)
    h_BF[1, 77] = torch.nan
    values = exact_topk(h_BF, 8)[0]
    assert values.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("by_latent", [True, False])
def test_products_agree(dtype: torch.dtype, by_latent: bool) -> None:
    torch.manual_seed(0)
    rows_FD = torch.randn(300, 48).to(dtype)
    W_DF = transposed(rows_FD) if by_latent else rows_FD.T.contiguous()
    x_BD, b_F = torch.randn(20, 2, 48).to(dtype)[:, 0], torch.randn(300).to(dtype)
    want = (x_BD.double() @ W_DF.double() + b_F.double()).to(dtype)
    # bf16 rounds the product and the sum, each by 2^-9 of what it rounds, which may cancel.
    tolerance = (
        {"rtol": 0.01, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    )
    torch.testing.assert_close(product(x_BD, W_DF, b_F), want, **tolerance)


def slots(n: int, k: int, n_latents: int) -> tuple[Tensor, Tensor]:
    values = torch.rand(n, k, dtype=torch.float64)
    values[:, 0] = 0
    return values, torch.rand(n, n_latents).argsort(-1)[:, :k]


@pytest.mark.parametrize("n_latents", [6, 53, 300])  # 300: most latents have no slot
@pytest.mark.parametrize("step", [None, 1, 7, 1000])
def test_sums_by_latent_equal_the_dense_product(
    n_latents: int, step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    if step is not None:
        monkeypatch.setattr(latents, "LARGE", 0)
        monkeypatch.setattr(latents, "PIECE", 5 * step)
    (values, indices), x_BD = slots(19, 4, n_latents), torch.randn(19, 5, dtype=torch.float64)
    dense_BF = torch.zeros(19, n_latents, dtype=torch.float64).scatter_(1, indices, values)
    got = sum_by_latent(x_BD, values, indices, n_latents)
    torch.testing.assert_close(got, dense_BF.T @ x_BD)
    W_FD = torch.randn(n_latents, 5, dtype=torch.float64)
    want = torch.einsum("bd,bkd->bk", x_BD, W_FD[indices])
    torch.testing.assert_close(dot_rows(x_BD, W_FD, indices), want)


def test_gradient_memory_is_used_again_only_when_nobody_holds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latents, "LARGE", 0)
    torch.manual_seed(2)
    W_FE = nn.Parameter(torch.randn(11, 4, dtype=torch.float64))

    def gradient(seed: int, times: int = 1) -> Tensor:
        torch.manual_seed(seed)
        W_FE.grad = None
        parts = [slots(9, 3, 11) for _ in range(times)]
        torch.stack([decode(*p, W_FE).sum() for p in parts]).sum().backward()
        dense = sum(torch.zeros(9, 11).double().scatter_(1, i, v) for v, i in parts)
        want = dense.sum(0)[:, None].expand(11, 4)
        torch.testing.assert_close(W_FE.grad, want)
        return W_FE.grad

    first = gradient(0)
    kept, where = first.clone(), first.data_ptr()
    second = gradient(1)  # `first` is still held
    assert second.data_ptr() != where
    assert torch.equal(first, kept)
    where = second.data_ptr()
    del second, first
    assert gradient(2).data_ptr() == where
    gradient(3, times=3)  # three uses in one graph


@pytest.mark.parametrize("pieced", [False, True])
def test_decode_equals_its_twin(pieced: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # F118
    if pieced:
        monkeypatch.setattr(latents, "LARGE", 0)
        monkeypatch.setattr(latents, "PIECE", 8)
    torch.manual_seed(3)
    values, indices = slots(7, 3, 13)
    W_FE = torch.randn(13, 4, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    want = values[..., None].mul(W_FE[indices]).sum(1)
    torch.testing.assert_close(decode(values, indices, W_FE), want)
    assert torch.autograd.gradcheck(lambda v, W: decode(v, indices, W), (values, W_FE))


def test_the_bias_has_the_gradient_of_the_input() -> None:
    torch.manual_seed(4)
    x_BD, W_DF = torch.randn(7, 4).double(), torch.randn(4, 6).double()
    own = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (6, 4)]
    plain = [p.detach().clone().requires_grad_() for p in own]
    ((x_BD - own[1].detach()) @ W_DF + input_bias(*own, W_DF)).sin().sum().backward()
    ((x_BD - plain[1]) @ W_DF + plain[0]).sin().sum().backward()
    for got, want in zip(own, plain, strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def plain(x_BD: Tensor, W_DF: Tensor, b_F: Tensor, k: int, dead_F: Tensor | None, k_aux: int):
    h_BF = x_BD @ W_DF + b_F
    values, indices = h_BF.topk(k)
    if dead_F is None:
        return (values.relu(), indices), None
    aux, aux_indices = h_BF.where(dead_F, -torch.inf).topk(k_aux)
    return (values.relu(), indices), (aux.relu(), aux_indices)


def spread(found: tuple[Tensor, Tensor], n_latents: int) -> Tensor:
    values, indices = found
    return values.new_zeros(len(values), n_latents).scatter(1, indices, values)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("k_aux", [0, 5, 50])
def test_encoding_in_pieces_equals_the_plain_twin(
    bf16: bool, k_aux: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # F53, F118
    monkeypatch.setattr(encode, "LEAST", 8)
    monkeypatch.setattr(encode, "CACHED", 8 * 400)
    monkeypatch.setattr(latents, "LARGE", 0)
    torch.manual_seed(5)
    x_BD, out_F = torch.randn(27, 16), torch.randn(400)
    assert len(pieces(27, 400, "cpu")) == 4
    dead_F = torch.arange(400) % 3 == 0 if k_aux else None
    results = []
    for run in (encode_topk, plain):
        W_DF = nn.Parameter(transposed(torch.randn(400, 16, generator=torch.manual_seed(6))))
        b_F = nn.Parameter(0.1 * torch.arange(400).sin())
        more = (bf16,) if run is encode_topk else ()
        codes, aux = run(x_BD, W_DF, b_F, 6, dead_F, k_aux, *more)
        f_BF = spread(codes, 400) + (2 * spread(aux, 400) if k_aux else 0)
        (f_BF * out_F).square().sum().backward()
        results.append((f_BF.detach(), W_DF.grad, b_F.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_bf16_selection_errs_within_its_bound() -> None:
    torch.manual_seed(7)
    x_BD, k = torch.randn(512, 64), 16
    W_DF = transposed(nn.functional.normalize(torch.randn(4096, 64), dim=1))
    b_F = 0.1 * torch.randn(4096)
    h_BF = x_BD @ W_DF + b_F
    (values, indices), _ = encode_topk(x_BD, W_DF, b_F, k, bf16=True)
    torch.testing.assert_close(values, h_BF.gather(1, indices).relu(), rtol=1e-5, atol=1e-5)
    exact = h_BF.topk(k)[1]
    chosen = torch.zeros(512, 4096, dtype=torch.bool).scatter_(1, indices, True)
    missed = ~chosen.gather(1, exact)
    assert missed.float().mean() < 1e-3  # the surplus: without it over 1 %, see below
    least = values.min(1, keepdim=True)[0]
    size_BF = x_BD.abs() @ W_DF.abs() + b_F.abs()
    gap = h_BF.gather(1, exact) - least
    assert (gap <= 2**-7 * size_BF.gather(1, exact))[missed].all()
    coarse = (x_BD.bfloat16() @ W_DF.bfloat16() + b_F.bfloat16()).topk(k)[1]
    plain_missed = ~torch.zeros_like(chosen).scatter_(1, coarse, True).gather(1, exact)
    assert plain_missed.float().mean() > 0.01  # the test can fail


@pytest.mark.parametrize("piece", [1 << 18, 12])
def test_rows_equal_their_twins(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE", piece)
    torch.manual_seed(8)
    W_FE, g_FE = torch.randn(23, 5).double(), torch.randn(5, 23).double().T
    along = (g_FE * W_FE).sum(1) / (W_FE * W_FE).sum(1)
    want = g_FE - along[:, None] * W_FE
    project_rows_(g_FE, W_FE)
    torch.testing.assert_close(g_FE, want)
    want = W_FE / W_FE.square().sum(1, keepdim=True).sqrt()
    renormalise_rows_(W_FE)
    torch.testing.assert_close(W_FE, want)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_in_memory_order_is_adam(name: str) -> None:  # F118
    torch.manual_seed(9)
    start, grads = torch.randn(6, 10), torch.randn(4, 6, 10)
    plain, ours = nn.Parameter(start.clone()), nn.Parameter(start.T.contiguous().T)
    assert ours.stride() == (1, 6)
    theirs = getattr(torch.optim, name)([plain, nn.Parameter(start[0])], lr=0.1, fused=True)
    mine = getattr(adam, name)([ours, nn.Parameter(start[0])], lr=0.1, fused=True)
    for g in grads:
        plain.grad, ours.grad = g.clone(), g.T.contiguous().T
        theirs.step()
        mine.step()
    torch.testing.assert_close(plain, ours, rtol=1e-6, atol=1e-7)
    assert ours.stride() == (1, 6)
    for key, value in theirs.state[plain].items():
        torch.testing.assert_close(value, mine.state[ours][key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("step", [1, 2, 9])  # tokens that come at once
@pytest.mark.parametrize("keep", [1, 40, 3200, 9 * 700])  # the last: more than are above 0
def test_the_largest_of_what_comes_in_pieces(step: int, keep: int) -> None:  # F118
    torch.manual_seed(10)
    h_BF = torch.randn(9, 700)
    h_BF[4] = -1  # nothing fires there
    best = Best(keep)
    for first in range(0, 9, step):
        best.add(h_BF[first : first + step], first * 700)
    values, indices, used = best.slots(9, 700)
    floor = h_BF.flatten().sort(descending=True)[0][keep - 1].clamp(min=1e-9)
    want = h_BF * (h_BF >= floor)
    assert torch.equal(torch.zeros(9, 700).scatter_add_(1, indices, values), want)
    assert int(used.sum()) == int(want.count_nonzero()) == min(keep, int((h_BF > 0).sum()))
    assert not values[~used].any()


def test_what_is_no_number_is_kept() -> None:
    best, h_BF = Best(3), torch.randn(4, 50)
    h_BF[1, 7] = torch.nan
    for i, row in enumerate(h_BF):
        best.add(row[None], i * 50)
    values, indices, _ = best.slots(4, 50)
    assert values[1].isnan().sum() == 1
    assert indices[1][values[1].isnan()].tolist() == [7]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("k_aux", [0, 5])
@pytest.mark.parametrize("k", [0.3, 6])
def test_batchtopk_equals_its_dense_form(k: float, k_aux: int, bf16: bool) -> None:  # F118
    torch.manual_seed(11)
    x_BD, out_F = torch.randn(27, 16) * torch.rand(27, 1), torch.randn(400)
    dead_F = torch.arange(400) % 3 == 0 if k_aux else None
    dense = BatchTopK(BatchTopKConfig(k=k), 400)
    results = []
    for fast in (True, False):
        W_DF = nn.Parameter(transposed(torch.randn(400, 16, generator=torch.manual_seed(12))))
        b_F = nn.Parameter(0.1 * torch.arange(400).sin())
        if fast:
            codes, aux = encode_batchtopk(x_BD, W_DF, b_F, dense.keep(27), dead_F, k_aux, bf16)
            n = len(codes[0])
            f_BF = torch.zeros(n, 400).scatter_add(1, codes[1], codes[0])
        else:
            f_BF = dense.select(x_BD @ W_DF + b_F)
            aux = plain(x_BD, W_DF, b_F, 1, dead_F, k_aux)[1]
        f_BF = f_BF + (2 * spread(aux, 400) if k_aux else 0)
        (f_BF * out_F).square().sum().backward()
        results.append((f_BF.detach(), W_DF.grad, b_F.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
