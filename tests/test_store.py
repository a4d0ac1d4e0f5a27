"""The store: what is written is what is read, by us and by other readers; damage never passes."""

import json
import shutil

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store

from actcache.store import (
    DamagedError,
    HookMissingError,
    HookStats,
    Segment,
    StoreMissingError,
    StoreVersionError,
    open_store,
    verify,
)
from actcache.store.hooknames import canonical, storage_key
from actcache.store.layout import DTYPES, TOKEN_COLUMNS, permutation
from actcache.store.split import doc_key, held_out, splitmix64

HOOKS = {"resid.2": 16, "mlp.1": 24}


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "s", hooks=HOOKS)


def as_float(x):
    return np.asarray(x).astype(np.float32)


# -- other readers ---------------------------------------------------------------------------------


def test_zarr_python_reads_every_array(store):
    for segment in store.snapshot().segments:
        root = segment.path
        for hook in HOOKS:
            theirs = zarr.open_array(root / "acts" / hook, mode="r")
            assert theirs.dtype.name == "bfloat16"
            assert np.array_equal(as_float(theirs[...]), as_float(segment.acts(hook).read()))
        tokens = segment.tokens()
        for column in TOKEN_COLUMNS:
            theirs = zarr.open_array(root / "tokens" / column, mode="r")
            assert np.array_equal(theirs[...], getattr(tokens, column))


def test_tensorstore_reads_every_array(store):
    for segment in store.snapshot().segments:
        root = segment.path
        arrays = {f"acts/{h}": segment.acts(h).read() for h in HOOKS}
        arrays |= {f"tokens/{c}": getattr(segment.tokens(), c) for c in TOKEN_COLUMNS}
        for name, ours in arrays.items():
            kvstore = {"driver": "file", "path": f"{root / name}/"}
            theirs = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
            assert np.array_equal(as_float(theirs.read().result()), as_float(ours))


def test_zarrs_reads_every_array(store):
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        for segment in store.snapshot().segments:
            root = segment.path
            for hook in HOOKS:
                theirs = zarr.open_array(root / "acts" / hook, mode="r")
                assert np.array_equal(as_float(theirs[...]), as_float(segment.acts(hook).read()))
            for column in TOKEN_COLUMNS:
                theirs = zarr.open_array(root / "tokens" / column, mode="r")
                assert np.array_equal(theirs[...], getattr(segment.tokens(), column))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_survive_the_round_trip(tmp_path, dtype):
    kept = {}

    def acts(hook, rng, tokens, d):
        kept[len(kept)] = rng.normal(size=(len(tokens), d)).astype(np.float32)
        return kept[len(kept) - 1]

    store = make_store(tmp_path / "s", dtype=dtype, acts=acts, segments=(96, 64))
    for number, segment in enumerate(store.snapshot().segments):
        tokens = segment.tokens()
        back = np.lexsort((tokens.pos, tokens.ctx))  # undoes the permutation, for any reader
        rows = segment.acts("resid.2").read()
        expected = kept[number].astype(rows.dtype)
        assert np.array_equal(as_float(rows[back]), as_float(expected))


# -- order -----------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.sampled_from(["u00000-0000", "u00012-0003"]))
def test_permutation_is_one_and_depends_on_the_segment(n, segment):
    order = permutation(segment, n)
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, permutation(segment, n))
    if n > 20:
        assert not np.array_equal(order, permutation("u99999-0000", n))


def test_splitmix_matches_plain_python():
    def one(x):
        mask = (1 << 64) - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    values = [0, 1, 12345, 2**63, 2**64 - 1]
    assert splitmix64(np.array(values, dtype=np.uint64)).tolist() == [one(v) for v in values]


def test_context_order_keeps_sequences_contiguous(tmp_path):
    store = make_store(tmp_path / "s", order="context", context=32)
    tokens = store.snapshot().segments[0].tokens()
    assert np.array_equal(tokens.pos, np.arange(len(tokens)) % 32)


def test_held_out_is_a_stable_share_of_documents():
    docs = np.array([doc_key(f"d{i}") for i in range(20_000)], dtype=np.uint64)
    some = held_out(docs, 0.05)
    assert abs(some.mean() - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5  # four sigma
    assert np.all(held_out(docs, 0.1)[some])
    with pytest.raises(ValueError, match="held_out_fraction"):
        held_out(docs, 1.0)


# -- statistics ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_statistics_merge_exactly(sizes, seed):
    x = np.random.default_rng(seed).normal(300.0, 2.0, (sum(sizes), 3))
    merged = HookStats.empty(3)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        merged = merged.merge(HookStats.of(part))
    assert merged.n == len(x)
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.m2, ((x - x.mean(0)) ** 2).sum(0), rtol=1e-9)
    np.testing.assert_allclose(merged.mean_norm, np.linalg.norm(x, axis=1).mean(), rtol=1e-12)
    assert merged.max_abs == np.abs(x).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_statistics_of_storage_types_are_near_those_of_float64(dtype):
    """A mean far from zero is where sums in low precision go wrong."""
    x = np.random.default_rng(0).normal(300.0, 2.0, (3000, 40)).astype(DTYPES[dtype])
    fast, exact = HookStats.of(x), HookStats.of(x.astype(np.float64))
    np.testing.assert_allclose(fast.mean, exact.mean, rtol=1e-12)
    np.testing.assert_allclose(fast.m2, exact.m2, rtol=1e-5)
    np.testing.assert_allclose(fast.mean_norm, exact.mean_norm, rtol=1e-6)
    assert (fast.max_abs, fast.nonfinite) == (exact.max_abs, 0)
    x[7, 3], x[8, 4] = np.inf, np.nan
    assert HookStats.of(x).nonfinite == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_some_rows_are_those_of_a_copy(dtype):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3000, 96), dtype=np.float32).astype(DTYPES[dtype])
    for some in (np.flatnonzero(rng.random(3000) < 0.9), np.arange(0), np.arange(3000)):
        assert HookStats.of(x, some).to_json() == HookStats.of(x[some]).to_json()


def test_statistics_of_a_snapshot_leave_special_tokens_out(store):
    snapshot = store.snapshot()
    rows = np.concatenate([as_float(s.acts("resid.2").read()) for s in snapshot.segments])
    flags = np.concatenate([s.tokens().flags for s in snapshot.segments])
    plain = rows[(flags & 1) == 0].astype(np.float64)
    stats = snapshot.stats("resid.2")
    np.testing.assert_allclose(stats.mean, plain.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.variance, plain.var(0).sum(), rtol=1e-7)  # float32 squares
    assert snapshot.stats("resid.2", special=True).n == len(rows)


def test_statistics_of_a_snapshot_are_merged_once(store, monkeypatch):
    """Every one of a hundred runs asks several times; a store may have thousands of segments."""
    snapshot = store.snapshot()
    kept = [snapshot.stats("resid.2"), snapshot.stats("resid.2", special=True)]
    monkeypatch.setattr(Segment, "stats", lambda *_: pytest.fail("read again"))
    assert snapshot.stats("blocks.2.hook_resid_post") is kept[0]  # another name of the hook
    assert snapshot.stats("resid.2", special=True) is kept[1]
    assert kept[0].n < kept[1].n
    with pytest.raises(ValueError, match="read-only"):
        kept[0].mean += 1


# -- damage ----------------------------------------------------------------------------------------


def objects_of(store):
    return sorted(p for p in store.path.rglob("*") if p.is_file())


def read_everything(path):
    snapshot = open_store(path).snapshot()
    snapshot.vocab()
    for segment in snapshot.segments:
        segment.tokens()
        for hook in HOOKS:
            segment.acts(hook).read()
            segment.stats(hook)
    return snapshot


def test_every_damaged_object_is_named(tmp_path):  # F107
    """One flipped byte, one truncation, one deletion of each object of a small store."""
    original = make_store(tmp_path / "s", hooks=HOOKS, segments=(64,))
    assert [c for c in verify(original.snapshot()) if c.problem] == []
    for file in objects_of(original):
        name = file.relative_to(original.path)
        for damage in (flip, truncate, delete):
            copy = tmp_path / "copy"
            shutil.copytree(original.path, copy)
            damage(copy / name)
            with_problem = problems(copy)
            assert with_problem, f"{damage.__name__} of {name} went unnoticed"
            if "commits" not in name.parts and "snapshots" not in name.parts:
                assert any(str(name) in p for p in with_problem), (name, with_problem)
            shutil.rmtree(copy)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def delete(path):
    path.unlink()


def problems(path):
    """What verify names; opening may already refuse."""
    try:
        return [f"{c.key}: {c.problem}" for c in verify(open_store(path).snapshot()) if c.problem]
    except (DamagedError, StoreMissingError) as e:
        return [str(e)]


@pytest.mark.parametrize("damage", [flip, truncate, delete])
@pytest.mark.parametrize("name", ["acts/resid.2/c/0/0", "tokens/token_id/c/0"])
def test_damaged_bytes_raise_and_never_read_as_zeros(store, damage, name):
    segment = store.snapshot().segments[1]
    damage(segment.path / name)
    with pytest.raises(DamagedError, match=rf"segment {segment.id}.*{name.split('/')[1]}"):
        read_everything(store.path)


def test_a_chunk_that_was_never_written_raises(store):
    """zarr-python reads it as zeros; we do not."""
    segment = store.snapshot().segments[0]
    reader = segment.acts("resid.2")
    data = bytearray(reader.path.read_bytes())
    index = len(data) - (reader.n_chunks * 16 + 4)
    data[index : index + 16] = b"\xff" * 16
    import google_crc32c

    data[-4:] = google_crc32c.value(bytes(data[index:-4])).to_bytes(4, "little")
    reader.path.write_bytes(bytes(data))
    assert not as_float(
        zarr.open_array(reader.path.parents[2], mode="r")[: reader.chunk_rows]
    ).any()
    with pytest.raises(DamagedError, match="chunk 0 was never written"):
        segment.acts("resid.2").read_chunk(0)


# -- what users type wrong -------------------------------------------------------------------------


def test_missing_store(tmp_path):
    with pytest.raises(StoreMissingError, match="does not exist"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreMissingError, match="not a store"):
        open_store(tmp_path)


def test_store_of_a_newer_format(store):
    file = store.path / "store.json"
    record = json.loads(file.read_text())
    record["format_version"] = 2
    record["something_new"] = True
    file.write_text(json.dumps(record))
    with pytest.raises(StoreVersionError, match="store format 2"):
        open_store(store.path)


def test_store_interrupted_before_its_first_commit(store):
    shutil.rmtree(store.path / "snapshots")
    with pytest.raises(StoreMissingError, match="Run the same actcache command again"):
        open_store(store.path).snapshot()


def test_unknown_snapshot(store):
    with pytest.raises(StoreMissingError, match="no snapshot '7'; it has 1"):
        store.snapshot("7")


def test_hook_that_the_store_has_not(store):
    with pytest.raises(HookMissingError, match=r"Did you mean resid\.2.*It has: mlp\.1, resid\.2"):
        store.snapshot().resolve_hook("resid.3")


def test_spellings_of_a_hook(store):  # F69
    snapshot = store.snapshot()
    for name in ("resid.2", "blocks.2.hook_resid_post", "layers.2", "layers.2:out"):
        assert snapshot.resolve_hook(name) == "resid.2"
    assert snapshot.resolve_hook("blocks.1.hook_mlp_out") == "mlp.1"


def test_canonical_names():
    assert canonical("blocks.07.hook_resid_pre") == "resid_pre.7"
    assert canonical("hook_embed") == "embed"
    assert canonical("layers.1:in") == "layers.1:in"
    assert storage_key("layers.1:in") == "layers.1--in"
    with pytest.raises(ValueError, match="cannot be stored"):
        storage_key("../../etc")
