"""Garbage: what writers that died have left in a store. Nothing else is ever removed.

Three kinds: folders of segments and canaries that no record names, temporary files, dead claims.
Anything younger than a grace period stays, because a living writer may be about to commit it. Files
that are not ours are not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actcache.store import files, layout
from actcache.store.canaries import CanaryRecord, canary_files
from actcache.store.claims import CLAIM, Claims
from actcache.store.files import entry
from actcache.store.places import Location, each, place
from actcache.store.publish import PARTIAL
from actcache.store.reader import commit_files, read_record
from actcache.store.schema import Commit
from actcache.store.untrusted import inside, names_in

GRACE = 3600.0  # seconds
_PARTIAL = re.compile(rf"\..*{re.escape(PARTIAL)}")
_ATTEMPT = re.compile(rf"({layout.SEGMENT_ID.pattern}|[0-9a-f]{{12}})\.[0-9a-f]{{8}}")


@dataclass(frozen=True)
class Garbage:
    """Something that no commit names."""

    path: Location
    bytes: int


def find_garbage(root: str | Location, grace: float = GRACE) -> list[Garbage]:
    """Removable things of the store at `root` that were last changed over `grace` seconds ago."""
    root = place(root)
    for name in layout.FOLDERS:
        inside(root, root / name)  # nothing is removed outside the store
    claims = Claims(root / layout.CLAIMS, "gc")
    now = claims.now()
    commits = each(root, lambda f: read_record(Commit, root, f).folder, commit_files(root))
    canaries = each(root, lambda f: read_record(CanaryRecord, root, f).folder, canary_files(root))
    named = {root / folder for folder in (*commits, *canaries)}
    attempts, partials = _attempts(root, named), _partials(root, named)
    candidates = [*attempts, *partials, *_dead_claims(root, claims)]
    found = zip(candidates, each(root, entry, candidates), strict=True)
    return [Garbage(p, e.bytes) for p, e in found if e and now - e.modified >= grace]


def remove(garbage: list[Garbage]) -> int:
    """Remove what `find_garbage` found; bytes freed."""
    for item in garbage:
        files.remove(item.path)
    return sum(item.bytes for item in garbage)


def _attempts(root: Location, named: set[Location]) -> Iterator[Location]:
    for name in (layout.SEGMENTS, layout.CANARIES):
        for folder in names_in(root, name, _ATTEMPT):
            if folder not in named and not (isinstance(folder, Path) and folder.is_symlink()):
                yield folder


def _partials(root: Location, named: set[Location]) -> Iterator[Location]:
    """Unfinished files; in a committed segment they come from a copy that was interrupted."""
    names = tuple(n for n in layout.FOLDERS if n != layout.SEGMENTS)
    for name in ("", *names):
        yield from names_in(root, name, _PARTIAL)
    for folder in sorted(named):
        # An object store has none: there an object is whole or absent.
        if isinstance(folder, Path) and not folder.is_symlink():
            yield from sorted(folder.rglob(f".*{PARTIAL}"))


def _dead_claims(root: Location, claims: Claims) -> Iterator[Location]:
    living = set(claims.others())
    for file in names_in(root, layout.CLAIMS, CLAIM):
        if file.stem not in living:
            yield file
