"""From a trained SAE to the saved one: the scale of its inputs goes into the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saetrain.activations import Form
from saetrain.artefact import InferenceSAE

if TYPE_CHECKING:
    from saetrain.saes.base import SAE


def fold(
    sae: SAE,
    weights: Sequence[Tensor],
    form: Form,
    options: Mapping[str, Any] | None = None,
) -> InferenceSAE:
    """Fold x' = s (x - c) into `weights` (W_enc, b_enc, W_dec, b_dec) in standardised units.

    W_enc <- s W_enc, W_dec <- W_dec / s, b_dec <- b_dec / s + c; b_enc, thresholds and the latents
    do not change. For encoders that subtract b_dec from an input of the hook they reconstruct.
    """
    W_enc, b_enc, W_dec, b_dec = (w.detach() for w in weights)
    s, c = sae.in_scale, sae.in_center
    return InferenceSAE(
        W_enc * s,
        b_enc.clone(),
        W_dec / s,
        b_dec / s + c,
        activation=form.activation,
        k=form.k,
        threshold=None if form.threshold is None else form.threshold.detach().clone(),
        hooks_in=sae.hooks_in,
        hooks_out=sae.hooks_out,
        options=options,
        source=origin(sae),
    )


def origin(sae: SAE) -> dict[str, Any]:
    """What `source` says of every trained SAE: architecture, settings, package version."""
    return {
        "architecture": sae.name,
        "sae": json.loads(json.dumps(dataclasses.asdict(sae.cfg))),
        "package_version": _package_version(),
    }


def _package_version() -> str:
    try:
        return version("actcache-saetrain")
    except PackageNotFoundError:
        return "not installed"
