"""Stores of the same tokens read as one: rows joined by (doc, ctx, pos), whatever their order."""

import functools
import json
import re
from itertools import islice

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store

from actcache.store import DamagedError, HookMissingError, HookStats, Snapshot, dequantise
from actcache.store.layout import TOKEN_COLUMNS
from saetrain.errors import ConfigError
from saetrain.stream import Stream, join

SEGMENTS = (256, 256, 192)
EVERYTHING = {"split": "all", "skip_special": False}


def named(hook, rng, tokens, d, *, model):
    """Rows that name their token: a function of model, hook, document, context and position."""
    key = (
        tokens.doc % 99991 * 0.618 + 31.7 * tokens.ctx + 7.13 * tokens.pos + len(hook) + 1e3 * model
    )
    return np.sin(key[:, None] * (1 + np.arange(d)))


def store(path, model, **kw):
    """Equal tokens for every `model`: `named` draws no random numbers."""
    acts = functools.partial(named, model=model)
    host = {"weights": f"w{model}"}
    return make_store(path, **({"segments": SEGMENTS, "host": host, "acts": acts} | kw))


def rows_by_name(snapshot: Snapshot, hook: str):
    """{(segment id, doc, ctx, pos): row} as zarr-python reads them."""
    found = {}
    for segment in snapshot.segments:
        group = zarr.open_group(segment.path, mode="r")
        x = np.asarray(group[f"acts/{hook}"][:]).astype(np.float32)
        if f"scales/{hook}" in group:
            mean, std = np.asarray(group[f"calibration/{hook}"][:])
            x = dequantise(
                x.astype(np.int8), np.asarray(group[f"scales/{hook}"][:]).ravel(), mean, std
            )
        doc, ctx, pos = (np.asarray(group[f"tokens/{n}"][:]) for n in ("doc", "ctx", "pos"))
        for i in range(len(x)):
            found[segment.id, int(doc[i]), int(ctx[i]), int(pos[i])] = x[i]
    return found


def names(joined, batch):
    t = batch.tokens
    ids = [joined.segments[s].id for s in batch.segment]
    return list(zip(ids, t.doc.tolist(), t.ctx.tolist(), t.pos.tolist(), strict=True))


# How the second store differs: chunks, types, order of rows.
OTHERS = {
    "chunks": {"chunk_bytes": 1111},
    "float32": {"dtype": "float32", "chunk_bytes": 900},
    "context": {"order": "context"},
    "context-int8": {"order": "context", "dtype": "int8", "chunk_bytes": 500},
    "int8": {"dtype": "int8"},
}


@pytest.fixture(scope="module", params=list(OTHERS))
def pair(request, tmp_path_factory):
    """(snapshots, hooks): the second store has another width, and differs as OTHERS says."""
    folder = tmp_path_factory.mktemp(request.param)
    base = store(folder / "base", 0, hooks={"resid.2": 16, "mlp.1": 8})
    chat = store(folder / "chat", 1, hooks={"resid.2": 24}, **OTHERS[request.param])
    return {"base": base.snapshot(), "chat": chat.snapshot()}


@pytest.mark.parametrize("lead", ["base", "chat"])
def test_rows_of_a_batch_belong_to_the_same_token_in_every_store(pair, lead):  # F67
    joined = join(dict(sorted(pair.items(), key=lambda x: x[0] != lead)))
    hooks = ("base:resid.2", "chat:blocks.2.hook_resid_post", "base:mlp.1")
    stream = Stream(joined, hooks, batch_tokens=50, window_rows=170, **EVERYTHING)
    assert stream.hooks == ("base:resid.2", "chat:resid.2", "base:mlp.1")
    truth = {h: rows_by_name(pair[h.split(":")[0]], h.split(":")[1]) for h in stream.hooks}
    seen = []
    for batch in (*islice(stream, stream.batches_per_epoch), *stream.one_pass()):
        seen += names(joined, batch)
        for hook, rows in truth.items():
            wanted = np.stack([rows[n] for n in names(joined, batch)])
            np.testing.assert_allclose(batch.acts[hook].numpy(), wanted, atol=1e-6)
    epoch = seen[: stream.batches_per_epoch * 50]
    assert len(set(epoch)) == len(epoch)
    assert sorted(seen[len(epoch) :]) == sorted(truth["base:resid.2"])


# F115
@settings(deadline=None, max_examples=12)
@given(st.integers(0, 12), st.sampled_from([2, 3, 8]), st.integers(1, 400))
def test_ranks_and_a_resume_share_the_global_batches_of_joined_stores(pair, stop, world, window):
    def fresh(**kw):
        hooks = ("base:resid.2", "chat:resid.2")
        return Stream(join(pair), hooks, batch_tokens=60, window_rows=window, **kw)

    whole = fresh()
    expected = list(islice(whole, 14))
    part = fresh()
    list(islice(part, stop))
    state = json.loads(json.dumps(part.state_dict()))
    ranks = [fresh(rank=r, world=world) for r in range(world)]
    for rank in ranks:
        rank.load_state_dict(state)
    for step, shares in enumerate(islice(zip(*ranks, strict=True), 14 - stop), start=stop):
        found = {}
        for share in shares:
            for i, n in enumerate(names(whole.snapshot, share)):
                found[n] = np.concatenate([x[i].numpy() for x in share.acts.values()])
        wanted = expected[step]
        assert sum(map(len, shares)) == len(wanted) == len(found)
        for i, n in enumerate(names(whole.snapshot, wanted)):
            row = np.concatenate([x[i].numpy() for x in wanted.acts.values()])
            assert np.array_equal(found[n], row)


def test_large_units_are_shared_by_all_ranks(pair):
    """Of stores in different orders whole segments are read together; no rank goes without."""
    joined = join(pair)
    hooks = ("base:resid.2", "chat:resid.2")
    ranks = [Stream(joined, hooks, batch_tokens=200, rank=r, world=4) for r in range(4)]
    for shares in islice(zip(*ranks, strict=True), 3):
        assert all(20 < len(s) < 80 for s in shares)


def test_state_and_statistics_name_every_store(pair):
    joined = join(pair)
    state = Stream(joined, ["base:resid.2"]).state_dict()
    assert state["store_id"] == {k: s.store_id for k, s in pair.items()}
    assert state["snapshot"] == {"base": "1", "chat": "1"}
    for label, snapshot in pair.items():
        space = Stream(joined, [f"{label}:resid.2"]).space(f"{label}:resid.2")
        assert space.variance == snapshot.stats("resid.2").variance
        assert np.array_equal(space.mean, snapshot.stats("resid.2").mean.astype(np.float32))
    assert joined.n_rows == sum(SEGMENTS)
    assert joined.vocab() == pair["base"].vocab()


def test_a_segment_reads_in_the_order_of_the_first_store(pair):
    """What other readers of a snapshot use: `acts` fits `tokens`, chunk by chunk."""
    joined = join(pair)
    truth = rows_by_name(pair["chat"], "resid.2")
    for segment in joined.segments:
        t, reader = segment.tokens(), segment.acts("chat:resid.2")
        keys = zip(
            [segment.id] * len(t), t.doc.tolist(), t.ctx.tolist(), t.pos.tolist(), strict=True
        )
        wanted = np.stack([truth[k] for k in keys])
        np.testing.assert_allclose(reader.read().astype(np.float32), wanted, atol=1e-6)
        last = reader.read_chunk(reader.n_chunks - 1).astype(np.float32)
        np.testing.assert_allclose(last, wanted[-len(last) :], atol=1e-6)


def test_segments_that_one_store_lacks_are_left_out_and_named(tmp_path):
    base = store(tmp_path / "base", 0).snapshot()
    chat = store(tmp_path / "chat", 1, units=(0, 2), order="context").snapshot()
    joined = join({"base": base, "chat": chat})
    assert [s.id for s in joined.segments] == [s.id for s in chat.segments]
    assert joined.left_out == {"base": ("u00001-0000",), "chat": ()}
    assert "1 of base (u00001-0000" in joined.left_out_text()
    assert joined.n_rows == 256 + 192
    assert Stream(joined, ["base:resid.2"], **EVERYTHING).n_rows == 256 + 192
    total = HookStats.empty(16)
    for i in (0, 2):
        total = total.merge(base.segments[i].stats("resid.2"))
    assert joined.stats("base:resid.2").mean_norm == total.mean_norm
    other = store(tmp_path / "other", 2, units=(1,)).snapshot()
    with pytest.raises(ConfigError, match=r"chat, other have no segment in common.*2 of chat"):
        join({"chat": chat, "other": other})


def test_other_tokens_and_other_segmentation_are_refused_field_by_field(tmp_path):
    base = store(tmp_path / "base", 0).snapshot()
    short = store(tmp_path / "short", 0, context=16).snapshot()
    with pytest.raises(
        ConfigError, match=r"hold other tokens: packing\.context: base has 32, short has 16\. Cache"
    ):
        join({"base": base, "short": short})
    cut = store(tmp_path / "cut", 0, segments=(320, 320)).snapshot()
    with pytest.raises(ConfigError, match=r"layout\.segment_rows: base has 256, cut has 320"):
        join({"base": base, "cut": cut})


def test_other_tokens_behind_equal_ids_are_found(tmp_path):
    base = store(tmp_path / "base", 0).snapshot()
    liar = store(tmp_path / "liar", 1, seed=1).snapshot()
    message = (
        r"segment u00000-0000: base and liar .* In context 0, position \d+, token_id is \d+ in"
    )
    with pytest.raises(DamagedError, match=message):
        join({"base": base, "liar": liar})
    assert set(TOKEN_COLUMNS) >= {"doc", "ctx", "pos"}


def test_labels_and_hooks_are_checked(tmp_path):
    snap = store(tmp_path / "s", 0).snapshot()
    with pytest.raises(ConfigError, match="at least two stores"):
        join({"a": snap})
    with pytest.raises(ConfigError, match=re.escape("'a:b' cannot name a store")):
        join({"a:b": snap, "c": snap})
    joined = join({"a": snap, "b": snap})
    with pytest.raises(HookMissingError, match=r"such as a:resid\.2\. There are: a:resid\.2, b:"):
        joined.resolve_hook("resid.2")
    with pytest.raises(HookMissingError, match=r"hook 'resid\.7' is not in"):
        joined.resolve_hook("b:resid.7")
    assert joined.hooks["b:resid.2"].name == "b:resid.2"


def test_a_damaged_chunk_of_either_store_stops_the_stream(pair, tmp_path):
    chat = store(tmp_path / "chat", 1, order="context")
    shard = next((chat.path / "segments").rglob("acts/resid.2/c/0/0"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    stream = Stream(
        join({"base": pair["base"], "chat": chat.snapshot()}),
        ["base:resid.2", "chat:resid.2"],
        batch_tokens=64,
    )
    message = r"store chat, segment u0000\d-0000, hook resid\.2, chunk 0"
    with pytest.raises(DamagedError, match=message):
        list(islice(stream, stream.batches_per_epoch))
