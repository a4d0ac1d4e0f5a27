"""Every launch recipe runs as it is, with the tiny host in place of the large one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cache import digests

from actcache.run import run
from actcache.store import open_store, verify

RECIPES = Path(__file__).parent.parent / "pipelines" / "recipes"
SMALL = [
    "data.id_column=id",
    "layout.dtype=float32",
    "layout.segment_rows=128",
    "layout.chunk_bytes=2048",
    "layout.unit_bytes=1",
    "host.batch_tokens=128",
]


def started(name, asked, tmp_path, **env):
    """The recipe's process for a small store in `tmp_path`."""
    settings = asked()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STORE": settings.store,
        "DATA": str(settings.data.files),
        "HOST": "local",
        "LAYERS": "[0,1]",
        "TOKENS": "null",
        "CONTEXT": "32",
        **env,
    }
    words = ["bash", str(RECIPES / name), f"host.model={settings.host.model}", *SMALL]
    return subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.parametrize("name", sorted(p.name for p in RECIPES.iterdir()))
def test_recipe_fills_a_store(name, asked, tmp_path):  # F16
    done = started(name, asked, tmp_path, WRITERS="2")
    assert done.returncode == 0, done.stderr
    store = open_store(asked().store)
    alone = run(asked(store=str(tmp_path / "alone"), hooks="resid", layers=(0, 1))).store
    assert digests(store) == digests(alone)
    assert not [c for c in verify(store.snapshot()) if c.problem]


@pytest.mark.parametrize("name", sorted(p.name for p in RECIPES.iterdir()))
def test_recipe_says_what_it_needs(name, tmp_path):
    done = subprocess.run(
        ["bash", str(RECIPES / name)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "set STORE" in done.stderr
