"""From a trained SAE to the saved one: the scale of its inputs goes into the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saetrain.activations import Form
from saetrain.artefact import Description, InferenceSAE

if TYPE_CHECKING:
    from saetrain.linked import Linked
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


def fold_linked(sae: Linked, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """`weights` (W_enc, b_enc, W_dec, b_dec) between other hooks, folded, by name.

    W_enc (H·D, F) <- s W_enc, b_enc <- b_enc - c s W_enc, W_dec (F, G·E) <- W_dec / s,
    b_dec <- b_dec / s + c, with s and c of every channel. In float64: where c is large, the two
    parts of b_enc nearly cancel.
    """
    W_enc, b_enc, W_dec, b_dec = (w.detach().double() for w in weights)
    W_enc = W_enc * sae.in_scale.double()[:, None]
    out_scale = sae.out_scale.double()
    folded = {
        "W_enc": W_enc,
        "b_enc": b_enc - sae.in_center.double() @ W_enc,
        "W_dec": W_dec / out_scale,
        "b_dec": b_dec / out_scale + sae.out_center.double(),
    }
    return {name: w.to(sae.out_scale.dtype) for name, w in folded.items()}


def describe(sae: Linked, kind: str, form: Form, **more: Any) -> Description:
    """What sae.json says of a dictionary between other hooks."""
    return Description(
        kind=kind,
        activation=form.activation,
        k=form.k,
        d_in=sae.d_in,
        n_latents=sae.n_latents,
        d_out=sae.d_out,
        hooks_in=sae.hooks_in,
        hooks_out=sae.hooks_out,
        apply_b_dec_to_input=False,
        source=origin(sae),
        **more,
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
