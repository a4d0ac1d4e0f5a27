"""Which Triton kernels may be used: on CUDA, and only after they equalled their plain twins there.

A kernel is compared with its twin on small inputs once per type and device, before its first use.
If Triton is missing, does not compile, or differs, one line of log says so and torch's operations
are used as on a CPU. Triton is imported then and not before (0.2 s). Under torch.compile the check
runs while tracing, and its answer is a constant of the graph.

The kernels equal their twins in Triton's interpreter on a CPU, and compile for compute capability
8.0 and 9.0 (tests/test_kernels_triton.py). No GPU has run them yet: speed is not measured.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

DEVICE = "cuda"  # where kernels are used; tests in the interpreter set "cpu"
ROWS, CHANNELS = 8, 256  # of a program's tile; powers of two
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # others need more than float32 sums

log = logging.getLogger(__name__)
Launch = TypeVar("Launch", bound=Callable[..., Tensor])
Sample = Callable[[Callable[..., Tensor]], tuple[Any, ...]]
_checking = threading.Lock()  # the runs of a fused sweep are threads


class Kernel(NamedTuple):
    """A launch, its plain twin, and arguments to compare them on.

    `sample(randn)` makes the arguments, with `randn(*shape)` for those that have the kernel's type.
    """

    launch: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    sample: Sample


KERNELS: dict[str, Kernel] = {}  # those that `takes` knows, from the modules that launch them


def opaque(fake: Callable[..., Tensor]) -> Callable[[Launch], Launch]:
    """Make a launch one operation, on the device of its tensors, that torch.compile keeps whole.

    `fake` gives an empty result of the same shape, type and device.
    """

    def wrap(launch: Launch) -> Launch:
        @functools.wraps(launch)
        def run(first: Tensor, *rest: Any) -> Tensor:
            # Triton launches on the current device, whatever the tensors are on.
            with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
                return launch(first, *rest)

        op = torch.library.custom_op(f"saetrain::{launch.__name__}", run, mutates_args=())
        op.register_fake(fake)
        return cast(Launch, op)

    return wrap


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def spread(n: int, bound: int) -> Tensor:
    """(n,) int64 below `bound`, which repeat and are in no order: indices for samples."""
    return torch.arange(n, device="cpu") * 7919 % 104729 % bound


def takes(name: str, like: Tensor) -> bool:
    """Whether the kernel `name` is to be used for tensors of the type and device of `like`."""
    return like.device.type == DEVICE and usable(name, like.dtype, like.device)


def usable(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel compiles here and equals its twin; says once why not."""
    with _checking:
        return dtype in TYPES and installed() and equals(name, dtype, device)


# What `torch.compiler.assume_constant_result` does, without importing the compiler (1 s).
usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def installed() -> bool:
    """Whether there is a Triton; says once if not."""
    if find_spec("triton") is None:
        log.warning("Triton is not installed: the sparse step uses torch's operations instead")
        return False
    return True


@functools.cache
def equals(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernel and twin, the latter in float64, differ by rounding only; says once if not."""
    try:
        off = difference(KERNELS[name], dtype, device)
        # The result is rounded to its type, sums to float32. NaN is not at most anything.
        if not off <= max(torch.finfo(dtype).eps, 1e-5):
            raise AssertionError(f"differs from its plain twin by {off:.2g} of the largest value")
    except Exception as e:  # noqa: BLE001 - whatever a compiler raises, there is another way
        reason = str(e).strip().partition("\n")[0]
        log.warning("Triton's %s is not used (%s): torch's operations instead", name, reason)
        return False
    return True


def difference(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference of kernel and twin over the largest value."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cpu").to(dtype)

    args = kernel.sample(randn)
    there = (a.to(device) if isinstance(a, Tensor) else a for a in args)
    exact = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    got, want = kernel.launch(*there).cpu().double(), kernel.plain(*exact)
    return float((got - want).abs().max() / want.abs().max())
