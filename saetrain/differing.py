"""In which settings runs differ: what names a run in tables and on the page of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Settings that do not decide the numbers, or that differ because the others do.
_ASIDE = (
    *("runs_dir", "sae_name", "sae_series", "wandb", "progress", "report", "fresh", "store"),
    *("log_every", "checkpoint", "device", "early_stop", "saes_path", "metrics_path", "fused"),
)
_WIDTH = 72  # of a name


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted settings whose values are not the same in all of `configs`.

    Those of the most values come first, then those that all have: what a sweep varies stands before
    what another architecture brings along.
    """
    keys = dict.fromkeys(k for c in configs for k in c if k.split(".")[0] not in _ASIDE)
    values = {k: [c.get(k) for c in configs] for k in keys}
    counts = {k: len({json.dumps(v) for v in found}) for k, found in values.items()}
    some = [k for k in keys if counts[k] > 1]
    return sorted(some, key=lambda k: (-counts[k], None in values[k]))


def names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each of these flat settings, what tells it from the others: `sae.k=4 optim.lr=0.001`.

    Long names are cut off.
    """
    keys = differing(configs)
    found = [" ".join(f"{k}={_typed(c[k])}" for k in keys if c.get(k) is not None) for c in configs]
    return [n if len(n) <= _WIDTH else f"{n[: _WIDTH - 1]}…" for n in found]


def _typed(value: Any) -> str:
    """As one would type it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
