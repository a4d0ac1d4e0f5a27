"""int8: mean and standard deviation of every channel, before the first segment is written.

The first segments of the plan, as many as hold a million tokens that are not special, run through
the host, and their statistics become the calibration of the hook: once per store, published
exclusively, so segments do not depend on how many writers there are. Whoever comes meanwhile waits.
A process that dies here leaves a claim that the next one takes over.

Cost: rows that fit KEEP_BYTES are kept and not computed again when their segments are written; a
larger calibration costs a million tokens more. Bias: a smaller `tokens` or fewer data calibrate on
what there is, which holds for the store however it grows; every commit records its error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from actcache.capture import LazyCapture
from actcache.data import Context
from actcache.store import FLAG_SPECIAL, HookStats, TokenTable
from actcache.store.calibrations import publish_calibration
from actcache.store.claims import Claims
from actcache.store.int8 import CALIBRATION_ROWS, Calibration
from actcache.store.writer import StoreWriter

KEEP_BYTES = 1 << 30
CLAIM = "calibration"
Segments = Iterator[tuple[str, Sequence[Context]]]


def calibrate(
    capture: LazyCapture, writer: StoreWriter, segments: Segments, claims: Claims, progress: bool
) -> bool:
    """Make the calibrations that the hooks of `capture` lack; False while another process does.

    `segments` are the segments of the plan by id, from the first; no more of them are drawn than
    needed. Raises NonFiniteError.
    """
    if not _missing(capture, writer):
        return True
    if not claims.acquire(CLAIM):
        return False
    try:
        writer.refresh()
        if missing := _missing(capture, writer):
            _publish(missing, _measure(capture, segments, progress), writer)
    finally:
        claims.release(CLAIM)
    return True


def _missing(capture: LazyCapture, writer: StoreWriter) -> dict[str, str]:
    """Activation ids of the hooks without calibration, by name."""
    if capture.dtype != "int8":
        return {}
    return {n: i for n, i in capture.ids.items() if writer.calibration(i) is None}


def _publish(missing: dict[str, str], found: dict[str, HookStats], writer: StoreWriter) -> None:
    for name, activation_id in missing.items():
        if name in found:  # data without a token calibrate nothing, and need nothing
            made = Calibration.of(found[name])
            publish_calibration(writer.path, activation_id, made, found[name].n)


def _measure(capture: LazyCapture, segments: Segments, progress: bool) -> dict[str, HookStats]:
    """Statistics of each hook over the first million rows without special tokens.

    If all tokens are special, those of all. Rows that fit stay in `capture.kept`.
    """
    plain: dict[str, HookStats] = {}
    every: dict[str, HookStats] = {}
    rows = size = 0
    options: dict[str, Any] = {"unit": "tok", "unit_scale": True, "disable": not progress}
    with tqdm(total=CALIBRATION_ROWS, desc="calibrating int8", leave=False, **options) as bar:
        while rows < CALIBRATION_ROWS and (segment := next(segments, None)):
            tokens, acts = capture.builder.build(segment[1], bar.update)
            keep = (tokens.flags & FLAG_SPECIAL) == 0
            rows += int(np.count_nonzero(keep))
            for name, x in acts.items():
                _add(plain, name, x[keep])
                _add(every, name, x)
            size += _keep(capture, segment[0], tokens, acts, KEEP_BYTES - size)
    return plain if rows else every


def _add(found: dict[str, HookStats], name: str, x: NDArray[Any]) -> None:
    found[name] = found.get(name, HookStats.empty(x.shape[1])).merge(HookStats.of(x))


def _keep(
    capture: LazyCapture, segment: str, tokens: TokenTable, acts: dict[str, NDArray[Any]], room: int
) -> int:
    """Keep the rows for the writing of their segment, if they fit; bytes taken."""
    size = sum(x.nbytes for x in acts.values())
    if size > room:
        return 0
    capture.kept[segment] = tokens, acts
    return size
