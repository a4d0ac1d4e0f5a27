"""Matryoshka SAE: nested dictionaries, each of which has to reconstruct by itself (Bussmann et al.
2025, arXiv 2503.17547). Latents of the first groups become the general ones, because they may not
count on the later ones; that is what feature absorption and splitting are held back by.

x̂'_g = b_dec + the latents of groups 1..g,  for every prefix g of `group_sizes`; x̂' = x̂'_G
loss = mean_g reconstruction(x' - x̂'_g) + penalty(f) + auxk_alpha · auxk(x' - x̂')

The mean over prefixes, where the paper has the sum, keeps coefficients of other terms the same for
any number of groups. With `random_prefixes=n` there are n lengths, drawn anew in each step from a
Pareto distribution of exponent 1/2 (short ones often), the last always all latents; the saved SAE
has no groups then. One encoder and one selection; each group is decoded once, so a step costs no
more than without groups, apart from one (B, D) residual per prefix.

Shapes: B tokens, D width, F latents, G groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from saetrain.artefact import InferenceSAE
from saetrain.codes import Codes, SparseCodes, decode_codes
from saetrain.dictionary import Dictionary, DictionaryConfig, Weights
from saetrain.errors import ConfigError
from saetrain.fold import fold
from saetrain.kernels.latents import may_count
from saetrain.progress import Progress
from saetrain.saes.base import HookSpace, Losses, register

FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of the latents, and the rest: as in the paper


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(DictionaryConfig):
    group_sizes: tuple[int, ...] | None = None  # None: 1/32, 1/16, 1/8, 1/4 of F, and the rest
    random_prefixes: int | None = None  # prefixes drawn in each step, instead of group_sizes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_sizes is not None and self.random_prefixes is not None:
            raise ConfigError(
                f"give sae.group_sizes or sae.random_prefixes, not both, got {self.group_sizes} "
                f"and {self.random_prefixes}"
            )
        if self.random_prefixes is not None and self.random_prefixes < 2:
            raise ConfigError(
                f"sae.random_prefixes: expected at least 2, got {self.random_prefixes}: the last "
                "one is always all latents"
            )
        if self.n_latents is not None:
            self.groups(self.n_latents)

    def groups(self, n_latents: int) -> tuple[int, ...]:
        """Sizes of the groups among `n_latents`. ConfigError if they do not add up."""
        if self.group_sizes is None:
            head = [int(n_latents * f) for f in FRACTIONS]
            sizes = (*head, n_latents - sum(head))
            if min(sizes) < 1:
                raise ConfigError(
                    f"sae.n_latents={n_latents} is too few for the default groups, the first of "
                    "which is 1/32 of them: give sae.group_sizes"
                )
            return sizes
        sizes = self.group_sizes
        if not sizes or min(sizes) < 1 or sum(sizes) != n_latents:
            raise ConfigError(
                f"sae.group_sizes={list(sizes)} adds up to {sum(sizes)}, expected sizes above 0 "
                f"that add up to sae.n_latents={n_latents}"
            )
        if len(sizes) == 1:
            warnings.warn("sae.group_sizes has one group: this is a plain SAE", stacklevel=3)
        return sizes


@register("matryoshka", MatryoshkaConfig)
class Matryoshka(Dictionary):
    """Nested groups of latents, every prefix of which reconstructs by itself."""

    cfg: MatryoshkaConfig

    def __init__(self, cfg: MatryoshkaConfig, spaces: Mapping[str, HookSpace]) -> None:
        super().__init__(cfg, spaces)
        random = cfg.random_prefixes is not None
        self.group_sizes = (self.n_latents,) if random else cfg.groups(self.n_latents)

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """`reconstruction` (mean over prefixes), the penalty, `auxk` unless off; extras: `fvu` of
        all latents."""
        x_BD, w = self.standardise(acts[self.hooks_in[0]]), self.weights()
        picked = self.pick(x_BD, w)
        prefixes = self._prefixes()
        each = []
        for x_hat_BD in nested(picked.codes, w, prefixes):
            e_BD = x_BD - x_hat_BD
            each.append(self.reconstruction(e_BD))
        penalty, extras = self.sparsity(picked.codes, picked.pre, progress)
        terms = {"reconstruction": torch.stack(each).mean(), **penalty}
        terms |= self.revival(e_BD, picked, w)
        return Losses(terms, picked.codes, {"fvu": self.fvu(e_BD), **extras})

    def _prefixes(self) -> list[int]:
        """Lengths of the prefixes of this step, ascending, the last one F."""
        n = self.cfg.random_prefixes
        if n is None:
            return list(accumulate(self.group_sizes))
        return [*random_prefixes(n - 1, self.n_latents), self.n_latents]

    def to_inference(self) -> InferenceSAE:
        """Folded weights in raw units, and the sizes of the groups."""
        groups = {} if self.cfg.random_prefixes else {"group_sizes": list(self.group_sizes)}
        return fold(self, self.weights(), self.activation.form(), groups)


def nested(codes: Codes, w: Weights, prefixes: Sequence[int]) -> Iterator[Tensor]:
    """Reconstructions (..., D) from the latents below each of the ascending `prefixes`."""
    so_far, spans = w.b_dec, list(pairwise((0, *prefixes)))
    # Split at once: the gradients of the parts are joined, not padded with zeros and added.
    rows = torch.split(w.W_dec, [stop - start for start, stop in spans])
    for (start, stop), W_dec in zip(spans, rows, strict=True):
        if start < stop:  # random prefixes may coincide
            so_far = so_far + decode_codes(part(codes, start, stop), W_dec)
        yield so_far


def part(codes: Codes, start: int, stop: int) -> Codes:
    """The latents start..stop-1, numbered from 0; sparse codes keep their slots, others at 0."""
    if not isinstance(codes, SparseCodes):
        return codes[..., start:stop]
    inside = (codes.indices >= start) & (codes.indices < stop)
    indices = (codes.indices - start).clamp(0, stop - start - 1)
    used = None
    if may_count(inside):
        used = inside if codes.used is None else inside & codes.used
    return SparseCodes(codes.values * inside, indices, stop - start, used)


def random_prefixes(n: int, n_latents: int) -> list[int]:
    """n lengths in 1..F-1, ascending: P(length > m) = (1/√m - 1/√F) / (1 - 1/√F)."""
    u = torch.rand(n, dtype=torch.float64)
    end = n_latents**-0.5
    lengths = ((u * (1 - end) + end) ** -2).floor().clamp(1, n_latents - 1)
    return sorted(int(m) for m in lengths)
