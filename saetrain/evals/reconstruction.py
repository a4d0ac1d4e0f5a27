"""How well an SAE reconstructs held-out activations, and how sparsely.

One pass over the stream's held-out split, in stored order, special tokens skipped. Formulas are in
`saetrain.metrics.FORMULAS` and go into the result beside the token count. Bias: a token cap takes
the first rows in stored order, which is whole segments first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.codes import Codes
from saetrain.errors import ConfigError
from saetrain.metrics import FORMULAS, ContextSums, Firing, Reconstruction
from saetrain.stream import Batch


class Encoder(Protocol):
    """What is evaluated: anything with the public maths of an SAE."""

    def encode(self, x: Tensor) -> Codes: ...

    def decode(self, codes: Codes) -> Tensor: ...


def rows(
    batches: Iterable[Batch], limit: int | None
) -> Iterator[tuple[dict[str, Tensor], NDArray[Any], NDArray[Any]]]:
    """(acts, segment, ctx) of each batch, cut to exactly `limit` tokens in all."""
    done = 0
    for batch in batches:
        n = len(batch.segment) if limit is None else min(limit - done, len(batch.segment))
        yield {h: x[:n] for h, x in batch.acts.items()}, batch.segment[:n], batch.tokens.ctx[:n]
        done += n
        if done == limit:  # before the next batch is read
            return


@torch.no_grad()
def evaluate(
    sae: Encoder,
    batches: Iterable[Batch],
    *,
    hook_in: str,
    hook_out: str,
    reference: Tensor,
    tokens: int | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of `sae` over at most `tokens` rows of `batches`.

    `reference` (D_out,) is the store's mean of the output hook. The result is JSON-able: fve with
    its standard error, mse, nmse, cos, norm_ratio, l0 with percentiles, l1, dead share, density
    histogram, tokens, contexts and the formulas. ConfigError if there are no rows.
    """
    stream = rows(batches, tokens)
    first = next(stream, None)
    if first is None:
        raise ConfigError("the held-out split has no rows; raise held_out_fraction")
    recon, contexts = Reconstruction(reference.to(first[0][hook_out].device)), ContextSums()
    firing: Firing | None = None
    for acts, segment_B, ctx_B in chain([first], stream):
        codes = sae.encode(acts[hook_in])
        if firing is None:
            firing = Firing(_width(codes), reference.device)
        firing.update(codes)
        err_B, dev_B = recon.update(acts[hook_out], sae.decode(codes))
        contexts.update(segment_B, ctx_B, err_B.cpu().numpy(), dev_B.cpu().numpy())
    assert firing is not None  # there was a first batch
    result: dict[str, Any] = {**recon.compute(), **firing.compute()}
    result["fve_se"] = contexts.fve_se(recon.mean_offset_sq, bootstrap, seed)
    result |= {"tokens": recon.n, "contexts": len(contexts.table()), "split": "held_out"}
    return result | {"special_tokens": "excluded", "formulas": FORMULAS}


def _width(codes: Codes) -> int:
    return codes.shape[-1] if isinstance(codes, Tensor) else codes.n_latents
