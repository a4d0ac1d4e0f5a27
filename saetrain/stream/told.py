"""What a training run says about its data: how well batches are mixed, how fast they come.

Before the first step: κ, measured on the first batches and by formula, and the documents of a
batch; if κ is high, the setting that lowers it (not for batches of whole contexts, which it is not
about). With every row of metrics: GB/s read, and the share
of the time that training waited (`data_wait`). At the end: both over the whole run.

Cost: token tables of the segments that the first window touches, once per start.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from saetrain.native import wanted
from saetrain.stream.ahead import Traffic
from saetrain.stream.hot import compiled
from saetrain.stream.live import LiveStream
from saetrain.stream.mix import Mix
from saetrain.stream.mixing import HIGH, Mixing, advice, measure
from saetrain.stream.sequences import SequenceStream
from saetrain.stream.stream import Stream

Say = Callable[[str], None]


class Told:
    """Follows one stream through one training run."""

    def __init__(self, stream: object, say: Say) -> None:
        """`stream` is any source of batches; of what it cannot tell, nothing is said."""
        self._stream, self._say = stream, say
        self._mixing: Mixing | None = None
        self._started = time.perf_counter()
        self._waited = 0.0  # of the whole run
        self._first = self._bytes = 0  # read before this run, by others; at the last row

    @property
    def _traffic(self) -> Traffic | None:
        return getattr(self._stream, "traffic", None)

    def begin(self) -> None:
        """Before the first step of this process."""
        self._start()
        stream = self._stream
        if isinstance(stream, Stream | Mix) and not isinstance(stream, SequenceStream):
            self._mixing = measure(stream)
            self._say(str(self._mixing))
            if (better := advice(self._mixing, stream)) is not None:
                self._say(f"warning: {better}")
            if compiled() is None and wanted():
                self._say("no C compiler ($CC, cc): numpy shuffles the rows, which is slower")

    def begin_like(self, other: Told) -> None:
        """As `begin`, with what `other` measured of the same stream."""
        self._start()
        self._mixing = other._mixing

    def _start(self) -> None:
        self._started = time.perf_counter()
        if (traffic := self._traffic) is not None:
            self._first = self._bytes = traffic.bytes

    def mixing(self) -> dict[str, float]:
        """For the first row of metrics: the same numbers whenever a run is continued."""
        found = self._mixing
        if isinstance(self._stream, LiveStream):
            return self._live(self._stream)
        if found is None:
            return {}
        return {
            "kappa": found.kappa,
            "kappa_formula": found.predicted,
            "kappa_ideal": found.ideal,
            "documents_per_batch": found.documents,
        }

    def _live(self, stream: LiveStream) -> dict[str, float]:
        """Of a live source it is known once the first window was captured; there is no formula."""
        found = stream.mixing
        if found is None:
            return {}
        kappa, documents = found["kappa"], found["documents_per_batch"]
        self._say(f"mixing: κ = {kappa:.3g} (measured), {documents:,.0f} documents in a batch")
        if kappa > HIGH:
            self._say(
                f"warning: batches hold about {kappa:.1f} other tokens of each token's context. A "
                f"live source mixes within windows only: stream.window_rows="
                f"{int(stream.window_rows * 2 ** np.ceil(np.log2(kappa / HIGH)))} would mix better"
            )
        return found

    def reading(self, waited: float, seconds: float) -> dict[str, float]:
        """For a row of metrics about the last `seconds`, of which training waited `waited`."""
        self._waited += waited
        traffic = self._traffic
        if traffic is None:
            return {}
        read, self._bytes = traffic.bytes - self._bytes, traffic.bytes
        return {"read_gb_per_s": read / max(seconds, 1e-9) / 1e9}

    def end(self) -> None:
        """After the last step."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        traffic = self._traffic
        if traffic is not None:
            gb, digits = (traffic.bytes - self._first) / 1e9, int(seconds < 10)
            self._say(
                f"data: {gb:.3g} GB read, {gb / seconds:.3g} GB/s; training waited for it "
                f"{self._waited / seconds:.1%} of {seconds:,.{digits}f} s"
            )
