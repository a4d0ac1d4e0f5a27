"""Metrics against NumPy brute force, identities, and any way of cutting the rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from fakes import FakeStream, planted
from hypothesis import given
from hypothesis import strategies as st

from saetrain.artefact import InferenceSAE
from saetrain.codes import SparseCodes
from saetrain.errors import ConfigError, TrainingError
from saetrain.evals import pca, reconstruction
from saetrain.metrics import ContextSums, Firing, Reconstruction, density_histogram


def numpy_metrics(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    x, y = x.astype(np.float64), y.astype(np.float64)
    nx, ny = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    return {
        "fve": 1 - np.square(x - y).sum() / np.square(x - x.mean(0)).sum(),
        "mse": np.square(x - y).mean(),
        "nmse": np.square(x - y).sum() / np.square(x).sum(),
        "cos": ((x * y).sum(1) / (nx * ny)).mean(),
        "norm_ratio": ny.sum() / nx.sum(),
    }


def measure(x, y, reference=None, cuts: tuple[int, ...] = ()) -> dict[str, float]:
    m0 = torch.zeros(x.shape[1]) if reference is None else torch.as_tensor(reference)
    recon = Reconstruction(m0)
    for part in np.split(np.arange(len(x)), cuts):
        recon.update(torch.as_tensor(x[part]), torch.as_tensor(y[part]))
    return recon.compute()


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(5.0, 2.0, (300, 7))
    return x, x + rng.normal(0.3, 1.0, x.shape)


def test_reconstruction_is_numpys(pair) -> None:  # F33
    x, y = pair
    assert measure(x, y) == pytest.approx(numpy_metrics(x, y), rel=1e-12)


def test_perfect_is_one_and_the_mean_is_zero(pair) -> None:  # F33
    x, _ = pair
    assert measure(x, x)["fve"] == 1.0
    assert measure(x, x)["mse"] == 0.0
    mean = np.broadcast_to(x.mean(0), x.shape).copy()
    assert measure(x, mean)["fve"] == pytest.approx(0.0, abs=1e-12)
    # A constant offset is an error too; a variance of residuals would not see it.
    assert measure(x, x + 1.0)["fve"] < 0.8


def test_neither_cuts_nor_the_reference_point_matter(pair) -> None:
    x, y = pair
    whole = measure(x, y)
    assert measure(x, y, cuts=(1, 8, 100)) == pytest.approx(whole, rel=1e-12)
    assert measure(x, y, reference=x.mean(0) + 0.1) == pytest.approx(whole, rel=1e-12)


def test_a_large_mean_costs_no_digits() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(500, 4))
    x, y = 1e6 + noise, 1e6 + 0.5 * noise
    got = measure(x, y, reference=np.full(4, 1e6 + 0.01))
    assert got["fve"] == pytest.approx(numpy_metrics(x, y)["fve"], abs=1e-9)


def test_float32_rows_are_summed_in_float64() -> None:
    x = torch.full((70_000, 1), 1.0)
    x[::2] = 3.0
    recon = Reconstruction(torch.zeros(1))
    for part in (x + 4096).split(1000):
        recon.update(part, part + 0.5)
    assert recon.compute()["fve"] == 0.75  # variance 1, squared error 1/4


whole_rows = st.lists(
    st.lists(st.integers(-50, 50), min_size=3, max_size=3), min_size=4, max_size=30
)


@given(rows=whole_rows, cut=st.integers(0, 30))
def test_merging_is_exact(rows: list[list[int]], cut: int) -> None:  # F33
    x = torch.tensor(rows, dtype=torch.float64)
    if len(set(map(tuple, rows))) < 2:
        return
    y, codes = x.roll(1, 0), x.clamp_min(0)
    parts = []
    for piece in (slice(None), slice(0, cut), slice(cut, None)):
        recon, fires, sums = Reconstruction(torch.ones(3)), Firing(3), ContextSums()
        err, dev = recon.update(x[piece], y[piece])
        fires.update(codes[piece])
        n = len(x[piece])
        ctx = (np.arange(len(x))[piece] // 2).astype(np.uint32)
        sums.update(np.zeros(n, dtype=np.int32), ctx, err.numpy(), dev.numpy())
        parts.append((recon, fires, sums))
    (one, firing, context), (a, b, c), (d, e, f) = parts
    a.merge(d), b.merge(e), c.merge(f)
    # cos and norms have roots in them, so their sums depend on the order in the last bit.
    exact = ("fve", "mse", "nmse")
    assert [a.compute()[k] for k in exact] == [one.compute()[k] for k in exact]
    assert a.compute() == pytest.approx(one.compute(), rel=1e-12)
    assert b.compute() == firing.compute()
    assert np.array_equal(c.table(), context.table())


def test_merging_other_references_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        Reconstruction(torch.zeros(2)).merge(Reconstruction(torch.ones(2)))


def test_l0_l1_dead_and_density_against_numpy() -> None:  # F33
    rng = np.random.default_rng(3)
    f = np.maximum(rng.normal(-1.0, 1.0, (400, 20)), 0) * (np.arange(20) != 7)
    firing = Firing(20)
    for part in np.split(f, [10, 250]):
        firing.update(torch.from_numpy(part))
    got = firing.compute()
    per_token = np.sort((f > 0).sum(1))
    assert got["l0"] == pytest.approx(per_token.mean())
    assert (got["l0_p10"], got["l0_p90"]) == (per_token[39], per_token[359])
    assert got["l1"] == pytest.approx(np.abs(f).sum(1).mean())
    assert (got["dead"], got["dead_latents"], got["n_latents"]) == (1 / 20, 1, 20)
    histogram = got["density"]
    assert histogram["zero"] == 1
    assert histogram["n"] == 400
    assert sum(histogram["counts"]) == 19
    edges = 10 ** np.array(histogram["edges"])
    rates = (f > 0).mean(0)
    inside = [((rates >= a) & (rates < b)).sum() for a, b in pairwise(edges)]
    assert inside == histogram["counts"]


def test_density_keeps_the_rarest_and_the_always_on() -> None:
    got = density_histogram(np.array([0, 1, 1000, 1000]), 1000)
    assert (got["counts"][0], got["counts"][-1], got["zero"]) == (1, 2, 1)
    assert (got["edges"][0], got["edges"][-1]) == (-3.0, 0.0)


def test_sparse_codes_count_like_dense_ones() -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    codes = SparseCodes(values, torch.tensor([[0, 3], [3, 1]]), 5)
    sparse, dense = Firing(5), Firing(5)
    sparse.update(codes)
    dense.update(codes.dense())
    assert sparse.compute() == dense.compute()
    assert sparse.counts_F.tolist() == [1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones((3, 2)), np.ones((3, 2)), "all equal"),
        (np.eye(2), np.array([[np.nan, 0], [0, 1]]), "not finite"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "no rows"),
    ],
)
def test_what_is_undefined_is_an_error_and_not_a_number(x, y, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        measure(x, y)


def test_bootstrap_error_is_that_of_the_mean_over_contexts() -> None:
    rng = np.random.default_rng(0)
    contexts, per = 200, 16
    # All tokens of a context share their error, so 3200 tokens are worth 200.
    err = np.repeat(rng.random(contexts), per)
    dev = np.ones(contexts * per)
    sums = ContextSums()
    ctx = np.repeat(np.arange(contexts), per).astype(np.uint32)
    sums.update(np.zeros(len(ctx), dtype=np.int32), ctx, err, dev)
    expected = err[::per].std() / np.sqrt(contexts)
    assert sums.fve_se(0.0, 2000) == pytest.approx(expected, rel=0.1)
    assert sums.fve_se(0.0, 2000) == sums.fve_se(0.0, 2000)
    lone = ContextSums()
    lone.update(np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.uint32), err[:2], dev[:2])
    assert lone.fve_se(0.0, 2000) is None


def toy_sae(d: int = 6, f: int = 10, k: int | None = 3) -> InferenceSAE:
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(d, f, generator=gen)
    return InferenceSAE(
        w,
        torch.zeros(f),
        w.T.contiguous() / f,
        torch.full((d,), 2.0),
        activation="topk" if k else "relu",
        k=k,
        hooks_in=("resid.2",),
        hooks_out=("resid.2",),
    )


@pytest.mark.parametrize("k", [3, None])
def test_evaluating_an_sae_is_the_brute_force(k: int | None) -> None:  # F33
    x, sae = planted(203, 6), toy_sae(k=k)
    before = {n: p.clone() for n, p in sae.named_parameters()}
    out = sae(torch.from_numpy(x).float())
    expected = numpy_metrics(x.astype(np.float32), out["sae_out"].numpy())
    fires = out["feature_acts"].numpy() > 0
    results = [
        reconstruction.evaluate(
            sae,
            FakeStream(x, batch).one_pass(),
            hook_in="resid.2",
            hook_out="resid.2",
            reference=torch.full((6,), 2.0),
        )
        for batch in (16, 203, 64)
    ]
    for got in results:
        assert {n: got[n] for n in expected} == pytest.approx(expected, rel=1e-4)
        assert got["l0"] == pytest.approx(fires.sum(1).mean())
        assert got["dead"] == (fires.sum(0) == 0).mean()
        assert (got["tokens"], got["contexts"]) == (203, 26)
        assert got["fve"] == pytest.approx(results[0]["fve"], rel=1e-6)
        assert got["fve_se"] == pytest.approx(results[0]["fve_se"], rel=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in sae.named_parameters())


def test_a_token_cap_is_exact() -> None:
    x = planted(100, 6)
    args = {"hook_in": "resid.2", "hook_out": "resid.2", "reference": torch.zeros(6)}
    capped = reconstruction.evaluate(toy_sae(), FakeStream(x, 16).one_pass(), tokens=37, **args)
    alone = reconstruction.evaluate(toy_sae(), FakeStream(x[:37], 5).one_pass(), **args)
    assert capped["tokens"] == 37
    assert capped["fve"] == pytest.approx(alone["fve"], rel=1e-6)
    with pytest.raises(ConfigError, match="held_out_fraction"):
        reconstruction.evaluate(toy_sae(), iter(()), **args)


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_pca_is_the_singular_value_decomposition(rank: int) -> None:
    fit_on, test_on = planted(500, 6, seed=1), planted(90, 6, seed=2)
    fitted = pca.fit(FakeStream(fit_on, 50).one_pass(), "resid.2", rank, 10_000, torch.zeros(6))
    got = pca.evaluate(fitted, FakeStream(test_on, 32).one_pass(), "resid.2")
    fit_on, test_on = fit_on.astype(np.float32), test_on.astype(np.float32)
    mean = fit_on.mean(0, dtype=np.float64)
    basis = np.linalg.svd(fit_on - mean)[2][:rank]
    y = mean + (test_on - mean) @ basis.T @ basis
    assert got["fve"] == pytest.approx(numpy_metrics(test_on, y)["fve"], abs=1e-9)
    assert (got["rank"], got["tokens"], got["fitted_on"]) == (rank, 90, 500)
    if rank == 6:
        assert got["fve"] == pytest.approx(1.0)


def test_pca_is_fitted_on_a_capped_number_of_rows() -> None:
    x = planted(500, 6)
    fitted = pca.fit(iter(FakeStream(x, 50)), "resid.2", 2, 120, torch.zeros(6))
    assert fitted.n == 120
    with pytest.raises(ConfigError, match="pca_tokens"):
        pca.fit(iter(()), "resid.2", 2, 120, torch.zeros(6))
