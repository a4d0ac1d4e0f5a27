"""Which module of a host goes to which device.

A map may name modules as the base model has them or as the model with its head does, and may name
blocks above the deepest hook and heads: what is not loaded is left out of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actcache.adapter import HEADS
from actcache.errors import HostError
from actcache.families import cut
from actcache.store.records import did_you_mean


def placed(
    asked: str | dict[str, Any] | None,
    device: torch.device,
    skeleton: nn.Module,
    deepest: int | None,
) -> str | dict[str, Any]:
    """The map for the model that is left when `skeleton` is cut above `deepest`, which it is then.

    Raises HostError for a module that does not exist, and if a weight has no device.
    """
    if asked is None:
        return {"": str(device)}
    if isinstance(asked, str):
        return asked
    head = f"{getattr(skeleton, 'base_model_prefix', '')}."
    whole = dict(skeleton.named_modules())
    named = {k if k in whole else k.removeprefix(head): v for k, v in asked.items()}
    strange = [k for k in named if k not in whole and k.split(".")[0] not in HEADS]
    if strange:
        raise HostError(
            f"host.device_map: the host has no module {strange[0]!r}."
            f"{did_you_mean(strange[0], whole)}"
        )
    cut(skeleton, deepest)
    left = dict(skeleton.named_modules())
    named = {k: v for k, v in named.items() if k in left}
    for name, _ in skeleton.named_parameters():
        if not any(name.startswith(f"{k}." if k else "") for k in named):
            raise HostError(f"host.device_map names no device for {name}")
    return named
