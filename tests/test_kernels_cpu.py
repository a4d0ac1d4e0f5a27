"""The sparse step's loops in C against torch, with and without AVX-512."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saetrain.codes import SparseCodes, decode_codes, select_topk
from saetrain.init import transposed
from saetrain.kernels import cpu
from saetrain.kernels.topk import exact_topk
from saetrain.native import SWITCH

WAYS = ["native", "portable"]
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(autouse=True, params=WAYS)
def way(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compiled for this processor, or as for one without AVX-512."""
    if request.param == "portable":
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("native is portable here")
        monkeypatch.setenv("CC", "cc -mno-avx512f")
    cpu.compiled.cache_clear()
    assert cpu.compiled() is not None
    yield request.param
    cpu.compiled.cache_clear()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 700),
    share=st.floats(0, 1),
    levels=st.sampled_from([1, 2, 7, 0]),
    half=st.booleans(),
)
@pytest.mark.usefixtures("way")
def test_the_k_largest(seed: int, n: int, share: float, levels: int, half: bool) -> None:  # F118
    draw = torch.Generator().manual_seed(seed)
    h_BF = torch.randn(4, n, generator=draw)
    if levels:  # ties, also with the infinite numbers that rows are padded with
        h_BF = torch.randint(levels, h_BF.shape, generator=draw).float().log()
    h_BF = h_BF.bfloat16() if half else h_BF
    k = max(1, round(share * n))
    values, indices = cpu.topk(h_BF, k)
    assert values.dtype == h_BF.dtype
    assert torch.equal(h_BF.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(values.sort(1)[0], h_BF.topk(k)[0].sort(1)[0])


@pytest.mark.parametrize("n", [5, 160, 4096, 4099])
@pytest.mark.parametrize("half", [False, True])
def test_no_number_that_is_none_passes_unseen(n: int, half: bool) -> None:
    h_BF = torch.randn(5, n)
    h_BF[1, n // 2], h_BF[2, 0], h_BF[3, n - 1], h_BF[3, 1] = torch.nan, -torch.nan, torch.nan, 99
    values, indices = cpu.topk(h_BF.bfloat16() if half else h_BF, 2)
    assert values.isnan().any(1).tolist() == [False, True, True, True, False]
    assert indices[3].sort()[0].tolist() == [1, n - 1]


def test_one_long_row_of_a_whole_batch() -> None:  # BatchTopK
    h = torch.randn(1, 300_000, generator=torch.manual_seed(0))
    values, indices = exact_topk(h, 4_000)
    assert torch.equal(values.sort()[0], h.topk(4_000)[0].sort()[0])
    assert len(indices.unique()) == 4_000


def slots(n: int, k: int, n_latents: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(n, k, generator=draw)
    values[torch.rand(n, k, generator=draw) < 0.2] = 0
    indices = torch.rand(n, n_latents, generator=draw).argsort(-1)[:, :k]
    return values, indices.contiguous()


@pytest.mark.parametrize("d", [1, 15, 16, 100, 128, 300])
@pytest.mark.parametrize(("k", "n_latents"), [(1, 3), (7, 40), (7, 900)])
def test_sums_and_products_of_rows(d: int, k: int, n_latents: int) -> None:  # F118
    values, indices = slots(53, k, n_latents, seed=d)
    x_BD, W_FD = torch.randn(53, d), torch.randn(n_latents, d)
    dense_BF = SparseCodes(values, indices, n_latents).dense().double()
    near = {"rtol": 1e-5, "atol": 1e-4}
    got = cpu.decode(values, indices, W_FD)
    torch.testing.assert_close(got, (dense_BF @ W_FD.double()).float(), **near)
    out_FD = torch.full((n_latents, d), torch.nan)
    assert cpu.sum_by_latent(x_BD, values, indices, out_FD) is out_FD
    torch.testing.assert_close(out_FD, (dense_BF.T @ x_BD.double()).float(), **near)
    want = torch.einsum("bd,bkd->bk", x_BD, W_FD[indices])
    torch.testing.assert_close(cpu.dot_rows(x_BD, W_FD, indices), want, **near)
    used = values > 0
    torch.testing.assert_close(cpu.dot_rows(x_BD, W_FD, indices, used), want * used, **near)


def test_rows_that_do_not_lie_side_by_side() -> None:
    values, indices = slots(9, 3, 20, seed=1)
    x_BD, W_FD = torch.randn(5, 9).T, torch.randn(5, 20).T
    want = torch.einsum("bd,bkd->bk", x_BD, W_FD[indices])
    spread = torch.empty(3, 9, dtype=torch.int64).T.copy_(indices)
    torch.testing.assert_close(cpu.dot_rows(x_BD, W_FD, spread), want)
    torch.testing.assert_close(cpu.topk(x_BD, 2)[0].sort()[0], x_BD.topk(2)[0].sort()[0])
    want = cpu.decode(values, indices, W_FD.contiguous())
    assert torch.equal(cpu.decode(values.T.contiguous().T, spread, W_FD), want)


@pytest.mark.parametrize("latent", [-1, 20, 2**40])
def test_an_index_beyond_the_rows_is_an_error(latent: int) -> None:
    values, indices = slots(9, 3, 20, seed=1)
    indices[4, 1], values[4, 1] = latent, 1
    x_BD, W_FD = torch.randn(9, 6), torch.randn(20, 6)
    for call in (
        lambda: cpu.decode(values, indices, W_FD),
        lambda: cpu.dot_rows(x_BD, W_FD, indices),
        lambda: cpu.sum_by_latent(x_BD, values, indices, torch.empty(20, 6)),
    ):
        with pytest.raises(IndexError, match="not that of one of the rows"):
            call()


def test_a_number_that_is_none_shows() -> None:
    values, indices = slots(9, 3, 20, seed=1)
    values[2, 1] = torch.nan
    W_FD = torch.randn(20, 6)
    assert cpu.decode(values, indices, W_FD).isnan().any(1).nonzero().tolist() == [[2]]
    out_FD = cpu.sum_by_latent(torch.randn(9, 6), values, indices, torch.empty(20, 6))
    assert out_FD.isnan().any(1).nonzero().tolist() == [[int(indices[2, 1])]]


def step(threads: int) -> list[Tensor]:
    """Values and gradients of one step on sizes at which all threads are used."""
    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(3)
    x_BD = torch.randn(600, 64, generator=draw)
    W_enc = nn.Parameter(transposed(0.1 * torch.randn(1024, 64, generator=draw)))
    W_dec, b = (
        nn.Parameter(0.1 * torch.randn(1024, 64, generator=draw)),
        nn.Parameter(torch.zeros(1024)),
    )
    codes, aux = select_topk(x_BD, W_enc, b, 20, torch.arange(1024) % 7 == 0, 30)
    assert aux is not None
    out = decode_codes(codes, W_dec) + 0.1 * decode_codes(aux, W_dec)
    (out - x_BD).square().sum().backward()
    grads = [p.grad for p in (W_enc, W_dec, b)]
    assert all(g is not None for g in grads)
    return [codes.values.detach().sort()[0], out.detach(), *(g for g in grads if g is not None)]


def test_the_number_of_threads_changes_nothing() -> None:
    for one, three in zip(step(1), step(3), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("way_out", [{SWITCH: "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}])
def test_without_a_compiler_torch_does_it(
    way_out: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    ours = step(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in way_out.items():
        monkeypatch.setenv(name, value)
    cpu.compiled.cache_clear()
    assert not cpu.takes(torch.zeros(1))
    for fast, slow in zip(ours, step(1), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-3)
    told = [r.message for r in caplog.records]
    assert len(told) == ("CC" in way_out)  # said once, and not if it was asked for
    assert all("no C compiler with OpenMP" in t for t in told)


def test_what_it_is_not_for() -> None:
    assert cpu.takes(torch.zeros(1))
    assert not cpu.takes(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert (cpu.takes(half), cpu.takes(half, half=True)) == (False, True)
    assert not cpu.takes(torch.zeros(1, device="meta"))
