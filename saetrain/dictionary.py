"""What architectures with one encoder and one decoder share: parts, weights, dead latents.

sae, gated and matryoshka are this class plus their own loss; a new one usually is, too. All maths
is written against `weights()`, the effective weights in standardised units, whose decoder rows have
length 1. With decoder_norm=unit they are the parameters, held at that length by projecting the
gradient and renormalising. With decoder_norm=free rows w may grow, and the effective weights are
W_enc ||w||, b_enc ||w||, W_dec / ||w||: selections, thresholds and penalties see f ||w||, so
nothing is gained by large rows and small latents (Anthropic, Circuits Updates, April 2024). Latents
are given in that unit, too. Cost of free: six passes over the weights each step.

Shapes: B tokens, D input width, E output width, F latents, A auxiliary slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from saetrain import init
from saetrain.activations import (
    ActivationConfig,
    BatchTopK,
    GroupMax,
    ReLU,
    TopK,
    fired,
    make_activation,
)
from saetrain.codes import (
    Codes,
    SparseCodes,
    decode_codes,
    input_bias,
    ragged_pays,
    select_above,
    select_batchtopk,
    select_topk,
    topk_codes,
)
from saetrain.errors import ConfigError
from saetrain.losses import auxk, reconstruction
from saetrain.penalties import PenaltyConfig, make_penalty
from saetrain.progress import Progress
from saetrain.saes.base import SAE, HookSpace, Replaced, SAEConfig, check_autoencoder

FREE_NORM = 0.1  # length of decoder rows at the start when they are free to grow


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig(SAEConfig):
    """Parts and choices of every single-hook architecture. See conf/sae for named settings."""

    activation: ActivationConfig
    penalty: PenaltyConfig | None = None
    decoder_norm: Literal["unit", "free"] = "unit"
    aux_k: int | None = None  # dead latents in AuxK; None: half the input width; 0: no AuxK
    auxk_alpha: float = 1 / 32  # weight of AuxK in the loss; 0: no AuxK
    resample_every: int | None = None  # steps after which dead latents get new weights; None: never
    resample_times: int = 4  # at most
    init_bias: Literal["mean", "geometric_median", "zero"] = "mean"  # of the decoder
    init_encoder: Literal["tied", "random"] = "tied"
    init_norm: float | Literal["search"] | None = None  # None: 1 for unit rows, 0.1 for free ones

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_latents is not None:
            self.activation.check(self.n_latents)
        if self.aux_k is not None and self.aux_k < 0:
            raise ConfigError(f"sae.aux_k: expected 0 (off) or more, got {self.aux_k}")
        if not self.auxk_alpha >= 0:
            raise ConfigError(f"sae.auxk_alpha: expected 0 (off) or more, got {self.auxk_alpha}")
        if self.aux_k and self.auxk_alpha == 0:
            warnings.warn(f"sae.aux_k={self.aux_k} has no effect: sae.auxk_alpha=0", stacklevel=3)
        for name in ("resample_every", "resample_times"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"sae.{name}: expected at least 1, got {value}")
        if not isinstance(self.init_norm, str | None) and not self.init_norm > 0:
            raise ConfigError(
                f"sae.init_norm: expected more than 0 or 'search', got {self.init_norm}"
            )
        self._check_sparsity()

    def _check_sparsity(self) -> None:
        name = getattr(self.activation, "name", "")
        if self.penalty is None and name in ("relu", "jumprelu"):
            warnings.warn(
                f"nothing makes latents sparse: sae.activation.name={name} without sae.penalty",
                stacklevel=4,
            )


class Weights(NamedTuple):
    """Effective weights in standardised units."""

    W_enc: Tensor  # (D, F)
    b_enc: Tensor  # (F,)
    W_dec: Tensor  # (F, E)
    b_dec: Tensor  # (E,)


@dataclass(frozen=True)
class Picked:
    """What the encoder made of one batch."""

    codes: Codes
    pre: Tensor | None  # (B, F) where something needs them; (N,) of the used slots of sparse codes
    aux: SparseCodes | None = None  # dead latents only
    dead: Tensor | None = None  # (F,) bool, what `aux` was chosen from


class Dictionary(SAE):
    """Encoder, activation, decoder, and what keeps latents alive."""

    cfg: DictionaryConfig
    selections: int = 1  # rows of pre-activations of one token, each with k latents

    def __init__(self, cfg: DictionaryConfig, spaces: Mapping[str, HookSpace]) -> None:
        self._check_hooks(cfg, spaces)
        super().__init__(cfg, spaces)
        self._make_units(spaces)
        because = f" (sae.expansion_factor={cfg.expansion_factor} x width {self.d_in})"
        cfg.activation.check(self.n_latents, because if cfg.expansion_factor else "")
        self.activation = make_activation(cfg.activation, self.n_latents)
        self.penalty = None if cfg.penalty is None else make_penalty(cfg.penalty, self.activation)
        aux_k = max(1, self.d_in // 2) if cfg.aux_k is None else cfg.aux_k
        self.aux_k = min(aux_k, self.n_latents) if cfg.auxk_alpha else 0
        # Slots of the next TopK step, where a sweep has found them already: saetrain.stack
        self.found: list[Tensor] | None = None
        self._make_weights(spaces[self.hooks_in[0]].mean)

    def _check_hooks(self, cfg: DictionaryConfig, spaces: Mapping[str, HookSpace]) -> None:
        check_autoencoder(cfg, spaces, self.name)

    def _make_units(self, spaces: Mapping[str, HookSpace]) -> None:
        """Units of hooks beyond the first one's."""

    def _make_weights(self, mean_D: Tensor) -> None:
        cfg, (rows, norm) = self.cfg, self._start_norms()
        self.W_dec = nn.Parameter(init.random_rows(self.n_latents, self.d_in, rows))
        W_enc = init.transposed(self.W_dec)
        if cfg.init_encoder == "random":
            W_enc = init.transposed(init.random_rows(self.n_latents, self.d_in, rows))
        self.W_enc = nn.Parameter(W_enc * (norm / rows))
        self._make_encoder_biases()
        start = self.standardise(mean_D.to(self.in_center))
        self.b_dec = nn.Parameter(start * 0 if cfg.init_bias == "zero" else start)

    def _make_encoder_biases(self) -> None:
        self.b_enc = nn.Parameter(self.W_dec.new_zeros(self.n_latents))

    def _start_norms(self) -> tuple[float, float]:
        """Lengths of decoder rows and of encoder columns at the start."""
        free, norm = self.cfg.decoder_norm == "free", self.cfg.init_norm
        if norm is None or isinstance(norm, str):
            norm = FREE_NORM if free else 1.0
        return (norm if free else 1.0), norm

    # -- the maths ----------------------------------------------------------------------------

    def weights(self) -> Weights:
        """Effective weights: decoder rows of length 1."""
        if self.cfg.decoder_norm == "unit":
            return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        norm_F = self.row_norms()
        return Weights(
            self.W_enc * norm_F, self.b_enc * norm_F, self.W_dec / norm_F[:, None], self.b_dec
        )

    def row_norms(self) -> Tensor:
        """(F,) what the rows of a free decoder count as."""
        norms_F: Tensor = self.W_dec.norm(dim=1)
        return norms_F

    def decoders(self) -> Sequence[nn.Parameter]:
        """Decoders, the rows of each of which have length 1 under decoder_norm=unit."""
        return [self.W_dec]

    def inputs(self, acts: Mapping[str, Tensor]) -> Tensor:
        """What is encoded, (..., D) in standardised units."""
        return self.standardise(acts[self.hooks_in[0]])

    def targets(self, acts: Mapping[str, Tensor]) -> Tensor:
        """What is reconstructed, (..., E) in standardised units."""
        return self.inputs(acts)

    def pre_activations(self, x: Tensor, w: Weights) -> Tensor:
        """(..., F) of standardised inputs x (..., D)."""
        return (x - w.b_dec) @ w.W_enc + w.b_enc

    def predict(self, codes: Codes, x: Tensor, w: Weights) -> Tensor:
        """(..., E) in standardised units."""
        return decode_codes(codes, w.W_dec) + w.b_dec

    def _encoder_terms(self, x_BD: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
        """(x, b) of the product x W_enc + b, x without gradients."""
        return x_BD - self.b_dec.detach(), input_bias(w.b_enc, self.b_dec, w.W_enc)

    def encode(self, x: Tensor) -> Codes:
        """Latents of raw activations x (..., D), by the inference form of the activation."""
        return self.activation.infer(self.pre_activations(self.standardise(x), self.weights()))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., E) in raw units."""
        w = self.weights()
        return self.unstandardise(decode_codes(codes, w.W_dec) + w.b_dec)

    def pick(self, x_BD: Tensor, w: Weights) -> Picked:
        """Codes of standardised inputs in their training form, and AuxK's candidates.

        TopK and BatchTopK without a penalty that reads pre-activations, and ReLU and JumpReLU once
        few latents fire, make nothing dense after the selection.
        """
        x_BD, bias_F = self._encoder_terms(x_BD, w)
        needs_pre = self.penalty is not None and self.penalty.needs_pre
        if isinstance(self.activation, TopK) and not needs_pre:
            return self._pick_topk(x_BD, w.W_enc, bias_F, self.activation.cfg.k)
        if isinstance(self.activation, BatchTopK) and not needs_pre and x_BD.device.type == "cpu":
            keep, dead_F = self.activation.keep(len(x_BD)), self._aux_candidates()
            codes, aux = select_batchtopk(x_BD, w.W_enc, bias_F, keep, dead_F, self.aux_k)
            return Picked(codes, None, aux, dead_F)
        if (few := self._pick_above(x_BD, w.W_enc, bias_F)) is not None:
            return few
        h_BF = x_BD @ w.W_enc + bias_F
        aux, dead_F = self.pick_dead(h_BF)
        return Picked(self.activation.select(h_BF), h_BF, aux, dead_F)

    def _pick_topk(self, x_BD: Tensor, W_enc_DF: Tensor, bias_F: Tensor, k: int) -> Picked:
        dead_F, sought_F = self.aux_search()
        found, self.found = self.found, None
        codes, aux = select_topk(x_BD, W_enc_DF, bias_F, k, sought_F, self.aux_k, found)
        if dead_F is None or sought_F is not None:
            return Picked(codes, None, aux, dead_F)
        # All dead latents are chosen: no second search over all of them (a GPU would wait here).
        dead = dead_F.nonzero().squeeze(1)
        values = (x_BD @ W_enc_DF[:, dead] + bias_F[dead]).relu()
        aux = SparseCodes(values, dead.expand(len(x_BD), -1), self.n_latents)
        return Picked(codes, None, aux, dead_F)

    def aux_search(self) -> tuple[Tensor | None, Tensor | None]:
        """Who is dead, and among whom AuxK has to choose: None where it takes all or none."""
        dead_F = self._aux_candidates()
        if dead_F is None or dead_F.device.type != "cpu" or int(dead_F.sum()) > self.aux_k:
            return dead_F, dead_F
        return dead_F, None

    def _pick_above(self, x_BD: Tensor, W_enc_DF: Tensor, bias_F: Tensor) -> Picked | None:
        """Codes of what lies above a floor; None where there is none, or dense codes are better."""
        floor_F = self.activation.floor() if ragged_pays(x_BD) else None
        if floor_F is None:
            return None
        dead_F = self._aux_candidates()
        found = select_above(x_BD, W_enc_DF, bias_F, floor_F, dead_F, self.aux_k)
        if found is None:
            return None
        codes, pre_N = fired(self.activation, found[0])
        return Picked(codes, pre_N, found[1], dead_F)

    def pick_dead(self, h_BF: Tensor) -> tuple[SparseCodes | None, Tensor | None]:
        """The `aux_k` largest positive dead latents of dense pre-activations, and who is dead."""
        dead_F = self._aux_candidates()
        if dead_F is None:
            return None, None
        return topk_codes(h_BF.masked_fill(~dead_F, 0), self.aux_k), dead_F

    def _aux_candidates(self) -> Tensor | None:
        """Mask of dead latents, or None where AuxK is off or known to be 0 without asking a GPU."""
        if not self.aux_k:
            return None
        dead_F = self.dead
        return None if dead_F.device.type == "cpu" and not dead_F.any() else dead_F

    # -- loss terms -------------------------------------------------------------------------------

    def reconstruction(self, e_BE: Tensor) -> Tensor:
        """The residual's size in the unit of `sae.reconstruction`."""
        return reconstruction(e_BE, self.cfg.reconstruction, self.in_variance, self.d_in)

    def fvu(self, e_BE: Tensor) -> Tensor:
        """For `extras`."""
        return reconstruction(e_BE.detach(), "fvu", self.in_variance, 0)

    def sparsity(
        self, codes: Codes, pre: Tensor | None, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """({penalty's name: term}, {its coefficient as of now}), both empty without a penalty."""
        if self.penalty is None:
            return {}, {}
        name = self.penalty.cfg.name
        now = torch.full((), self.penalty.coefficient(progress), device=self.in_scale.device)
        term = self.penalty(codes, pre, self.penalty_norms(), progress)
        return {name: term}, {f"{name}_coefficient": now}

    def penalty_norms(self) -> Tensor | None:
        """(F,) sizes of the effective decoder rows in the penalty; None: 1."""
        return None

    def revival(self, e_BE: Tensor, picked: Picked, w: Weights) -> dict[str, Tensor]:
        """{"auxk": term}, empty where AuxK is off, 0 while nothing is dead."""
        if not self.aux_k:
            return {}
        if picked.aux is None or picked.dead is None:
            return {"auxk": e_BE.new_zeros(())}
        return {"auxk": self.cfg.auxk_alpha * auxk(e_BE, picked.aux, w.W_dec, picked.dead)}

    # -- around the step --------------------------------------------------------------------------

    @torch.no_grad()
    def init_from_data(self, acts: Mapping[str, Tensor]) -> None:
        """What the first batch decides: geometric median, searched norm."""
        x_BD, y_BE = self.inputs(acts), self.targets(acts)
        if self.cfg.init_bias == "geometric_median":
            self.b_dec.copy_(init.geometric_median(y_BE))
        if self.cfg.init_norm == "search":
            self.found = None  # with the length before
            self._search_norm(x_BD[:1024], y_BE[:1024])

    def _search_norm(self, x_BD: Tensor, y_BE: Tensor) -> None:
        """Set the start length that reconstructs best on x; with thresholds, of `init.NORMS`."""
        columns = self.W_enc / self.W_enc.norm(dim=-2, keepdim=True)
        rows = [W / W[0].norm() for W in self.decoders()]
        free = self.cfg.decoder_norm == "free"

        def predict(norm: float) -> Tensor:
            self.W_enc.copy_(columns * norm)
            for W, rows_FE in zip(self.decoders(), rows, strict=True):
                W.copy_(rows_FE * norm if free else rows_FE)
            w = self.weights()
            return self.predict(self.pick(x_BD, w).codes, x_BD, w)

        def error(norm: float) -> float:
            return float((y_BE - predict(norm)).square().sum(-1).mean())

        if isinstance(self.activation, ReLU | TopK | BatchTopK | GroupMax):  # latents in proportion
            predict(init.best_norm(y_BE, predict, power=2 if free else 1))
        else:
            error(min(init.NORMS, key=error))  # the last call leaves the best one set

    def before_step(self) -> None:
        """With rows of length 1: take the radial part from the decoder's gradient."""
        for W in self.decoders() if self.cfg.decoder_norm == "unit" else ():
            init.remove_parallel_grad(W)

    def after_step(self) -> None:
        """Decoder rows back to length 1, thresholds to 0 or more, schedules onwards."""
        for W in self.decoders() if self.cfg.decoder_norm == "unit" else ():
            init.renormalise_rows(W)
        self.activation.project()
        if self.penalty is not None:
            self.penalty.settle()

    def note_firing(self, codes: Codes) -> None:
        """Advance the dead-latent clock and what the activation averages."""
        super().note_firing(codes)
        self.activation.observe(codes)

    def resample(self, acts: Mapping[str, Tensor], progress: Progress) -> Replaced:
        """Every `resample_every` steps: see `saetrain.resample`."""
        every, done = self.cfg.resample_every, progress.step + 1
        if every is None or done % every or done // every > self.cfg.resample_times:
            return {}
        from saetrain.resample import resample  # it reads this module

        return resample(self, acts)

    def fresh_vectors(self) -> dict[str, float]:
        """Name -> starting value of every parameter with one number per latent."""
        vectors = {n: p for n, p in self.named_parameters() if p.shape == (self.n_latents,)}
        start = getattr(self.cfg.activation, "threshold", 0.0)
        return {n: start if n == "activation.threshold" else 0.0 for n in vectors if n != "b_dec"}

    def input_origin(self) -> Tensor:
        """(D,) the point from which resampling takes the directions of inputs."""
        return self.b_dec

    def settle_biases(self, ids: Tensor) -> None:
        """Set biases of resampled latents that depend on their new weights."""

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Fix batchtopk's threshold on held-out rows; nothing for the others."""
        calibrator = self.activation.calibrator()
        if calibrator is None:
            return
        calibrator.wanted *= self.selections
        w = self.weights()
        for acts in batches:
            if not calibrator.update(self.pre_activations(self.inputs(acts), w)):
                break
        calibrator.finish()
