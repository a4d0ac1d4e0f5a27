"""The embedded default: `data=pydocs` and `host=demo`, made on this machine, no download.

`python -m actcache.demo` builds both and prints their figures; `ensure_demo` does the same from
code. They lie under $ACTCACHE_HOME/demo (default ~/.cache/actcache/demo) and are made once.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actcache.demo.train_host import HostSettings


@dataclass(frozen=True, kw_only=True)
class DemoPaths:
    """Where the embedded default lies."""

    corpus: Path  # a parquet file: id, source, text
    host: Path  # a Hugging Face folder, with report.json


def demo_paths(root: Path | None = None) -> DemoPaths:
    """The paths, whether or not anything is there; `root` as in `ensure_demo`."""
    home = root or os.environ.get("ACTCACHE_HOME") or Path.home() / ".cache" / "actcache"
    folder = Path(home).expanduser() / "demo"
    return DemoPaths(corpus=folder / "pydocs.parquet", host=folder / "host")


def ensure_demo(
    root: Path | None = None, settings: HostSettings | None = None, progress: bool = True
) -> DemoPaths:
    """Build what is missing of corpus and host under `root`/demo; about three minutes, once.

    Safe to call from several processes: one builds, the others wait for it. `settings` (of the
    training) count only when the host is built. Raises ActcacheError as the two builders do.
    """
    paths = demo_paths(root)
    if (paths.host / "report.json").exists() and paths.corpus.exists():
        _say(f"demo corpus and host: already in {paths.corpus.parent}", progress)
        return paths
    # Training needs torch and tokenizers, finding the result does not.
    from actcache.demo.corpus import build_corpus
    from actcache.demo.train_host import build_host

    with _lock(paths.corpus.parent, progress):
        build_corpus(paths.corpus.parent, progress)
        build_host(paths.host, paths.corpus, settings, progress)
    return paths


@contextmanager
def _lock(folder: Path, progress: bool) -> Iterator[None]:
    """Hold `folder`/.lock; the kernel frees it when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"demo: another process is building in {folder}, waiting for it", progress)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str, progress: bool) -> None:
    if progress:
        print(line, flush=True)
