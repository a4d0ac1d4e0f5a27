"""κ: how many other tokens of its context share a batch with a token, on average.

Tokens of one context have similar gradients; with correlation ρ between them the variance of a
batch's gradient grows by 1 + κρ, as if the batch were that much smaller. A shuffle of all rows has
κ = (B - 1)(T - 1)/(N - 1). Here κ is measured on the batches of an order without reading an
activation, and predicted from the layout, exactly up to batches that span two windows:

    κ = (T-1) (B-1)/(W-1) [p + (1 - p) q]    p  two tokens of a context lie in one unit
                                             q  two units lie in one window: (U-1)/(M-1)

A mix of stores has the mean of theirs by weight, each with its own part of the batch as B.

Symbols: B batch, T tokens of a context, W rows of a window, U units of a window, M units, S rows of
a segment, c rows of a unit. Permuted segments have p = (c-1)/(S-1); in contiguous ones p follows
from where the borders of units cut contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from saetrain.stream.mix import Mix
from saetrain.stream.stream import Stream

_Ids = tuple[NDArray[np.int64], NDArray[np.uint64]]  # context and document of each row
HIGH = 1.0  # κ above this is worth a warning


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What `measure` found."""

    kappa: float  # over the batches looked at
    error: float  # its standard error, from the spread between batches
    predicted: float  # by the formula
    ideal: float  # of a shuffle of all rows
    documents: float  # distinct documents per batch
    batches: int

    def __str__(self) -> str:
        return (
            f"mixing: κ = {self.kappa:.3g} (formula {self.predicted:.3g}, perfect shuffle "
            f"{self.ideal:.3g}), {self.documents:,.0f} documents in a batch"
        )


def measure(source: Stream | Mix, batches: int = 8) -> Mixing:
    """κ of the first `batches` batches of epoch 0. Reads token tables, no activations."""
    parts, total = _parts(source), source.batch_tokens
    rows = islice(zip(*map(_batches, parts), strict=False), batches)  # the shortest ends an epoch
    found = [_pairs(*_joined(ids)) for ids in rows]
    others = np.array([p for p, _ in found])
    documents = [d for _, d in found]
    sem = float(others.std(ddof=1) / np.sqrt(len(others))) if len(others) > 1 else float("inf")
    weights = [part.rows / total for part in parts]
    return Mixing(
        kappa=float(others.mean()),
        error=sem,
        predicted=sum(w * predict(p.stream, p.rows) for w, p in zip(weights, parts, strict=True)),
        ideal=sum(w * p.ideal for w, p in zip(weights, parts, strict=True)),
        documents=float(np.mean(documents)),
        batches=len(found),
    )


def of_rows(
    contexts: NDArray[np.int64], documents: NDArray[np.uint64], batch_tokens: int, batches: int = 8
) -> dict[str, float]:
    """κ and documents of the first batches of rows in the order of training, for live sources."""
    cuts = [slice(i * batch_tokens, (i + 1) * batch_tokens) for i in range(batches)]
    found = [_pairs(contexts[c], documents[c]) for c in cuts if c.stop <= len(contexts)]
    return {
        "kappa": float(np.mean([pairs for pairs, _ in found])),
        "documents_per_batch": float(np.mean([n for _, n in found])),
    }


def advice(found: Mixing, source: Stream | Mix) -> str | None:
    """What to set if κ is high; None if it is not."""
    stream = source.streams[0] if isinstance(source, Mix) else source
    if found.kappa <= HIGH or found.kappa <= 1.5 * found.ideal:
        return None
    factor = found.kappa / HIGH
    wanted = 1 << int(np.ceil(np.log2(stream.window_rows * factor)))
    return (
        f"batches hold about {found.kappa:.1f} other tokens of each token's context, a perfect "
        f"shuffle {found.ideal:.2g}: gradients are noisier than the batch size suggests. "
        f"stream.window_rows={wanted} would bring it to about {HIGH:g}"
        + ("" if stream.run_chunks == 1 else ", or use stream.run_chunks=1")
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One stream's share of every batch."""

    stream: Stream
    rows: float  # of a batch, on average
    bound: Callable[[int], int]  # rows in the first n batches

    @property
    def ideal(self) -> float:
        context, rows = self.stream.snapshot.context, self.stream.n_rows
        return max(0.0, self.rows - 1) * (context - 1) / max(1, rows - 1)


def _parts(source: Stream | Mix) -> list[_Part]:
    total = source.batch_tokens
    if isinstance(source, Stream):
        return [_Part(stream=source, rows=total, bound=lambda s: s * total)]
    each = enumerate(zip(source.streams, source.weights, strict=True))
    return [_Part(stream=s, rows=float(w) * total, bound=source.bound(i)) for i, (s, w) in each]


def _joined(ids: Sequence[_Ids]) -> _Ids:
    """Rows of all stores; contexts of different stores are different ones."""
    contexts = [c | np.int64(store) << 56 for store, (c, _) in enumerate(ids)]
    return np.concatenate(contexts), np.concatenate([d for _, d in ids])


def _batches(part: _Part) -> Iterator[_Ids]:
    """(context, document) of the rows of each global batch, in order."""
    stream, step = part.stream, 0
    contexts, documents = np.empty(0, np.int64), np.empty(0, np.uint64)
    for window in stream.windows(0):
        places = stream.places(window)
        table = stream.table_of(places.segment, places.row)
        ids = places.segment.astype(np.int64) << 32 | table.ctx
        contexts = np.concatenate([contexts, ids])
        documents = np.concatenate([documents, table.doc])
        while len(contexts) >= (b := part.bound(step + 1) - part.bound(step)):
            step += 1
            yield contexts[:b], documents[:b]
            contexts, documents = contexts[b:], documents[b:]


def _pairs(context: NDArray[np.int64], document: NDArray[np.uint64]) -> tuple[float, int]:
    """Mean number of other rows of the same context, and distinct documents."""
    counts = np.unique(context, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / len(context)), len(np.unique(document))


def predict(stream: Stream, batch: float | None = None) -> float:
    """κ by the formula above, for the rows that the filter keeps; of `batch` of them, or B."""
    batch = stream.batch_tokens if batch is None else batch
    layout = stream.snapshot.store.identity.layout
    sizes = np.array([s.n_rows for s in stream.snapshot.segments])
    kept = stream.n_rows / max(1, int(sizes.sum()))
    units = len(stream.eligible)
    unit_rows = sizes.sum() / units
    per_window = min(units, -(-stream.window_rows // max(1e-9, unit_rows * kept)))
    window = min(stream.n_rows, per_window * unit_rows * kept)
    if layout.order == "permuted":
        same_unit = float(np.mean((unit_rows - 1) / np.maximum(1, sizes - 1)))
    else:
        same_unit = _same_unit(int(sizes.max()), layout.context, round(unit_rows))
    same_window = same_unit + (1 - same_unit) * (per_window - 1) / max(1, units - 1)
    tokens = layout.context * kept
    return float((tokens - 1) * max(0.0, batch - 1) / max(1, window - 1) * same_window)


def _same_unit(rows: int, context: int, unit: int) -> float:
    """Share of pairs of tokens of a context that lie in one unit, contexts stored contiguously."""
    row = np.arange(rows)
    pieces = np.unique((row // context) * rows + row // unit, return_counts=True)[1]
    whole = np.unique(row // context, return_counts=True)[1]
    pairs = (whole * (whole - 1)).sum()
    return float((pieces * (pieces - 1)).sum() / pairs) if pairs else 0.0
