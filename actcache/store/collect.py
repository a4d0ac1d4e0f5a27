"""Garbage: what writers that died have left in a store. Nothing else is ever removed.

Three kinds: folders of segments and canaries that no record names, temporary files, dead claims.
Anything younger than a grace period stays, because a living writer may be about to commit it. Files
that are not ours are not touched.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actcache.store import layout
from actcache.store.canaries import CanaryRecord, canary_files
from actcache.store.claims import Claims
from actcache.store.publish import PARTIAL
from actcache.store.reader import commit_files, read_record
from actcache.store.schema import Commit
from actcache.store.untrusted import inside

GRACE = 3600.0  # seconds
_ATTEMPT = re.compile(rf"({layout.SEGMENT_ID.pattern}|[0-9a-f]{{12}})\.[0-9a-f]{{8}}")


@dataclass(frozen=True)
class Garbage:
    """Something that no commit names."""

    path: Path
    bytes: int


def find_garbage(root: Path, grace: float = GRACE) -> list[Garbage]:
    """Removable things of the store at `root` that were last changed over `grace` seconds ago."""
    for name in layout.FOLDERS:
        inside(root, root / name)  # nothing is removed outside the store
    claims = Claims(root / layout.CLAIMS, "gc")
    now = claims.now()
    commits = (read_record(Commit, root, f) for f in commit_files(root))
    canaries = (read_record(CanaryRecord, root, f) for f in canary_files(root))
    named = {root / r.folder for records in (commits, canaries) for r in records}
    attempts, partials = _attempts(root, named), _partials(root, named)
    candidates = [*attempts, *partials, *_dead_claims(root, claims)]
    return [Garbage(p, _size(p)) for p in candidates if now - _newest(p) >= grace]


def remove(garbage: list[Garbage]) -> int:
    """Remove what `find_garbage` found; bytes freed."""
    for item in garbage:
        if item.path.is_dir():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
    return sum(item.bytes for item in garbage)


def _attempts(root: Path, named: set[Path]) -> Iterator[Path]:
    folders = (*(root / layout.SEGMENTS).glob("u*"), *(root / layout.CANARIES).glob("*.*"))
    for folder in sorted(folders):
        if _ATTEMPT.fullmatch(folder.name) and folder not in named and not folder.is_symlink():
            yield folder


def _partials(root: Path, named: set[Path]) -> Iterator[Path]:
    """Unfinished files; in a committed segment they come from a copy that was interrupted."""
    names = tuple(n for n in layout.FOLDERS if n != layout.SEGMENTS)
    for folder in (root, *(root / name for name in names)):
        yield from sorted(folder.glob(f".*{PARTIAL}"))
    for folder in sorted(named):
        if not folder.is_symlink():
            yield from sorted(folder.rglob(f".*{PARTIAL}"))


def _dead_claims(root: Path, claims: Claims) -> Iterator[Path]:
    living = set(claims.others())
    for file in sorted((root / layout.CLAIMS).glob("*.json")):
        if file.stem not in living:
            yield file


def _newest(path: Path) -> float:
    """When anything in `path` last changed."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return max(p.lstat().st_mtime for p in paths)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(p.lstat().st_size for p in files if p.is_file())
