"""Rows of tests/test_saes.py for SAEs between different hooks, and their planted data.

Three layers of width 16 read features that each start in one layer; MLP outputs of width 12 are
sums of what the features of their own and earlier layers write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from saes_reference import Terms, jumprelu_oracle, topk_oracle
from saes_reference_multi import clt_reference, crosscoder_reference, transcoder_reference
from saes_rows import D, Law, Row, X, above, exactly, planted
from torch import Tensor

from saetrain.codes import Codes, l0
from saetrain.saes.base import SAE

E, N = 12, 2048
GEN = torch.Generator().manual_seed(11)
INS, OUTS = ("resid_pre.0", "resid_pre.1", "resid_pre.2"), ("mlp.0", "mlp.1", "mlp.2")


def _layered() -> tuple[dict[str, Tensor], dict[tuple[int, int], Tensor]]:
    """(hook -> rows, (source, target) -> what its features write (8, E))."""
    acts: dict[str, Tensor] = {}
    writes, codes = {}, []
    for i, hook in enumerate(INS):
        fires = torch.rand(N, 8, generator=GEN) < 0.12
        codes.append(fires * (1 + torch.rand(N, 8, generator=GEN)))
        reads = torch.nn.functional.normalize(torch.randn(8, D, generator=GEN), dim=1)
        noise = 0.02 * torch.randn(N, D, generator=GEN)  # no two rows are equal
        acts[hook] = codes[i] @ reads * (i + 1) + torch.randn(D, generator=GEN) + noise
        for t in range(i, 3):
            writes[i, t] = torch.randn(8, E, generator=GEN)
    for t, hook in enumerate(OUTS):
        y = sum(codes[i] @ writes[i, t] for i in range(t + 1))
        acts[hook] = y * 3.0**t + torch.randn(E, generator=GEN)
    return acts, writes


LAYERS, WRITES = _layered()
PAIR = {"resid.1": X[:N], "mlp.2": torch.tanh(X[:N] @ torch.randn(D, E, generator=GEN)) * 2 + 1}
CODES_OF_BOTH = planted(N, 2 * D, 24, 2, seed=13, offset=0.0)  # rows of two hooks, end to end
BOTH = {
    "resid.1": CODES_OF_BOTH[0][:, :D] + 1,
    "resid.2": 4 * CODES_OF_BOTH[0][:, D:] + torch.randn(D, generator=GEN),
}


@dataclass(frozen=True, kw_only=True)
class LinkedRow(Row):
    """A row whose reference is `(w, x, y, dead, kind, variances)`."""

    targets: tuple[str, ...]

    @property
    def out_shape(self) -> tuple[int, ...]:
        width = self.acts[self.targets[0]].shape[1]
        return (width,) if len(self.targets) == 1 else (len(self.targets), width)

    def norms(self, W_dec: Tensor, policy: str) -> Tensor:
        if self.name == "crosscoder" and policy == "free":
            return W_dec.reshape(len(W_dec), *self.out_shape).norm(dim=2).sum(1)
        return W_dec.norm(dim=1)

    def terms(self, sae: SAE, w: dict[str, Tensor], rows: slice, kind: str) -> Terms:
        """Standardised here from the data itself: mean off, mean length √d (the default units)."""
        x = torch.stack([self._own(h, rows)[0] for h in sae.hooks_in], dim=1)
        y = torch.stack([self._own(h, rows)[0] for h in self.targets], dim=1)
        variances = [self._own(h, rows)[1] for h in self.targets]
        return self.reference(w, x, y, sae.dead, kind, variances)

    def _own(self, hook: str, rows: slice) -> tuple[Tensor, float]:
        """Standardised rows of a hook, and the total variance of all of its standardised rows."""
        mean, x = self.acts[hook].mean(0), self.acts[hook].double()
        scale = (x.shape[1] ** 0.5 / x.norm(dim=1).mean()).float().double()  # as it is kept
        return (x[rows] - mean) * scale, float((x * scale).var(0, correction=0).sum())


def exactly_per_layer(k: int, n_layers: int) -> Law:
    """`exactly` in each layer."""

    def law(codes: Codes, h_BF: Tensor) -> None:
        each = [(h > 0).sum(-1).clamp(max=k) for h in h_BF.chunk(n_layers, dim=1)]
        assert torch.equal(l0(codes), sum(each))

    return law


def tanh(f: Tensor) -> Terms:
    """λ = 0.01, c = 4, whatever the norms: latents are in units of f||w||."""
    return {"tanh": 0.01 * torch.stack([torch.tanh(4 * row).sum() for row in f]).mean()}


def jump(h: Tensor, w: Mapping[str, Tensor], layer: int) -> Tensor:
    """h 1[h > θ] with the slope of a ramp of width ε = 0.5 in θ, and in h, too."""
    theta = w["activation.threshold"].reshape(3, -1)[layer]
    ramp = ((h - theta.detach()) / 0.5 + 0.5).clamp(0, 1)
    return jumprelu_oracle(h, theta, 0.5)[0] + theta.detach() * (ramp - ramp.detach())


TRANSCODER = LinkedRow(
    name="transcoder",
    values={"k": 2, "aux_k": 3, "hook_out": "mlp.2"},
    trained=exactly(2),
    inferred=exactly(2),
    reference=transcoder_reference,
    acts=PAIR,
    targets=("mlp.2",),
)
SKIP = replace(TRANSCODER, more="skip", values=TRANSCODER.values | {"skip": True}, passes_by=True)
CROSSCODER = LinkedRow(
    name="crosscoder",
    values={"l1_coefficient": 0.05, "hooks_in": tuple(BOTH)},
    trained=above(0),
    inferred=above(0),
    reference=crosscoder_reference,
    acts=BOTH,
    targets=tuple(BOTH),
)
CLT = LinkedRow(
    name="clt",
    values={
        "n_latents": 24,
        "hooks_in": INS,
        "hooks_out": OUTS,
        "activation": {"threshold": 0.3, "bandwidth": 0.5},
        "penalty": {"coefficient": 0.01},
        "init_norm": 1.0,  # some pre-activations of inputs of length 1 are above 0.3, too
    },
    trained=above(0.3),
    inferred=above(0.3),
    reference=clt_reference(jump, tanh),
    acts=LAYERS,
    targets=OUTS,
)
CLT_TOPK = LinkedRow(
    name="clt",
    more="clt_topk",
    values={
        "n_latents": 24,
        "hooks_in": INS,
        "hooks_out": OUTS,
        "activation": {"name": "topk", "k": 2},
        "penalty": None,
        "auxk_alpha": 1 / 32,
        "aux_k": 3,
    },
    trained=exactly_per_layer(2, 3),
    inferred=exactly_per_layer(2, 3),
    half_error=0.06,  # near ties of so few latents fall the other way
    reference=clt_reference(lambda h, w, i: topk_oracle(h, 2), lambda f: {}, aux_k=3),
    acts=LAYERS,
    targets=OUTS,
)
LINKED = [TRANSCODER, SKIP, CROSSCODER, CLT, CLT_TOPK]
