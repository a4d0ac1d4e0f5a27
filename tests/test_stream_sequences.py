"""Whole contexts with masks, from both orders of rows, against tables sorted by brute force."""

import functools
import json
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store
from test_stream_join import named

from actcache.store import DamagedError
from actcache.store.split import held_out
from saetrain.errors import ConfigError
from saetrain.stream import SequenceStream, join

HOOKS = {"resid.2": 16, "mlp.1": 6}
T = 16
FRACTION = 0.2


def store(path, model=0, **kw):
    defaults = {
        "hooks": HOOKS,
        "segments": (128, 128, 86),  # the last context is short, 6 of 16
        "context": T,
        "chunk_bytes": 300,
        "acts": functools.partial(named, model=model),
        "host": {"weights": f"w{model}"},
    }
    return make_store(path, **(defaults | kw))


@pytest.fixture(scope="module", params=["permuted", "context", "int8", "bfloat16"])
def snapshot(request, tmp_path_factory):
    kw = {
        "permuted": {"dtype": "float32"},
        "context": {"dtype": "float32", "order": "context"},
        "int8": {"dtype": "int8"},
        "bfloat16": {"order": "context"},
    }[request.param]
    return store(tmp_path_factory.mktemp("seq") / "store", **kw).snapshot()


def contexts(snapshot):
    """{(segment, ctx): [(pos, token, doc, flags, {hook: row})] by position}, from the segments."""
    found = {}
    for s, segment in enumerate(snapshot.segments):
        t = segment.tokens()
        acts = {h: segment.acts(h).read().astype(np.float32) for h in snapshot.hooks}
        for i in np.lexsort((t.pos, t.ctx)).tolist():
            row = (int(t.pos[i]), int(t.token_id[i]), t.doc[i], int(t.flags[i]))
            rows = {h: x[i] for h, x in acts.items()}
            found.setdefault((s, int(t.ctx[i])), []).append((*row, rows))
    return found


def expected(rows, hook, d, split, skip_special=True):
    """(acts, mask, present, token ids) of a context by the rules in the module's header."""
    acts, ids = np.zeros((T, d), np.float32), np.zeros(T, np.uint32)
    mask, present = np.zeros(T, bool), np.zeros(T, bool)
    for pos, token, doc, flags, x in rows:
        held = bool(held_out(np.array([doc], np.uint64), FRACTION)[0])
        if held and split == "train":
            continue
        present[pos], ids[pos], acts[pos] = True, token, x[hook]
        mask[pos] = (split == "all" or held == (split == "held_out")) and not (
            skip_special and flags & 1
        )
    return acts, mask, present, ids


def names(batch):
    return list(zip(batch.segment.tolist(), batch.ctx.tolist(), strict=True))


def stream(snapshot, hooks=("resid.2", "mlp.1"), **kw):
    defaults = {"batch_sequences": 3, "window_rows": 80, "held_out_fraction": FRACTION}
    return SequenceStream(snapshot, hooks, **(defaults | kw))


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
@pytest.mark.parametrize("skip_special", [True, False])
def test_contexts_are_put_together_and_masked_by_brute_force(  # F59 rows for Lorsa, F67 2D
    snapshot, split, skip_special
):
    truth = contexts(snapshot)
    wanted = {
        (key, hook): expected(rows, hook, HOOKS[hook], split, skip_special)
        for key, rows in truth.items()
        for hook in HOOKS
    }
    eligible = {key for (key, _), (_, mask, _, _) in wanted.items() if mask.any()}
    s = stream(snapshot, split=split, skip_special=skip_special)
    seen = []
    for batch in (*s.one_pass(), *islice(s, s.batches_per_epoch)):
        seen += names(batch)
        for i, key in enumerate(names(batch)):
            for hook in HOOKS:
                acts, mask, present, ids = wanted[key, hook]
                np.testing.assert_allclose(batch.acts[hook][i].numpy(), acts, atol=1e-6)
                assert np.array_equal(batch.mask[i].numpy(), mask)
                assert np.array_equal(batch.present[i].numpy(), present)
                assert np.array_equal(batch.tokens.token_id[i], ids)
    assert sorted(seen[: len(eligible)]) == sorted(eligible)  # one pass
    assert s.n_sequences == len(eligible)
    assert s.n_rows == sum(int(wanted[key, "resid.2"][1].sum()) for key in eligible)
    epoch = seen[len(eligible) :]
    assert len(set(epoch)) == len(epoch) == s.n_sequences // 3 * 3


def test_no_held_out_activation_leaves_a_train_stream(snapshot):
    """Values name their rows, so a leak through memory that is used again would show."""
    held = set()
    for rows in contexts(snapshot).values():
        for _, _, doc, _, x in rows:
            if held_out(np.array([doc], np.uint64), FRACTION)[0]:
                held.add(x["resid.2"].tobytes())
    assert held
    s = stream(snapshot, ["resid.2"])
    partial = 0
    for batch in islice(s, 3 * s.batches_per_epoch):
        partial += int((~batch.present).any(dim=1).sum())
        rows = batch.acts["resid.2"].reshape(-1, 16).numpy()
        assert held.isdisjoint(r.tobytes() for r in rows)
    assert partial > 10  # contexts with a held-out document were used, without it


# F115
@settings(deadline=None, max_examples=15)
@given(
    st.integers(0, 20),
    st.sampled_from([1, 2, 3, 8]),
    st.integers(1, 400),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_ranks_and_resumes_share_the_global_batches(snapshot, stop, world, window, size, seed):
    def fresh(**kw):
        return stream(snapshot, window_rows=window, batch_sequences=size, seed=seed, **kw)

    whole = list(islice(fresh(), 24))
    part = fresh()
    list(islice(part, stop))
    state = json.loads(json.dumps(part.state_dict()))
    ranks = [fresh(rank=r, world=world) for r in range(world)]
    for rank in ranks:
        rank.load_state_dict(state)
    for step, shares in enumerate(islice(zip(*ranks, strict=True), 24 - stop), start=stop):
        sizes = [len(s) for s in shares]
        assert sum(sizes) == size
        assert max(sizes) - min(sizes) <= 1  # equal shares
        found = {n: x for s in shares for n, x in zip(names(s), s.acts["resid.2"], strict=True)}
        wanted = whole[step]
        assert found.keys() == set(names(wanted))
        assert all(s.step == step and s.epoch == wanted.epoch for s in shares)
        for n, x in zip(names(wanted), wanted.acts["resid.2"], strict=True):
            assert torch.equal(found[n], x)


def test_epochs_and_seeds_differ_and_repeat(snapshot):
    def epoch(number, **kw):
        s = stream(snapshot, ["resid.2"], **kw)
        n = s.batches_per_epoch
        return [name for b in islice(s, number * n, (number + 1) * n) for name in names(b)]

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)


def test_both_orders_of_a_store_give_the_same_contexts(tmp_path):
    """A permuted store and its joined partner in context order: sorted alike."""
    a = store(tmp_path / "a", dtype="float32").snapshot()
    b = store(tmp_path / "b", 1, dtype="float32", order="context", chunk_bytes=500).snapshot()
    truth = contexts(b)
    s = stream(join({"a": a, "b": b}), ["a:resid.2", "b:resid.2"], split="all")
    for batch in islice(s, s.batches_per_epoch):
        for i, key in enumerate(names(batch)):
            acts = expected(truth[key], "resid.2", 16, "all")[0]
            assert np.array_equal(batch.acts["b:resid.2"][i].numpy(), acts)
            assert not np.array_equal(batch.acts["a:resid.2"][i].numpy(), acts)


def test_memory_is_a_window_whatever_the_store(tmp_path, monkeypatch):
    from saetrain.stream import loader as loading

    sizes = {}
    new = loading._Ring._new
    monkeypatch.setattr(
        loading._Ring, "_new", lambda ring, n: sizes[count].append(n) or new(ring, n)
    )
    for count in (3, 12):
        sizes[count] = []
        snap = store(tmp_path / str(count), segments=(128,) * count, order="context").snapshot()
        s = stream(snap, ["resid.2"], split="all")
        for _ in islice(s, s.batches_per_epoch):
            pass
    assert sum(sizes[12]) <= sum(sizes[3]) + max(sizes[3])
    assert len(sizes[12]) <= 4


def test_threads_change_nothing(snapshot):
    one, four = (stream(snapshot, threads=n, window_rows=300) for n in (1, 4))
    for a, b in islice(zip(one, four, strict=True), 12):
        assert names(a) == names(b)
        assert all(torch.equal(a.acts[h], b.acts[h]) for h in HOOKS)


def test_what_cannot_work_is_said(snapshot):
    with pytest.raises(ConfigError, match="give batch_sequences instead of batch_tokens"):
        stream(snapshot, batch_tokens=64)
    with pytest.raises(ConfigError, match="max_norm is for streams of rows"):
        stream(snapshot, max_norm=3.0)
    with pytest.raises(ConfigError, match="batch_sequences: expected at least 1, got 0"):
        stream(snapshot, batch_sequences=0)
    with pytest.raises(ConfigError, match=r"batch_sequences=999 is more than the \d+ contexts"):
        next(iter(stream(snapshot, batch_sequences=999)))
    state = stream(snapshot, batch_sequences=2).state_dict()
    with pytest.raises(ConfigError, match="batch_sequences: 2 then, 3 now"):
        stream(snapshot).load_state_dict(state)


def test_positions_beyond_the_context_are_damage(tmp_path, monkeypatch):
    snap = store(tmp_path / "s").snapshot()
    monkeypatch.setattr(type(snap), "context", 8)
    with pytest.raises(DamagedError, match="beyond the store's context of 8"):
        next(iter(stream(snap, batch_sequences=1)))
