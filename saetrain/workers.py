"""Threads that train several SAEs at once on a CPU, each with its share of the cores.

One step of a small SAE does not fill two cores: between its products lies work of a single thread,
and every operation ends with its threads waiting for the slowest. Two steps side by side do, since
torch lets go of Python's lock inside its operations. `threads` of torch are shared out: each worker
gives its operations threads // n of them (the setting is one of each thread).

Cost: gradients and activations of n SAEs at once. A run equals its single run bit for bit although
that has more threads inside its operations: torch's products and row-wise sums do not depend on
their number, and sums over whole tensors are made so (`saetrain.sums`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier
from types import TracebackType
from typing import Self

import torch

TURN = 4  # batches that one job takes in a row, at most
TURN_BYTES = 64 << 20  # of them
MOST = 8  # by default: beyond, they would wait for each other's Python


def how_many(asked: int | None, n_jobs: int, device: torch.device) -> int:
    """Workers for `n_jobs`: as many as `asked`; None: as there are threads, `MOST` at most."""
    if device.type != "cpu":
        return 1
    wanted = min(torch.get_num_threads(), MOST) if asked is None else asked
    return max(1, min(wanted, n_jobs))


def turn_length(batch_bytes: int) -> int:
    """Batches that one job takes in a row."""
    return max(1, min(TURN, TURN_BYTES // max(batch_bytes, 1)))


class Workers:
    """`n` threads. Use as a context manager; the caller's own number of threads is left alone."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.threads = max(1, torch.get_num_threads() // n)  # inside an operation of each
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.n > 1:
            mine, all_here = torch.get_num_threads(), Barrier(self.n)
            self._pool = ThreadPoolExecutor(self.n, "saetrain", self._begin)
            wait([self._pool.submit(all_here.wait) for _ in range(self.n)])
            torch.set_num_threads(mine)  # theirs is also what new threads would start with
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def each(self, tasks: Sequence[Callable[[], object]]) -> list[Exception | None]:
        """Run all, at most n at a time, begun in this order; what each raised, when all have ended.

        What is no Exception, such as SystemExit, is raised here.
        """
        if self._pool is None:
            return [_caught(task) for task in tasks]
        futures = [self._pool.submit(_caught, task) for task in tasks]
        wait(futures)
        return [f.result() for f in futures]

    def _begin(self) -> None:
        torch.get_num_threads()  # the first question would set it to the number of the process
        torch.set_num_threads(self.threads)


def _caught(task: Callable[[], object]) -> Exception | None:
    try:
        task()
    except Exception as e:  # noqa: BLE001  the caller decides what a failure means
        return e
    return None
