"""Claims on units of work: who does what, without a coordinator.

A claim is a small file created exclusively; its owner touches it while at work. A claim that was
not touched for a lease is dead and may be taken over; so is one whose process on this machine is
gone. Ages are measured on the clock of the file system or object store (the time it gives a file
that we touch), so the clocks of the writers' machines do not matter.

Claims save work, they do not protect data: if two writers ever do the same unit, the exclusive
commit decides, and the loser's bytes are in a folder of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from actcache.store.errors import DamagedError, RemoteError
from actcache.store.files import entry, now, remove, swap, touch
from actcache.store.ids import digest, short
from actcache.store.places import Location
from actcache.store.publish import publish
from actcache.store.untrusted import names_in, read_file

LEASE = 60.0  # seconds without a touch after which a claim is dead
CLAIM = re.compile(r".*\.json")
_MAX_CLAIM = 1 << 16  # bytes


class Claims:
    """The claims of one writer below `folder`. A context manager: leaving it lets all go."""

    def __init__(self, folder: Location, owner: str, lease: float = LEASE) -> None:
        self.folder, self.owner, self.lease = folder, owner, lease
        claim = {"owner": owner, "machine": machine(), "pid": os.getpid()}
        self._mine = json.dumps(claim).encode()
        self._held: set[str] = set()
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def acquire(self, name: str) -> bool:
        """Claim `name`; False if a living writer holds it."""
        path = self._path(name)
        if not self._create(path) and not self._take_over(path):
            return False
        self._held.add(name)
        if self._beat is None:
            self._beat = threading.Thread(target=self._touch_held, daemon=True)
            self._beat.start()
        return True

    def release(self, name: str) -> None:
        """Let `name` go, if it is still ours."""
        self._held.discard(name)
        path = self._path(name)
        if self._read(path) == self._mine:
            remove(path)

    def others(self) -> list[str]:
        """Names held by other living writers."""
        files = names_in(self.folder, "", CLAIM)
        claims = ((path, self._read(path)) for path in files)
        return [p.stem for p, claim in claims if claim != self._mine and not self._dead(p, claim)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        for name in list(self._held):
            self.release(name)

    def _path(self, name: str) -> Location:
        return self.folder / f"{name}.json"

    def _create(self, path: Location) -> bool:
        try:
            publish(path, self._mine)
        except FileExistsError:
            return False
        return True

    def _take_over(self, path: Location) -> bool:
        """Put ours in place of a dead claim; False if it lives or another was faster."""
        before = self._read(path)
        return self._dead(path, before) and swap(path, before, self._mine)

    def _read(self, path: Location) -> bytes:
        """A claim's bytes; none if it is gone or cannot be a claim."""
        try:
            return read_file(self.folder, path, _MAX_CLAIM)
        except DamagedError:
            return b""

    def _dead(self, path: Location, claim: bytes) -> bool:
        found = _parse(claim)
        if found.get("machine") == machine() and not _alive(found.get("pid")):
            return True
        held = entry(path)
        if held is None:
            return False  # released this moment; the next look will see
        return self.now() - held.modified > self.lease

    def now(self) -> float:
        """Time of the file system or object store that holds the store."""
        return now(self.folder)

    def _touch_held(self) -> None:
        while not self._stop.wait(self.lease / 6):
            for name in list(self._held):
                # Gone, or another's: taken over while this machine slept. Out of reach: it may be
                # taken over. The commit decides then.
                with contextlib.suppress(RemoteError):
                    touch(self._path(name), self._mine)


def machine() -> str:
    """Names this machine and boot, without telling its host name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return short(digest([socket.gethostname(), boot.read_text() if boot.exists() else ""]))


def _alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _parse(claim: bytes) -> dict[str, object]:
    try:
        found = json.loads(claim)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
