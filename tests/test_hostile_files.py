"""Stores from others: objects that are not what they claim, links that lead outside, records that
hold anything at all. Impossible records one by one are in test_hostile.py.
"""

import contextlib
import json
import os
import shutil

import google_crc32c
import numpy as np
import pytest
from hostile import HOOK, OPENED, RECORDS, edit, record_file, refused, seal, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import identity

from actcache.store import (
    ActcacheError,
    DamagedError,
    Layout,
    StoreMissingError,
    open_store,
    verify,
)
from actcache.store.collect import find_garbage, remove
from actcache.store.writer import StoreWriter

# -- objects ---------------------------------------------------------------------------------------


def shard(root):
    return open_store(root).snapshot().segments[0].acts(HOOK)


def with_index(reader, offsets):
    """Write a shard index with a good checksum that names these offsets."""
    length = reader.chunk_bytes + 4
    index = np.array([(o, length) for o in offsets], dtype="<u8").tobytes()
    data = bytearray(reader.path.read_bytes())
    data[-len(index) - 4 :] = index + google_crc32c.value(index).to_bytes(4, "little")
    reader.path.write_bytes(bytes(data))


@pytest.mark.parametrize("first", [260, 2**64 - 10, 2**63, 1])
def test_a_shard_index_that_points_elsewhere(root, first):
    """One chunk for two rows' worth, beyond the file, beyond 64 bits, between two chunks."""
    reader = shard(root)
    assert reader.chunk_bytes + 4 == 260
    with_index(reader, [first, 260, 520, 780])
    with pytest.raises(DamagedError, match="entries do not fit the array's shape"):
        reader.read()


def test_chunks_may_lie_in_any_order(root):
    """zarr leaves the order of inner chunks open."""
    reader = shard(root)
    before = reader.read()
    data = reader.path.read_bytes()
    reader.path.write_bytes(data[260:520] + data[:260] + data[520:])
    with_index(reader, [260, 0, 520, 780])
    assert np.array_equal(shard(root).read(), before)


def test_a_shard_that_claims_a_giant_chunk(root):
    """Every size agrees, the file is sparse: nothing is read before the index was checked."""
    size = (1 << 24) * 16
    total = size + 4 + 16 + 4

    def act(commit):
        commit["hooks"][0]["info"]["chunk_rows"] = 1 << 24
        for o in commit["objects"]:
            if o["key"].endswith("/acts/resid.2/c/0/0"):
                o["bytes"] = total

    edit(root, "commits/", act)
    with shard(root).path.open("r+b") as f:
        f.truncate(total)
    refused(root, "shard index: checksum")


def test_positions_beyond_the_rows_are_refused(root):
    """What rebuilds contexts allocates by these numbers."""
    path = open_store(root).snapshot().segments[0].path / "tokens" / "pos" / "c" / "0"
    column = np.frombuffer(path.read_bytes()[:-4], dtype="<u4").copy()
    column[5] = 2**32 - 1
    data = column.tobytes()
    path.write_bytes(data + google_crc32c.value(data).to_bytes(4, "little"))
    with pytest.raises(DamagedError, match="position is beyond its 64 rows"):
        open_store(root).snapshot().segments[0].tokens()


def test_metadata_that_disagrees_is_found_by_verify(root):
    """We never read zarr.json; readers of zarr do, so its digest is part of the commit."""
    file = open_store(root).snapshot().segments[0].path / "acts" / HOOK / "zarr.json"
    file.write_text(file.read_text().replace("64", "32"))
    assert use(root) == [f"{file.relative_to(root)}: bytes do not match their digest"]


# -- links and other things that are not files -----------------------------------------------------

LINKED = [
    "store.json",
    "vocab.json",
    "snapshots",
    "snapshots/1.json",
    "commits",
    "commits/",
    "segments",
    "canaries",
    "canaries/",
]


@pytest.mark.parametrize("name", [*LINKED, "segment", "shard"])
def test_links_out_of_the_store_are_refused(root, tmp_path, name):
    found = {"segment": shard(root).path.parents[4], "shard": shard(root).path}
    path = found.get(name) or record_file(root, name)
    (tmp_path / "outside").mkdir()
    target = tmp_path / "outside" / path.name
    shutil.move(path, target)
    path.symlink_to(target)
    refused(root, "leads out of the store.*copy the files there")


def test_verify_names_a_linked_object(root, tmp_path):
    path = shard(root).path
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    (problem,) = [c for c in verify(open_store(root).snapshot()) if c.problem]
    assert problem.key == str(path.relative_to(root))
    assert "leads out of the store" in problem.problem


def test_a_linked_store_and_links_inside_it_work(root, tmp_path):
    path = shard(root).path
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")
    (tmp_path / "link").symlink_to(root)
    assert use(tmp_path / "link") == []


@pytest.mark.parametrize("name", ["commits/", "shard"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_in_place_of_files(root, name, make):
    path = shard(root).path if name == "shard" else record_file(root, name)
    path.unlink()
    make(path)
    refused(root, "is not a file|Is a directory")


def test_a_link_that_leads_to_itself(root):
    path = shard(root).path
    path.unlink()
    path.symlink_to(path.name)
    refused(root, "cannot be read|is missing|leads out")


def test_nothing_outside_is_collected_as_garbage(root, tmp_path):
    precious = tmp_path / "outside" / "u00007-0000.01234567"
    precious.mkdir(parents=True)
    (precious / "thesis.tex").write_text("precious")
    (tmp_path / "outside" / "u00001.json").write_text("{}")
    for name in ("segments", "claims", "canaries"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).symlink_to(tmp_path / "outside")
        with pytest.raises(DamagedError, match="leads out of the store"):
            remove(find_garbage(root, grace=0))
        (root / name).unlink()
    (root / "segments").mkdir()
    (root / "segments" / precious.name).symlink_to(precious)
    remove(find_garbage(root, grace=0))
    assert (precious / "thesis.tex").read_text() == "precious"
    assert (tmp_path / "outside" / "u00001.json").exists()


def test_no_writer_writes_outside(tmp_path):
    vocab = b'{"tokens":[]}'
    ident = identity(Layout(context=32, segment_rows=64), vocab)
    StoreWriter(tmp_path / "s", ident, {"vocab.json": vocab})
    (tmp_path / "outside").mkdir()
    for name in ("segments", "commits", "snapshots", "canaries", "claims"):
        (tmp_path / "s" / name).symlink_to(tmp_path / "outside")
        with pytest.raises(DamagedError, match=f"{name} leads out of the store"):
            StoreWriter(tmp_path / "s", ident, {"vocab.json": vocab})
        (tmp_path / "s" / name).unlink()


def test_names_that_are_no_snapshots_are_passed_over(root):
    for name in ("1abc.json", "0.json", "-1.json", "²3.json", "9" * 200 + ".json", ".2.json"):
        (root / "snapshots" / name).write_text("{}")
    assert open_store(root).snapshot_names() == ["1"]
    with pytest.raises(StoreMissingError, match="no snapshot '0'"):
        open_store(root).snapshot("0")


# -- anything at all -------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(["..", "/etc/passwd", "a/b", "sha256:" + 64 * "0", "u00001-0000", "resid.2"]),
    st.recursive(st.integers(0, 3), lambda s: st.lists(s, max_size=3), max_leaves=5),
    st.dictionaries(st.text(max_size=5), st.integers(0, 3), max_size=3),
)


def only_our_errors(root):
    OPENED.clear()
    with contextlib.suppress(ActcacheError):
        use(root)
    assert not [p for p in OPENED if p.startswith("/etc") or "outside" in p]


@FUZZ
@given(st.data())
def test_any_bytes_in_a_record_raise_our_errors_only(original, data):
    """Flipped, cut and inserted bytes, with and without every other digest made good."""
    file = record_file(original, data.draw(st.sampled_from(RECORDS)))
    kept = {f: f.read_bytes() for f in original.rglob("*.json") if "segments" not in f.parts}
    whole = kept[file]
    at = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.binary(min_size=1, max_size=4))
    changed = data.draw(
        st.sampled_from(
            [
                whole[:at],
                whole[:at] + change + whole[at:],
                whole[:at] + bytes([whole[at] ^ change[0]]) + whole[at + 1 :],
                whole[:at] + whole[at + len(change) :],
            ]
        )
    )
    try:
        file.write_bytes(changed)
        if data.draw(st.booleans()):
            seal(original)
        only_our_errors(original)
    finally:
        for f, before in kept.items():
            f.write_bytes(before)


@FUZZ
@given(st.data())
def test_any_value_at_any_place_of_a_record_raises_our_errors_only(original, data):
    """One or two leaves of a sealed record hold something else than they should."""
    file = record_file(original, data.draw(st.sampled_from(RECORDS)))
    kept = {f: f.read_bytes() for f in original.rglob("*.json") if "segments" not in f.parts}
    record = json.loads(kept[file])
    for _ in range(data.draw(st.integers(1, 2))):
        place, name = record, data.draw(st.sampled_from(sorted(record)))
        while isinstance(place[name], (dict, list)) and place[name] and data.draw(st.booleans()):
            place = place[name]
            names = sorted(place) if isinstance(place, dict) else range(len(place))
            name = data.draw(st.sampled_from(list(names)))
        place[name] = data.draw(NASTY)
    try:
        file.write_text(json.dumps(record))
        seal(original)
        only_our_errors(original)
    finally:
        for f, before in kept.items():
            f.write_bytes(before)
