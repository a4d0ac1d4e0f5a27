"""The hot path against zarr-python, memory that is used again, filters, int8, ranges of types."""

import errno
import fcntl
import os
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from stores import make_store

from actcache.store import DamagedError, StoreError
from actcache.store.shard import scratch
from saetrain.errors import ConfigError
from saetrain.stream import Stream
from saetrain.stream import loader as loading
from saetrain.stream import stream as streams

EVERYTHING = {"split": "all", "skip_special": False}


def by_zarr(snapshot, hook):
    """{(segment, row): values} as zarr-python reads them."""
    found = []
    for segment in snapshot.segments:
        array = zarr.open_array(segment.path / "acts" / hook, mode="r")
        found.append(np.asarray(array[:]).astype(np.float32))
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("d", [3, 16])
def test_batches_hold_what_zarr_python_reads(tmp_path, dtype, d):
    store = make_store(tmp_path / "s", hooks={"resid.2": d}, dtype=dtype, chunk_bytes=700)
    snapshot = store.snapshot()
    truth = by_zarr(snapshot, "resid.2")
    stream = Stream(snapshot, ["resid.2"], batch_tokens=50, window_rows=170, **EVERYTHING)
    rows_of = [
        {(c, p): i for i, (c, p) in enumerate(zip(t.ctx.tolist(), t.pos.tolist(), strict=True))}
        for t in (s.tokens() for s in snapshot.segments)
    ]
    for batch in islice(stream, 30):
        t = batch.tokens
        for i, s in enumerate(batch.segment.tolist()):
            row = rows_of[s][int(t.ctx[i]), int(t.pos[i])]
            assert np.array_equal(batch.acts["resid.2"][i].numpy(), truth[s][row])


def test_batches_that_are_kept_stay_what_they_were(tmp_path):
    """Windows lie in memory that is used again, but never while a batch refers to it."""
    snapshot = make_store(tmp_path / "s", dtype="float32").snapshot()

    def fresh():
        return Stream(snapshot, ["resid.2"], batch_tokens=64, window_rows=128, **EVERYTHING)

    copies = [b.acts["resid.2"].clone() for b in islice(fresh(), 60)]
    kept = [b.acts["resid.2"] for b in islice(fresh(), 60)]
    assert all(torch.equal(a, b) for a, b in zip(copies, kept, strict=True))


def test_memory_is_used_again(tmp_path, monkeypatch):
    made = []
    new = loading._Ring._new
    monkeypatch.setattr(loading._Ring, "_new", lambda ring, n: made.append(n) or new(ring, n))
    snapshot = make_store(tmp_path / "s", dtype="float32", segments=(2048,) * 4).snapshot()
    stream = Stream(snapshot, ["resid.2"], batch_tokens=64, window_rows=512, **EVERYTHING)
    for batch in islice(stream, 400):  # 50 windows
        assert batch.acts["resid.2"].shape == (64, 16)
    assert len(made) <= 4


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(tmp_path, threads):
    snapshot = make_store(tmp_path / "s", hooks={"resid.2": 16, "mlp.0": 40}).snapshot()
    hooks = ["resid.2", "mlp.0"]
    one = Stream(snapshot, hooks, batch_tokens=64, threads=1, window_rows=300)
    other = Stream(snapshot, hooks, batch_tokens=64, threads=threads, window_rows=300)
    for a, b in islice(zip(one, other, strict=False), 40):
        assert all(torch.equal(a.acts[h], b.acts[h]) for h in hooks)
        assert np.array_equal(a.segment, b.segment)


def test_stored_type_comes_without_a_copy_and_others_converted(tmp_path):
    snapshot = make_store(tmp_path / "s").snapshot()
    same = next(iter(Stream(snapshot, ["resid.2"], batch_tokens=32, dtype=torch.bfloat16)))
    wide = next(iter(Stream(snapshot, ["resid.2"], batch_tokens=32, dtype=torch.float64)))
    assert torch.equal(same.acts["resid.2"].double(), wide.acts["resid.2"])
    assert same.acts["resid.2"].untyped_storage().nbytes() > 32 * 16 * 2  # a slice of its window


def test_traffic_counts_what_was_read(tmp_path):
    snapshot = make_store(tmp_path / "s", dtype="float32").snapshot()
    stream = Stream(snapshot, ["resid.2"], batch_tokens=64, window_rows=256, **EVERYTHING)
    n = stream.batches_per_epoch
    for _ in islice(stream, n):
        pass
    assert stream.traffic.rows == n * 64
    assert stream.traffic.bytes >= n * 64 * 16 * 4
    shown = stream.traffic.to_json()
    assert 0 <= shown["wait_share"] <= 1
    assert shown["gb_per_s"] > 0


def spiked(hook, rng, tokens, d):
    """Rows of about one length, every 50th twenty times as long."""
    x = rng.normal(1.0, 0.1, (len(tokens), d))
    x[::50] *= 20
    return x


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_outliers_are_left_out_by_length_before_anything_is_read(tmp_path, dtype):
    store = make_store(tmp_path / "s", hooks={"resid.2": 16, "mlp.0": 8}, acts=spiked, dtype=dtype)
    snapshot = store.snapshot()
    for hook in ("resid.2", "mlp.0"):
        for segment in snapshot.segments:
            rows = segment.acts(hook).read().astype(np.float64)
            brute = np.linalg.norm(rows, axis=1)
            assert np.allclose(segment.norms(hook), brute, rtol=1e-6)
    stream = Stream(snapshot, ["resid.2"], batch_tokens=64, max_norm=5.0, **EVERYTHING)
    limit = 5.0 * snapshot.stats("resid.2", special=True).mean_norm
    lengths = np.concatenate([s.norms("resid.2") for s in snapshot.segments])
    assert stream.n_rows == np.count_nonzero(lengths <= limit) < snapshot.n_rows
    for batch in stream.one_pass():
        assert (batch.acts["resid.2"].norm(dim=1) <= limit * 1.01).all()
    assert stream.state_dict()["filter"]["max_norm"] == 5.0


def test_outliers_of_a_store_without_lengths(tmp_path):
    snapshot = make_store(tmp_path / "s", norms=False).snapshot()
    with pytest.raises(StoreError, match="written without the lengths of its rows"):
        Stream(snapshot, ["resid.2"], max_norm=10.0)
    with pytest.raises(ConfigError, match=r"max_norm=-1\.0: expected a number above 0"):
        Stream(snapshot, ["resid.2"], max_norm=-1.0)


def _open_shards(store: Path) -> int:
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found += str(link.readlink()).startswith(str(store))
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_few_files_stay_open_and_none_after_the_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_OPEN_FILES", 3)
    path = tmp_path.resolve() / "s"
    snapshot = make_store(path, segments=(64,) * 8).snapshot()
    stream = Stream(
        snapshot, ["resid.2"], batch_tokens=64, window_rows=128, threads=1, **EVERYTHING
    )
    batches, most = iter(stream), 0
    for _ in range(40):
        next(batches)
        most = max(most, _open_shards(path))
    assert 1 <= most <= 4  # one more while the next is opened
    batches.close()
    assert _open_shards(path) == 0


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_shard_that_is_damaged_while_it_is_read_is_named(tmp_path, how):
    snapshot = make_store(tmp_path / "s", segments=(256,)).snapshot()
    (segment,) = snapshot.segments
    stream = Stream(snapshot, ["resid.2"], batch_tokens=64, window_rows=64, **EVERYTHING)
    batches = iter(stream)
    next(batches)
    file = segment.acts("resid.2").path
    if how == "cut":
        os.truncate(file, 10)
    else:
        data = bytearray(file.read_bytes())
        data[: len(data) // 2] = bytes(len(data) // 2)
        with file.open("r+b") as f:
            f.write(data)
    with pytest.raises(DamagedError, match=rf"{segment.id}.*resid\.2, chunk \d+: "):
        list(islice(batches, 20))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("compiled", [True, False])
def test_direct_reading_gives_the_same_batches(tmp_path, request, dtype, compiled):
    if not compiled:
        request.getfixturevalue("uncompiled")
    snapshot = make_store(tmp_path / "s", hooks={"resid.2": 24}, dtype=dtype).snapshot()

    def some(direct):
        stream = Stream(snapshot, ["resid.2"], batch_tokens=64, window_rows=128, direct=direct)
        return [b.acts["resid.2"].clone() for b in islice(stream, 30)]

    assert all(torch.equal(a, b) for a, b in zip(some(True), some(False), strict=True))


def reader_and_chunks(tmp_path, rows):
    """The reader of a store's only segment, and its chunks as they are read one by one."""
    snapshot = make_store(tmp_path / "s", hooks={"resid.2": 24}, segments=(rows,)).snapshot()
    reader = snapshot.segments[0].acts("resid.2")
    return reader, [reader.read_chunk(i) for i in range(reader.n_chunks)]


def test_direct_reading_is_of_whole_pages_where_it_can_be(tmp_path, monkeypatch):
    reader, plain = reader_and_chunks(tmp_path, 320)
    asked = []
    preadv = os.preadv

    def noted(fd, buffers, offset):
        asked.append((offset, len(buffers[0]), buffers[0]))
        return preadv(fd, buffers, offset)

    def refused(fd, buffers, offset):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "larger pages")
        return preadv(fd, buffers, offset)

    def read(file):
        buffer = scratch(reader.chunk_bytes)
        return [reader.read_into(i, buffer, file).copy() for i in range(reader.n_chunks)]

    file = reader.open(direct=True)
    monkeypatch.setattr(os, "preadv", noted)
    assert all(np.array_equal(a, b) for a, b in zip(read(file), plain, strict=True))
    if file.direct:  # not every file system can
        addresses = [np.frombuffer(b, dtype=np.uint8).ctypes.data for _, _, b in asked]
        assert all(n % 4096 == 0 for o, size, _ in asked for n in (o, size))
        assert all(a % 4096 == 0 for a in addresses)
        monkeypatch.setattr(os, "preadv", refused)
        assert all(np.array_equal(a, b) for a, b in zip(read(file), plain, strict=True))
        assert not file.direct


def test_rows_that_memory_cannot_hold_are_read_directly(tmp_path, monkeypatch):
    snapshot = make_store(tmp_path / "s", hooks={"resid.2": 16}, dtype="float32").snapshot()

    def chosen(**options):
        return Stream(snapshot, ["resid.2"], batch_tokens=64, window_rows=128, **options).direct

    size = snapshot.n_rows * 16 * 4
    monkeypatch.setattr(streams, "memory_bytes", lambda: 2 * size)
    assert (chosen(), chosen(direct=True)) == (False, True)
    monkeypatch.setattr(streams, "memory_bytes", lambda: 2 * size - 2)
    assert (chosen(), chosen(direct=False)) == (True, False)


def test_neighbouring_chunks_are_read_at_once(tmp_path, monkeypatch):
    reader, plain = reader_and_chunks(tmp_path, 512)
    asked = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: asked.append(a[2]) or preadv(*a))
    n = reader.n_chunks
    assert n > 4
    for direct in (False, True):
        file, buffer = reader.open(direct), scratch(n * (reader.chunk_bytes + 4))
        asked.clear()
        found = reader.read_run(range(1, n), buffer, file)
        assert all(np.array_equal(a, b) for a, b in zip(found, plain[1:], strict=True))
        assert len(asked) == 1
    # A file may have its chunks in any order.
    size, data = reader.chunk_bytes + 4, bytearray(reader.path.read_bytes())
    data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]
    reader.path.write_bytes(data)
    reader._offsets[:2] = reader._offsets[1::-1].copy()
    found = reader.read_run(range(n), buffer, reader.open())
    assert all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True))
    # The damaged one is named, not the first of the run.
    with reader.path.open("r+b") as f:
        f.seek(3 * size)
        f.write(b"damaged!")
    with pytest.raises(DamagedError, match="chunk 3: checksum"):
        reader.read_run(range(2, n), buffer, reader.open())


@pytest.mark.usefixtures("uncompiled")  # reads that Python can count
def test_a_stream_reads_runs_at_once(tmp_path, monkeypatch):
    snapshot = make_store(tmp_path / "s", segments=(2048,) * 2).snapshot()
    calls = {}
    for run_chunks in (1, 4):
        stream = Stream(
            snapshot,
            ["resid.2"],
            batch_tokens=64,
            window_rows=256,
            run_chunks=run_chunks,
            **EVERYTHING,
        )
        asked = []
        preadv = os.preadv
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda *a, to=asked, do=preadv: to.append(a) or do(*a))
            list(islice(stream, 48))
        calls[run_chunks] = len(asked)
    assert calls[4] < calls[1] / 2
