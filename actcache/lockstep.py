"""Lockstep: ranks that share one model run every forward pass together.

In ZeRO-3 and FSDP2 each rank holds a slice of the weights, and each forward pass gathers them from
all ranks, so all must run it, however much data each has. Before each pass the ranks agree, by one
all-reduce of four integers: if any of them has tokens, all run the model, those without on two
dummy tokens whose activations nobody keeps. Ranks therefore claim, compute and commit units at
their own pace, and no schedule has to be worked out beforehand.

Cost: the all-reduce (about 0.1 ms), and a pass over two tokens on a rank that has run out of data.
Bias: none, the dummies are not rows.
Source: the synced_gpus of transformers' generate; DeepSpeed issue 860 is the hang without it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from actcache.errors import RankError
from actcache.ranks import ONE_PRESS, Ranks


class State(IntEnum):
    """What a rank brings to an agreement."""

    WORK = 0  # tokens for a forward pass
    WAIT = 1  # none now; others hold units that may come free
    DONE = 2  # none, and nothing is left to wait for
    STOP = 3  # Ctrl-C


class Lockstep:
    """The agreement of all ranks before each forward pass of their common model."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._serving = False
        self._interrupted: float | None = None  # when
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore("group", ranks.store),
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=timedelta(seconds=ranks.timeout),
            )

    def enter(self, *_: Any) -> None:
        """Before the model is loaded or run here: wait until all ranks do so too.

        Also a forward pre-hook. Raises KeyboardInterrupt on all ranks if one was interrupted.
        """
        if not self._serving:
            self._agree(State.WORK)

    def serve(self, done: bool, step: Callable[[], object]) -> bool:
        """Run `step()`, a dummy pass, as long as another rank has tokens.

        False if all ranks are done. True if some of those that wait should look again for units.
        """
        while True:
            found = self._agree(State.DONE if done else State.WAIT)
            if found[State.WORK]:
                self._serving = True
                try:
                    step()
                finally:
                    self._serving = False
            elif not found[State.WAIT]:
                return False
            elif not done:
                return True

    def _agree(self, state: State) -> list[int]:
        """How many ranks are in each state."""
        count = torch.zeros(len(State), dtype=torch.int64)
        count[state if self._interrupted is None else State.STOP] = 1
        try:
            dist.all_reduce(count)
        except RuntimeError as e:
            self._ranks.refuse_failed()
            raise RankError(
                "another rank went away, or did not come to the next forward pass within "
                f"host.rank_timeout={self._ranks.timeout:g} s: {str(e).splitlines()[0]}"
            ) from e
        found: list[int] = count.tolist()
        if found[State.STOP]:
            raise KeyboardInterrupt
        return found

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C here ends all ranks at their next agreement; a second one ends this at once.

        The terminal and torchrun both pass one Ctrl-C on, which counts as one.
        """

        def note(*_: object) -> None:
            if self._interrupted is None:
                self._interrupted = time.monotonic()
            elif time.monotonic() - self._interrupted > ONE_PRESS:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
