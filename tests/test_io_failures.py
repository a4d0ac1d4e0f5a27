"""Disks that are full, read-only or closed to the writer: an error in words, then the same run
continues and gives the store of a run that met nothing.
"""

import ctypes
import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cache import digests

import actcache.store.publish as publishing
from actcache.errors import ActcacheError
from actcache.run import run
from actcache.store import OutOfSpaceError, StoreError, open_store, verify
from actcache.store.canaries import canary_files
from actcache.store.collect import find_garbage, remove

TOKENS = 256


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """What a run gives that meets no failure; filled by the first test that asks."""
    return {}


@pytest.fixture
def expected(asked, tmp_path, quiet):
    if not quiet:
        quiet.update(digests(run(asked(store=str(tmp_path / "quiet"), tokens=TOKENS)).store))
    return quiet


def continues(settings, expected):
    """The same run, with nothing in its way, completes the store; garbage is all that is left."""
    store = run(settings).store
    assert digests(store) == expected
    assert not [c for c in verify(store.snapshot()) if c.problem]
    remove(find_garbage(store.path, grace=0))
    assert not list(store.path.rglob("*.partial"))
    folders = {p.name for p in (store.path / "segments").iterdir()}
    assert len(folders) == len(list((store.path / "commits").iterdir()))


def whole_so_far(path):
    """Whatever a snapshot names is whole; there may be none yet."""
    if (Path(path) / "snapshots" / "1.json").exists():
        assert not [c for c in verify(open_store(path).snapshot()) if c.problem]


# -- one call fails --------------------------------------------------------------------------------


def fail(monkeypatch, call, code, part, after):
    """`os.link` or `os.fsync` of a file in the folder `part` fails, from the `after`-th on."""
    original, left = getattr(os, call), [after]

    def failing(first, *rest):
        path = str(rest[0]) if rest else str(Path(f"/proc/self/fd/{first}").readlink())
        if f"/{part}" in path or f"/.{part}" in path:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(code, os.strerror(code))
        return original(first, *rest)

    monkeypatch.setattr(publishing.os, call, failing)


PLACES = [
    ("store.json", 0),
    ("claims/", 0),
    ("segments/", 0),
    ("segments/", 20),
    ("commits/", 0),
    ("commits/", 1),
    ("canaries/", 0),
    ("canaries/", 3),
    ("snapshots/", 0),
]


FULL = ("link", errno.ENOSPC, OutOfSpaceError, "no space left .*committed before is intact")
BROKEN = ("fsync", errno.EIO, StoreError, "cannot write .*: Input/output error")
READ_ONLY = ("link", errno.EROFS, StoreError, "cannot write .*: Read-only file system")
FAILURES = [
    *((*place, *FULL) for place in PLACES),
    *((*place, *BROKEN) for place in (PLACES[3], PLACES[5], PLACES[8])),
    *((*place, *READ_ONLY) for place in (PLACES[0], PLACES[2])),
]


@pytest.mark.parametrize(("part", "after", "call", "code", "kind", "words"), FAILURES)
def test_a_write_that_fails(  # F107
    asked, monkeypatch, expected, part, after, call, code, kind, words
):
    settings = asked(tokens=TOKENS)
    fail(monkeypatch, call, code, part, after)
    with pytest.raises(kind, match=words):
        run(settings)
    monkeypatch.undo()
    whole_so_far(settings.store)
    continues(settings, expected)
    assert len(canary_files(Path(settings.store))) == 1


# -- a disk that is full ---------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; `grow(size)` makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of its own to fill up")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("pages", [1, 30, 100])
def test_a_full_disk(asked, small_disk, expected, pages):  # F107
    """A real one: its last `pages` of 4 KiB are what the run can use."""
    free = os.statvfs(small_disk).f_bavail
    (small_disk / "ballast").write_bytes(b"x" * 4096 * (free - pages))
    settings = asked(tokens=TOKENS, store=str(small_disk / "store"))
    with pytest.raises(OutOfSpaceError, match="no space left while writing"):
        run(settings)
    whole_so_far(settings.store)
    with pytest.raises(OutOfSpaceError):
        run(settings)  # nothing got better, nothing worse
    (small_disk / "ballast").unlink()
    continues(settings, expected)


# -- folders that may not be written ---------------------------------------------------------------


def without_privilege(job):
    """What `job` raised in a forked process that obeys permission bits, even if we are root."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "crashed"
        try:
            drop_capabilities()
            said = str(job())
        except ActcacheError as e:
            said = f"{type(e).__name__}: {e}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def drop_capabilities():
    """Root without CAP_DAC_OVERRIDE and the rest is an ordinary owner of its files."""
    if os.geteuid() == 0:
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, data):
            raise OSError(ctypes.get_errno(), "capset")


@pytest.fixture
def closed():
    """`closed(path)` takes away the right to write there; given back at the end."""
    paths = []

    def close(path, mode=0o555):
        paths.append(path)
        path.chmod(mode)

    yield close
    for path in paths:
        path.chmod(0o755)


@pytest.mark.parametrize(
    "name", ["segments", "commits", "snapshots", "claims", "canaries", "parent"]
)
def test_a_folder_that_may_not_be_written(asked, tmp_path, expected, closed, name):  # F107
    (tmp_path / "parent").mkdir()
    store = tmp_path / "parent" / "store"
    settings = asked(tokens=TOKENS, store=str(store))
    if name == "parent":
        closed(store.parent)
    else:
        run(asked(tokens=128, store=str(store)))
        shutil.rmtree(store / "canaries")
        (store / "canaries").mkdir()
        closed(store / name)
    said = without_privilege(lambda: run(settings))
    assert said.startswith("StoreError: ")
    assert "Permission denied" in said
    assert str(store) in said
    whole_so_far(store)
    (store.parent if name == "parent" else store / name).chmod(0o755)
    continues(settings, expected)


def test_a_folder_that_may_not_be_read(asked, closed):
    store = run(asked(tokens=128)).store
    for name in ("commits", "segments", "snapshots", "store.json"):
        closed(store.path / name, 0o000)
        said = without_privilege(lambda: list(verify(open_store(store.path).snapshot())))
        goes_on = name in ("segments", "commits")  # verify names what it cannot read
        assert said.startswith("[Check" if goes_on else "DamagedError: ")
        assert f"{name}" in said
        assert "cannot be read: Permission denied" in said
        (store.path / name).chmod(0o755)


def test_a_read_only_store_is_read_and_asked_for_the_same_again(asked, closed):
    """Nothing is written to a store that holds all that is asked for."""
    settings = asked(tokens=128)
    store = run(settings).store
    for path in (store.path, *(p for p in store.path.rglob("*") if p.is_dir())):
        closed(path)

    def read():
        snapshot = open_store(store.path).snapshot()
        problems = [c for c in verify(snapshot) if c.problem]
        return len(problems), snapshot.segments[0].acts("resid.1").read().shape[0]

    assert without_privilege(read) == "(0, 128)"
    assert without_privilege(lambda: run(settings).computed) == "0"
