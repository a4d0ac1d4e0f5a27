"""Per-latent statistics and top contexts of an SAE over stored activations. No host model needed.

Pass one streams the chosen rows once through `encode` and keeps `FeatureState`. Pass two re-reads
only the contexts to be shown, sorts their rows by position, and takes the shown latents' activation
on every token. Both read one inner chunk at a time.

Bias: `max_rows` takes whole contexts from the start of the store, so it sees the first documents.
Special tokens and documents outside the split are not counted; in a shown context they appear
without an activation. Text is put together from the stored bytes of tokens, never from token
strings, so that a character spread over several tokens survives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from actcache.store import FLAG_SPECIAL, TokenTable
from actcache.store.split import held_out
from saetrain.codes import Codes, SparseCodes, largest_per_token
from saetrain.dashboard.contexts import Contexts
from saetrain.dashboard.state import FeatureState, Peaks
from saetrain.errors import ConfigError
from saetrain.several import Readable
from saetrain.stream import Split
from saetrain.stream.aligned import AnySegment
from saetrain.units import unit_of

_BATCH_ROWS = 1024
Encode = Callable[
    [AnySegment, TokenTable, NDArray[np.int64]], Iterator[tuple[NDArray[np.int64], Codes]]
]


class Encoder(Protocol):
    """Anything that turns rows (B, D) into codes (B, F)."""

    def encode(self, x: Tensor) -> Codes: ...


@dataclass(frozen=True)
class Example:
    """One context of a latent, in reading order; T tokens."""

    segment: int
    ctx: int
    peak: int  # index of the token with the largest activation, in 0..T-1
    value: float  # its activation
    pos: NDArray[np.int64]  # (T,) position in the context
    token_id: NDArray[np.int64]  # (T,)
    acts: NDArray[np.float32]  # (T,)
    counted: NDArray[np.bool_]  # (T,) False: a special token, or a document outside the split


@dataclass(frozen=True)
class FeatureTable:
    """Statistics of all F latents, and examples of a few. Counts are of tokens of `split`."""

    n_tokens: int
    n_contexts: int
    split: str
    fires_F: NDArray[np.int64]  # tokens with an activation above 0
    contexts_F: NDArray[np.int64]  # contexts with such a token
    sum_F: NDArray[np.float64]  # sum of activations
    max_F: NDArray[np.float32]
    best: Peaks  # K best contexts of every latent, one peak per context
    rule: str  # how the latents with examples were chosen
    examples: dict[int, list[Example]]  # latent -> its best contexts, in order

    @property
    def density_F(self) -> NDArray[np.float64]:
        """Share of tokens on which each latent fires."""
        return self.fires_F / self.n_tokens

    @property
    def log10_density_F(self) -> NDArray[np.float64]:
        """log10 of the density; -inf for a latent that never fired."""
        with np.errstate(divide="ignore"):
            return np.log10(self.density_F)

    @property
    def n_dead(self) -> int:
        """Latents that fired on none of the n_tokens tokens."""
        return int((self.fires_F == 0).sum())


@torch.no_grad()
def collect(
    sae: Encoder,
    snapshot: Readable,
    hook: str | Sequence[str],
    *,
    split: Split = "held_out",
    held_out_fraction: float = 0.05,
    max_rows: int | None = 500_000,
    top_contexts: int = 8,
    features: Sequence[int] | None = None,
    n_features: int = 20,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> FeatureTable:
    """Statistics of every latent over `split`, and examples of `features`.

    `hook` are the hooks that the SAE reads. `features=None` chooses `n_features` of them by density
    (see `choose`). `max_rows` stops after the context that reaches it; None reads the whole split.
    Of an SAE with latents for each layer of a token (mlsae) the largest counts.
    Raises HookMissingError, ConfigError if the split has no rows or a feature does not exist,
    TrainingError on non-finite activations.
    """
    names = [hook] if isinstance(hook, str) else hook
    hooks = [snapshot.resolve_hook(name) for name in names]
    picked = _Picked(split, held_out_fraction)
    encode = _encoder(sae, snapshot, hooks, picked, device)
    state: FeatureState | None = None
    with _bar(snapshot, picked, max_rows, progress) as bar:
        for number, segment, tokens, rows in _chosen(snapshot, picked, max_rows):
            for part, codes in encode(segment, tokens, rows):
                state = state or FeatureState(_width(codes), top_contexts)
                state.update(number, tokens.take(part), codes)
                bar.update(len(part))
    if state is None:
        raise ConfigError(f"the {split} split has no rows; raise held_out_fraction")
    chosen, rule = _choice(features, state.fires_F, n_features)
    best = state.best()
    return FeatureTable(
        n_tokens=state.n_tokens,
        n_contexts=state.n_contexts,
        split=split,
        fires_F=state.fires_F,
        contexts_F=state.contexts_F,
        sum_F=state.sum_F,
        max_F=state.max_F,
        best=best,
        rule=rule,
        examples=_examples(encode, snapshot, best, chosen, picked),
    )


def choose(fires_F: NDArray[np.int64], n: int) -> list[int]:
    """n live latents spread evenly over density, densest first; all of them if there are fewer.

    The live latents, sorted by falling number of fires, then by index, are cut into n groups of
    equal size (to one), and the middle one of each group is taken. Nothing else is looked at.
    """
    order = np.argsort(-fires_F, kind="stable")
    live = order[fires_F[order] > 0]
    if len(live) <= n:
        return [int(f) for f in live]
    middle = (2 * np.arange(n) + 1) * len(live) // (2 * n)
    return [int(f) for f in live[middle]]


def token_texts(tokens: Sequence[bytes]) -> list[str]:
    """Text of each token within the joined bytes, decoded as UTF-8.

    A character spread over tokens belongs to the token with its first byte, so a token that only
    continues one has the text ''. A byte that is no UTF-8 becomes U+FFFD.
    """
    ends = np.cumsum([len(t) for t in tokens])
    out = [""] * len(tokens)
    offset = 0
    for char in b"".join(tokens).decode("utf-8", "surrogateescape"):
        invalid = "\udc80" <= char <= "\udcff"
        owner = int(np.searchsorted(ends, offset, side="right"))
        out[owner] += "\ufffd" if invalid else char
        offset += 1 if invalid else len(char.encode())
    return out


@dataclass(frozen=True)
class _Picked:
    """Which rows count."""

    split: Split
    held_out_fraction: float

    def __call__(self, tokens: TokenTable) -> NDArray[np.bool_]:
        keep: NDArray[np.bool_] = (tokens.flags & FLAG_SPECIAL) == 0
        if self.split != "all":
            keep &= held_out(tokens.doc, self.held_out_fraction) == (self.split == "held_out")
        return keep

    def visible(self, tokens: TokenTable) -> NDArray[np.bool_]:
        """Rows that a model may attend to, whether they count or not."""
        if self.split != "train":
            return np.ones(len(tokens.doc), dtype=np.bool_)
        return ~held_out(tokens.doc, self.held_out_fraction)


def _chosen(
    snapshot: Readable, picked: _Picked, max_rows: int | None
) -> Iterator[tuple[int, AnySegment, TokenTable, NDArray[np.int64]]]:
    """(number, segment, its tokens, rows that count), whole contexts until max_rows is reached."""
    left = max_rows
    segments: Sequence[AnySegment] = snapshot.segments
    for number, segment in enumerate(segments):
        tokens = segment.tokens()
        keep = picked(tokens)
        if left is not None:
            ctx, counts = np.unique(tokens.ctx[keep], return_counts=True)
            before = np.cumsum(counts) - counts
            keep &= np.isin(tokens.ctx, ctx[before < left])
            left -= int(keep.sum())
        rows = np.flatnonzero(keep)
        if len(rows):
            yield number, segment, tokens, rows
        if left is not None and left <= 0:
            return


def _read(
    segment: AnySegment, hooks: Sequence[str], rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """`_read_one` of several hooks, stacked (B, H, D); their chunks may differ in size."""
    lead, *others = (_read_one(segment, hook, rows) for hook in hooks)
    kept = [torch.zeros(0) for _ in others]
    for part, x_BD in lead:
        each = [x_BD]
        for i, other in enumerate(others):
            while len(kept[i]) < len(part):
                more = next(other)[1]
                kept[i] = torch.cat([kept[i], more]) if len(kept[i]) else more
            each.append(kept[i][: len(part)])
            kept[i] = kept[i][len(part) :]
        yield part, torch.stack(each, dim=-2) if others else x_BD


def _read_one(
    segment: AnySegment, hook: str, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """(row numbers, activations (B, D) float32) of the given ascending rows, in batches."""
    reader = segment.acts(hook)
    waiting: list[NDArray[np.float32]] = []
    done, size = 0, 0
    number = rows // reader.chunk_rows
    for chunk in np.unique(number):
        inside = rows[number == chunk] - chunk * reader.chunk_rows
        waiting.append(reader.read_chunk(int(chunk))[inside].astype(np.float32))
        size += len(inside)
        if size >= _BATCH_ROWS or done + size == len(rows):
            x = torch.from_numpy(np.concatenate(waiting))
            for first in range(0, size, _BATCH_ROWS):
                part = x[first : first + _BATCH_ROWS]
                yield rows[done + first : done + first + len(part)], part
            done, size, waiting = done + size, 0, []


def _choice(
    features: Sequence[int] | None, fires_F: NDArray[np.int64], n: int
) -> tuple[list[int], str]:
    if features is not None:
        wrong = [f for f in features if not 0 <= f < len(fires_F)]
        if wrong:
            raise ConfigError(f"features={wrong}: this SAE has latents 0 to {len(fires_F) - 1}")
        return list(features), "These latents were asked for by number."
    chosen, live = choose(fires_F, n), int((fires_F > 0).sum())
    if len(chosen) == live:
        return chosen, f"All {live:,} live latents, densest first."
    return chosen, (
        f"The {live:,} live latents, sorted by density, were cut into {n} groups of equal size; "
        "the middle latent of each group is shown, densest first. Nothing else decided the choice."
    )


def _examples(
    encode: Encode,
    snapshot: Readable,
    best: Peaks,
    chosen: list[int],
    picked: _Picked,
) -> dict[int, list[Example]]:
    """Tokens and activations of the best contexts of the chosen latents."""
    found: dict[tuple[int, int, int], Example] = {}
    wanted = best.take(np.isin(best.feature, chosen))
    for number in np.unique(wanted.segment):
        peaks, segment = wanted.take(wanted.segment == number), snapshot.segments[number]
        tokens = segment.tokens()
        rows = np.flatnonzero(np.isin(tokens.ctx, peaks.ctx))
        acts_NC = np.zeros((len(rows), len(chosen)), dtype=np.float32)
        for part, codes in encode(segment, tokens, rows):
            acts_NC[np.searchsorted(rows, part)] = _columns(codes, chosen)
        tokens = tokens.take(rows)
        for i in range(len(peaks)):
            one = peaks.take(slice(i, i + 1))
            feature, ctx = int(one.feature[0]), int(one.ctx[0])
            acts_N = acts_NC[:, chosen.index(feature)]
            found[feature, int(number), ctx] = _example(one, tokens, acts_N, picked)
    return {
        f: [found[f, int(s), int(c)] for s, c in zip(p.segment, p.ctx, strict=True)]
        for f, p in ((f, best.of(f)) for f in chosen)
    }


def _example(
    peak: Peaks, tokens: TokenTable, acts_N: NDArray[np.float32], picked: _Picked
) -> Example:
    """The context of `peak` (one row), put back in reading order."""
    rows = np.flatnonzero(tokens.ctx == peak.ctx[0])
    rows = rows[np.argsort(tokens.pos[rows], kind="stable")]
    tokens = tokens.take(rows)
    return Example(
        segment=int(peak.segment[0]),
        ctx=int(peak.ctx[0]),
        peak=int(np.searchsorted(tokens.pos, peak.pos[0])),
        value=float(peak.value[0]),
        pos=tokens.pos.astype(np.int64),
        token_id=tokens.token_id.astype(np.int64),
        acts=acts_N[rows],
        counted=picked(tokens),
    )


def _encoder(
    sae: Encoder,
    snapshot: Readable,
    hooks: Sequence[str],
    picked: _Picked,
    device: str | torch.device,
) -> Encode:
    """(row numbers, codes) of ascending rows of a segment, for an SAE of either unit."""

    def of_rows(
        segment: AnySegment, tokens: TokenTable, rows: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Codes]]:
        for part, x in _read(segment, hooks, rows):
            yield part, largest_per_token(sae.encode(x.to(device)))

    if unit_of(sae) == "token":
        return of_rows
    packing = snapshot.store.identity.token_stream.get("packing", {})
    apart = not packing.get("attend_across_documents", True)
    contexts = Contexts(sae, picked.visible, apart, device)
    return lambda segment, tokens, rows: contexts.encoded(
        lambda members: _read(segment, hooks, members), tokens, rows
    )


def _bar(snapshot: Readable, picked: _Picked, max_rows: int | None, shown: bool) -> Any:
    """A bar over the rows that will be read; counting them costs one more look at the tokens."""
    total = sum(len(c[-1]) for c in _chosen(snapshot, picked, max_rows)) if shown else None
    return tqdm(
        total=total,
        desc="features",
        unit="tok",
        unit_scale=True,
        mininterval=0.5,
        dynamic_ncols=True,
        disable=not shown,
    )


def _columns(codes: Codes, chosen: list[int]) -> NDArray[np.float32]:
    """Activations of the chosen latents, (B, C)."""
    if not isinstance(codes, SparseCodes):
        return codes[:, chosen].float().cpu().numpy()
    columns = [(codes.values * (codes.indices == f)).sum(-1) for f in chosen]
    return torch.stack(columns, dim=1).float().cpu().numpy()


def _width(codes: Codes) -> int:
    return codes.n_latents if isinstance(codes, SparseCodes) else codes.shape[-1]
