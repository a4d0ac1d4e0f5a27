"""Stores from others: each impossible record is refused in words, before anything is allocated.

Every digest of these stores is made good again (`seal`), so it is the records' content that is
refused, not a checksum.
"""

import base64
import json
import shutil

import numpy as np
import pytest
from hostile import HOOK, RECORDS, edit, put, record_file, refused, seal, small_store, use

import actcache.store.untrusted as untrusted
from actcache.store import StoreVersionError
from actcache.store.ids import bytes_digest


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
