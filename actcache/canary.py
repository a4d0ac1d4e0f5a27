"""Is the model that I have the one that wrote this store? Stored contexts, computed again.

Of each token, the relative error ‖a − b‖ / ‖b‖: a is what the reader's model gives, b what is
stored, norms over the channels of one hook, in float64. Both were computed one context at a time
and are compared before any rounding to the storage type: what is left is rounding in the model.
The verdict: the largest error over all tokens is at most the tolerance of the coarser of the two
number types (1e-4 float32, 5e-3 float16, 2e-2 bfloat16). Equal identities are not asked for: a
re-saved checkpoint, another machine or another attention kernel passes; a wrong revision, rope base
or layer norm does not. Which fields of the identity differ is said beside the verdict.

Writing costs at most eight contexts of at most 8,192 tokens; it happens while the host is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.capture import LazyCapture
from actcache.data import Context
from actcache.errors import HookError, HostError
from actcache.hooks import HookPoint
from actcache.host import Host, HostSettings
from actcache.segments import SegmentBuilder, token_table
from actcache.store import FLAG_IMAGE, HookInfo, Store, TokenTable, open_store
from actcache.store.canaries import (
    CONTEXTS,
    MAX_TOKENS,
    Canary,
    canaries,
    canary_file,
    write_canary,
)
from actcache.store.errors import DamagedError, StoreMissingError
from actcache.store.ids import diff
from actcache.store.layout import DTYPES, chunk_rows
from actcache.store.reader import read_table
from actcache.store.writer import StoreWriter

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


@dataclass(frozen=True, kw_only=True)
class CanaryResult:
    """The verdict on one hook."""

    hook: str
    contexts: int
    tokens: int
    largest: float  # relative error ‖a − b‖ / ‖b‖ of the worst token
    median: float  # over tokens
    largest_difference: float  # max |a − b| over tokens and channels
    worst: tuple[int, int]  # context and position of the worst token
    tolerance: float
    differs: tuple[str, ...]  # fields of the identity in which the reader's model is another

    @property
    def ok(self) -> bool:
        return self.largest <= self.tolerance


# -- writing ---------------------------------------------------------------------------------------


def write(writer: StoreWriter, segment: str, capture: LazyCapture) -> None:
    """Store the canary of the captured hooks from a committed segment, unless it is there.

    Loads the host if nothing has yet: call it where a segment was just computed.
    """
    root = writer.path
    if canary_file(root, capture.activation_ids).exists():
        return
    commit = writer.commits[segment][0]
    table = read_table(root, root / commit.folder, commit.rows, f"segment {segment}")
    numbers, contexts = choose(table, writer.identity.layout.context)
    if not contexts:
        return  # all of them have images
    tokens, acts = capture.builder.alone().build(contexts, lambda _: None)
    write_canary(
        root,
        store_id=writer.identity.store_id,
        segment=segment,
        contexts=numbers,
        tokens=tokens,
        acts=[
            (_whole(info, len(tokens), writer.identity.layout.chunk_bytes), acts[info.name])
            for info in capture.infos
        ],
        writer=capture.recorded,
    )


def choose(table: TokenTable, context: int) -> tuple[list[int], list[Context]]:
    """The first contexts of full length, by number; all of them where none is full.

    Contexts with images are left out: a store does not keep their pixels.
    """
    found = {n: c for n, c in contexts_of(table).items() if not (c.flags & FLAG_IMAGE).any()}
    full = [number for number, c in found.items() if len(c) == context] or list(found)
    numbers = full[: max(1, min(CONTEXTS, MAX_TOKENS // context))]
    return numbers, [found[number] for number in numbers]


def contexts_of(table: TokenTable) -> dict[int, Context]:
    """The contexts of a token table by number, in order, whatever the order of its rows."""
    table = table.take(np.lexsort((table.pos, table.ctx)))
    numbers, starts = np.unique(table.ctx, return_index=True)
    stops = [*starts[1:].tolist(), len(table)]
    return {
        int(number): Context(
            table.token_id[start:stop], table.doc[start:stop], table.flags[start:stop]
        )
        for number, start, stop in zip(numbers, starts, stops, strict=True)
    }


def _whole(info: HookInfo, rows: int, chunk_bytes: int) -> HookInfo:
    """The hook as a canary stores it: float32."""
    size = DTYPES["float32"].itemsize
    cut = chunk_rows(info.d, size, chunk_bytes, rows)
    return replace(info, dtype="float32", chunk_rows=cut, norms=False)


# -- checking --------------------------------------------------------------------------------------


def check(store_path: str | Path, host: HostSettings) -> list[CanaryResult]:
    """Compare the canaries of a store with what the reader's model gives, one result per hook.

    Raises StoreMissingError if the store has no canary, DamagedError if one is damaged, HostError
    or HookError if the model cannot be compared at all, NonFiniteError if it gives NaN.
    """
    store = open_store(store_path)
    found = list(canaries(store))
    if not found:
        raise StoreMissingError(
            f"{store.path} has no canary contexts. A run of actcache writes them when it computes "
            "segments; this store was written without, or its only run was interrupted, or every "
            "context of its first segment has images, whose pixels a store does not keep"
        )
    tolerance = _tolerance(store, host)
    mine = Host(host)
    differs = tuple(_differences(store, mine))
    points = {i.name: _point(i) for c in found for i in c.record.hooks}
    _refuse_unknown(mine, list(points.values()))
    model = mine.load(list(points.values()))
    results: dict[str, CanaryResult] = {}
    for canary in found:
        builder = SegmentBuilder(
            model,
            [points[h] for h in canary.hooks],
            device=mine.device,
            batch_contexts=1,
            dtype="float32",
            cross_documents=_attends_across(store),
        )
        for result in _compare(canary, builder, mine, tolerance, differs):
            before = results.get(result.hook)
            if before is None or result.largest > before.largest:
                results[result.hook] = result
    return [results[hook] for hook in sorted(results)]


def table(results: Sequence[CanaryResult]) -> str:
    """What the command prints."""
    lines = [f"{'hook':<24}{'tokens':>8}{'median':>11}{'largest':>11}{'allowed':>11}  verdict"]
    for r in results:
        where = f"differs most at context {r.worst[0]}, position {r.worst[1]}"
        lines.append(
            f"{r.hook:<24}{r.tokens:>8}{r.median:>11.2e}{r.largest:>11.2e}{r.tolerance:>11.0e}  "
            + ("the same model" if r.ok else f"ANOTHER MODEL, {where}")
        )
    lines += ["relative error |a - b| / |b| of a token's activations: yours a, stored b"]
    return "\n".join([*lines, *(results[0].differs if results else ())])


def _compare(
    canary: Canary, builder: SegmentBuilder, mine: Host, tolerance: float, differs: tuple[str, ...]
) -> list[CanaryResult]:
    table = canary.tokens()
    _refuse_tokens(mine, table)
    contexts = list(contexts_of(table).values())
    again, acts = builder.build(contexts, lambda _: None)
    assert again.digest() == token_table(contexts).digest()
    return [
        _result(hook, table, acts[hook], canary.acts(hook), tolerance, differs)
        for hook in canary.hooks
    ]


def _result(
    hook: str,
    table: TokenTable,
    mine: NDArray[Any],
    stored: NDArray[Any],
    tolerance: float,
    differs: tuple[str, ...],
) -> CanaryResult:
    if mine.shape != stored.shape:
        raise HostError(
            f"hook {hook}: your model gives {mine.shape[1]} channels, the store has "
            f"{stored.shape[1]}: it is another architecture"
        )
    errors = relative_errors(mine, stored)
    worst = int(np.argmax(errors))
    return CanaryResult(
        hook=hook,
        contexts=int(table.ctx.max()) + 1,
        tokens=len(errors),
        largest=float(errors[worst]),
        median=float(np.median(errors)),
        largest_difference=float(np.abs(mine.astype(np.float64) - stored).max()),
        worst=(int(table.ctx[worst]), int(table.pos[worst])),
        tolerance=tolerance,
        differs=differs,
    )


def relative_errors(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """‖a − b‖ / ‖b‖ of each row (n,) of a, b (n, d); infinite where b is 0 and a is not."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    off, size = np.linalg.norm(a - b, axis=1), np.linalg.norm(b, axis=1)
    safe = np.where(size > 0, size, 1.0)
    errors: NDArray[np.float64] = np.where(size > 0, off / safe, np.where(off > 0, np.inf, 0.0))
    return errors


def _tolerance(store: Store, host: HostSettings) -> float:
    """That of the coarser number type."""
    theirs = store.identity.host.get("dtype")
    if not isinstance(theirs, str) or theirs not in TOLERANCE:
        raise DamagedError(f"{store.path}: store.json has no host.dtype of {', '.join(TOLERANCE)}")
    return max(TOLERANCE[theirs], TOLERANCE[host.dtype])


def _attends_across(store: Store) -> bool:
    packing = store.identity.token_stream.get("packing")
    value = packing.get("attend_across_documents") if isinstance(packing, dict) else None
    if not isinstance(value, bool):
        raise DamagedError(f"{store.path}: store.json has no packing.attend_across_documents")
    return value


def _differences(store: Store, mine: Host) -> list[str]:
    """Lines for the fields of the identity that the reader's model does not share."""
    theirs = {k: v for k, v in store.identity.host.items() if k != "order"}
    tokens = {"tokenizer": store.identity.token_stream.get("tokenizer")}
    ours = {"tokenizer": mine.tokenizer_identity}
    lines = [*diff(theirs, mine.identity, "host."), *diff(tokens, ours)]
    return [line.replace("you asked for", "your model has") for line in lines]


def _point(info: HookInfo) -> HookPoint:
    return HookPoint(name=info.name, module=info.module, io=info.io, index=info.index)


def _refuse_unknown(mine: Host, points: Sequence[HookPoint]) -> None:
    modules = dict(mine.skeleton().named_modules())
    for point in points:
        if point.module not in modules:
            raise HookError(
                f"hook {point.name}: your model has no module {point.module!r:.200}: it is another "
                "architecture, or has fewer layers, than the one that wrote the store"
            )


def _refuse_tokens(mine: Host, table: TokenTable) -> None:
    size = getattr(mine.config.get_text_config(), "vocab_size", None)
    largest = int(table.token_id.max())
    if size is not None and largest >= size:
        raise HostError(
            f"the store has token ids up to {largest}, your model embeds {size}: it is another "
            "model"
        )
