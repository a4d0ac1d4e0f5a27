"""MoLT, a sparse mixture of linear transforms: an MLP as a few linear maps that act on a token, out
of many (Lindsey et al. 2025, Transformer Circuits, "Sparse mixtures of linear transforms"). It
reads one hook and predicts another (`sae.hook_out`), as a transcoder does, but a latent's output is
a low-rank map of the input instead of a fixed direction.

f = act(n (x' W_enc + b_enc)),  ŷ' = Σ_i f_i T_i(x') + b_dec,  T_i(x') = x' V_i U_i / n_i
n_i = ||V_i U_i||_F, loss = reconstruction(y' - ŷ') + penalty(f) + auxk_alpha · auxk(y' - ŷ')

`ranks: {rank: count}` says how many transforms have which rank; V_i (D, r), U_i (r, E). Activation
and penalty see latents in units of transforms of size 1, so growing a transform gains nothing.
n² = Σ (V_iᵀV_i) ∘ (U_iU_iᵀ) costs r² (D + E) a transform, with no (D, E) matrix made. A step costs
the dense products with all ranks, 6 B (D + E) Σ r: transforms are few and large, and to pick the
rows of those that fire would cost more than it saves. `decode` alone cannot know ŷ, which depends
on x, too: use `reconstruct` or `forward`.

Shapes: B tokens, D and E widths of input and output, F latents (transforms), n of one rank r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from saetrain import init
from saetrain.artefact import ArtefactError, Description, Inference, register_kind
from saetrain.codes import Codes, dense
from saetrain.dictionary import DictionaryConfig, Weights
from saetrain.errors import ConfigError
from saetrain.fold import describe
from saetrain.linked import Linked, LinkedConfig
from saetrain.losses import explained_by
from saetrain.progress import Progress
from saetrain.saes.base import HookSpace, Losses, register

SHARES = (1, 2, 4, 8, 16)  # of transforms of rank R, R/2, … R/16, as in the paper
TOP_RANK = 512  # R, or the width of the hook if that is less


@dataclass(frozen=True, kw_only=True)
class MoltConfig(LinkedConfig):
    ranks: dict[int, int] | None = None  # rank -> number of transforms; None: as in the paper
    center: Literal["none", "mean"] = "none"
    auxk_alpha: float = 0.0
    decoder_norm: Literal["unit", "free"] = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        refused = {
            "decoder_norm": self.decoder_norm != "free",
            "resample_every": self.resample_every is not None,
            "init_encoder": self.init_encoder != "random",
            "init_norm": self.init_norm == "search",
        }
        for name in (n for n, bad in refused.items() if bad):
            raise ConfigError(
                f"sae.{name}={getattr(self, name)} with sae.name=molt: a transform is a matrix, "
                "not a direction. Leave it at its default"
            )
        if self.ranks is not None:  # keys of JSON are text
            object.__setattr__(self, "ranks", {_whole(r): n for r, n in self.ranks.items()})
            if self.n_latents is not None:
                self.rank_counts(self.n_latents, max(self.ranks, default=0))

    def hooks(self, hook: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """ConfigError unless `hook_out` is another hook."""
        if self.hook_out in (None, hook):
            raise ConfigError(
                f"sae.hook_out={self.hook_out}: sae.name=molt reads the hook given by hook "
                f"({hook}) and predicts another one, such as sae.hook_out=mlp.2"
            )
        return (hook,), (str(self.hook_out),)

    def rank_counts(self, n_latents: int, width: int) -> dict[int, int]:
        """Rank -> number of transforms. ConfigError if they do not fit F or the width."""
        if self.ranks is None:
            units, rest = divmod(n_latents, sum(SHARES))
            ranks = [min(TOP_RANK, width) >> i for i in range(len(SHARES))]
            if rest or not units or not ranks[-1]:
                raise ConfigError(
                    f"sae.n_latents={n_latents} at width {width}: the default of sae.ranks needs a "
                    f"multiple of {sum(SHARES)} transforms and a width of at least 16. Give "
                    "sae.ranks={rank: count, …}"
                )
            return {r: n * units for r, n in zip(ranks, SHARES, strict=True)}
        counts = self.ranks
        if not counts or min(*counts, *counts.values()) < 1 or sum(counts.values()) != n_latents:
            raise ConfigError(
                f"sae.ranks={counts}: expected ranks and counts of at least 1, with counts that "
                f"add up to sae.n_latents={n_latents}"
            )
        if max(counts) > width:
            raise ConfigError(
                f"sae.ranks: rank {max(counts)} is more than the narrower hook's width, {width}"
            )
        return counts


def _whole(rank: int | str) -> int:
    if not str(rank).isdigit():
        raise ConfigError(f"sae.ranks: expected whole numbers as ranks, got {rank!r}")
    return int(rank)


@register("molt", MoltConfig)
class Molt(Linked):
    """Few of many low-rank linear maps act on each token; predicts another hook."""

    cfg: MoltConfig

    def _words(self) -> tuple[str, str]:
        return "hook", "sae.hook_out"

    def _check_hooks(self, cfg: DictionaryConfig, spaces: Mapping[str, HookSpace]) -> None:
        super()._check_hooks(cfg, spaces)
        if len(spaces) != 2:
            raise ConfigError(f"sae.name=molt links two hooks, got {', '.join(spaces)}")

    def _make_weights(self, mean_D: Tensor) -> None:
        narrow = min(self.d_in, self.d_out)
        self.ranks = self.cfg.rank_counts(self.n_latents, narrow)
        norm = float(self.cfg.init_norm or 1.0)
        for rank, count in self.ranks.items():
            V_NDr, U_NrE = torch.randn(count, self.d_in, rank), torch.randn(count, rank, self.d_out)
            size_N = (norm / sizes(V_NDr, U_NrE)).sqrt()[:, None, None]
            self.register_parameter(f"V_{rank}", nn.Parameter(V_NDr * size_N))
            self.register_parameter(f"U_{rank}", nn.Parameter(U_NrE * size_N))
        self.W_enc = nn.Parameter(init.transposed(init.random_rows(self.n_latents, self.d_in)))
        self._make_biases()

    def transforms(self) -> list[tuple[Tensor, Tensor]]:
        """(V, U) of each rank, in the order of the latents."""
        found = dict(self.named_parameters())
        return [(found[f"V_{rank}"], found[f"U_{rank}"]) for rank in self.ranks]

    def row_norms(self) -> Tensor:
        """n (F,)."""
        return torch.cat([sizes(V, U) for V, U in self.transforms()])

    def weights(self) -> Weights:
        """Effective encoder; in the place of decoder rows the sizes n of the transforms, (F, 1)."""
        n_F = self.row_norms()
        return Weights(self.W_enc * n_F, self.b_enc * n_F, n_F[:, None], self.b_dec)

    def predict(self, codes: Codes, x: Tensor, w: Weights) -> Tensor:
        """(..., E) in standardised units."""
        return self._mixed(codes, x, w) + w.b_dec

    def _mixed(self, codes: Codes, x: Tensor, w: Weights) -> Tensor:
        return mixture(dense(codes) / w.W_dec[:, 0], x, self.transforms())

    def decode(self, codes: Codes) -> Tensor:
        """ValueError: see `reconstruct`."""
        raise ValueError(NEEDS_INPUT)

    def reconstruct(self, x: Tensor, codes: Codes) -> Tensor:
        """Prediction (..., E) in raw units from raw inputs x (..., D) and their latents."""
        return self.raw(self.predict(codes, self.standardise(x), self.weights()))

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """`reconstruction`, the penalty by its name, `auxk` unless off; extras: `fvu`."""
        x_BD, y_BE, w = self.inputs(acts), self.targets(acts), self.weights()
        picked = self.pick(x_BD, w)
        e_BE = y_BE - self.predict(picked.codes, x_BD, w)
        penalty, extras = self.sparsity(picked.codes, picked.pre, progress)
        terms = {"reconstruction": self.reconstruction(e_BE), **penalty}
        if self.aux_k:
            terms["auxk"] = e_BE.new_zeros(())
        if picked.aux is not None and picked.dead is not None:
            guess_BE = self._mixed(picked.aux, x_BD, w)
            terms["auxk"] = self.cfg.auxk_alpha * explained_by(guess_BE, e_BE, picked.dead)
        return Losses(terms, picked.codes, {"fvu": self.fvu_of(e_BE), **extras})

    def fvu_of(self, e_BE: Tensor) -> Tensor:
        """For `extras`."""
        return e_BE.detach().square().sum(-1).mean() / self.out_variance[0]

    def to_inference(self) -> InferenceMolt:
        """Transforms of size 1 in standardised units, folded to raw ones; `center` stays."""
        w, form = self.weights(), self.activation.form()
        s, n_F = self.in_scale, w.W_dec[:, 0]
        tensors = {
            "W_enc": w.W_enc * s[:, None],
            "b_enc": w.b_enc,
            "b_dec": w.b_dec / self.out_scale + self.out_center,
            "center": self.in_center,
        }
        firsts = accumulate((0, *self.ranks.values()))
        for rank, (first, last), (V, U) in zip(
            self.ranks, pairwise(firsts), self.transforms(), strict=True
        ):
            tensors[f"V_{rank}"] = V * s[:, None]
            tensors[f"U_{rank}"] = U / n_F[first:last, None, None] / self.out_scale
        if form.threshold is not None:
            tensors["threshold"] = form.threshold
        options = {"ranks": [[rank, n] for rank, n in self.ranks.items()]}
        description = describe(self, "molt", form, options=options)
        return InferenceMolt(description, {n: t.detach().clone() for n, t in tensors.items()})


NEEDS_INPUT = "what a transform adds depends on its input: use reconstruct(x, codes), or forward(x)"


def sizes(V_NDr: Tensor, U_NrE: Tensor) -> Tensor:
    """||V_i U_i||_F of each of N transforms, (N,)."""
    return ((V_NDr.mT @ V_NDr) * (U_NrE @ U_NrE.mT)).sum((1, 2)).sqrt()


def mixture(f: Tensor, x: Tensor, transforms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ_i f_i x V_i U_i, (..., E), of dense f (..., F) and x (..., D)."""
    out, first = x.new_zeros(()), 0
    for V_NDr, U_NrE in transforms:
        count, width, rank = V_NDr.shape
        z = x @ V_NDr.transpose(0, 1).reshape(width, -1)
        z = z.reshape(*z.shape[:-1], count, rank)
        z = (z * f[..., first : first + count, None]).flatten(-2)
        out, first = out + z @ U_NrE.flatten(0, 1), first + count
    return out


@register_kind("molt")
class InferenceMolt(Inference):
    """f = act((x - center) W_enc + b_enc), ŷ = Σ_i f_i (x - center) V_i U_i + b_dec.

    `options.ranks` lists [rank, number of transforms], in the order of the latents; the transforms
    of rank r are V_r (n, D, r) and U_r (n, r, E).
    """

    W_enc: Tensor  # (D, F)
    b_enc: Tensor  # (F,)
    b_dec: Tensor  # (E,)
    center: Tensor  # (D,)

    @classmethod
    def check(cls, description: Description) -> None:
        ranks = description.options.get("ranks")
        pairs = isinstance(ranks, list) and all(
            isinstance(p, list) and len(p) == 2 and all(type(n) is int and n > 0 for n in p)
            for p in ranks
        )
        if not pairs or set(description.options) != {"ranks"}:
            raise ArtefactError(
                "options of kind=molt: expected ranks=[[rank, count], …], got "
                f"{description.options}"
            )
        assert isinstance(ranks, list)
        if sum(n for _, n in ranks) != description.n_latents or len(dict(ranks)) < len(ranks):
            raise ArtefactError(
                f"options.ranks={ranks}: expected different ranks with counts that add up to "
                f"n_latents={description.n_latents}"
            )

    @classmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        d, e, f = description.d_in, description.d_out, description.n_latents
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, f), "b_enc": (f,)}
        shapes |= {"b_dec": (e,), "center": (d,)}
        for rank, count in description.options["ranks"]:
            shapes |= {f"V_{rank}": (count, d, rank), f"U_{rank}": (count, rank, e)}
        return shapes | ({"threshold": (f,)} if description.activation == "jumprelu" else {})

    def encode(self, x: Tensor) -> Codes:
        """Latents (..., F) of raw activations x (..., D)."""
        return self.form()((x.to(self.W_enc.dtype) - self.center) @ self.W_enc + self.b_enc)

    def decode(self, codes: Codes) -> Tensor:
        """ValueError: see `reconstruct`."""
        raise ValueError(NEEDS_INPUT)

    def reconstruct(self, x: Tensor, codes: Codes) -> Tensor:
        """Prediction (..., E) in raw units from raw inputs x (..., D) and their latents."""
        found = dict(self.named_parameters())
        ranks = [rank for rank, _ in self._description.options["ranks"]]
        transforms = [(found[f"V_{rank}"], found[f"U_{rank}"]) for rank in ranks]
        x = x.to(self.W_enc.dtype) - self.center
        return mixture(dense(codes), x, transforms) + self.b_dec
