"""Train sparse autoencoders from cached activations.

`train(TrainSettings(...))` does what the `saetrain` command does; `load_sae(folder)` reads the
result. Both are imported on first use, so `import saetrain` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saetrain.artefact import load_sae
    from saetrain.settings import TrainSettings
    from saetrain.trainer import train

_HOME = {
    "TrainSettings": "saetrain.settings",
    "load_sae": "saetrain.artefact",
    "train": "saetrain.trainer",
}

__all__ = ["TrainSettings", "load_sae", "train"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
