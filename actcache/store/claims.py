"""Claims on units of work: who does what, without a coordinator.

A claim is a small file created exclusively; its owner touches it while at work. A claim that was
not touched for a lease is dead and may be taken over; so is one whose process on this machine is
gone. Ages are measured on the file system's own clock (the time it gives a file we touch), so the
clocks of the writers' machines do not matter.

Claims save work, they do not protect data: if two writers ever do the same unit, the exclusive
commit decides, and the loser's bytes are in a folder of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from actcache.store.ids import digest, short
from actcache.store.publish import publish

LEASE = 60.0  # seconds without a touch after which a claim is dead


class Claims:
    """The claims of one writer below `folder`. A context manager: leaving it lets all go."""

    def __init__(self, folder: Path, owner: str, lease: float = LEASE) -> None:
        self.folder, self.owner, self.lease = folder, owner, lease
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
        if _read(path).get("owner") == self.owner:
            path.unlink(missing_ok=True)

    def others(self) -> list[str]:
        """Names held by other living writers."""
        theirs = (
            p for p in sorted(self.folder.glob("*.json")) if _read(p).get("owner") != self.owner
        )
        return [path.stem for path in theirs if not self._dead(path)]

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

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _create(self, path: Path) -> bool:
        claim = {"owner": self.owner, "machine": machine(), "pid": os.getpid()}
        try:
            publish(path, json.dumps(claim).encode())
        except FileExistsError:
            return False
        return True

    def _take_over(self, path: Path) -> bool:
        """Move a dead claim aside and claim anew; False if it lives or another was faster."""
        before = _read(path)
        if not self._dead(path):
            return False
        aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False
        stolen = _read(aside) != before  # another writer had just taken it over: give it back
        if stolen:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()
        return not stolen and self._create(path)

    def _dead(self, path: Path) -> bool:
        claim = _read(path)
        if claim.get("machine") == machine() and not _alive(claim.get("pid")):
            return True
        try:
            return self.now() - path.stat().st_mtime > self.lease
        except FileNotFoundError:
            return False  # released this moment; the next look will see

    def now(self) -> float:
        """Time of the file system that holds the store."""
        clock = self.folder / f".clock.{self.owner}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        clock.touch()
        os.utime(clock)
        seen = clock.stat().st_mtime
        clock.unlink(missing_ok=True)
        return seen

    def _touch_held(self) -> None:
        while not self._stop.wait(self.lease / 6):
            for name in list(self._held):
                # Gone: taken over while this machine slept. The commit decides then.
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._path(name))


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


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
