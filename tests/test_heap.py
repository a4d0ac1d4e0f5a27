"""Memory between passes and steps: kept where the C library can, left alone where it is tuned."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from training import planted_store, settings

from actcache.store import heap
from saetrain import train

ROUNDS = """
import resource, sys, threading
from actcache.store import heap
kept = heap.keep() if "keep" in sys.argv else None
if "share" in sys.argv: heap.share()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def round():
    blocks = [bytearray(8 << 20) for _ in range(10)]
    del blocks
def again():
    thread = threading.Thread(target=round)
    thread.start()
    thread.join()
for i in range(7):
    before = faults() if i == 2 else 0 if i == 0 else before
    again() if "threads" in sys.argv else round()
print(kept, (faults() - before) / 5)
"""
PAGES = 10 * (8 << 20) // os.sysconf("SC_PAGE_SIZE")  # of one round

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def rounds(*args: str, **environment: str) -> tuple[str, float]:
    """What `heap.keep` says in a new process, and page faults of a round of blocks."""
    command = [sys.executable, "-c", ROUNDS, *args]
    tuned = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        command, env=tuned | environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, float(faults)


@glibc
def test_what_a_round_gives_back_is_there_for_the_next() -> None:
    assert rounds()[1] > PAGES / 2  # what there is to gain
    kept, faults = rounds("keep")
    assert kept == "True"
    assert faults < PAGES / 100


@glibc
def test_what_a_thread_gives_back_is_there_for_the_next() -> None:
    assert rounds("keep", "threads")[1] > PAGES / 4  # what there is to gain
    assert rounds("keep", "share", "threads")[1] < PAGES / 100


@glibc
@pytest.mark.parametrize(
    "own", [{"MALLOC_TRIM_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=65536"}]
)
def test_whoever_tunes_malloc_is_left_alone(own: dict[str, str]) -> None:
    kept, faults = rounds("keep", **own)
    assert kept == "False"
    assert faults > PAGES / 2


def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in heap._TUNED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    assert heap.keep.__wrapped__() is False
    assert heap.share.__wrapped__() is False


def test_training_on_a_cpu_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(heap, "keep", lambda: asked.append("keep"))
    monkeypatch.setattr(heap, "share", lambda: asked.append("share"))
    planted_store(tmp_path / "store", segments=(512,))
    train(settings(tmp_path / "store", tmp_path / "runs", tokens=64 * 2))
    assert asked == ["keep", "share"]
