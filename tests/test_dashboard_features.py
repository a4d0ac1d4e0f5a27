"""Per-latent statistics and top contexts against brute force over the whole store."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import make_store

from actcache.store import FLAG_SPECIAL, HookMissingError, Snapshot, TokenTable
from actcache.store.split import held_out
from saetrain.artefact import InferenceSAE
from saetrain.codes import SparseCodes, dense
from saetrain.dashboard import features as features_module
from saetrain.dashboard.features import choose, collect, token_texts
from saetrain.dashboard.state import FeatureState
from saetrain.errors import ConfigError, TrainingError

D, F, HOOK = 8, 24, "resid.2"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Small whole numbers: sums are exact, so batches cannot matter, and ties abound."""
    path = tmp_path_factory.mktemp("dashboard") / "store"

    def acts(hook, rng, tokens, d):
        return rng.integers(-2, 3, (len(tokens), d))

    store = make_store(path, hooks={HOOK: D}, segments=(512, 320, 256), acts=acts, chunk_bytes=1000)
    return store.snapshot()


def sae(kind: str) -> InferenceSAE:
    g = torch.Generator().manual_seed(1)
    W_enc = torch.randint(-2, 3, (D, F), generator=g).float()
    b_enc = torch.randint(-9, 0, (F,), generator=g).float()
    b_enc[3] = -1000.0  # a dead latent
    return InferenceSAE(
        W_enc,
        b_enc,
        W_enc.T.contiguous(),
        torch.zeros(D),
        activation=kind,
        k=5 if kind == "topk" else None,
        hooks_in=(HOOK,),
        hooks_out=(HOOK,),
    )


def brute(snapshot: Snapshot, kind: str, split: str, fraction: float) -> list[dict]:
    """Every counted token of the store as {segment, ctx, pos, codes}."""
    rows = []
    for s, segment in enumerate(snapshot.segments):
        t = segment.tokens()
        x = torch.from_numpy(segment.acts(HOOK).read().astype(np.float32))
        codes = dense(sae(kind).encode(x)).numpy()
        inside = held_out(t.doc, fraction) == (split == "held_out")
        for i in range(len(t)):
            if not t.flags[i] & FLAG_SPECIAL and (split == "all" or inside[i]):
                where = {"segment": s, "ctx": int(t.ctx[i]), "pos": int(t.pos[i])}
                rows.append({**where, "codes": codes[i]})
    return rows


def brute_top(rows: list[dict], feature: int, k: int) -> list[tuple]:
    """(segment, ctx, pos, value) of the k best contexts, the best token of each."""
    best: dict[tuple, tuple] = {}
    for r in rows:
        value, place = float(r["codes"][feature]), (r["segment"], r["ctx"])
        if value > 0:
            candidate = (-value, *place, r["pos"])
            best[place] = min(best.get(place, candidate), candidate)
    return [(s, c, p, -v) for v, s, c, p in sorted(best.values())[:k]]


# F74: the top examples are the true maxima over the store.
@pytest.mark.parametrize("kind", ["topk", "relu"])
@pytest.mark.parametrize(("split", "k"), [("held_out", 3), ("train", 1), ("all", 40)])
def test_equals_brute_force(snapshot, monkeypatch, kind: str, split: str, k: int) -> None:
    monkeypatch.setattr(features_module, "_BATCH_ROWS", 50)  # batches end inside inner chunks
    table = collect(sae(kind), snapshot, HOOK, split=split, held_out_fraction=0.4, top_contexts=k)
    rows = brute(snapshot, kind, split, 0.4)
    codes = np.stack([r["codes"] for r in rows])
    assert table.n_tokens == len(rows)
    assert table.n_contexts == len({(r["segment"], r["ctx"]) for r in rows})
    np.testing.assert_array_equal(table.fires_F, (codes > 0).sum(0))
    np.testing.assert_array_equal(table.sum_F, codes.sum(0, dtype=np.float64))
    np.testing.assert_array_equal(table.max_F, codes.max(0))
    np.testing.assert_array_equal(table.density_F, (codes > 0).mean(0))
    assert table.n_dead == (codes.max(0) == 0).sum() >= 1
    assert table.log10_density_F[3] == -np.inf
    for f in range(F):
        found = table.best.of(f)
        columns = (found.segment, found.ctx, found.pos, found.value)
        assert list(zip(*(c.tolist() for c in columns), strict=True)) == brute_top(rows, f, k)
        assert table.contexts_F[f] == len(brute_top(rows, f, len(rows)))


def test_ties_are_there_and_break_by_place(snapshot) -> None:
    best = collect(sae("relu"), snapshot, HOOK, split="all", top_contexts=10).best
    order = list(zip(best.feature, -best.value, best.segment, best.ctx, strict=True))
    assert order == sorted(order)
    assert len({o[:2] for o in order}) < len(order) / 2


def test_examples_restore_the_context_in_reading_order(snapshot) -> None:
    table = collect(sae("topk"), snapshot, HOOK, held_out_fraction=0.4, features=[7, 0, 3])
    assert list(table.examples) == [7, 0, 3]
    assert table.examples[3] == []  # the dead one
    assert "by number" in table.rule
    for f in (7, 0):
        peaks = table.best.of(f)
        assert len(table.examples[f]) == len(peaks) == 8
        for i, example in enumerate(table.examples[f]):
            segment = snapshot.segments[example.segment]
            t, x = segment.tokens(), segment.acts(HOOK).read().astype(np.float32)
            rows = np.flatnonzero(t.ctx == example.ctx)
            rows = rows[np.argsort(t.pos[rows])]
            codes = dense(sae("topk").encode(torch.from_numpy(x)))[:, f].numpy()
            np.testing.assert_array_equal(example.token_id, t.token_id[rows])
            np.testing.assert_array_equal(example.pos, np.arange(len(rows)))
            np.testing.assert_array_equal(example.acts, codes[rows])
            inside = held_out(t.doc, 0.4) & ((t.flags & FLAG_SPECIAL) == 0)
            np.testing.assert_array_equal(example.counted, inside[rows])
            counted = np.where(example.counted, example.acts, -1)
            assert example.peak == counted.argmax() == peaks.pos[i]
            assert example.value == counted.max() == peaks.value[i]


def test_max_rows_takes_whole_contexts_from_the_start(snapshot) -> None:
    table = collect(sae("topk"), snapshot, HOOK, split="all", max_rows=600)
    rows = brute(snapshot, "topk", "all", 0.0)
    sizes: dict[tuple, int] = {}
    taken = 0
    for place in sorted({(r["segment"], r["ctx"]) for r in rows}):
        if taken < 600:
            sizes[place] = sum((r["segment"], r["ctx"]) == place for r in rows)
            taken += sizes[place]
    assert {s for s, _ in sizes} == {0, 1}
    assert table.n_tokens == taken >= 600
    assert table.n_contexts == len(sizes)
    inside = [r["codes"] for r in rows if (r["segment"], r["ctx"]) in sizes]
    np.testing.assert_array_equal(table.fires_F, (np.stack(inside) > 0).sum(0))
    for limit, n in ((taken, taken), (taken + 1, taken + 31)):  # a context has 30 or 31 of 32
        more = collect(sae("topk"), snapshot, HOOK, split="all", max_rows=limit)
        assert n - 1 <= more.n_tokens <= n


def feed(state: FeatureState, snapshot: Snapshot, segments: list[int], seed: int) -> FeatureState:
    """All rows of the segments, in a random order, in batches of random sizes."""
    rng = np.random.default_rng(seed)
    for s in segments:
        t = snapshot.segments[s].tokens()
        x = torch.from_numpy(snapshot.segments[s].acts(HOOK).read().astype(np.float32))
        order = rng.permutation(len(t))
        for part in np.split(order, np.sort(rng.integers(0, len(t), 7))):
            state.update(s, t.take(part), sae("topk").encode(x[part]))
    return state


def test_states_of_segments_merge_to_the_state_of_all(snapshot) -> None:
    whole = feed(FeatureState(F, 6), snapshot, [0, 1, 2], seed=0)
    merged, *others = [feed(FeatureState(F, 6), snapshot, s, seed=1) for s in ([2], [0], [1])]
    for other in others:
        merged.merge(other)
    backwards = feed(FeatureState(F, 6), snapshot, [2, 1, 0], seed=3)  # ties arrive last first
    np.testing.assert_array_equal(whole.best().place, backwards.best().place)
    for name in ("fires_F", "contexts_F", "sum_F", "max_F"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(merged, name))
    for name in ("feature", "place", "key"):
        np.testing.assert_array_equal(getattr(whole.best(), name), getattr(merged.best(), name))
    assert (whole.n_tokens, whole.n_contexts) == (merged.n_tokens, merged.n_contexts)
    with pytest.raises(ValueError, match="both states counted segments \\[1\\]"):
        merged.merge(feed(FeatureState(F, 6), snapshot, [1], seed=2))
    with pytest.raises(ValueError, match="already counted"):
        feed(merged, snapshot, [0], seed=0)
    with pytest.raises(ValueError, match="different numbers"):
        merged.merge(FeatureState(F, 5))


def test_a_full_buffer_changes_nothing(snapshot, monkeypatch) -> None:
    whole = feed(FeatureState(F, 6), snapshot, [0, 1], seed=0)
    monkeypatch.setattr("saetrain.dashboard.state._PENDING", 10)
    small = feed(FeatureState(F, 6), snapshot, [0, 1], seed=0)
    np.testing.assert_array_equal(whole.best().key, small.best().key)
    np.testing.assert_array_equal(whole.contexts_F, small.contexts_F)


def test_choice_is_even_over_density_and_looks_at_nothing_else() -> None:
    fires = np.array([0, 5, 1, 9, 3, 0, 7, 2, 8, 4, 6, 10])
    # live by falling fires: 11 3 8 6 10 1 9 4 7 2, in groups of two: the second one of each
    assert choose(fires, 5) == [3, 6, 1, 4, 2]
    assert choose(fires, 10) == [11, 3, 8, 6, 10, 1, 9, 4, 7, 2]
    assert choose(fires, 50) == choose(fires, 10)
    assert choose(np.zeros(4, dtype=np.int64), 5) == []
    assert choose(np.arange(1000, 0, -1), 20) == list(range(25, 1000, 50))


def test_a_character_split_over_tokens_survives() -> None:
    face = "🙂".encode()
    assert token_texts([b"a", face[:1], face[1:3], face[3:] + b"!"]) == ["a", "🙂", "", "!"]
    assert token_texts([b"\xe2\x82", b"\xac5", b"\xff"]) == ["€", "5", "\ufffd"]
    assert token_texts([b"", b"x", b""]) == ["", "x", ""]
    assert token_texts([]) == []


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_texts_of_tokens_join_to_the_text_of_all(data: bytes, cuts: list[int]) -> None:
    ends = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    tokens = [data[a:b] for a, b in pairwise(ends)]
    escaped = data.decode("utf-8", "surrogateescape")
    expected = "".join("\ufffd" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in escaped)
    texts = token_texts(tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == expected


def test_refusals(snapshot) -> None:
    with pytest.raises(HookMissingError, match=r"resid\.2"):
        collect(sae("topk"), snapshot, "resid.9")
    with pytest.raises(ConfigError, match="raise held_out_fraction"):
        collect(sae("topk"), snapshot, HOOK, held_out_fraction=0.0)
    with pytest.raises(ConfigError, match=r"features=\[24, -1\].*0 to 23"):
        collect(sae("topk"), snapshot, HOOK, split="all", features=[1, 24, -1])
    one = np.zeros(1, dtype=np.uint32)
    tokens = TokenTable(one, one.astype(np.uint64), one, one, one.astype(np.uint8))
    codes = SparseCodes(torch.tensor([[1.0, float("nan")]]), torch.tensor([[0, 1]]), F)
    with pytest.raises(TrainingError, match="not finite"):
        FeatureState(F, 2).update(0, tokens, codes)


def test_sparse_codes_stay_sparse(snapshot, monkeypatch) -> None:
    def refuse(self: SparseCodes) -> torch.Tensor:
        raise AssertionError("dense codes were made")

    monkeypatch.setattr(SparseCodes, "dense", refuse)
    assert collect(sae("topk"), snapshot, HOOK, split="all").n_tokens > 1000
