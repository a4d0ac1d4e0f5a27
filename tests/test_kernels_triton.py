"""Triton kernels against their plain twins, on a GPU; and the way on without one."""

from __future__ import annotations

import logging

import pytest
import torch

from saetrain.kernels import triton_decode
from saetrain.kernels.triton_decode import decode_forward, launch, plain, usable


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("width", [7, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_its_twin(width: int, dtype: torch.dtype) -> None:  # F118
    torch.manual_seed(0)
    W_FE = torch.randn(64, width, device="cuda", dtype=dtype)
    values, indices = torch.rand(50, 9, device="cuda", dtype=dtype), torch.randint(64, (50, 9))
    got = launch(values, indices.cuda(), W_FE)
    want = plain(values.float(), indices.cuda(), W_FE.float())
    torch.testing.assert_close(got.float(), want, rtol=0.01, atol=1e-5 + (dtype.itemsize == 2) / 20)
    assert usable(dtype, W_FE.device)


def test_the_cpu_takes_the_twin() -> None:
    torch.manual_seed(1)
    values, indices, W_FE = torch.rand(5, 3), torch.randint(11, (5, 3)), torch.randn(11, 4)
    assert torch.equal(decode_forward(values, indices, W_FE), plain(values, indices, W_FE))


def test_a_kernel_that_errs_is_not_used_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(triton_decode, "triton", object())
    usable.cache_clear()
    try:
        monkeypatch.setattr(triton_decode, "launch", lambda v, i, W: plain(v, i, W) * 1.1)
        with caplog.at_level(logging.WARNING):
            assert not usable(torch.float32, cpu)
            assert not usable(torch.float32, cpu)
        assert len(caplog.records) == 1
        assert "embedding_bag instead" in caplog.text
        monkeypatch.setattr(triton_decode, "launch", plain)
        assert usable(torch.float64, cpu)  # a kernel that agrees passes
    finally:
        usable.cache_clear()
