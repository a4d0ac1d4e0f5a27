"""Commands in processes of their own, and what a run left behind, for tests of the pipelines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actcache.store import FLAG_SPECIAL, open_store
from actcache.store.split import held_out

ROOT = Path(__file__).resolve().parents[1]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_rows(store: Path) -> int:
    """Rows a run trains on, counted from the token tables: no specials, not held out."""
    tables = [s.tokens() for s in open_store(store).snapshot().segments]
    return sum(
        int(np.sum(((t.flags & FLAG_SPECIAL) == 0) & ~held_out(t.doc, 0.05))) for t in tables
    )


def python(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-m", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
