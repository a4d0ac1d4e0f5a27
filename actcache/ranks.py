"""Several processes of one launch, one store: who this process is, what the ranks tell each other.

`torchrun` and `accelerate launch` start N processes (ranks) and say so in the environment; rank and
size are taken from there. Ranks talk through one small key-value store (torch's TCPStore), never
through collectives, so replicas that run at their own pace need no more than this: counting rows,
meeting before the snapshot, and ending together when one of them fails. Ranks that share one model
(ZeRO-3, FSDP2) also move in lockstep, see lockstep.py.

A process that was started alone is rank 0 of 1, with a store in its own memory.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from actcache.errors import OtherRankFailedError, RankError
from actcache.store.errors import IdentityError
from actcache.store.ids import diff

POLL = 0.2  # seconds between looks at a key that another rank will set
ONE_PRESS = 3.0  # seconds within which SIGINTs are one Ctrl-C
GRACE = 10.0  # seconds that a rank has to end by itself once another one has failed


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def device() -> torch.device:
    """The device of this process: the CPU, the GPU, or of several ranks each its own GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not launched():
        return torch.device("cuda")
    # Launchers that show each rank one GPU only still count the ranks of the machine.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class Ranks:
    """This process among the ranks of one run."""

    def __init__(self, rank: int, size: int, store: Store, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.store = store
        self._meetings = 0  # all ranks meet in the same order, so the number names the meeting

    @property
    def first(self) -> bool:
        """Rank 0 prints, decides and takes the snapshot."""
        return self.rank == 0

    def say(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """`say` on rank 0, silence on the others."""
        return say if self.first else lambda _: None

    # -- joining ----------------------------------------------------------------------------------

    def gather(self) -> None:
        """Wait for all ranks. RankError naming those that do not come within the timeout."""
        self.store.set(f"here/{self.rank}", "1")
        missing = self._wait([f"here/{r}" for r in range(self.size)])
        if missing:
            names = ", ".join(m.removeprefix("here/") for m in missing)
            raise RankError(
                f"host.rank_timeout={self.timeout:g}: rank {names} of {self.size} did not come "
                f"within {self.timeout:g} s. Start all {self.size} ranks, on every machine with "
                "the same MASTER_ADDR and MASTER_PORT, or raise host.rank_timeout"
            )

    def meet(self, what: str) -> None:
        """Go on when all ranks have come here. RankError if one does not within the timeout."""
        self._meetings += 1
        name = f"meet/{self._meetings}"
        self.store.set(f"{name}/{self.rank}", "1")
        missing = self._wait([f"{name}/{r}" for r in range(self.size)])
        if missing:
            names = ", ".join(m.split("/")[-1] for m in missing)
            raise RankError(
                f"rank {names} of {self.size} did not {what} within host.rank_timeout="
                f"{self.timeout:g} s of this one"
            )

    def _wait(self, keys: list[str]) -> list[str]:
        """Keys that nobody has set within the timeout; raises if a rank fails meanwhile."""
        end = time.monotonic() + self.timeout
        while missing := [k for k in keys if not self.store.check([k])]:
            self.refuse_failed()
            if time.monotonic() > end:
                return missing
            time.sleep(POLL)
        return []

    # -- agreeing ---------------------------------------------------------------------------------

    def from_first(self, what: str, make: Callable[[], str]) -> str:
        """What `make()` gives on rank 0, on every rank."""
        self._meetings += 1
        key = f"value/{self._meetings}"
        if self.first:
            self.store.set(key, make())
        if self._wait([key]):
            raise RankError(
                f"rank 0 did not say {what} within host.rank_timeout={self.timeout:g} s of rank "
                f"{self.rank}"
            )
        return self.store.get(key).decode()

    def refuse_different(self, what: str, value: Mapping[str, Any]) -> None:
        """IdentityError with a field-by-field diff if rank 0 has another `value`."""
        theirs = json.loads(self.from_first(what, lambda: json.dumps(value, sort_keys=True)))
        mine = json.loads(json.dumps(value))
        lines = list(diff(theirs, mine))
        if lines:
            text = "\n  ".join(lines).replace("the store has", "rank 0 has")
            raise IdentityError(
                f"rank {self.rank} has other {what} than rank 0:\n  "
                + text.replace("you asked for", f"rank {self.rank} has")
            )

    def one_by_one(self, make: Callable[[], Any]) -> Any:
        """`make()` on rank 0 first: what it makes on disk is there when the others look."""
        if self.first:
            made = make()
            self.meet("prepare")
            return made
        self.meet("prepare")
        return make()

    # -- counting ---------------------------------------------------------------------------------

    def add(self, key: str, amount: int) -> int:
        """Add to a counter of all ranks; its new value."""
        return int(self.store.add(f"sum/{key}", amount))

    def counting(self, bar: Any, before: int) -> Callable[[int], None]:
        """An `advance(rows)` whose rows show in rank 0's bar, whichever rank they come from.

        `before` is how many rows there were when the ranks began.
        """
        if self.size == 1:
            update: Callable[[int], None] = bar.update
            return update

        def advance(rows: int) -> None:
            bar.update(max(0, before + self.add("rows", rows) - bar.n))

        return advance

    # -- ending together --------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask all ranks to end as on Ctrl-C, keeping what is committed."""
        self.store.set("stop", "1")

    def heed(self) -> None:
        """KeyboardInterrupt if another rank was interrupted, OtherRankFailedError if one failed."""
        self.refuse_failed()
        if self.size > 1 and self.store.check(["stop"]):
            raise KeyboardInterrupt

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Where Ctrl-C is KeyboardInterrupt once, though terminal and torchrun both pass it on."""
        if self.size == 1:
            yield
            return
        pressed: list[float] = []

        def note(*_: object) -> None:
            pressed.append(time.monotonic())
            if len(pressed) == 1 or pressed[-1] - pressed[0] > ONE_PRESS:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def fail(self) -> bool:
        """Tell the others that this rank has failed; True if it is the first to."""
        return bool(self.store.add("failed", 1) == 1)

    def refuse_failed(self) -> None:
        """OtherRankFailedError if another rank has failed."""
        if self.size > 1 and self.store.add("failed", 0):
            raise OtherRankFailedError("another rank failed")


def _alone() -> Ranks:
    return Ranks(0, 1, HashStore(), 0.0)


_current = _alone()
_runs = 0
_link: Store | None = None  # to the key-value store, which rank 0 may keep: for all of a process


def speaks_for_all(error: Exception) -> bool:
    """Whether this process should print `error`: once, whatever the number of ranks.

    Errors before `joined`, in settings, come to all ranks alike: rank 0 prints them.
    """
    if isinstance(error, OtherRankFailedError):
        return False
    return not launched() or _runs > 0 or is_first()


def is_first() -> bool:
    """Whether this process is rank 0, joined or not."""
    return not launched() or int(os.environ.get("RANK", "0")) == 0


def current() -> Ranks:
    """The ranks of the run in progress; rank 0 of 1 outside of `joined`."""
    return _current


@contextmanager
def joined(timeout: float) -> Iterator[Ranks]:
    """The ranks of one run. An error on one of them ends all of them.

    The rank that failed first raises its error; the others raise OtherRankFailedError, or are ended
    after GRACE seconds if they are stuck waiting for it.
    """
    global _current, _runs
    if not launched():
        yield _alone()
        return
    _runs += 1
    ranks = Ranks(*_place(), _connect(timeout, own=True), timeout)
    ended = threading.Event()
    try:
        ranks.gather()
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        threading.Thread(target=_watch, args=(ranks, timeout, ended), daemon=True).start()
        _current = ranks
        yield ranks
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        _tell(ranks, e)
        raise
    finally:
        _current = _alone()
        ended.set()
        _leave(ranks)


def _tell(ranks: Ranks, error: BaseException) -> None:
    """Raise OtherRankFailedError instead if this error follows from another rank's."""
    try:
        told = isinstance(error, OtherRankFailedError) or not ranks.fail()
    except RuntimeError:  # the process that held the store is gone; nobody is left to ask
        return
    if told:
        raise OtherRankFailedError("another rank failed") from error


def _leave(ranks: Ranks) -> None:
    """Rank 0 goes last where it keeps the store, so that the others can read why it ended."""
    try:
        ranks.store.set(f"left/{ranks.rank}", "1")
        end = time.monotonic() + min(GRACE, ranks.timeout)
        last = ranks.first and not _by_agent()
        others = [f"left/{r}" for r in range(1, ranks.size)]
        while last and not ranks.store.check(others) and time.monotonic() < end:
            time.sleep(POLL)
    except RuntimeError:  # the store is gone: so is the process that kept it
        return


def _watch(ranks: Ranks, timeout: float, ended: threading.Event) -> None:
    """End this process if another rank failed and this one is stuck in a collective with it."""
    try:
        store = _connect(timeout, own=False)  # another link: a waiting one is locked
        while not ended.wait(1.0):
            if store.add("failed", 0):
                if not ended.wait(GRACE):
                    os._exit(1)
                return
    except RuntimeError:
        return  # the process that held the store is gone; the launcher ends the others


def _place() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _by_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(timeout: float, own: bool) -> Store:
    """The launcher's key-value store, or one that rank 0 keeps: this process' link, or one more.

    RankError if it cannot be reached within the timeout.
    """
    global _link
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise RankError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set and {', '.join(missing)} is not: start "
            "the ranks with torchrun or accelerate launch"
        )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"actcache/{attempt}/{_runs}"
    if not own:
        return PrefixStore(prefix, _open(timeout, keep=False))
    rank, _ = _place()
    _link = _link or _open(timeout, keep=rank == 0 and not _by_agent())
    return PrefixStore(prefix, _link)


def _open(timeout: float, keep: bool) -> Store:
    rank, size = _place()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(
            *address,
            size,
            is_master=keep,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as e:
        raise RankError(
            f"rank {rank} of {size} cannot reach rank 0 at {address[0]}:{address[1]} within "
            f"host.rank_timeout={timeout:g} s: {str(e).splitlines()[0]}"
        ) from e
