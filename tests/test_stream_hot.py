"""The compiled hot path against loops, another crc32c, and what numpy does without it."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training import planted_store

from actcache.store import open_store
from saetrain import native
from saetrain.native import SWITCH
from saetrain.stream import Stream, hot
from saetrain.stream.hot import Chunk, compiled, scatter
from saetrain.stream.told import Told

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def anew():
    """Each test decides anew whether to compile."""
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@pytest.fixture(params=["compiled", "numpy"])
def way(request, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setenv(SWITCH, "0")
    elif shutil.which("cc") is None:
        pytest.skip("no C compiler")
    assert (compiled() is None) == (request.param == "numpy")
    return request.param


def by_loop(to, at, rows, which):
    for i, place in enumerate(at):
        to[place] = rows[i if which is None else which[i]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.integers(1, 40),
    dtype=st.sampled_from(["int8", "int16", "float32", "float64"]),
    some=st.booleans(),
)
@pytest.mark.parametrize("numpy", [False, True])
def test_rows_go_to_their_places(numpy: bool, seed: int, d: int, dtype: str, some: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0" if numpy else "1")
        compiled.cache_clear()
        rng = np.random.default_rng(seed)
        rows = rng.integers(-99, 99, (rng.integers(1, 50), d)).astype(dtype)
        which = np.flatnonzero(rng.random(len(rows)) < 0.5) if some else None
        n = len(rows) if which is None else len(which)
        to = rng.integers(-99, 99, (n + rng.integers(0, 20), d)).astype(dtype)
        at, expected = rng.permutation(len(to))[:n], to.copy()
        by_loop(expected, at, rows, which)
        scatter(to, at, rows, which)
        assert np.array_equal(to, expected)


@pytest.mark.parametrize("d", [768, 8, 12])  # whole cache lines; 16 bytes a row; 24: no streaming
@pytest.mark.parametrize("shift", [0, 2, 16])  # bytes by which rows miss the 16 that stores need
def test_windows_beyond_the_cache(way: str, d: int, shift: int) -> None:
    rng, n = np.random.default_rng(0), (20 << 20) // (2 * d)
    memory = np.zeros(2 * n * d + 64, dtype=np.uint8)
    first = -memory.ctypes.data % 64 + shift
    to = memory[first : first + 2 * n * d].view(np.int16).reshape(n, d)
    rows = rng.integers(-9, 9, (300, d)).astype(np.int16)
    at, expected = rng.permutation(n)[:300], np.zeros_like(to)
    by_loop(expected, at, rows, None)
    scatter(to, at, rows)
    assert np.array_equal(to, expected)
    assert not memory[:first].any()
    assert not memory[first + 2 * n * d :].any()


@pytest.mark.parametrize(
    ("at", "which"),
    [([0, 4], None), ([-1, 0], None), ([0, 1], [0, 3]), ([0, 1], [-1, 0]), ([0, 1, 2, 3], None)],
)
def test_numbers_out_of_range_are_refused(way: str, at, which) -> None:
    to, rows = np.zeros((4, 2)), np.ones((3, 2))
    with pytest.raises((IndexError, ValueError)):
        scatter(to, np.array(at), rows, None if which is None else np.array(which))
    assert not to.any()


@needs_compiler
def test_rows_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot copy rows \(3, 2\) float64 to \(4, 3\)"):
        scatter(np.zeros((4, 3)), np.arange(3), np.ones((3, 2)))
    with pytest.raises(ValueError, match="cannot copy rows"):
        scatter(np.zeros((4, 4))[:, :2], np.arange(3), np.ones((3, 2)))


@needs_compiler
def test_compiled_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled() is not None
    (file,) = (tmp_path / "saetrain").iterdir()
    assert (tmp_path / "saetrain").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(native.subprocess, "run", None)  # it would fail to compile again
    compiled.cache_clear()
    assert compiled() is not None
    assert [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_numpy_does_it(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    assert compiled() is None
    to = np.zeros((3, 2))
    scatter(to, np.array([2, 0]), np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert to.tolist() == [[3, 4], [0, 0], [1, 2]]
    assert not [*(tmp_path / "saetrain").iterdir()]


@needs_compiler
def test_without_a_folder_for_it_numpy_does_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled() is None


def test_a_run_says_that_it_is_slower(tmp_path: Path, monkeypatch) -> None:
    planted_store(tmp_path / "store", segments=(512,))
    snapshot = open_store(tmp_path / "store").snapshot()
    said: list[str] = []
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Told(Stream(snapshot, ["resid.2"], batch_tokens=64, window_rows=128), said.append).begin()
    assert "no C compiler" in said[-1]
    said.clear()
    monkeypatch.setenv(SWITCH, "0")  # asked for: nothing to tell
    compiled.cache_clear()
    Told(Stream(snapshot, ["resid.2"], batch_tokens=64, window_rows=128), said.append).begin()
    assert not any("compiler" in line for line in said)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.integers(0, 2**32 - 1))
def test_checksums_are_googles(size: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    found = ctypes.c_uint32()
    if compiled().checksum(data.ctypes.data, size, ctypes.byref(found)):
        pytest.skip("a processor without SSE 4.2")
    assert found.value == google_crc32c.value(data.tobytes())


class Opened:
    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.fd = self.file.fileno()


@pytest.fixture
def chunks(tmp_path: Path):
    """Rows of 5 chunks, (5, 6, 10) float32, and a file of them with their checksums."""
    rows = np.random.default_rng(0).standard_normal((5, 6, 10)).astype(np.float32)
    crcs = [google_crc32c.value(r.tobytes()).to_bytes(4, "little") for r in rows]
    path = tmp_path / "chunks"
    path.write_bytes(b"".join(r.tobytes() + c for r, c in zip(rows, crcs, strict=True)))
    opened = Opened(path)
    yield rows, path, opened
    opened.file.close()


def filled(rows, opened, which=(None,) * 5):
    """What `fill` says, the window, and what a loop makes of the chunks."""
    counts = [6 if w is None else len(w) for w in which]
    at = np.split(np.random.default_rng(1).permutation(40)[: sum(counts)], np.cumsum(counts)[:-1])
    to, expected = np.zeros((40, 10), np.float32), np.zeros((40, 10), np.float32)
    for r, places, w in zip(rows, at, which, strict=True):
        by_loop(expected, places, r, w)
    jobs = [Chunk(opened, i * 244, a, w) for i, (a, w) in enumerate(zip(at, which, strict=True))]
    return hot.fill(to, jobs, 6, np.empty(244, np.uint8)), to, expected, at


def can_check() -> bool:
    """Whether this processor has the instruction; without it `fill` leaves all to Python."""
    data, found = np.zeros(8, np.uint8), ctypes.c_uint32()
    return compiled() is not None and not compiled().checksum(
        data.ctypes.data, 8, ctypes.byref(found)
    )


def test_chunks_are_read_checked_and_scattered(way: str, chunks) -> None:
    rows, _, opened = chunks
    done, to, expected, _ = filled(rows, opened)
    if not can_check():
        assert done == 0
        return
    assert done == 5
    assert np.array_equal(to, expected)
    some = [np.array(w, np.int64) for w in ([0], [5, 1], [2, 3, 4], [], [0, 1, 2, 3, 4, 5])]
    done, to, expected, _ = filled(rows, opened, some)
    assert done == 5
    assert np.array_equal(to, expected)


@needs_compiler
@pytest.mark.parametrize("how", ["payload", "checksum", "cut"])
def test_it_stops_at_a_chunk_that_is_damaged(chunks, how: str) -> None:
    if not can_check():
        pytest.skip("a processor without SSE 4.2")
    rows, path, opened = chunks
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: 3 * 244 + 100]
    else:
        data[3 * 244 + (100 if how == "payload" else 241)] ^= 1
    path.write_bytes(data)
    done, to, expected, at = filled(rows, opened)
    assert done == 3
    for i, places in enumerate(at):
        assert np.array_equal(to[places], expected[places]) == (i < 3)


@needs_compiler
def test_it_refuses_what_it_cannot_do(chunks) -> None:
    _, _, opened = chunks
    to, n = np.zeros((40, 10), np.float32), np.arange(6)
    with pytest.raises(ValueError, match="scratch has 243 bytes, a chunk 244"):
        hot.fill(to, [Chunk(opened, 0, n, None)], 6, np.empty(243, np.uint8))
    with pytest.raises(ValueError, match="row numbers"):
        hot.fill(to, [Chunk(opened, 0, n, n[:3])], 6, np.empty(244, np.uint8))
    with pytest.raises(ValueError, match="row numbers"):
        hot.fill(to, [Chunk(opened, 0, np.arange(12)[::2], None)], 6, np.empty(244, np.uint8))
    for at, which in ((n + 35, None), (n, n + 1), (n - 1, None)):
        assert hot.fill(to, [Chunk(opened, 0, at, which)], 6, np.empty(244, np.uint8)) == 0
    assert not to.any()
