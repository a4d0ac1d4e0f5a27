"""Stores in an object store: moto's S3 server, and a proxy in front of it that spoils answers. What
happens there must be what happens in a folder. Writers are in test_objects_writers.py, the web, the
catalog, bad input and credentials in test_objects_input.py.  # F110
"""

import re
import threading
import time

import numpy as np
import pytest
import torch
from buckets import same, whole
from cache import digests

from actcache.cli import main
from actcache.run import run
from actcache.store import (
    DamagedError,
    StoreError,
    files,
    open_store,
    verify,
)
from actcache.store import objects as requests
from actcache.store.canaries import canaries
from actcache.store.copy import copy_snapshot
from actcache.store.errors import RemoteError
from saetrain.stream import Stream

TOKENS = 128

pytestmark = pytest.mark.usefixtures("s3")


# -- as in a folder --------------------------------------------------------------------------------


def test_a_run_into_a_bucket_is_the_run_into_a_folder(asked, tmp_path, capsys):
    local = run(asked(tokens=TOKENS)).store
    url = f"s3://lab/{tmp_path.name}/run"
    settings = asked(store=url, tokens=TOKENS, catalog=str(tmp_path / "catalog"))
    result = run(settings)
    assert str(result.store.path) == url
    assert same(result.store, local)
    assert whole(open_store(url))
    assert [c.record.rows for c in canaries(open_store(url))] == [
        c.record.rows for c in canaries(local)
    ]
    again = run(settings)
    assert again.computed == 0
    more = run(asked(store=url, tokens=2 * TOKENS, catalog=str(tmp_path / "catalog")))
    assert 0 < more.computed < more.tokens
    assert same(more.store, run(asked(tokens=2 * TOKENS)).store)
    for words in (["info", url], ["verify", url], ["ls"]):
        with pytest.raises(SystemExit) as e:
            main([*words, "--catalog", str(tmp_path / "catalog")])
        assert e.value.code == 0
        assert url in capsys.readouterr().out or words[0] == "verify"


def test_zarr_python_reads_the_bucket(there, small_store):
    import obstore.store
    import zarr
    from zarr.storage import ObjectStore

    prefix = str(there.path).removeprefix("s3://lab/")
    bucket = obstore.store.S3Store("lab", prefix=prefix, client_options={"allow_http": True})
    segment = there.snapshot().segments[0]
    group = zarr.open_group(
        ObjectStore(bucket, read_only=True), path=segment.commits[0].folder, mode="r"
    )
    rows = small_store.snapshot().segments[0].acts("resid.2").read()
    assert np.array_equal(group["acts/resid.2"][:], rows)


def test_copies_to_a_bucket_and_back(small_store, there, tmp_path):
    back = copy_snapshot(there.snapshot(), tmp_path / "back")
    assert same(back.store, small_store)
    names = {p.relative_to(small_store.path) for p in small_store.path.rglob("*.json")}
    assert all(
        (back.store.path / f).read_bytes() == (small_store.path / f).read_bytes() for f in names
    )
    assert copy_snapshot(there.snapshot(), tmp_path / "back").copied == 0
    again = copy_snapshot(small_store.snapshot(), str(there.path))
    assert (again.copied, again.kept) == (0, back.copied)
    some = copy_snapshot(there.snapshot(), f"s3://lab/{tmp_path.name}/some", ["mlp.0"])
    assert "mlp.0" in some.store.snapshot().hooks
    with pytest.raises(StoreError, match="one lies in the other"):
        copy_snapshot(there.snapshot(), f"{there.path}/below")


def test_many_ranges_from_many_threads(small_store, there):
    segment, local = there.snapshot().segments[0], small_store.snapshot().segments[0]
    reader, file = segment.acts("resid.2"), local.acts("resid.2").path.read_bytes()
    assert reader.n_chunks > 3
    found = {}

    def read(seed):
        rng = np.random.default_rng(seed)
        starts = rng.integers(0, len(file) - 300, 20)
        asked = [(int(s), int(n)) for s, n in zip(starts, rng.integers(1, 300, 20), strict=True)]
        parts = reader.read_ranges(asked)
        found[seed] = all(
            bytes(p) == file[s : s + n] for p, (s, n) in zip(parts, asked, strict=True)
        )

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)
    chunks = [3, 0, 2]
    for chunk, rows in zip(chunks, reader.read_chunks(chunks), strict=True):
        assert np.array_equal(rows, local.acts("resid.2").read_chunk(chunk))
    buffer = np.empty(reader.chunk_bytes + 4, np.uint8)
    assert np.array_equal(reader.read_into(1, buffer), reader.read_chunk(1))


# -- answers that are spoilt -----------------------------------------------------------------------

MENDED = ["503", "reset", "truncate", "flip"]


@pytest.mark.parametrize("kind", MENDED)
def test_reading_mends_what_goes_wrong_on_the_way(small_store, there, s3, kind):
    # A flipped bit of store.json is seen where the snapshot is opened: a test of its own.
    names = "snapshots/1|commits/|tokens/|acts/" + ("" if kind == "flip" else r"|store\.json")
    s3.spoil(kind, f"GET .*/({names})", each=2)
    assert same(open_store(str(there.path)), small_store)
    assert s3.quiet()[kind] > 30


def test_a_connection_that_stands_still_is_given_up(there, s3, monkeypatch):
    monkeypatch.setattr(requests, "STALL", 0.3)
    store = open_store(str(there.path))
    s3.spoil("stall", r"GET .*/snapshots/1", 1)
    begin = time.monotonic()
    assert store.snapshot().n_rows > 0
    assert time.monotonic() - begin < 2.5
    assert s3.quiet() == {"stall": 1}


@pytest.mark.parametrize("kind", ["503", "reset", "lost"])
def test_writing_mends_what_goes_wrong_on_the_way(small_store, s3, tmp_path, kind):
    """`lost`: the server has taken the object and the writer cannot know."""
    s3.spoil(kind, r"PUT .*/(tokens|acts|commits|snapshots|store)", each=2)
    copy = copy_snapshot(small_store.snapshot(), f"s3://lab/{tmp_path.name}/{kind}")
    assert s3.quiet()[kind] > 30
    assert same(copy.store, small_store)
    assert whole(copy.store)


def test_a_run_among_random_faults(asked, s3, tmp_path):
    expected = digests(run(asked(tokens=TOKENS)).store)
    for kind, part in (("503", "PUT"), ("lost", "commits"), ("reset", "GET"), ("503", "claims")):
        s3.spoil(kind, part, each=1)
    result = run(asked(store=f"s3://lab/{tmp_path.name}/faults", tokens=TOKENS))
    assert sum(s3.quiet().values()) >= 9
    assert digests(result.store) == expected
    assert whole(result.store)


def test_damage_that_stays_is_named(there, s3):
    snapshot = there.snapshot()
    folder = snapshot.segments[1].commits[0].folder
    s3.spoil("flip", rf"GET .*{re.escape(folder)}/acts/mlp\.0/c/0/0")
    with pytest.raises(DamagedError, match=r"segment u00001-0000, hook mlp\.0, shard index: check"):
        snapshot.segments[1].acts("mlp.0").read()
    assert [c.key for c in verify(snapshot) if c.problem] == [f"{folder}/acts/mlp.0/c/0/0"]


@pytest.mark.parametrize("kind", ["503", "reset", "truncate"])
def test_a_server_that_stays_broken_is_named(there, s3, kind):
    s3.spoil(kind, r"GET .*/snapshots/1")
    with pytest.raises(RemoteError, match=r"s3://lab/.*/snapshots/1\.json: .*endpoint http://127"):
        open_store(str(there.path)).snapshot()
    assert s3.quiet()[kind] == requests.TRIES


def test_lost_objects_are_named_and_never_zeros(there, tmp_path):
    copy = copy_snapshot(there.snapshot(), f"s3://lab/{tmp_path.name}/lost").store
    snapshot = copy.snapshot()
    key = snapshot.segments[0].commits[0].folder + "/acts/mlp.0/c/0/0"
    files.remove(copy.path / key)
    with pytest.raises(DamagedError, match=r"segment u00000-0000, hook mlp\.0.* is missing"):
        snapshot.segments[0].acts("mlp.0").read()
    assert [(c.key, c.problem) for c in verify(snapshot) if c.problem] == [(key, "is missing")]


def test_a_store_json_that_changed_on_its_way(there, s3):
    s3.spoil("flip", r"GET .*/store\.json")
    with pytest.raises(StoreError, match=r"store\.json"):
        open_store(str(there.path)).snapshot()


def test_training_batches_from_a_bucket_are_those_from_the_folder(there, small_store, s3):
    def batches(store):
        stream = Stream(store.snapshot(), ["resid.2", "mlp.0"], batch_tokens=16, seed=1)
        return [next(it) for it in [iter(stream)] for _ in range(3)]

    s3.spoil("flip", "GET .*/acts/", each=1)
    for mine, theirs in zip(batches(there), batches(small_store), strict=True):
        assert np.array_equal(mine.tokens.token_id, theirs.tokens.token_id)
        for hook in mine.acts:
            assert torch.equal(mine.acts[hook], theirs.acts[hook])
    assert s3.quiet()["flip"] > 2
