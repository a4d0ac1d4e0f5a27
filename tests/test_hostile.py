"""Stores from others: each impossible record is refused in words, before anything is allocated.

Every digest of these stores is made good again (`seal`), so it is the records' content that is
refused, not a checksum.
"""

import base64
import contextlib
import json
import os
import shutil
import sys
import tracemalloc

import google_crc32c
import numpy as np
import pytest
from hostile import HOOK, RECORDS, record_file, seal, small_store, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import identity

import actcache.store.untrusted as untrusted
from actcache.store import (
    ActcacheError,
    DamagedError,
    Layout,
    StoreMissingError,
    StoreVersionError,
    open_store,
    verify,
)
from actcache.store.collect import find_garbage, remove
from actcache.store.ids import bytes_digest
from actcache.store.writer import StoreWriter

PEAK = 4 << 20  # bytes that a refusal may allocate; the smallest bait here is 64 times as large
OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile") / "store"
    small_store(root)
    return root


@pytest.fixture
def root(original, tmp_path):
    shutil.copytree(original, tmp_path / "store")
    return tmp_path / "store"


def edit(root, name, act):
    """Change a record with `act(values)`, and make every digest good again."""
    file = record_file(root, name)
    values = json.loads(file.read_text())
    act(values)
    file.write_text(json.dumps(values))
    seal(root)


def put(*path):
    """A change: `put("hooks", 0, "info", "d", 7)` sets the 7 there."""
    *keys, last, value = path

    def act(values):
        for key in keys:
            values = values[key]
        values[last] = value

    act.__name__ = f"{'.'.join(map(str, (*keys, last)))}={str(value)[:40]}"
    return act


def refused(root, match, kind=DamagedError):
    """Using the store fails with `kind`, in these words, with little memory and nothing outside."""
    OPENED.clear()
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=match):
            use(root)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < PEAK
    assert not [path for path in OPENED if "outside" in path or "passwd" in path]


def test_the_store_itself_is_whole_and_sealing_changes_nothing(root):
    assert use(root) == []
    seal(root)
    assert use(root) == []


# -- commits ---------------------------------------------------------------------------------------

INFO = ("hooks", 0, "info")
PLAIN = ("hooks", 0, "plain")


def packed(*values):
    return base64.b64encode(np.array(values, dtype="<f8").tobytes()).decode()


def key(name):
    return put("objects", 0, "key", name)


COMMITS = [
    (put("rows", 1 << 40), "with 1099511627776 rows is impossible"),
    (put("rows", 0), "with 0 rows is impossible"),
    (put("rows", -64), "with -64 rows is impossible"),
    (put("rows", 1 << 24), r"cannot have .* bytes with 16,777,216 rows"),
    (put("rows", 63), "cannot have"),
    (put("rows", True), "rows: expected a whole number, got True"),
    (put("rows", "64"), "rows: expected a whole number"),
    (put("rows", 64.5), "rows: expected a whole number"),
    (put("documents", -1), "has -1 documents"),
    (put("documents", 65), "has 65 documents"),
    (put("token_digest", "sha256:0"), "no token digest"),
    (put(*INFO, "chunk_rows", 0), "chunk_rows=0"),
    (put(*INFO, "chunk_rows", -1), "chunk_rows=-1"),
    (put(*INFO, "chunk_rows", 1 << 40), "chunk_rows=1099511627776"),
    (put(*INFO, "chunk_rows", 1 << 24), "cannot have"),
    (put(*INFO, "d", 0), "d=0"),
    (put(*INFO, "d", 1 << 40), "d=1099511627776"),
    (put(*INFO, "d", 1 << 24), "cannot have"),
    (put(*INFO, "d", True), "expected a whole number"),
    (put(*INFO, "dtype", "object"), "impossible dtype='object'"),
    (put(*INFO, "dtype", "float64"), "impossible dtype='float64'"),
    (put(*INFO, "io", "sideways"), "expected one of 'in', 'out'"),
    (put(*INFO, "name", "../../outside"), "cannot be stored"),
    (put(*INFO, "name", "/etc/passwd"), "cannot be stored"),
    (put(*INFO, "name", ".."), "cannot be stored"),
    (put(*INFO, "name", "a\x00b"), "cannot be stored"),
    (put(*INFO, "name", "resid.3"), "does not name exactly its files"),
    (put(*INFO, "activation_id", "sha256:00"), "belongs under"),
    (key("../../outside/secret"), "is not allowed"),
    (key("/etc/passwd"), "is not allowed"),
    (key("segments/../../outside"), "is not allowed"),
    (key("segments//x"), "is not allowed"),
    (key("segments\\x"), "is not allowed"),
    (key(""), "is not allowed"),
    (key("store.json"), "names objects outside"),
    (put("objects", 0, "bytes", -1), "negative size"),
    (put("objects", 0, "bytes", 1 << 60), "cannot have"),
    (put("objects", 0, "sha256", "md5:00"), "no sha256"),
    (lambda c: c["objects"].pop(), "does not name exactly its files"),
    (lambda c: c["objects"].append(c["objects"][0]), "named twice"),
    (put("objects", []), "does not name exactly its files"),
    (lambda c: c["hooks"].append(c["hooks"][0]), "two hooks of one name|belongs under"),
    (put("folder", "../outside"), r"names the folder '\.\./outside'"),
    (put("folder", "segments/u00001-0000.00000000"), "names the folder"),
    (put("segment", "u00001-0000"), "names the folder"),
    (put("segment", "../../outside"), "is impossible"),
    (put("unit", 1), "says it is segment 0 of unit 1"),
    (put("index", -1), "says it is segment -1"),
    (put("last_in_unit", 1), "expected true or false"),
    (put("format_version", 0), "expected format_version 1, got 0"),
    (put("format_version", True), "expected format_version 1, got True"),
    (put("format_version", "1"), "expected format_version 1, got '1'"),
    (put("surprise", 1), "unknown key 'surprise'"),
    (lambda c: c.pop("rows"), "missing: rows"),
    (put("hooks", {}), "expected a list"),
    (put("hooks", 0, []), "expected a mapping"),
    (put("rows", 10**30), "more than 64 bits"),
    (put(*PLAIN, {}), "statistics record is malformed"),
    (put(*PLAIN, "n", -1), "expected a count"),
    (put(*PLAIN, "n", True), "expected a count"),
    (put(*PLAIN, "n", 1 << 47), "statistics of .* rows, it has 64"),
    (put(*PLAIN, "nonfinite", 1), "statistics record is impossible"),
    (put(*PLAIN, "mean", packed(0, 0, 0, np.nan)), "statistics record is impossible"),
    (put(*PLAIN, "mean", packed(0, 0, 0, np.inf)), "statistics record is impossible"),
    (put(*PLAIN, "mean", packed(1e9, 0, 0, 0)), "beyond its own max_abs"),
    (put(*PLAIN, "m2", packed(-1, 0, 0, 0)), "statistics record is impossible"),
    (put(*PLAIN, "m2", packed(1e300, 0, 0, 0)), "statistics record is impossible"),
    (put(*PLAIN, "m2", packed(1, 1, 1)), "expected 4 channels, got 3"),
    (put(*PLAIN, "mean", "ab"), "malformed"),
    (put(*PLAIN, "mean", "é" * 40), "malformed"),
    (put(*PLAIN, "mean", None), "malformed"),
    (put(*PLAIN, "mean", "AAAA" * 4096), "longer than 4 channels"),
    (put(*PLAIN, "max_abs", 1e300), "statistics record is impossible"),
    (put(*PLAIN, "max_abs", -1.0), "statistics record is impossible"),
    (put(*PLAIN, "sum_norm", 1e300), "statistics record is impossible"),
    (put(*PLAIN, "sum_norm", True), "expected a number"),
    (put(*PLAIN, "more", 1), "statistics record is impossible"),
]


@pytest.mark.parametrize(("act", "match"), COMMITS, ids=lambda v: getattr(v, "__name__", None))
def test_impossible_commits(root, act, match):  # F107
    edit(root, "commits/", act)
    refused(root, match)


def test_a_commit_of_a_newer_format_is_named_so(root):
    edit(root, "commits/", put("format_version", 2))
    refused(root, "has store format 2", StoreVersionError)


# -- snapshots, identity, vocabulary, canaries -----------------------------------------------------


def entry(*path):
    return put("segments", 0, *path)


def rename_commit(name):
    def act(snapshot):
        commits = snapshot["segments"][0]["commits"]
        commits[name] = commits.pop(min(commits))

    return act


def borrow_commits(snapshot):
    """The first segment lists the commits of the second."""
    snapshot["segments"][0]["commits"] = snapshot["segments"][1]["commits"]


SNAPSHOTS = [
    (lambda s: s["segments"].append(s["segments"][0]), "names a segment or a hook twice"),
    (put("hooks", [HOOK, HOOK]), "names a segment or a hook twice"),
    (put("hooks", [HOOK, "resid.9"]), "lists hook 'resid.9', which segment u00000-0000 does not"),
    (put("hooks", ["../../outside"]), "lists hook"),
    (put("hooks", HOOK), "expected a list"),
    (put("rows", 97), "has rows that are not its segments'"),
    (put("rows", 1 << 62), "has rows that are not its segments'"),
    (entry("rows", 1 << 40), "with 1099511627776 rows"),
    (entry("rows", -1), "with -1 rows"),
    (entry("segment", "../outside"), r"names '\.\./outside'"),
    (entry("segment", "u٠٠٠٠٠-٠٠٠٠"), "snapshot names"),
    (entry("commits", {}), "as commits of u00000-0000"),
    (entry("commits", {"../outside.json": "sha256:" + 64 * "0"}), "as commits of"),
    (rename_commit("u00000-0000.\x00.json"), "as commits of"),
    (rename_commit("u00000-0000.0123456789ab.json"), "cannot be read"),
    (borrow_commits, "as commits of u00000-0000"),
    (put("name", "2"), "says that it is snapshot '2'"),
    (put("name", "../1"), r"says that it is snapshot '\.\./1'"),
]
IDENTITIES = [
    (put("layout", "context", 0), "layout.context: expected at least 1, got 0"),
    (put("layout", "segment_rows", 1 << 40), "expected at most 16,777,216"),
    (put("layout", "chunk_bytes", 1 << 40), "expected at most 1,073,741,824"),
    (put("layout", "order", "random"), "expected one of 'permuted', 'context'"),
    (put("layout", []), "expected a mapping"),
    (put("format", "zarr"), "has the format 'zarr'"),
    (put("files", []), "expected a mapping"),
    (put("host", None), "expected a mapping"),
]
VOCABULARIES = [
    (put("tokens", "abcd"), "expected one list, 'tokens'"),
    (put("tokens", {}), "expected one list, 'tokens'"),
    (put("tokens", 0, None), "is not a vocabulary"),
    (put("tokens", 0, "é"), "is not a vocabulary"),
    (put("tokens", 0, "a"), "is not a vocabulary"),
    (put("tokens", 0, ["YQ=="]), "is not a vocabulary"),
    (put("more", 1), "expected one list, 'tokens'"),
]
CANARIES = [
    (put("rows", 1 << 40), "with 1099511627776 rows"),
    (put("rows", 16), "cannot have"),
    (put("folder", "../outside"), "names folder"),
    (put("folder", "segments/u00000-0000.00000000"), "names folder"),
    (put("hooks", 0, "dtype", "bfloat16"), "is not float32"),
    (put("hooks", 0, "d", 1 << 24), "cannot have"),
    (put("hooks", 0, "name", "../../outside"), "cannot be stored"),
    (put("contexts", []), "has 0 contexts"),
    (put("contexts", [0, 1]), "its token table is not the one that was committed"),
    (put("objects", []), "does not name exactly its files"),
    (put("objects", 0, "key", "../../outside"), "is not allowed"),
    (put("store_id", "sha256:0"), "belongs to another store"),
    (put("token_digest", "sha256:0"), "its token table is not the one that was committed"),
    (put("format_version", -1), "expected format_version 1"),
]
OTHERS = [
    *(("snapshots/1.json", act, match) for act, match in SNAPSHOTS),
    *(("store.json", act, match) for act, match in IDENTITIES),
    *(("vocab.json", act, match) for act, match in VOCABULARIES),
    *(("canaries/", act, match) for act, match in CANARIES),
]


@pytest.mark.parametrize(
    ("name", "act", "match"), OTHERS, ids=lambda v: getattr(v, "__name__", None)
)
def test_impossible_records(root, name, act, match):  # F107
    edit(root, name, act)
    refused(root, match)


def test_commits_of_one_segment_under_the_name_of_another(root):
    """A second commit file, rightly digested, that tells of another segment's rows."""
    theirs = next((root / "commits").glob("u00001-*.json"))
    mine = root / "commits" / theirs.name.replace("u00001", "u00000")
    mine.unlink()
    shutil.copy(theirs, mine)
    seal(root)
    refused(root, "belongs under u00001-0000")


def test_segments_must_agree_about_a_hook(root):
    """The second segment's bytes are sealed as float16 of twice the width."""
    other = root.parent / "other"
    small_store(other)
    file = next((root / "commits").glob("u00001-*.json"))
    commit = json.loads(file.read_text())
    commit["hooks"][0]["info"] |= {"dtype": "float16", "d": 8}
    for stats in (commit["hooks"][0]["plain"], commit["hooks"][0]["all"]):
        stats |= {"mean": packed(*[0] * 8), "m2": packed(*[0] * 8)}
    file.write_text(json.dumps(commit))
    seal(root)
    refused(root, "segment u00001-0000, hook resid.2: 8 channels of float16; segment u00000-0000")


# -- JSON ------------------------------------------------------------------------------------------

TEXTS = [
    (b"", "is not valid JSON"),
    (b"[]", "expected a JSON object"),
    (b"{" * 100_000, "is not valid JSON"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON"),
    (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 64 deep"),
    (b'{"a": NaN}', "NaN is not allowed"),
    (b'{"a": -Infinity}', "-Infinity is not allowed"),
    (b'{"a": 1e999}', "a number is too large"),
    (b'{"a": 1' + b"0" * 5000 + b"}", "more than 64 bits"),
    (b'{"a": 1, "a": 2}', "a key is there twice"),
    (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    (b'{"\\udfff": 1}', "half of a surrogate pair"),
    ('{"a": 1}'.encode("utf-16"), "is not valid JSON"),
    (b'{"a": "\xff"}', "is not valid JSON"),
]


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize(("text", "match"), TEXTS)
def test_json_that_would_trip_later_code(root, name, text, match):
    record_file(root, name).write_bytes(text)
    seal_around(root, name, text)
    refused(root, match)


def seal_around(root, name, text):
    """As `seal`, with the record `name` kept byte for byte."""
    seal(root)
    record_file(root, name).write_bytes(text)
    if name == "vocab.json":
        edit(root, "store.json", put("files", "vocab.json", bytes_digest(text)))


@pytest.mark.parametrize("name", RECORDS)
def test_huge_records_are_refused_by_their_size(root, name):
    with record_file(root, name).open("r+b") as f:
        f.truncate(untrusted.MAX_JSON_BYTES + 1)  # sparse: takes no space on the disk
    refused(root, "268,435,457 bytes, more than any store needs")


def test_small_text_of_many_values_is_refused_before_parsing(root, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_JSON_VALUES", 1000)
    record_file(root, "store.json").write_text('{"a": [' + "[]," * 1000 + "[]]}")
    refused(root, "more than 1,000 values of JSON")


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
