"""Encode, and keep the `keep` largest of all tokens of a batch (BatchTopK), with a sparse backward.

The product is made in pieces of tokens that stay in cache, as for TopK. The keep largest of the
first piece give a floor that those of the batch cannot be below; of later pieces only what is above
the floor is looked at, and raises it. So the (B, F) pre-activations never exist, and four matrix
products less are made than by autograd on dense codes. Tokens keep different numbers of latents:
what was found, sorted by token, is a ragged list, padded here to the largest number of any token,
with empty slots of value 0 at latent 0, so that everything that takes (values, indices) takes it.
The width of the padding is data, so on other devices than the CPU it would have to be waited for:
there `saetrain.activations` keeps the dense form.

bf16: as in encode.py, the product proposes keep + keep/8, float32 decides. Plain twin:
`saetrain.activations.BatchTopK.select`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saetrain.kernels.above import above, pad
from saetrain.kernels.encode import Slots, dead_slots, encode_with, joined, pieces
from saetrain.kernels.gemm import product
from saetrain.kernels.latents import dot_rows
from saetrain.kernels.topk import exact_topk


def encode_batchtopk(
    x_BD: Tensor,
    W_DF: Tensor,
    b_F: Tensor,
    keep: int,
    dead_F: Tensor | None = None,
    k_aux: int = 0,
    bf16: bool = False,
) -> tuple[Slots, Slots]:
    """((values, indices), (values, indices) of dead ones): `keep` in all, and k_aux a token.

    Slots of value 0 are empty and may repeat a latent. Differentiable in W and b. CPU only.
    """

    def select() -> list[Tensor]:
        best = Best(keep + keep // 8 if bf16 else keep, x_BD.dtype)
        aux = _look(best, 0, x_BD, W_DF, b_F, dead_F, k_aux, bf16)
        values, indices, used = best.slots(len(x_BD), len(b_F))
        if bf16:
            exact = dot_rows(x_BD, W_DF.T, indices, used) + b_F[indices]
            values = largest(exact * used, keep)
        return [values, indices, *aux]

    return encode_with(select, x_BD, W_DF, b_F)


def encode_batchtopk_of(
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    keep: int,
    dead_LF: Sequence[Tensor | None],
    k_aux: int = 0,
) -> list[tuple[Slots, Slots]]:
    """`encode_batchtopk` of each of L layers, given as (x, W, b), but `keep` of all together.

    Float32 decides, whatever autocast says.
    """
    best, size = Best(keep, layers[0][0].dtype), layers[0][0].shape[0] * layers[0][1].shape[1]
    with torch.no_grad(), torch.autocast(layers[0][0].device.type, enabled=False):
        aux = [
            _look(best, i * size, *layer, dead_F, k_aux)
            for i, (layer, dead_F) in enumerate(zip(layers, dead_LF, strict=True))
        ]
        n_tokens = len(layers[0][0])
        wide, places, _ = best.slots(len(layers) * n_tokens, layers[0][1].shape[1])
        each = zip(torch.split(wide, n_tokens), torch.split(places, n_tokens), aux, strict=True)
        found = [[v.clone(), i.clone(), *of_dead] for v, i, of_dead in each]
    return [
        encode_with(lambda slots=slots: slots, *layer)  # type: ignore[misc]
        for slots, layer in zip(found, layers, strict=True)
    ]


def _look(
    best: Best,
    first: int,
    x_BD: Tensor,
    W_DF: Tensor,
    b_F: Tensor,
    dead_F: Tensor | None,
    k_aux: int,
    bf16: bool = False,
) -> list[Tensor]:
    """Show `best` all of x W + b, with places from `first` on; values and indices of dead ones."""
    W_DF, aux = W_DF.to(x_BD.dtype), list[Slots]()
    dtype = torch.bfloat16 if bf16 else x_BD.dtype
    given = x_BD.to(dtype), W_DF.to(dtype), b_F.to(dtype)
    for piece in pieces(len(x_BD), len(b_F), x_BD.device.type):
        h_BF = product(given[0][piece], *given[1:])
        best.add(h_BF.to(x_BD.dtype), first + piece.start * len(b_F))
        if k_aux and dead_F is not None:
            aux.append(dead_slots(h_BF, x_BD[piece], W_DF.T, b_F, dead_F, k_aux))
    none = x_BD.new_empty(len(x_BD), 0)
    return joined(aux) if aux else [none, none.to(torch.int64)]


class Best:
    """The `keep` largest of numbers above 0 that come in pieces, with their places."""

    def __init__(self, keep: int, dtype: torch.dtype = torch.float32) -> None:
        self.keep = keep
        self._values = torch.empty(0, dtype=dtype)
        self._places = torch.empty(0, dtype=torch.int64)
        self._floor = torch.zeros(1, dtype=dtype)  # nothing below it can be among them

    def add(self, h_BF: Tensor, first: int) -> None:
        """Look at h, whose rows, laid end to end, have the places from `first` on."""
        values, places = self._found(h_BF)
        values = torch.cat([self._values, values])
        places = torch.cat([self._places, places + first])
        if len(values) >= self.keep:
            best, at = exact_topk(values[None], self.keep)
            values, places = best[0], places[at[0]]
            self._floor = values.nan_to_num(nan=torch.inf).min()[None]
        self._values, self._places = values, places

    def _found(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """What may be among the largest, and its places in h."""
        if len(self._values):
            values, latents, counts = above(h_BF, self._floor)
            return values, torch.arange(len(h_BF)).repeat_interleave(counts) * h_BF.shape[
                1
            ] + latents
        # Half of the numbers may be above 0: no floor yet that would leave out most of them.
        best, at = exact_topk(h_BF.reshape(1, -1), min(self.keep, h_BF.numel()))
        some = ~(best[0] <= 0)  # NaN is some
        return best[0][some], at[0][some]

    def slots(self, n_tokens: int, n_latents: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values, indices and used, (B, K), K the most that any token has, at least 1."""
        places, order = self._places.sort()
        counts = torch.bincount(places // n_latents, minlength=n_tokens)
        return pad(self._values[order], places % n_latents, counts)


def largest(values_BK: Tensor, keep: int) -> Tensor:
    """The values, all but the `keep` largest set to 0."""
    if keep >= values_BK.numel():
        return values_BK
    chosen = values_BK.reshape(-1).topk(keep, sorted=False)[1]
    mask = torch.zeros(values_BK.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
    return values_BK * mask.reshape(values_BK.shape)
