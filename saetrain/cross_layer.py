"""The saved cross-layer transcoder, and the order of its codes: those of layer 0, of layer 1, ...

Names and orientation are circuit-tracer's, whose files hold one layer each: W_enc_i (F, D),
b_enc_i, b_dec_i, threshold_i where the activation has one, and W_dec_i (F, L-i, E), what latents of
layer i write to layers i, i+1, .... `n_latents` counts all layers, `k` is that of a layer.

Shapes: L layers, D input width, E output width, F latents of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from saetrain.activations import Form
from saetrain.artefact import ArtefactError, Description, Inference, register_kind
from saetrain.codes import Codes, SparseCodes, decode_codes


def layer_after_layer(codes: Codes) -> Codes:
    """Codes (..., L, F) of each layer as codes (..., L·F) of all."""
    if not isinstance(codes, SparseCodes):
        return codes.flatten(-2)
    n_layers, size = codes.values.shape[-2], codes.n_latents
    start_L1 = torch.arange(n_layers, device=codes.indices.device)[:, None] * size
    indices = (codes.indices + start_L1).flatten(-2)
    return SparseCodes(codes.values.flatten(-2), indices, n_layers * size)


def by_layer(codes: Codes, n_layers: int, *, ordered: bool = False) -> list[Codes]:
    """Codes (..., L·F) as those of each layer, (..., F).

    Sparse codes in the order that `encode` gives are cut; others keep all slots in every layer,
    at 0 where they belong to another one. `ordered` says that they are, without a look.
    """
    if not isinstance(codes, SparseCodes):
        return list(codes.chunk(n_layers, dim=-1))
    size = codes.n_latents // n_layers
    layer, inside = codes.indices // size, codes.indices % size
    slots = codes.indices.shape[-1] // n_layers
    where = torch.arange(codes.indices.shape[-1], device=layer.device) // max(1, slots)
    if ordered or bool((layer == where).all()):
        values_L, indices_L = codes.values.chunk(n_layers, -1), inside.chunk(n_layers, -1)
        used_L = [None] * n_layers if codes.used is None else codes.used.chunk(n_layers, -1)
        cuts = zip(values_L, indices_L, used_L, strict=True)
        return [SparseCodes(values, indices, size, used) for values, indices, used in cuts]
    return [SparseCodes(codes.values * (layer == i), inside, size) for i in range(n_layers)]


@register_kind("clt")
class InferenceClt(Inference):
    """f^i = act(W_enc_i x_i + b_enc_i),  ŷ_l = b_dec_l + Σ_{i≤l} f^i W_dec_i[:, l-i]."""

    @classmethod
    def check(cls, description: Description) -> None:
        super().check(description)
        if description.apply_b_dec_to_input:
            raise ArtefactError(f"kind={cls.kind}: expected apply_b_dec_to_input=false")
        n_in, n_out = len(description.hooks_in), len(description.hooks_out)
        if n_in != n_out or n_in < 1:
            raise ArtefactError(
                f"kind={cls.kind}: expected as many hooks out as in, got {n_in} in, {n_out} out"
            )
        if description.n_latents % n_in:
            raise ArtefactError(
                f"kind={cls.kind}: {n_in} layers do not divide n_latents={description.n_latents}"
            )
        per_layer, k = description.n_latents // n_in, description.k or 1
        if k > per_layer or (description.activation == "groupmax" and per_layer % k):
            raise ArtefactError(
                f"kind={cls.kind}: k={k} does not fit {per_layer} latents per layer"
            )

    @classmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        n_layers = len(description.hooks_in)
        size, d_in, d_out = description.n_latents // n_layers, description.d_in, description.d_out
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(n_layers):
            shapes |= {f"W_enc_{i}": (size, d_in), f"b_enc_{i}": (size,), f"b_dec_{i}": (d_out,)}
            shapes[f"W_dec_{i}"] = (size, n_layers - i, d_out)
            if description.activation == "jumprelu":
                shapes[f"threshold_{i}"] = (size,)
        return shapes

    def layer(self, name: str, i: int) -> Tensor:
        """W_enc, b_enc, W_dec, b_dec or threshold of layer i."""
        return self.get_parameter(f"{name}_{i}")

    def encode(self, x: Tensor) -> Codes:
        """Latents (..., L·F) of raw activations x (..., L, D), in the weights' dtype."""
        layers = []
        for i, x_i in enumerate(x.to(self.layer("W_enc", 0).dtype).unbind(-2)):
            h = linear(x_i, self.layer("W_enc", i), self.layer("b_enc", i))
            theta = self.layer("threshold", i) if self.activation == "jumprelu" else None
            layers.append(Form(activation=self.activation, k=self.k, threshold=theta)(h))
        sparse = [codes for codes in layers if isinstance(codes, SparseCodes)]
        if not sparse:
            return torch.cat([codes for codes in layers if isinstance(codes, Tensor)], dim=-1)
        values = torch.stack([codes.values for codes in sparse], dim=-2)
        indices = torch.stack([codes.indices for codes in sparse], dim=-2)
        return layer_after_layer(SparseCodes(values, indices, sparse[0].n_latents))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., L, E) in raw units, in the weights' dtype."""
        n = len(self.hooks_in)
        y = [self.layer("b_dec", i) for i in range(n)]
        for i, f in enumerate(by_layer(codes, n)):
            written = decode_codes(f, self.layer("W_dec", i).flatten(1))
            for later, part in enumerate(torch.split(written, self.d_out, dim=-1)):
                y[i + later] = y[i + later] + part
        return torch.stack(y, dim=-2)
