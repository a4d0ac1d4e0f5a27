"""The stream: every eligible row once an epoch, in an order that resumes anywhere."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store

from actcache.store import DamagedError, HookMissingError
from actcache.store.split import held_out
from saetrain.errors import ConfigError
from saetrain.stream import Stream

HOOKS = {"resid.2": 16, "mlp.1": 24}  # other widths, so other chunk sizes


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("s") / "store", hooks=HOOKS).snapshot()


def stream(snapshot, hooks=("resid.2",), **kw):
    return Stream(snapshot, hooks, **({"batch_tokens": 64, "window_rows": 300} | kw))


def names(batch):
    """A row is (segment, ctx, pos)."""
    t = batch.tokens
    return list(zip(batch.segment.tolist(), t.ctx.tolist(), t.pos.tolist(), strict=True))


def all_rows(snapshot):
    """{(segment, ctx, pos): (doc, flags, {hook: row})} straight from the segments."""
    found = {}
    for s, segment in enumerate(snapshot.segments):
        t = segment.tokens()
        acts = {h: segment.acts(h).read().astype(np.float32) for h in HOOKS}
        for i in range(len(t)):
            key = (s, int(t.ctx[i]), int(t.pos[i]))
            found[key] = (t.doc[i], t.flags[i], {h: x[i] for h, x in acts.items()})
    return found


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
@pytest.mark.parametrize("skip_special", [True, False])
def test_eligible_rows_are_those_of_the_split(snapshot, split, skip_special):
    fraction = 0.3
    expected = set()
    for key, (doc, flags, _) in all_rows(snapshot).items():
        held = bool(held_out(np.array([doc], np.uint64), fraction)[0])
        if split != "all" and held != (split == "held_out"):
            continue
        if not (skip_special and flags & 1):
            expected.add(key)
    s = stream(
        snapshot,
        split=split,
        skip_special=skip_special,
        held_out_fraction=fraction,
        batch_tokens=32,
    )
    rows = [r for b in s.one_pass() for r in names(b)]
    assert len(rows) == len(set(rows)) == s.n_rows == len(expected)
    assert set(rows) == expected


def test_rows_carry_their_own_activations_on_every_hook(snapshot):
    truth = all_rows(snapshot)
    s = stream(snapshot, hooks=("resid.2", "blocks.1.hook_mlp_out"))
    for batch in (*islice(s, 12), *s.one_pass()):
        for i, key in enumerate(names(batch)):
            for hook in HOOKS:
                assert np.array_equal(batch.acts[hook][i].numpy(), truth[key][2][hook])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 200), st.integers(1, 2000), st.integers(0, 5))
def test_an_epoch_has_every_row_at_most_once(snapshot, batch_tokens, window_rows, seed):
    s = stream(snapshot, batch_tokens=batch_tokens, window_rows=window_rows, seed=seed)
    first = list(islice(s, s.batches_per_epoch))
    rows = [r for b in first for r in names(b)]
    assert len(set(rows)) == len(rows) == s.batches_per_epoch * batch_tokens
    assert s.n_rows - len(rows) < batch_tokens  # what is left over
    assert [b.step for b in first] == list(range(len(first)))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 60), st.sampled_from([1, 100, 300, 5000]))
def test_resume_anywhere_equals_uninterrupted(snapshot, stop, window_rows):
    whole = stream(snapshot, window_rows=window_rows)
    expected = list(islice(whole, 64))
    part = stream(snapshot, window_rows=window_rows)
    for _ in islice(part, stop):
        pass
    resumed = stream(snapshot, window_rows=window_rows)
    resumed.load_state_dict(part.state_dict())
    for batch in islice(resumed, 64 - stop):
        assert names(batch) == names(expected[batch.step])
        assert torch.equal(batch.acts["resid.2"], expected[batch.step].acts["resid.2"])
        assert batch.epoch == expected[batch.step].epoch


def test_same_seed_same_order_other_seed_and_epoch_another(snapshot):
    def rows(epoch, **kw):
        s = stream(snapshot, **kw)
        batches = islice(s, epoch * s.batches_per_epoch, (epoch + 1) * s.batches_per_epoch)
        return [r for b in batches for r in names(b)]

    assert rows(0) == rows(0)
    assert rows(0) != rows(0, seed=1)
    assert rows(0) != rows(1)
    assert rows(0) != sorted(rows(0))


def test_a_damaged_chunk_stops_the_stream_by_name(tmp_path):
    store = make_store(tmp_path / "s")
    shard = next((store.path / "segments").rglob("acts/resid.2/c/0/0"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    s = stream(store.snapshot())
    with pytest.raises(DamagedError, match=r"segment u0000\d-0000, hook resid\.2, chunk 0"):
        list(islice(s, s.batches_per_epoch))


def test_dtype_and_space(snapshot):
    batch = next(iter(stream(snapshot, dtype=torch.bfloat16)))
    assert batch.acts["resid.2"].dtype == torch.bfloat16
    space = stream(snapshot).space("resid.2")
    stats = snapshot.stats("resid.2")
    assert (space.d, space.variance) == (16, pytest.approx(stats.variance))
    assert space.mean.dtype == torch.float32


def test_a_store_that_grows_changes_nothing_for_a_snapshot(tmp_path):
    store = make_store(tmp_path / "s", segments=(128, 128))
    s = stream(store.snapshot("1"))
    before = [names(b) for b in islice(s, 3)]
    (store.path / "snapshots" / "2.json").write_text("{}")  # something newer, whatever it is
    again = stream(store.snapshot("1"))
    assert [names(b) for b in islice(again, 3)] == before


def test_what_cannot_work_is_said(snapshot):
    with pytest.raises(HookMissingError, match="It has: mlp"):
        stream(snapshot, hooks=("resid.9",))
    with pytest.raises(ConfigError, match="batch_tokens=9,999 is more than the"):
        next(iter(stream(snapshot, batch_tokens=9999)))
    state = stream(snapshot, seed=3).state_dict()
    with pytest.raises(ConfigError, match="seed: 3 then, 0 now"):
        stream(snapshot).load_state_dict(state)
