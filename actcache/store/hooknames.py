"""Hook names, as text: which spellings mean the same point of a transformer.

Canonical names are the short aliases, equal for every model family:

    embed          token embeddings
    resid_pre.L    residual stream entering block L     blocks.L.hook_resid_pre
    attn.L         what block L's attention adds to it  blocks.L.hook_attn_out
    mlp.L          what block L's MLP adds to it        blocks.L.hook_mlp_out
    resid.L        residual stream leaving block L      blocks.L.hook_resid_post

The right-hand column is TransformerLens' spelling. Which module a name means in which family is in
actcache/families.py. Everything else is a module path with an
optional side, `PATH`, `PATH:in`, `PATH:out` or `PATH:out.1` (item 1 of a tuple).
"""

from __future__ import annotations

import re

KINDS = ("resid", "resid_pre", "mlp", "attn")
_LENS = {
    "hook_resid_post": "resid",
    "hook_resid_pre": "resid_pre",
    "hook_mlp_out": "mlp",
    "hook_attn_out": "attn",
}
_LENS_BLOCK = re.compile(r"blocks\.(\d+)\.(\w+)")
_ALIAS = re.compile(rf"({'|'.join(KINDS)})\.(\d+)")


def canonical(name: str) -> str:
    """The canonical spelling of `name`; module paths come back with a default ':out' removed."""
    if name == "hook_embed":
        return "embed"
    lens = _LENS_BLOCK.fullmatch(name)
    if lens and lens[2] in _LENS:
        return f"{_LENS[lens[2]]}.{int(lens[1])}"
    return name.removesuffix(":out")


def parse_alias(name: str) -> tuple[str, int] | None:
    """('resid', 2) for a canonical block alias, None for anything else."""
    match = _ALIAS.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def storage_key(name: str) -> str:
    """A canonical name as one zarr node name: letters, digits, dot, dash, underscore."""
    key = name.replace(":", "--")
    if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,200}", key) or set(key) == {"."}:
        raise ValueError(f"hook name {name!r} cannot be stored: use letters, digits and . _ - :")
    return key
