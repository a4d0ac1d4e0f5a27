"""Garbage: what writers that died have left in a store. Nothing else is ever removed.

Three kinds: folders of segments that no commit names, temporary files, and dead claims. Anything
younger than a grace period stays, because a living writer may be about to commit it. Files that
are not ours are not touched.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actcache.store import layout
from actcache.store.claims import Claims
from actcache.store.publish import PARTIAL
from actcache.store.reader import read_record
from actcache.store.schema import Commit
from actcache.store.untrusted import inside

GRACE = 3600.0  # seconds
_ATTEMPT = re.compile(rf"{layout.SEGMENT_ID.pattern}\.[0-9a-f]{{8}}")


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
    candidates = [*_attempts(root), *_partials(root), *_dead_claims(root, claims)]
    return [Garbage(p, _size(p)) for p in candidates if now - _newest(p) >= grace]


def remove(garbage: list[Garbage]) -> int:
    """Remove what `find_garbage` found; bytes freed."""
    for item in garbage:
        if item.path.is_dir():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
    return sum(item.bytes for item in garbage)


def _attempts(root: Path) -> Iterator[Path]:
    commits = (read_record(Commit, root, f) for f in (root / layout.COMMITS).glob("u*.json"))
    named = {root / c.folder for c in commits}
    for folder in sorted((root / layout.SEGMENTS).glob("u*")):
        if _ATTEMPT.fullmatch(folder.name) and folder not in named and not folder.is_symlink():
            yield folder


def _partials(root: Path) -> Iterator[Path]:
    for folder in (root, *(root / n for n in (layout.COMMITS, layout.SNAPSHOTS, layout.CLAIMS))):
        yield from sorted(folder.glob(f".*{PARTIAL}"))


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
