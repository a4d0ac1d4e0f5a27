"""Cross-layer transcoder: latents of layer i read layer i and write to the outputs of all layers
from i on (Ameisen et al. 2025, "Circuit Tracing", Transformer Circuits). A feature that many layers
carry along is found once, and circuits get shorter.

f^i = act(x'^i W_enc^i + b_enc^i),  ŷ'^l = b_dec^l + Σ_{i≤l} f^i W_dec^{i→l}
loss = reconstruction(y' - ŷ') + penalty(f) + auxk_alpha · auxk(y' - ŷ')

`sae.n_latents` is the number in each of the L layers; codes hold all L·F of them, layer after
layer. topk and groupmax choose in each layer by itself, batchtopk among all layers of a batch (k is
the mean per layer). A latent's size, in penalties, selections and thresholds, is the length of all
its decoder vectors together. AuxK revives dead latents of each layer by the residuals that they
reach; resampling is refused, as no single token says what a latent should write to all layers.

Cost: L encoders, L(L+1)/2 decoders of F·E parameters; sparse codes gather their rows only.

Shapes: B tokens, L layers, D input width, E output width, F latents of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from actcache.store.hooknames import parse_alias
from saetrain import init
from saetrain.activations import BatchTopK, GroupMax, TopK, fired
from saetrain.codes import (
    Codes,
    SparseCodes,
    decode_codes,
    ragged_pays,
    select_above,
    select_batchtopk_of,
    select_topk,
    topk_codes,
)
from saetrain.cross_layer import InferenceClt, by_layer, layer_after_layer
from saetrain.dictionary import DictionaryConfig, Picked, Weights
from saetrain.errors import ConfigError
from saetrain.fold import describe
from saetrain.linked import Linked, LinkedConfig
from saetrain.losses import explained_by
from saetrain.saes.base import HookSpace, register
from saetrain.saes.crosscoder import check_distinct, refuse_hook_out
from saetrain.stacking import joined


@dataclass(frozen=True, kw_only=True)
class CltConfig(LinkedConfig):
    HOOK_FIELDS: ClassVar[tuple[str, ...]] = ("hooks_in", "hooks_out")
    NAMES_INPUTS: ClassVar[bool] = True

    hooks_in: tuple[str, ...] | None = None  # input of each layer, first layer first
    hooks_out: tuple[str, ...] | None = None  # output of each layer, in the same order
    init_encoder: Literal["tied", "random"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_hook_out(self.hook_out, "clt")
        if self.init_encoder == "tied":
            raise ConfigError(
                "sae.init_encoder=tied with sae.name=clt: a latent has one encoder and several "
                "decoders. sae.init_encoder=random"
            )
        if self.resample_every is not None:
            raise ConfigError(
                f"sae.resample_every={self.resample_every} with sae.name=clt: no single token says "
                "what a latent should write to all layers. sae.auxk_alpha revives dead latents"
            )

    def hooks(self, hook: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """ConfigError unless every layer has an input and an output, in order."""
        if not self.hooks_in or not self.hooks_out:
            missing = "sae.hooks_in" if not self.hooks_in else "sae.hooks_out"
            raise ConfigError(
                f"missing: {missing}. sae.name=clt reads and predicts one hook per layer, such as "
                "sae.hooks_in=[resid_pre.0,resid_pre.1] sae.hooks_out=[mlp.0,mlp.1]"
            )
        if len(self.hooks_in) != len(self.hooks_out):
            raise ConfigError(
                f"sae.hooks_in names {len(self.hooks_in)} hooks and sae.hooks_out "
                f"{len(self.hooks_out)}: a clt has one of each per layer"
            )
        if len(self.hooks_in) < 2:
            raise ConfigError(
                "sae.hooks_in: a clt has at least two layers. For one, "
                f"hook={self.hooks_in[0]} sae=transcoder sae.hook_out={self.hooks_out[0]}"
            )
        for word in ("hooks_in", "hooks_out"):
            check_distinct(getattr(self, word), f"sae.{word}")
            _check_order(getattr(self, word), f"sae.{word}")
        return self.hooks_in, self.hooks_out

    def latents(self, d_in: int) -> int:
        """L·F."""
        assert self.hooks_in is not None  # hooks() was asked first
        return len(self.hooks_in) * super().latents(d_in)


def _check_order(hooks: Sequence[str], word: str) -> None:
    """ConfigError if the names tell layers and these do not ascend."""
    layers = [parse_alias(hook.rpartition(":")[2]) for hook in hooks]
    numbers = [layer[1] for layer in layers if layer is not None]
    if len(numbers) == len(hooks) and numbers != sorted(set(numbers)):
        raise ConfigError(
            f"{word}=[{','.join(hooks)}]: expected layers in ascending order, because latents of a "
            "layer write to those after it"
        )


class CltWeights(NamedTuple):
    """Effective weights in standardised units."""

    W_enc: Tensor  # (L, D, F)
    b_enc: Tensor  # (L, F)
    W_dec: tuple[Tensor, ...]  # of source i: (F, (L-i)·E)
    b_dec: Tensor  # (L·E,)


@register("clt", CltConfig)
class Clt(Linked):
    """Latents of each layer read it and write to all layers from there on."""

    cfg: CltConfig
    W_dec: nn.ParameterList  # type: ignore[assignment]  # of source i: (F, (L-i)·E)

    def _check_hooks(self, cfg: DictionaryConfig, spaces: Mapping[str, HookSpace]) -> None:
        super()._check_hooks(cfg, spaces)
        assert isinstance(cfg, CltConfig)
        hooks_in = cfg.hooks(next(iter(spaces)))[0]
        d_in = spaces[hooks_in[0]].d
        per_layer = cfg.latents(d_in) // len(hooks_in)
        because = f" (sae.expansion_factor={cfg.expansion_factor} x width {d_in})"
        cfg.activation.check(per_layer, because if cfg.expansion_factor else "")

    def _make_weights(self, mean_D: Tensor) -> None:
        self.n_layers = self.selections = len(self.hooks_in)
        self.per_layer = self.n_latents // self.n_layers
        self.aux_k = min(self.aux_k, self.per_layer)
        rows, norm = self._start_norms()
        self.W_dec = nn.ParameterList(
            nn.Parameter(init.random_rows(self.per_layer, (self.n_layers - i) * self.d_out, rows))
            for i in range(self.n_layers)
        )
        columns = [init.random_rows(self.per_layer, self.d_in, norm) for _ in self.hooks_in]
        self.W_enc = nn.Parameter(torch.stack(columns).mT)  # one latent after the other
        self.b_enc = nn.Parameter(self.W_enc.new_zeros(self.n_layers, self.per_layer))
        self.b_dec = nn.Parameter(self.W_enc.new_zeros(self.n_layers * self.d_out))
        if self.cfg.init_bias != "zero":
            origin_L1D = self.in_origin.reshape(self.n_layers, 1, self.d_in)
            self.b_enc.data -= (origin_L1D @ self.W_enc.data).squeeze(1)
            self.b_dec.data += self._out_origin

    # -- the maths --------------------------------------------------------------------------------

    def weights(self) -> CltWeights:  # type: ignore[override]
        """Effective weights: all decoder vectors of a latent together have length 1."""
        W_dec = tuple(self.W_dec)
        if self.cfg.decoder_norm == "unit":
            return CltWeights(self.W_enc, self.b_enc, W_dec, self.b_dec)
        norms = [torch.linalg.vector_norm(W, dim=1) for W in W_dec]
        norm_LF = torch.stack(norms)
        W_dec = tuple(W / n[:, None] for W, n in zip(W_dec, norms, strict=True))
        return CltWeights(self.W_enc * norm_LF[:, None], self.b_enc * norm_LF, W_dec, self.b_dec)

    def pre_activations(self, x: Tensor, w: Weights | CltWeights) -> Tensor:
        """(..., L, F) of x' (..., L·D)."""
        x = x.reshape(*x.shape[:-1], self.n_layers, self.d_in)
        return torch.einsum("...ld,ldf->...lf", x, w.W_enc) + w.b_enc

    def _infer(self, h: Tensor) -> Codes:
        """Inference form of pre-activations (..., L, F), codes of all layers."""
        if isinstance(self.activation, TopK | GroupMax):
            return layer_after_layer(self.activation.infer(h))
        return self.activation.infer(h.flatten(-2))

    def _select(self, h: Tensor) -> Codes:
        """Training form likewise."""
        if isinstance(self.activation, TopK | GroupMax | BatchTopK):
            return layer_after_layer(self.activation.select(h))
        return self.activation.select(h.flatten(-2))

    def encode(self, x: Tensor) -> Codes:
        """Latents (..., L·F) of raw activations x (..., L, D)."""
        x = self.standardise(joined(x, self.n_layers))
        return self._infer(self.pre_activations(x, self.weights()))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., L, E) in raw units."""
        w = self.weights()
        return self.raw(self._decoded(codes, w) + w.b_dec)

    def predict(self, codes: Codes, x: Tensor, w: Weights | CltWeights) -> Tensor:
        """(..., L·E) in standardised units."""
        return self._decoded(codes, cast(CltWeights, w), ordered=True) + w.b_dec

    def _decoded(self, codes: Codes, w: CltWeights, *, ordered: bool = False) -> Tensor:
        """(..., L·E) without the bias: source i fills the last L-i blocks."""
        layers = by_layer(codes, self.n_layers, ordered=ordered)
        parts = [decode_codes(f, W) for f, W in zip(layers, w.W_dec, strict=True)]
        y = parts[0]
        for part in parts[1:]:
            y = y + nn.functional.pad(part, (y.shape[-1] - part.shape[-1], 0))
        return y

    # -- training ---------------------------------------------------------------------------------

    def pick(self, x_BD: Tensor, w: Weights | CltWeights) -> Picked:
        """Codes of standardised inputs in their training form, and AuxK's candidates."""
        w, needs_pre = cast(CltWeights, w), self.penalty is not None and self.penalty.needs_pre
        if isinstance(self.activation, TopK) and not needs_pre:
            return self._pick_topk_layers(x_BD, w, self.activation.cfg.k)
        if ragged_pays(x_BD):
            few = self._pick_above_layers(x_BD, w)
            if isinstance(self.activation, BatchTopK) and not needs_pre:
                few = self._pick_batchtopk(x_BD, w, self.activation.keep(len(x_BD) * self.n_layers))
            if few is not None:
                return few
        h_BLF = self.pre_activations(x_BD, w)
        dead, aux = self._aux_candidates(), None
        if dead is not None:
            alive_LF = ~dead.reshape(self.n_layers, self.per_layer)
            aux = cast(SparseCodes, layer_after_layer(self._best(h_BLF, alive_LF)))
        return Picked(self._select(h_BLF), h_BLF.flatten(-2), aux, dead)

    def _best(self, h_BLF: Tensor, alive_LF: Tensor) -> SparseCodes:
        return topk_codes(h_BLF.masked_fill(alive_LF, 0), self.aux_k)

    def _layers(self, x_BD: Tensor, w: CltWeights) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(x, W, b) of every layer's product."""
        x_LBD = x_BD.reshape(len(x_BD), self.n_layers, self.d_in).unbind(1)
        W_LDF = [W.T for W in w.W_enc.mT.unbind()]  # so gradients are joined as they lie
        return list(zip(x_LBD, W_LDF, w.b_enc, strict=True))

    def _dead_layers(self) -> tuple[Tensor | None, list[Tensor | None]]:
        """Who is dead, and who of each layer."""
        dead = self._aux_candidates()
        return dead, [None] * self.n_layers if dead is None else list(dead.chunk(self.n_layers))

    def _pick_topk_layers(self, x_BD: Tensor, w: CltWeights, k: int) -> Picked:
        """`select_topk` of every layer."""
        (dead, dead_L), layers = self._dead_layers(), self._layers(x_BD, w)
        picked = [
            select_topk(*layer, k, dead_F, self.aux_k)
            for layer, dead_F in zip(layers, dead_L, strict=True)
        ]
        return _joined(picked, dead)

    def _pick_above_layers(self, x_BD: Tensor, w: CltWeights) -> Picked | None:
        """`select_above` of every layer; None where it is for none, or too many fire in one."""
        floor = self.activation.floor()
        if floor is None:
            return None
        (dead, dead_L), layers = self._dead_layers(), self._layers(x_BD, w)
        picked = []
        for layer, floor_F, dead_F in zip(layers, floor.chunk(self.n_layers), dead_L, strict=True):
            found = select_above(*layer, floor_F, dead_F, self.aux_k)
            if found is None:
                return None
            picked.append(found)
        joined = _joined(picked, dead)
        codes, pre_N = fired(self.activation, cast(SparseCodes, joined.codes))
        return replace(joined, codes=codes, pre=pre_N)

    def _pick_batchtopk(self, x_BD: Tensor, w: CltWeights, keep: int) -> Picked:
        """`select_batchtopk_of` all layers."""
        dead, dead_L = self._dead_layers()
        return _joined(select_batchtopk_of(self._layers(x_BD, w), keep, dead_L, self.aux_k), dead)

    def revival(self, e_BE: Tensor, picked: Picked, w: Weights | CltWeights) -> dict[str, Tensor]:
        """{"auxk": term}, empty where AuxK is off, 0 while nothing is dead."""
        if not self.aux_k:
            return {}
        if picked.aux is None or picked.dead is None:
            return {"auxk": e_BE.new_zeros(())}
        guess_BE = self._decoded(picked.aux, cast(CltWeights, w), ordered=True)
        return {"auxk": self.cfg.auxk_alpha * explained_by(guess_BE, e_BE, picked.dead)}

    def decoders(self) -> Sequence[nn.Parameter]:
        """Of each source layer."""
        return list(self.W_dec)

    # -- the saved form ---------------------------------------------------------------------------

    @torch.no_grad()
    def to_inference(self) -> InferenceClt:
        """Folded weights in raw units, a few tensors per layer."""
        w, form, n = self.weights(), self.activation.form(), self.n_layers
        s_LD, c_LD = (t.double().reshape(n, -1) for t in (self.in_scale, self.in_center))
        scale, center = (t.double().reshape(n, -1) for t in (self.out_scale, self.out_center))
        theta = None if form.threshold is None else form.threshold.reshape(n, -1)
        b_dec_LE = w.b_dec.double().reshape(n, -1) / scale + center
        tensors: dict[str, Tensor] = {}
        for i in range(n):
            W_enc_FD = (w.W_enc[i].double() * s_LD[i, :, None]).T
            W_dec = w.W_dec[i].double().reshape(self.per_layer, n - i, -1) / scale[i:]
            tensors |= {f"W_enc_{i}": W_enc_FD, f"W_dec_{i}": W_dec, f"b_dec_{i}": b_dec_LE[i]}
            tensors[f"b_enc_{i}"] = w.b_enc[i].double() - W_enc_FD @ c_LD[i]
            if theta is not None:
                tensors[f"threshold_{i}"] = theta[i]
        folded = {name: t.to(self.W_enc.dtype, copy=True) for name, t in tensors.items()}
        return InferenceClt.build(
            describe(self, "clt", form), {n: t.contiguous() for n, t in folded.items()}
        )


def _joined(
    picked: Sequence[tuple[SparseCodes, SparseCodes | None]], dead: Tensor | None
) -> Picked:
    """Codes and AuxK's candidates of L layers as those of all of them."""
    aux = None
    if dead is not None:
        aux = _side_by_side([p[1] for p in picked if p[1] is not None])
    return Picked(_side_by_side([p[0] for p in picked]), None, aux, dead)


def _side_by_side(layers: Sequence[SparseCodes]) -> SparseCodes:
    """Codes of L layers, each (B, K) of its own latents, as codes (B, L·K) of all of them.

    Those that have fewer slots than another get unused ones.
    """
    size, width = layers[0].n_latents, max(codes.indices.shape[-1] for codes in layers)
    values, indices, used = [], [], []
    for i, codes in enumerate(layers):
        more = (0, width - codes.indices.shape[-1])
        values.append(nn.functional.pad(codes.values, more))
        indices.append(nn.functional.pad(codes.indices, more) + i * size)
        if codes.used is not None:
            used.append(nn.functional.pad(codes.used, more))
    mask = torch.cat(used, dim=-1) if used else None
    n_latents = size * len(layers)
    return SparseCodes(torch.cat(values, dim=-1), torch.cat(indices, dim=-1), n_latents, mask)
