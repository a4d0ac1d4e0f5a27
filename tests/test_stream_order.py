"""The order of an epoch: keyed permutations, windows, and the shares of any number of ranks."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store

from saetrain.errors import ConfigError
from saetrain.stream import Stream
from saetrain.stream.mixing import advice, measure, predict
from saetrain.stream.order import feistel, shuffled, windows


@given(st.integers(1, 3000), st.text(max_size=8))
@settings(deadline=None)
def test_feistel_is_a_permutation_that_depends_on_its_key(n, key):
    everything = feistel(np.arange(n), n, key)
    assert sorted(everything) == list(range(n))
    some = np.arange(n)[:: max(1, n // 7)]
    assert np.array_equal(feistel(some, n, key), everything[some])  # elementwise
    if n > 20:
        assert not np.array_equal(everything, feistel(np.arange(n), n, key + "'"))


def test_feistel_refuses_numbers_outside():
    with pytest.raises(ValueError, match="below 5, got 5"):
        feistel(np.array([5]), 5, "k")


@pytest.mark.parametrize("permute", [lambda n, key: feistel(np.arange(n), n, key), shuffled])
def test_permutations_are_uniform(permute):
    """χ² of where each of 12 elements goes, over many keys: 11 x 11 degrees of freedom."""
    n, keys = 12, 3000
    seen = np.zeros((n, n))
    for k in range(keys):
        seen[np.arange(n), permute(n, f"{k}")] += 1
    chi2 = ((seen - keys / n) ** 2 / (keys / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_windows_cover_all_units_with_rows_once(eligible, window_rows, data):
    eligible = np.array(eligible, dtype=np.int32)
    found = list(windows(eligible, window_rows=window_rows, key="k"))
    units = [int(u) for w in found for u in w.units]
    assert sorted(units) == np.flatnonzero(eligible).tolist()
    assert [w.first for w in found] == np.cumsum([0, *(w.n_rows for w in found)])[:-1].tolist()
    assert all(w.n_rows >= window_rows for w in found[:-1])
    skip = data.draw(st.integers(0, int(eligible.sum())))
    later = list(windows(eligible, window_rows=window_rows, key="k", skip_rows=skip))
    assert [w.first for w in later] == [w.first for w in found if w.first + w.n_rows > skip]
    assert [w.key for w in later] == [w.key for w in found if w.first + w.n_rows > skip]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("s") / "store", chunk_bytes=1024).snapshot()


def rows(batch):
    t = batch.tokens
    return set(zip(batch.segment.tolist(), t.ctx.tolist(), t.pos.tolist(), strict=True))


def make(snapshot, **kw):
    return Stream(snapshot, ["resid.2"], **({"batch_tokens": 64, "window_rows": 200} | kw))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_number_of_ranks_shares_the_same_global_batches(snapshot, world):  # F115
    whole = make(snapshot)
    n = 2 * whole.batches_per_epoch + 3
    expected = [rows(b) for b in islice(whole, n)]
    read = 0
    parts = []
    for rank in range(world):
        stream = make(snapshot, rank=rank, world=world)
        parts.append([rows(b) for b in islice(stream, n)])
        read += stream.traffic.rows
    for step, one in enumerate(expected):
        shares = [part[step] for part in parts]
        assert set.union(*shares) == one
        assert sum(map(len, shares)) == len(one) == 64  # disjoint
    assert read == 64 * n


@given(st.integers(1, 20), st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 3, 8]))
@settings(deadline=None, max_examples=12)
def test_resume_with_another_number_of_ranks(snapshot, stop, before, after):  # F115
    whole = [rows(b) for b in islice(make(snapshot), stop + 6)]
    first = make(snapshot, world=before)
    for _ in islice(first, stop):
        pass
    resumed = []
    for rank in range(after):
        stream = make(snapshot, rank=rank, world=after)
        stream.load_state_dict(first.state_dict())
        resumed.append([rows(b) for b in islice(stream, 6)])
    assert [set.union(*step) for step in zip(*resumed, strict=True)] == whole[stop:]


def test_one_pass_is_shared_too(snapshot):
    whole = set.union(*(rows(b) for b in make(snapshot).one_pass()))
    parts = [
        [r for b in make(snapshot, rank=r, world=3).one_pass() for r in rows(b)] for r in range(3)
    ]
    assert set().union(*parts) == whole
    assert sum(map(len, parts)) == len(whole)


def test_runs_of_chunks_and_stored_order_keep_the_laws(snapshot):
    for kw in ({"run_chunks": 3}, {"shuffle": False}, {"run_chunks": 2, "window_rows": 1}):
        stream = make(snapshot, **kw)
        got = [r for b in islice(stream, stream.batches_per_epoch) for r in rows(b)]
        assert len(set(got)) == len(got) == stream.batches_per_epoch * 64
    in_order = make(snapshot, shuffle=False, window_rows=1)
    segments = [int(b.segment.max()) for b in islice(in_order, in_order.batches_per_epoch)]
    assert segments == sorted(segments)


@pytest.mark.parametrize("order", ["permuted", "context"])
@pytest.mark.parametrize("chunk", [1, 4])  # rows of a chunk over tokens of a context, about
def test_kappa_is_what_the_formula_says(tmp_path, order, chunk):  # F115
    store = make_store(
        tmp_path / order,
        segments=(4096,) * 6,
        context=64,
        order=order,
        chunk_bytes=64 * chunk * 32,
        doc_len=1 << 20,
    )
    stream = Stream(
        store.snapshot(),
        ["resid.2"],
        batch_tokens=256,
        window_rows=2048,
        split="all",
        skip_special=False,
    )
    found = measure(stream, batches=80)
    assert abs(found.kappa - found.predicted) < 3 * found.error + 0.02 * found.predicted
    # A shuffle of all rows, by its own formula.
    assert found.ideal == pytest.approx(255 * 63 / (6 * 4096 - 1))
    assert found.documents <= 6
    if order == "context":
        assert "window_rows=" in advice(found, stream)
    else:
        assert found.kappa < 2 * found.ideal
        assert (advice(found, stream) is None) == (chunk == 1)


def test_kappa_without_a_window_is_the_worst(tmp_path):
    store = make_store(tmp_path / "s", segments=(2048,), context=64, order="context")
    common = {"split": "all", "skip_special": False, "batch_tokens": 64}
    tight = Stream(store.snapshot(), ["resid.2"], window_rows=128, **common)
    wide = Stream(store.snapshot(), ["resid.2"], window_rows=2048, **common)
    assert predict(tight) > 10 * predict(wide)
    assert measure(tight).kappa > 10 * measure(wide).kappa


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1, got 0"),
        ({"window_rows": 1 << 24}, "window_rows=16,777,216: expected at most"),
        ({"rank": 2, "world": 2}, "expected 0 <= rank < world=2, got 2"),
        ({"split": "test"}, "split=test: expected one of train, held_out, all"),
        ({"held_out_fraction": 1.5}, "held_out_fraction=1.5: expected 0 <= fraction < 1"),
        ({"run_chunks": 0}, "run_chunks: expected at least 1"),
    ],
)
def test_settings_that_cannot_work(snapshot, setting, message):
    with pytest.raises(ConfigError, match=message):
        make(snapshot, **setting)
