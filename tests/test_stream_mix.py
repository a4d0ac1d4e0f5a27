"""Weighted mixes: the right rows of each store in every batch, for any ranks, after any resume."""

import json
from collections import Counter
from fractions import Fraction
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stores import make_store
from test_stream_join import named

from saetrain.errors import ConfigError
from saetrain.stream import Mix, SequenceStream, Stream
from saetrain.stream.apportion import Apportion, split
from saetrain.stream.mixing import measure
from saetrain.stream.told import Told

OPTIONS = {"batch_tokens": 40, "window_rows": 100}


def shares(numbers):
    return sorted((Fraction(n, sum(numbers)) for n in numbers), reverse=True)


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=9), st.integers(0, 10**12))
def test_rows_are_apportioned_within_a_row_or_two_and_never_taken_back(numbers, n):
    weights = shares(numbers)
    now, then = split(weights, n), split(weights, n + 1)
    assert sum(now) == n
    assert sorted(b - a for a, b in zip(now, then, strict=True)) == [0] * (len(now) - 1) + [1]
    limit = {2: 0.5, 3: 1.0}.get(len(weights), 2.5)
    assert all(abs(c - w * n) <= limit for c, w in zip(now, weights, strict=True))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 60)), min_size=2, max_size=5))
def test_stores_that_end_leave_their_share_to_the_others(parts):
    weights, rows = [w for w, _ in parts], [n for _, n in parts]
    exact = [Fraction(w, sum(weights)) for w in weights]
    counts = Apportion(exact, rows)
    steps = [counts(n) for n in range(counts.n_rows + 1)]
    assert steps[0] == [0] * len(rows)
    assert steps[-1] == rows  # everything, exactly
    for a, b in pairwise(steps):
        assert sorted(y - x for x, y in zip(a, b, strict=True)) == [0] * (len(rows) - 1) + [1]
    order = sorted(range(len(rows)), key=lambda i: (-exact[i], i))
    for n in range(counts.together + 1):
        plain = split([exact[i] for i in order], n)
        assert [steps[n][i] for i in order] == plain


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """Three stores of the same hooks: other sizes, types, orders and models."""
    folder = tmp_path_factory.mktemp("mix")
    kinds = {
        "web": {"segments": (256, 256, 128)},
        "code": {"segments": (256,), "dtype": "float32", "order": "context"},
        "chat": {"segments": (128, 96), "dtype": "int8"},
    }
    return {
        name: make_store(
            folder / name,
            hooks={"resid.2": 8, "mlp.1": 6},
            acts=lambda hook, rng, t, d, model=i: named(hook, rng, t, d, model=model) + model,
            host={"weights": name},
            seed=i,
            **kw,
        ).snapshot()
        for i, (name, kw) in enumerate(kinds.items())
    }


def mix(snapshots, weights=None, hooks=("resid.2",), **kw):
    weights = weights or {"web": 0.6, "code": 0.3, "chat": 0.1}
    streams = [(Stream(snapshots[n], hooks, **(OPTIONS | kw)), w) for n, w in weights.items()]
    return Mix(streams, names=list(weights))


def names(mixed, batch):
    """(store, segment in it, ctx, pos) of each row."""
    store = np.searchsorted(mixed._first_segment, batch.segment, side="right") - 1
    inside = batch.segment - mixed._first_segment[store]
    t = batch.tokens
    return list(zip(store.tolist(), inside.tolist(), t.ctx.tolist(), t.pos.tolist(), strict=True))


def all_rows(snapshots):
    """{(store, segment, ctx, pos): {hook: row}} straight from the segments."""
    found = {}
    for k, snapshot in enumerate(snapshots.values()):
        for s, segment in enumerate(snapshot.segments):
            t = segment.tokens()
            acts = {h: segment.acts(h).read().astype(np.float32) for h in snapshot.hooks}
            for i in range(len(t)):
                row = {h: x[i] for h, x in acts.items()}
                found[k, s, int(t.ctx[i]), int(t.pos[i])] = row
    return found


def test_batches_hold_each_stores_rows_by_weight_with_their_activations(snapshots):  # F67
    truth = all_rows(snapshots)
    mixed = mix(snapshots, hooks=("resid.2", "mlp.1"))
    seen, total = [], Counter()
    for step, batch in enumerate(islice(mixed, mixed.batches_per_epoch), start=1):
        rows = names(mixed, batch)
        seen += rows
        total.update(r[0] for r in rows)
        assert len(batch) == len(rows) == 40
        assert all(abs(total[i] - w * 40 * step) <= 1 for i, w in enumerate((0.6, 0.3, 0.1)))
        for i, row in enumerate(rows):
            for hook in mixed.hooks:
                np.testing.assert_allclose(batch.acts[hook][i], truth[row][hook], atol=1e-6)
    assert len(set(seen)) == len(seen)  # no row twice in an epoch
    assert mixed.batches_per_epoch == step
    left = [s.n_rows - n for s, n in zip(mixed.streams, mixed.counts(step), strict=True)]
    assert min(left) >= 0
    assert min(a - 40 * w for a, w in zip(left, (0.6, 0.3, 0.1), strict=True)) < 1  # one is used up


def test_one_pass_has_every_row_of_every_store_once(snapshots):
    mixed = mix(snapshots, split="held_out", held_out_fraction=0.4)
    batches = list(mixed.one_pass())
    rows = [r for b in batches for r in names(mixed, b)]
    single = [
        (i, *r[1:])
        for i, s in enumerate(mixed.streams)
        for b in s.one_pass()
        for r in zip(
            [0] * len(b),
            b.segment.tolist(),
            b.tokens.ctx.tolist(),
            b.tokens.pos.tolist(),
            strict=True,
        )
    ]
    assert sorted(rows) == sorted(single)
    assert len(rows) == mixed.n_rows
    assert [len(b) for b in batches[:-1]] == [40] * (len(batches) - 1)
    first = Counter(r[0] for r in rows[:40])
    assert [first[i] for i in range(3)] == [24, 12, 4]


# F115
@settings(deadline=None, max_examples=15)
@given(
    st.integers(0, 20),
    st.sampled_from([1, 2, 3, 8]),
    st.lists(st.integers(1, 20), min_size=3, max_size=3),
    st.integers(5, 60),
)
def test_ranks_and_resumes_share_the_global_batches(snapshots, stop, world, numbers, size):
    weights = dict(zip(snapshots, numbers, strict=True))

    def fresh(**kw):
        return mix(snapshots, weights, batch_tokens=size, **kw)

    plain = fresh()
    assume(plain.batches_per_epoch and all(plain.counts(plain.batches_per_epoch)))
    expected = list(islice(plain, 25))
    part = fresh()
    list(islice(part, stop))
    state = json.loads(json.dumps(part.state_dict()))
    ranks = [fresh(rank=r, world=world) for r in range(world)]
    for rank in ranks:
        rank.load_state_dict(state)
    for step, parts in enumerate(islice(zip(*ranks, strict=True), 25 - stop), start=stop):
        found = {
            n: x for b in parts for n, x in zip(names(plain, b), b.acts["resid.2"], strict=True)
        }
        wanted = expected[step]
        assert sum(map(len, parts)) == len(found) == len(wanted) == size
        assert all((b.step, b.epoch) == (wanted.step, wanted.epoch) for b in parts)
        for n, x in zip(names(plain, wanted), wanted.acts["resid.2"], strict=True):
            assert torch.equal(found[n], x)


def test_epochs_differ(snapshots):
    mixed = mix(snapshots)
    n = mixed.batches_per_epoch
    first, second = ([b for _, b in zip(range(n), mixed, strict=False)] for _ in range(2))
    a, b = ([r for x in e for r in names(mixed, x)] for e in (first, second))
    assert a != b
    assert [x.epoch for x in (first[0], first[-1], second[0], second[-1])] == [0, 0, 1, 1]


def test_statistics_are_those_of_the_weighted_mixture(snapshots):
    """Against weighted moments of the rows themselves."""
    mixed = mix(snapshots)
    space = mixed.space("resid.2")
    x, w = [], []
    for snapshot, weight in zip(snapshots.values(), (0.6, 0.3, 0.1), strict=True):
        rows = np.concatenate(
            [
                s.acts("resid.2").read().astype(np.float64)[(s.column("flags") & 1) == 0]
                for s in snapshot.segments
            ]
        )
        x.append(rows)
        w.append(np.full(len(rows), weight / len(rows)))
    rows, weight = np.concatenate(x), np.concatenate(w)
    mean = weight @ rows
    np.testing.assert_allclose(space.mean.numpy(), mean, rtol=1e-3, atol=1e-5)
    assert space.mean_norm == pytest.approx(weight @ np.linalg.norm(rows, axis=1), rel=1e-3)
    assert space.variance == pytest.approx(weight @ ((rows - mean) ** 2).sum(1), rel=1e-3)
    assert space.d == 8


def test_traffic_and_state_are_of_all_stores(snapshots):
    mixed = mix(snapshots)
    list(islice(mixed, 3))
    assert mixed.traffic.rows >= 120
    assert mixed.traffic.bytes == sum(s.traffic.bytes for s in mixed.streams) > 0
    ids = [s["store_id"] for s in mixed.state_dict()["streams"]]
    assert ids == [s.store_id for s in snapshots.values()]
    assert mixed.state_dict()["step_in_epoch"] == 3


def test_what_cannot_be_mixed_is_refused_by_name(snapshots, tmp_path):
    web, code = snapshots["web"], snapshots["code"]

    def one(snapshot, hooks=("resid.2",), **kw):
        return Stream(snapshot, hooks, **(OPTIONS | kw))

    wide = make_store(tmp_path / "wide", hooks={"resid.2": 12}).snapshot()
    pairs = {
        r"hook resid\.2 has 8 channels in web and 12 in wide": [one(web), one(wide)],
        r"web streams resid\.2, wide mlp\.1; a mix needs": [one(web), one(code, ["mlp.1"])],
        "batch_tokens of web is 40, of wide 41": [one(web), one(code, batch_tokens=41)],
        "got a SequenceStream": [one(web), SequenceStream(code, ["resid.2"], batch_sequences=1)],
    }
    pairs["got a SequenceStream"][0].batch_tokens = 32
    for message, streams in pairs.items():
        with pytest.raises(ConfigError, match=message):
            Mix([(s, 0.5) for s in streams], names=["web", "wide"])
    with pytest.raises(ConfigError, match="weight of code must be more than 0, got 0"):
        Mix([(one(web), 1.0), (one(code), 0.0)], names=["web", "code"])
    with pytest.raises(ConfigError, match="at least two streams, got 1"):
        Mix([(one(web), 1.0)])
    with pytest.raises(ConfigError, match=r"There are web \d+ rows \(weight 1\); code \d+ rows"):
        next(iter(Mix([(one(web), 1.0), (one(code), 1e-6)], names=["web", "code"])))


def test_a_changed_mix_is_not_resumed(snapshots):
    state = mix(snapshots).state_dict()
    other = mix(snapshots, {"web": 0.5, "code": 0.4, "chat": 0.1})
    with pytest.raises(ConfigError, match=r"weights: .* then, .* now"):
        other.load_state_dict(state)
    with pytest.raises(ConfigError, match="seed of web: 0 then, 4 now"):
        mix(snapshots, seed=4).load_state_dict(state)
    swapped = mix(snapshots, {"code": 0.6, "web": 0.3, "chat": 0.1})
    with pytest.raises(ConfigError, match="store_id of code: sha256:"):
        swapped.load_state_dict(state)


def test_kappa_of_a_mix_is_measured_and_predicted(tmp_path):  # F42
    """Against a count over the batches themselves."""
    wide = {"hooks": {"resid.2": 4}, "segments": (4096,) * 3, "chunk_bytes": 32 * 4 * 2}
    stores = {
        "a": make_store(tmp_path / "a", **wide, seed=1).snapshot(),
        "b": make_store(tmp_path / "b", **wide, seed=2, order="context").snapshot(),
    }
    mixed = mix(stores, {"a": 3, "b": 1}, batch_tokens=512, window_rows=2048)
    found = measure(mixed, batches=16)
    others, documents = [], []
    for batch in islice(mixed, 16):
        rows = list(zip(batch.segment.tolist(), batch.tokens.ctx.tolist(), strict=True))
        count = Counter(rows)
        others.append(np.mean([count[r] - 1 for r in rows]))
        documents.append(len(np.unique(batch.tokens.doc)))
    assert found.kappa == pytest.approx(np.mean(others))
    assert found.documents == pytest.approx(np.mean(documents))
    assert abs(found.predicted - found.kappa) < 3 * found.error + 0.02 * found.predicted
    context = stores["a"].context
    ideal = [
        w * (w * 512 - 1) * (context - 1) / (s.n_rows - 1)
        for s, w in zip(mixed.streams, (0.75, 0.25), strict=True)
    ]
    assert found.ideal == pytest.approx(sum(ideal))
    for rows, warned in ((2048, False), (600, True)):
        said: list[str] = []
        tight = mix(stores, {"a": 3, "b": 1}, batch_tokens=512, window_rows=rows)
        Told(tight, said.append).begin()
        assert said[0].startswith("mixing: κ = ")
        assert any("stream.window_rows=" in line for line in said) == warned
