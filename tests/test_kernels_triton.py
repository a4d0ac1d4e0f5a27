"""Triton kernels: in the interpreter, through the compiler, on a GPU; and the way on without them.

What is compared with what is in tests/triton_equality.py.
"""

from __future__ import annotations

import inspect
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
from saetrain.kernels.triton_decode import decode_forward, plain

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def equalities(interpret: str) -> str:
    """What pytest says about tests/triton_equality.py, all of which must have passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
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


TILE = {"R": 8, "C": 256, "S": 64}
# Kernel -> Triton's names of its pointers' types, `t` for the tensors' own.
POINTERS = {
    "decode": {"values": "t", "indices": "i64", "W": "t", "out": "t"},
    "dot_rows": {"x": "t", "W": "t", "indices": "i64", "out": "t"},
    "sum_windows": {
        "x": "t", "weights": "t", "tokens": "i64", "by_latent": "i32", "partial": "fp32",
    },
    "sum_latents": {
        "x": "t", "weights": "t", "tokens": "i64", "starts": "i64", "partial": "fp32", "out": "t",
    },
}  # fmt: skip


def assembled(name: str, dtype: str, capability: int, **ones: int) -> Any:
    """A kernel for a GPU that need not be here; `ones`: sizes of 1, which Triton builds in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from saetrain.kernels import triton_kernels

    kernel = getattr(triton_kernels, name)
    names = list(inspect.signature(kernel.fn).parameters)
    pointers = {n: "*" + t.replace("t", dtype, t == "t") for n, t in POINTERS[name].items()}
    built_in = {n: v for n, v in {**TILE, **ones}.items() if n in names}
    types = {n: pointers.get(n, "constexpr" if n in built_in else "i32") for n in names}
    by_16 = [["tt.divisibility", 16]]  # as torch's memory and the widths of models are
    aligned = {(i,): by_16 for i, n in enumerate(names) if n in {*pointers, "width"} - {*ones}}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in built_in.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # 3.9 about a default of 3.10
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the compiler is turned off")
@pytest.mark.parametrize(("dtype", "loads"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("name", POINTERS)
def test_kernels_compile_without_a_gpu(
    name: str, dtype: str, loads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F118
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for capability in (80, 90):
        made = assembled(name, dtype, capability)
        found = Counter(re.findall(r"ld\.global[.\w]*", made.asm["ptx"]))
        assert found["ld.global.v4.b32"] >= loads  # rows come in 16 bytes a thread
        assert "atom" not in made.asm["ptx"]
        assert made.asm["cubin"][:4] == b"\x7fELF"
    assembled(name, dtype, 90, n_slots=1, width=1)


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
