"""torch.compile around an SAE's losses, or a clear word on why it cannot be.

The step number reaches the losses as a Python number; torch traces it as a symbol after the second
step. Where it decides a branch, as the staircase of p_anneal does, torch compiles again, at most 8
times, and runs that part uncompiled from then on. The kernels written here run as they are. Same
loss as without, up to rounding; what it gains depends on the architecture, so measure it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TypeVar

import torch

from saetrain.errors import ConfigError

F = TypeVar("F", bound=Callable[..., object])


def compiled(losses: F, device: torch.device) -> F:
    """`losses` through torch.compile. ConfigError without the compiler that it needs on a CPU."""
    reason = why_not(device)
    if reason is not None:
        raise ConfigError(f"compile=true: {reason}. Install it, or set compile=false")
    made: F = torch.compile(losses)  # type: ignore[assignment]
    return made


def why_not(device: torch.device) -> str | None:
    """What is missing for torch.compile on `device`; None if nothing is."""
    if device.type != "cpu":
        return None  # Triton brings its own
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if any(shutil.which(name) for name in names):
        return None
    return f"torch needs a C++ compiler on CPUs, and {' or '.join(names)} is not on the PATH"
