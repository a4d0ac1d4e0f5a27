"""One hook or several: how the vectors of a token's hooks lie together.

One hook is (..., D). Several hooks of one width are stacked in order, (..., H, D); that is what
`encode` takes and `decode` gives. Inside, where a product over all hooks is meant, they are laid
end to end, (..., H·D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saetrain.errors import ConfigError
from saetrain.saes.base import HookSpace


def stacked(acts: Mapping[str, Tensor], hooks: Sequence[str]) -> Tensor:
    """(..., D) of one hook, (..., H, D) of several."""
    if len(hooks) == 1:
        return acts[hooks[0]]
    return torch.stack([acts[hook] for hook in hooks], dim=-2)


def end_to_end(acts: Mapping[str, Tensor], hooks: Sequence[str]) -> Tensor:
    """(..., H·D); one hook passes as it is."""
    return acts[hooks[0]] if len(hooks) == 1 else torch.cat([acts[h] for h in hooks], dim=-1)


def split(x: Tensor, n_hooks: int) -> Tensor:
    """(..., H·D) as `stacked` has it."""
    return x if n_hooks == 1 else x.reshape(*x.shape[:-1], n_hooks, -1)


def joined(x: Tensor, n_hooks: int) -> Tensor:
    """What `stacked` made, end to end. ValueError if x has another number of hooks."""
    if n_hooks == 1:
        return x
    if x.dim() < 2 or x.shape[-2] != n_hooks:
        raise ValueError(f"expected (..., {n_hooks} hooks, width), got {tuple(x.shape)}")
    return x.flatten(-2)


def common_width(spaces: Mapping[str, HookSpace], hooks: Sequence[str], word: str) -> int:
    """The width of all `hooks`; `word` is what the user typed. ConfigError if they differ."""
    widths = {hook: spaces[hook].d for hook in hooks}
    if len(set(widths.values())) > 1:
        each = ", ".join(f"{hook} has {d}" for hook, d in widths.items())
        raise ConfigError(f"{word}: expected hooks of one width, but {each}")
    return next(iter(widths.values()))
