"""What a host is given beside token ids: pixels, grids and token types of the contexts of a batch.

Token types have one value per token and are padded with 0, which means text. Everything else is
joined along its first axis, in the order of the contexts: processors return the patches or images
of a text that way. Contexts whose tensors cannot be joined, or of which only some have images, do
not share a forward pass; consecutive ones that can do.

Shapes: B contexts in a batch, T tokens of the longest.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from actcache.data import Context
from actcache.errors import DataError
from actcache.store import FLAG_IMAGE

_PER_TOKEN = "token_type_ids"


def alike(batch: Sequence[Context]) -> list[list[Context]]:
    """The batch in runs of contexts that can share a forward pass."""
    return [list(group) for _, group in groupby(batch, _form)]


def pictured(context: Context) -> bool:
    """Whether a context comes with pixels."""
    return any(not name.endswith(_PER_TOKEN) for name in context.inputs or {})


def _form(context: Context) -> Any:
    """What must be equal for two contexts to be joined."""
    inputs = context.inputs or {}
    return [(n, x.shape[1:]) for n, x in sorted(inputs.items()) if not n.endswith(_PER_TOKEN)]


def joined(
    batch: Sequence[Context], model: nn.Module, device: torch.device, T: int
) -> dict[str, Tensor]:
    """Keyword inputs of the model for contexts that are alike, on `device`.

    Raises DataError for contexts with image tokens whose pixels are not there.
    """
    for context in batch:
        if context.inputs is None and (context.flags & FLAG_IMAGE).any():
            raise DataError(
                "a context has tokens that stand for images, and no pixels: a store keeps token "
                "ids only. Run actcache run with the data set instead"
            )
    names = {name for context in batch for name in context.inputs or {}}
    return {name: _join(name, batch, T).to(device) for name in sorted(names) if _takes(model, name)}


def _join(name: str, batch: Sequence[Context], T: int) -> Tensor:
    found = [(context, (context.inputs or {}).get(name)) for context in batch]
    if not name.endswith(_PER_TOKEN):
        return torch.cat([x for _, x in found if x is not None])
    empty = torch.zeros(0, dtype=torch.int64)
    return torch.stack([pad(x if x is not None else empty, (0, T - _len(x))) for _, x in found])


def _len(x: Tensor | None) -> int:
    return 0 if x is None else len(x)


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the model wants token types; one that makes positions of them must have them."""
    if not name.endswith(_PER_TOKEN):
        return True
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or "input_ids" not in parameters  # a wrapper passes everything on
