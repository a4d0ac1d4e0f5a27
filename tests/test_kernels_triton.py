"""Triton kernels: in the interpreter, through the compiler, on a GPU; and the way on without them.

What is compared with what is in tests/triton_equality.py.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.kernels import triton_common as common
from saetrain.kernels.triton_common import KERNELS, Kernel, equals, installed, spread, takes
from saetrain.kernels.triton_decode import decode_forward, launch_decode, plain
from saetrain.kernels.triton_latents import launch_dot, launch_sum

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def equalities(interpret: str) -> str:
    """What pytest says about tests/triton_equality.py, all of which must have passed."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    env = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [*command, "tests/triton_equality.py"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d passed in ", done.stdout, re.MULTILINE), done.stdout  # none skipped
    return done.stdout


@needs_triton
def test_kernels_equal_their_twins_in_the_interpreter() -> None:  # F118
    equalities("1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_equal_their_twins_on_a_gpu() -> None:  # F118
    equalities("0")


class PaperDriver:
    """A GPU that is not there: kernels are compiled for it as for any, and launches do nothing."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.capability = GPUTarget("cuda", capability, 32), capability
        self.utils, self.loaded = self, dict[str, bytes]()

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 * 1024}

    def load_binary(self, name: str, binary: bytes, *rest: Any) -> tuple[Any, ...]:
        self.loaded[name] = binary
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None


def launched(n: int, k: int, width: int, dtype: torch.dtype) -> None:
    x, W = torch.ones(n, width, dtype=dtype), torch.ones(7, width, dtype=dtype)
    weights, indices = torch.ones(n, k, dtype=dtype), spread(n * k, 7).reshape(n, k)
    launch_decode(weights, indices, W)
    launch_dot(x, W, indices)
    launch_sum(x, weights, indices, 7)


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # 3.9 about a default of 3.10
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the compiler is turned off")
@pytest.mark.parametrize(
    ("capability", "dtype", "loads"), [(80, torch.float32, 4), (90, torch.bfloat16, 2)]
)
def test_launches_compile_without_a_gpu(
    capability: int, dtype: torch.dtype, loads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F118
    from triton.runtime import driver

    paper = PaperDriver(capability)
    monkeypatch.setattr(driver, "_active", paper)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launched(96, 2, 272, dtype)
    assert set(paper.loaded) == {"decode", "dot_rows", "sum_windows", "sum_latents"}
    assert all(binary[:4] == b"\x7fELF" for binary in paper.loaded.values())
    texts = [file.read_text() for file in tmp_path.rglob("*.ptx")]
    assert len(texts) == 4
    for text in texts:
        found = Counter(re.findall(r"ld\.global[.\w]*", text))
        assert found["ld.global.v4.b32"] >= loads  # rows come in 16 bytes a thread
        assert not re.search(r"\b(atom|red)\.", text)
    launched(70, 1, 1, dtype)  # sizes of 1 are built in
    assert len([*tmp_path.rglob("*.ptx")]) == 8


def test_the_cpu_takes_the_twin() -> None:
    torch.manual_seed(1)
    values, indices, W_FE = torch.rand(5, 3), torch.randint(11, (5, 3)), torch.randn(11, 4)
    assert not any(takes(name, W_FE) for name in KERNELS)
    assert torch.equal(decode_forward(values, indices, W_FE), plain(values, indices, W_FE))


def sample(randn: Any) -> tuple[Any, ...]:
    return randn(4, 3), spread(12, 7).reshape(4, 3), randn(7, 5)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """The log, with kernels on the CPU, nothing found out yet and a Triton that is there."""
    monkeypatch.setattr(common, "DEVICE", "cpu")
    monkeypatch.setattr(common, "find_spec", lambda name: object())
    for known in (installed, equals):
        known.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog
    for known in (installed, equals):
        known.cache_clear()


def broken(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    raise RuntimeError("no such instruction\nand a long trace")


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (lambda v, i, W: plain(v, i, W) * 1.1, "differs from its plain twin by 0.1 of the largest"),
        (lambda v, i, W: plain(v, i, W) * torch.nan, "differs from its plain twin by nan"),
        (broken, "(no such instruction)"),
    ],
)
def test_a_kernel_that_errs_is_not_used_and_said_once(
    launch: Any, reason: str, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "tried", Kernel(launch, plain, sample))
    assert not takes("tried", torch.zeros(1))
    assert not takes("tried", torch.zeros(2))
    assert len(said.records) == 1
    assert reason in said.text
    assert "Triton's tried is not used" in said.text
    assert "torch's operations instead" in said.text
    monkeypatch.setitem(KERNELS, "tried", Kernel(plain, plain, sample))
    assert takes("tried", torch.zeros(1, dtype=torch.bfloat16))  # another type is tried anew
    assert not takes("tried", torch.zeros(1, dtype=torch.float64))  # sums are float32
    assert len(said.records) == 1


def test_without_triton_one_line_says_so(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    assert not any(takes(name, torch.zeros(1)) for name in KERNELS)
    assert [r.getMessage() for r in said.records] == [
        "Triton is not installed: the sparse step uses torch's operations instead"
    ]


def test_importing_the_kernels_imports_neither_triton_nor_the_compiler() -> None:
    code = (
        "import sys, saetrain.kernels.decode\n"
        "print([name for name in ('triton', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
