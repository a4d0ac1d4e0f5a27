"""What a live stream draws from, and the statistics that it takes of it before training.

The interface alone: who captures (`actcache.live`, or a class of your own) imports nothing of this
package, and this package nothing of host models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.store import HookInfo, HookStats, TokenTable
from actcache.store.layout import FLAG_SPECIAL
from saetrain.errors import ConfigError

Wanted = Callable[[NDArray[np.uint8], NDArray[np.uint64]], NDArray[np.bool_]]


class LiveSegment(Protocol):
    """Rows of one segment in stored order, or those of them that are wanted and some more."""

    @property
    def place(self) -> Mapping[str, int]: ...  # plain; `segments(place)` begins here
    @property
    def row(self) -> NDArray[np.int64]: ...  # (n,) numbers in the whole segment, ascending
    @property
    def tokens(self) -> TokenTable: ...  # of these rows
    @property
    def acts(self) -> Mapping[str, NDArray[Any]]: ...  # hook -> (n, d) in storage type


class Capture(Protocol):
    """What a live stream draws from; `actcache.live.LiveCapture` is one."""

    @property
    def names(self) -> Mapping[str, str]: ...  # hooks as asked for -> as stored
    @property
    def hooks(self) -> Mapping[str, HookInfo]: ...
    @property
    def context(self) -> int: ...
    def ids(self) -> dict[str, Any]: ...
    def segments(
        self,
        start: Mapping[str, int] | None = None,
        wanted: Wanted | None = None,
        stop: threading.Event | None = None,
        keep_bytes: int = 0,
    ) -> Iterator[LiveSegment]: ...


class Calibration:
    """Statistics of the hooks over the first rows of a capture, found when first asked for."""

    def __init__(self, capture: Capture, tokens: int, *, special: bool, keep_bytes: int) -> None:
        """`special`: over special tokens too, for streams that do not skip them."""
        self._capture, self._tokens, self._special = capture, tokens, special
        self._keep, self._found = keep_bytes, dict[str, HookStats]()

    def of(self, hook: str) -> HookStats:
        """Statistics of a hook. ConfigError if there is not a row to take them of."""
        if not self._found:
            # Loading a host may draw random numbers; the training run's are its own.
            with torch.random.fork_rng():
                self._measure()
        return self._found[hook]

    def _measure(self) -> None:
        """Segment by segment, as the commits of a store hold them."""
        found = {h: HookStats.empty(i.d) for h, i in self._capture.hooks.items()}
        rows = 0
        for segment in self._capture.segments(keep_bytes=self._keep):
            plain = (segment.tokens.flags & FLAG_SPECIAL) == 0
            for hook, x in segment.acts.items():
                stats = HookStats.of(x[plain])
                if self._special:
                    stats = stats.merge(HookStats.of(x[~plain]))
                found[hook] = found[hook].merge(stats)
            rows += len(plain)
            if rows >= self._tokens:
                break
        if not all(stats.n for stats in found.values()):
            raise ConfigError("live: the data gave no tokens to take statistics of")
        self._found = found
