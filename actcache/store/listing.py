"""Which snapshots and commits a store has, by the names of their files.

Where nothing can be listed (a web server) snapshots are looked for by number: 1 to `PROBE` at once,
and so on while any is found. One behind a longer gap (a copy may hold a late snapshot alone) is
found only by its name. Cost there: `PROBE` small requests each time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from actcache.store import layout
from actcache.store.places import Location, Remote, each, listable
from actcache.store.untrusted import names_in

PROBE = 32
_COMMIT = re.compile(r"u.*\.json")
_SNAPSHOT = re.compile(r"[1-9][0-9]{0,17}\.json")


def commit_files(root: Location) -> Sequence[Location]:
    """Every commit record of the store at `root`, in a snapshot or not."""
    return names_in(root, layout.COMMITS, _COMMIT)


def snapshot_numbers(root: Location) -> list[int]:
    """Numbers of the snapshots of the store at `root`, oldest first."""
    if isinstance(root, Remote) and not listable(root):
        return _probed(root)
    return sorted(int(file.stem) for file in names_in(root, layout.SNAPSHOTS, _SNAPSHOT))


def is_snapshot(root: Location, name: str) -> bool:
    """Whether the store at `root` has a snapshot of this name."""
    if isinstance(root, Remote) and _SNAPSHOT.fullmatch(f"{name}.json"):
        return (root / layout.SNAPSHOTS / f"{name}.json").is_file()
    return name in map(str, snapshot_numbers(root))


def _probed(root: Remote) -> list[int]:
    found: list[int] = []
    first = 1
    while True:
        numbers = range(first, first + PROBE)
        files = [root / layout.SNAPSHOTS / f"{n}.json" for n in numbers]
        there = each(root, Remote.is_file, files)
        found += [n for n, is_there in zip(numbers, there, strict=True) if is_there]
        if not any(there):
            return found
        first += PROBE
