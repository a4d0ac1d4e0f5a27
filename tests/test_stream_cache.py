"""The local cache of stores at a server: fetched once, bounded, shared, never trusted.  # F110"""

import errno
import os
import subprocess
import sys
from itertools import islice

import google_crc32c
import numpy as np
import pytest
import torch
from faulty_proxy import folder_server
from stores import make_store

from actcache.requantise import requantise
from actcache.store import DamagedError, OutOfSpaceError, StoreError, open_store
from actcache.store import local_cache as caching
from actcache.store.cached import CachedStore, through
from actcache.store.local_cache import LocalCache
from actcache.store.objects import Objects
from saetrain.stream import Stream

HOOKS = {"resid.2": 16, "mlp.0": 8}
BIG = 1 << 30


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_store(
        tmp_path_factory.mktemp("cache") / "s",
        hooks=HOOKS,
        chunk_bytes=2048,
        segments=(320, 320, 192),
    )


@pytest.fixture(scope="module")
def web(small):
    """The address of the store at a web server."""
    with folder_server(small.path.parent) as port:
        yield f"http://127.0.0.1:{port}/s"


@pytest.fixture
def asked(monkeypatch):
    """Keys that a server was asked for."""
    keys, ask = [], Objects.ask
    spy = lambda self, key, *more: keys.append(key) or ask(self, key, *more)  # noqa: E731
    monkeypatch.setattr(Objects, "ask", spy)
    return keys


def remote(url, folder, size=BIG):
    cache = LocalCache(folder, size)
    return through(open_store(url), cache), cache


def batches(store, n=14, **kw):
    stream = Stream(store.snapshot(), list(HOOKS), batch_tokens=64, window_rows=300, **kw)
    return list(islice(stream, n))


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.acts[h], y.acts[h]) and np.array_equal(x.tokens.pos, y.tokens.pos)
        for x, y in zip(a, b, strict=True)
        for h in HOOKS
    )


def data(asked):
    """Those of shards and token columns; records are asked for every time."""
    return [key for key in asked if "/c/0" in key and "/calibration/" not in key]


def test_batches_are_those_of_the_folder_and_the_second_time_nothing_is_fetched(
    small, web, asked, tmp_path
):
    store, cache = remote(web, tmp_path / "c")
    assert equal(batches(store), batches(small))
    assert len(data(asked)) == cache.traffic.fetched > 0
    asked.clear()
    again, second = remote(web, tmp_path / "c")
    assert equal(batches(again), batches(small))
    assert data(asked) == []
    assert (second.traffic.fetched, second.traffic.evicted) == (0, 0)


def test_a_store_in_a_folder_is_read_where_it_is(small, tmp_path):
    cache = LocalCache(tmp_path / "c", BIG)
    assert through(small, cache) is small
    assert cache.held_bytes() == 0


def test_the_size_is_kept_and_what_was_used_last_stays(small, web, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "TOUCH", 0.0)
    size = 40_000  # of about 60 KB, in files of 4 KB pages
    store, cache = remote(web, tmp_path / "c", size)
    snapshot = store.snapshot()
    most = 0
    for _ in range(3):
        for segment in snapshot.segments:
            for hook in HOOKS:
                segment.acts(hook).read()
                segment.column("flags")
                most = max(most, cache.held_bytes())
    assert 0 < most <= size
    assert cache.traffic.evicted > 0
    # The newest file is there still: its chunks come without a request.
    asked.clear()
    snapshot.segments[-1].acts(hook).read()
    assert data(asked) == []
    assert equal(batches(store), batches(small))


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "TOUCH", 0.0)
    cache = LocalCache(tmp_path / "c", 10 * 12_288 + 8192)  # a block of 4 KB is counted as 12
    payload = np.arange(4092, dtype=np.uint8)
    crc = int(google_crc32c.value(payload)).to_bytes(4, "little")
    block = np.concatenate([payload, np.frombuffer(crc, np.uint8)])
    names = [f"sha256:{i:064x}" for i in range(60)]
    for i, name in enumerate(names):
        cache.write(name, 0, block)
        os.utime(cache._path(name), (i, i))
        assert cache.read(names[0], 0, np.empty_like(block))  # always in use
    there = [i for i, name in enumerate(names) if cache._path(name).exists()]
    assert cache.traffic.evicted == 60 - len(there) > 0
    assert there == [0, *range(60 - len(there) + 1, 60)]


def test_an_object_larger_than_the_cache_goes_through(small, web, tmp_path):
    store, cache = remote(web, tmp_path / "c", 100)
    assert equal(batches(store, 5), batches(small, 5))
    assert (cache.held_bytes(), cache.traffic.fetched) == (0, 0)


def test_what_a_crash_or_a_bad_disk_left_is_fetched_again(small, web, tmp_path):
    store, cache = remote(web, tmp_path / "c")
    batches(store)
    files = sorted((tmp_path / "c" / "blocks").rglob("*"))
    files = [f for f in files if f.is_file()]
    for i, file in enumerate(files):
        if i % 3 == 0:
            os.truncate(file, file.stat().st_size // 2)  # written to the half
        elif i % 3 == 1:
            content = bytearray(file.read_bytes())
            content[len(content) // 3] ^= 4
            file.write_bytes(bytes(content))
        else:
            os.truncate(file, 0)  # name on the disk, bytes not
            os.truncate(file, 5000)
    again, cache = remote(web, tmp_path / "c")
    assert equal(batches(again), batches(small))
    assert cache.traffic.fetched > 0
    assert cache.traffic.hits > 0


def test_bytes_that_are_damaged_at_the_server_are_not_kept(tmp_path):
    store = make_store(tmp_path / "s")
    shard = store.snapshot().segments[0].acts("resid.2").path
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(bytes(content))
    with folder_server(tmp_path) as port:
        cache = LocalCache(tmp_path / "c", BIG)
        bad = through(open_store(f"http://127.0.0.1:{port}/s"), cache)
        stream = Stream(bad.snapshot(), ["resid.2"], batch_tokens=64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("actcache.store.objects.PAUSE", 0.001)
            with pytest.raises(DamagedError, match=r"segment u0000\d-0000, hook resid\.2, chunk 0"):
                list(islice(stream, stream.batches_per_epoch))
            with pytest.raises(DamagedError, match="chunk 0"):
                bad.snapshot().segments[0].acts("resid.2").read_chunk(0)


def test_removed_under_a_reader_means_fetched_again(small, web, tmp_path):
    """Another process may evict between any two reads."""
    store, cache = remote(web, tmp_path / "c")
    reader = store.snapshot().segments[0].acts("resid.2")
    first = reader.read_chunk(0).copy()
    for _, _, path in list(cache._files()):
        path.unlink()
    buffer = np.empty(reader.chunk_bytes + 4, np.uint8)
    assert np.array_equal(reader.read_into(0, buffer), first)
    assert cache.held_bytes() > 0


def test_other_folders_are_refused_and_left_alone(small, tmp_path):
    before = sorted(p.name for p in small.path.iterdir())
    with pytest.raises(StoreError, match=r"holds other things \('c.*name a new or an empty folder"):
        LocalCache(small.path, BIG)
    assert sorted(p.name for p in small.path.iterdir()) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be used"):
        LocalCache(tmp_path / "file", BIG)


def test_eviction_touches_nothing_but_blocks(web, tmp_path):
    folder = tmp_path / "c"
    store, cache = remote(web, folder, 40_000)
    (folder / "notes.txt").write_text("mine" * 50_000)
    batches(store, 20)
    assert cache.traffic.evicted > 0
    assert (folder / "notes.txt").stat().st_size == 200_000


def test_a_full_disk_is_said(web, tmp_path, monkeypatch):
    store, _ = remote(web, tmp_path / "c")

    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutOfSpaceError, match=r"local cache cache_dir=.*/c: it holds .* cache_gb"):
        batches(store, 1)


READ = """
import sys
import numpy as np
from actcache.store import open_store
from actcache.store.cached import through
from actcache.store.local_cache import LocalCache
snapshot = through(open_store(sys.argv[1]), LocalCache(sys.argv[2], int(sys.argv[3]))).snapshot()
for _ in range(2):
    rows = [s.acts("resid.2").read().astype(np.float64) for s in snapshot.segments]
print(sum(float(x.sum()) for x in rows))
"""


def test_processes_share_a_folder(small, web, tmp_path):
    """Three at once in a cache too small for the store: all read what the folder holds."""
    words = [web, str(tmp_path / "c"), "20000"]
    running = [
        subprocess.Popen([sys.executable, "-c", READ, *words], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    rows = [s.acts("resid.2").read().astype(np.float64) for s in small.snapshot().segments]
    for process in running:
        out, _ = process.communicate(timeout=100)
        assert process.returncode == 0
        assert float(out) == sum(float(x.sum()) for x in rows)
    held = LocalCache(tmp_path / "c", 20_000).held_bytes()
    assert 0 < held <= 20_000 + 3 * 8192  # each may exceed it by what it writes between two looks


def test_int8_goes_through_too(asked, tmp_path):
    plain = make_store(tmp_path / "wide", dtype="float32", segments=(256, 128))
    small = requantise(plain.snapshot(), tmp_path / "s", "int8").store
    with folder_server(tmp_path) as port:
        store, cache = remote(f"http://127.0.0.1:{port}/s", tmp_path / "c")
        assert isinstance(store, CachedStore)
        for _ in range(2):
            asked.clear()
            a, b = (Stream(s.snapshot(), ["resid.2"], batch_tokens=64) for s in (store, small))
            for x, y in islice(zip(a, b, strict=False), 5):
                assert torch.equal(x.acts["resid.2"], y.acts["resid.2"])
        assert data(asked) == []
        assert cache.traffic.hits > 0
