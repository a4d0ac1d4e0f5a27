"""Transcoder: reads one hook and predicts another, such as an MLP's output from its input, so that
its latents are steps of the computation between them (Dunefsky et al. 2024, arXiv 2406.11944).

f = act(x' W_enc + b_enc),  ŷ' = f W_dec + b_dec,  with `skip` also + x' W_skip
loss = reconstruction(y' - ŷ') + penalty(f) + auxk_alpha · auxk(y' - ŷ')

The skip, a linear map that starts at 0, takes what no sparse latent is needed for; latents then
score better on interpretability at no cost in sparsity (Paulo et al. 2025, arXiv 2501.18823). It
costs 6BDE a step. What passes through it is in `reconstruct` and `forward`, not in `decode`.

Shapes: B tokens, D width of `hook`, E width of `sae.hook_out`, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from saetrain.artefact import ArtefactError, Description, Inference, InferenceSAE, register_kind
from saetrain.codes import Codes
from saetrain.dictionary import DictionaryConfig, Weights
from saetrain.errors import ConfigError
from saetrain.fold import describe, fold_linked
from saetrain.linked import Linked, LinkedConfig
from saetrain.saes.base import HookSpace, register
from saetrain.stacking import joined


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(LinkedConfig):
    skip: bool = False  # also a linear map from input to output

    def hooks(self, hook: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """ConfigError unless `hook_out` is another hook."""
        if self.hook_out is None:
            raise ConfigError(
                "missing: sae.hook_out. sae.name=transcoder reads the hook given by hook "
                f"({hook}) and predicts another one, such as sae.hook_out=mlp.2"
            )
        if self.hook_out == hook:
            raise ConfigError(
                f"sae.hook_out={hook} is the input hook, too: a transcoder predicts another hook. "
                "Give another hook or sae.hook_out; to reconstruct the input, sae=topk"
            )
        return (hook,), (self.hook_out,)


@register("transcoder", TranscoderConfig)
class Transcoder(Linked):
    """Predicts another hook from its input; with `skip` also linearly, past the latents."""

    cfg: TranscoderConfig
    W_skip: Tensor  # (E, D), with `skip` only

    def _words(self) -> tuple[str, str]:
        return "hook", "sae.hook_out"

    def _check_hooks(self, cfg: DictionaryConfig, spaces: Mapping[str, HookSpace]) -> None:
        super()._check_hooks(cfg, spaces)
        if len(spaces) != 2:
            raise ConfigError(
                f"sae.name=transcoder reads one hook and predicts one, got {', '.join(spaces)}"
            )

    def _make_weights(self, mean_D: Tensor) -> None:
        super()._make_weights(mean_D)
        if self.cfg.skip:
            self.W_skip = nn.Parameter(self.W_dec.new_zeros(self.d_out, self.d_in))

    def predict(self, codes: Codes, x: Tensor, w: Weights) -> Tensor:
        """(..., E) in standardised units, the skip included."""
        y = super().predict(codes, x, w)
        return y + x @ self.W_skip.T if self.cfg.skip else y

    def reconstruct(self, x: Tensor, codes: Codes) -> Tensor:
        """`decode(codes)` and what passes through the skip, in raw units."""
        if not self.cfg.skip:
            return self.decode(codes)
        x = self.standardise(joined(x, 1))
        return self.raw(self.predict(codes, x, self.weights()))

    def to_inference(self) -> Inference:
        """Folded weights in raw units."""
        form = self.activation.form()
        tensors = fold_linked(self, self.weights())
        if form.threshold is not None:
            tensors["threshold"] = form.threshold.detach().clone()
        if not self.cfg.skip:
            return InferenceSAE.build(describe(self, "sae", form), tensors)
        W_skip = self.W_skip.detach() * self.in_scale / self.out_scale[:, None]
        tensors["W_skip"] = W_skip
        tensors["b_dec"] = tensors["b_dec"] - W_skip @ self.in_center
        return InferenceSkip.build(describe(self, "skip_transcoder", form), tensors)


@register_kind("skip_transcoder")
class InferenceSkip(InferenceSAE):
    """ŷ = f W_dec + b_dec + x W_skipᵀ; tensors named and turned as in SAELens."""

    W_skip: Tensor  # (E, D)

    @classmethod
    def check(cls, description: Description) -> None:
        if description.options:
            raise ArtefactError(f"kind={cls.kind} has no options, got {list(description.options)}")
        if description.apply_b_dec_to_input:
            raise ArtefactError(f"kind={cls.kind}: expected apply_b_dec_to_input=false")

    @classmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        return super().shapes(description) | {"W_skip": (description.d_out, description.d_in)}

    def reconstruct(self, x: Tensor, codes: Codes) -> Tensor:
        """`decode(codes)` and what passes through the skip."""
        return self.decode(codes) + x.to(self.W_skip.dtype) @ self.W_skip.T
