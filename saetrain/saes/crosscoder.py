"""Crosscoder: one set of latents that reads several hooks and reconstructs them all, layers of a
model or one layer of several models (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer
Features and Model Diffing", Transformer Circuits).

f = act(Σ_h x'_h W_enc,h + b_enc),  ŷ'_g = f W_dec,g + b_dec,g
loss = reconstruction(y' - ŷ') + λ Σ_i f_i Σ_g ||W_dec,g,i|| + auxk_alpha · auxk(y' - ŷ')

The sum of lengths, not the length of all hooks together, is what a latent costs: as an L1 over
hooks it lets a latent write to few of them. `row_norm=concat` takes the latter. With
decoder_norm=free that norm also weighs selections, which makes topk and batchtopk fair to latents
of one hook (Minder et al. 2025, arXiv 2504.02922); with decoder_norm=unit the rows of all hooks
together have length 1, and selections are not weighted. `hooks_out` other than `hooks_in` makes it
an acausal transcoder.

Laid end to end it is a dictionary of width H·D, and as fast. Hooks must have one width.

Shapes: H input hooks of width D, G output hooks of width E, F latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from saetrain.artefact import ArtefactError, Description, Inference, register_kind
from saetrain.codes import Codes, decode_codes
from saetrain.errors import ConfigError
from saetrain.fold import describe, fold_linked
from saetrain.linked import Linked, LinkedConfig
from saetrain.saes.base import register
from saetrain.stacking import joined, split


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig(LinkedConfig):
    HOOK_FIELDS: ClassVar[tuple[str, ...]] = ("hooks_in", "hooks_out")
    NAMES_INPUTS: ClassVar[bool] = True

    hooks_in: tuple[str, ...] | None = None  # hooks that are read
    hooks_out: tuple[str, ...] | None = None  # hooks that are reconstructed; None: the same
    row_norm: Literal["sum", "concat"] = "sum"  # a latent's size: Σ of its lengths per hook, or one
    init_encoder: Literal["tied", "random"] = "tied"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_hook_out(self.hook_out, "crosscoder")
        if self.row_norm == "concat" and self.decoder_norm == "unit" and self.penalty is None:
            warnings.warn(
                "sae.row_norm=concat has no effect: sae.decoder_norm=unit weighs no selection, and "
                "there is no sae.penalty",
                stacklevel=3,
            )

    def hooks(self, hook: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """ConfigError unless several different hooks are named."""
        if not self.hooks_in:
            raise ConfigError(
                "missing: sae.hooks_in. sae.name=crosscoder reads several hooks, such as "
                "sae.hooks_in=[resid.1,resid.2], or of several stores "
                "'stores={base:PATH,chat:PATH}' sae.hooks_in=[base:resid.2,chat:resid.2]"
            )
        if len(self.hooks_in) < 2:
            raise ConfigError(
                f"sae.hooks_in=[{self.hooks_in[0]}]: a crosscoder reads at least two hooks. For "
                f"one, hook={self.hooks_in[0]} sae=topk"
            )
        check_distinct(self.hooks_in, "sae.hooks_in")
        if self.hooks_out == ():
            raise ConfigError("sae.hooks_out=[]: name hooks, or null for those of sae.hooks_in")
        check_distinct(self.hooks_out or (), "sae.hooks_out")
        return self.hooks_in, self.hooks_out or self.hooks_in


def refuse_hook_out(hook_out: str | None, name: str) -> None:
    """ConfigError where the single hook_out is given to an architecture of several."""
    if hook_out is not None:
        raise ConfigError(
            f"sae.hook_out={hook_out} has no meaning with sae.name={name}, whose hooks are "
            "sae.hooks_in and sae.hooks_out. Remove sae.hook_out"
        )


def check_distinct(hooks: Sequence[str], word: str) -> None:
    """ConfigError if a hook is named twice."""
    twice = sorted({hook for hook in hooks if hooks.count(hook) > 1})
    if twice:
        raise ConfigError(f"{word} names {', '.join(twice)} more than once")


@register("crosscoder", CrosscoderConfig)
class Crosscoder(Linked):
    """One set of latents over several hooks, of one model or of several."""

    cfg: CrosscoderConfig

    def row_norms(self) -> Tensor:
        """(F,) Σ_g ||W_dec,g,i||, or the length of all of it."""
        return self._sizes(self.W_dec)

    def _sizes(self, W_dec: Tensor) -> Tensor:
        rows_FGE = W_dec.reshape(len(W_dec), -1, self.d_out)
        if self.cfg.row_norm == "concat":
            rows_FGE = W_dec[:, None]
        each_FG: Tensor = torch.linalg.vector_norm(rows_FGE, dim=2)
        return each_FG.sum(1)

    def penalty_norms(self) -> Tensor | None:
        """(F,) Σ_g ||W_dec,g,i|| of rows of length 1; free ones have been divided by it."""
        if self.cfg.decoder_norm == "free" or self.cfg.row_norm == "concat":
            return None
        return self._sizes(self.W_dec)

    def to_inference(self) -> InferenceCrosscoder:
        """Folded weights in raw units, by hook."""
        form, folded = self.activation.form(), fold_linked(self, self.weights())
        n_in, n_out = len(self.hooks_in), len(self.hooks_out)
        tensors = {
            "W_enc": folded["W_enc"].reshape(n_in, self.d_in, -1),
            "b_enc": folded["b_enc"],
            "W_dec": folded["W_dec"].reshape(-1, n_out, self.d_out).transpose(0, 1).contiguous(),
            "b_dec": folded["b_dec"].reshape(n_out, self.d_out),
        }
        if form.threshold is not None:
            tensors["threshold"] = form.threshold.detach().clone()
        return InferenceCrosscoder.build(describe(self, "crosscoder", form), tensors)


@register_kind("crosscoder")
class InferenceCrosscoder(Inference):
    """f = act(Σ_h x_h W_enc,h + b_enc),  ŷ_g = f W_dec,g + b_dec,g; hooks lead in every tensor."""

    W_enc: Tensor  # (H, D, F)
    b_enc: Tensor  # (F,)
    W_dec: Tensor  # (G, F, E)
    b_dec: Tensor  # (G, E)

    @classmethod
    def check(cls, description: Description) -> None:
        super().check(description)
        if description.apply_b_dec_to_input:
            raise ArtefactError(f"kind={cls.kind}: expected apply_b_dec_to_input=false")
        if not description.hooks_in or not description.hooks_out:
            raise ArtefactError(f"kind={cls.kind}: expected at least one hook in and one out")

    @classmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        n_in, n_out = len(description.hooks_in), len(description.hooks_out)
        n_latents, d_out = description.n_latents, description.d_out
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (n_in, description.d_in, n_latents),
            "b_enc": (n_latents,),
            "W_dec": (n_out, n_latents, d_out),
            "b_dec": (n_out, d_out),
        }
        return shapes | (
            {"threshold": (n_latents,)} if description.activation == "jumprelu" else {}
        )

    def encode(self, x: Tensor) -> Codes:
        """Latents of raw activations x (..., H, D), in the weights' dtype."""
        x = joined(x.to(self.W_enc.dtype), len(self.hooks_in))
        return self.form()(linear(x, self.W_enc.flatten(0, 1).T, self.b_enc))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., G, E) in raw units, (..., E) of one hook, in the weights' dtype."""
        each = [decode_codes(codes, W) + b for W, b in zip(self.W_dec, self.b_dec, strict=True)]
        return split(torch.cat(each, dim=-1), len(each))
