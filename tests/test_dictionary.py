"""What single architectures and options promise: dead latents, starts, nesting, gates, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from saes_reference import recovery, space_of
from saes_rows import (
    END,
    HOOK,
    SPACES,
    TRUE,
    D,
    Row,
    X,
    assert_equal_gradients,
    shake,
    train,
    weights,
)
from test_saes import BATCHTOPK, GATED, JUMPRELU, MATRYOSHKA, RELU, TOPK, VANILLA
from training import planted_store, settings

from saetrain import init
from saetrain import train as run_training
from saetrain.codes import dense, l0
from saetrain.optim import Optimizer
from saetrain.saes import make_sae
from saetrain.saes.base import Progress
from saetrain.saes.matryoshka import random_prefixes
from saetrain.settings import OptimSettings

# -- losses by hand --------------------------------------------------------------------------------


def test_mse_plus_lambda_l1_by_hand() -> None:  # F32
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    values = {"name": "vanilla", "n_latents": 2, "l1_coefficient": 0.1, "scale": "none"}
    plain = {"reconstruction": "mse", "penalty": {"warmup_fraction": 0}}
    sae = make_sae({**values, **plain}, {HOOK: space_of(x, HOOK)})
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        sae.b_enc.copy_(torch.tensor([-0.5, 0.0]))
        sae.b_dec.zero_()
    # Latents (0.5, 2) and (2.5, 0); reconstructions (1.7, 1.6) and (2.5, 0).
    losses = sae.losses({HOOK: x}, Progress(step=0, n_steps=9, tokens=2))
    torch.testing.assert_close(losses.total.item(), 0.225 + 0.1 * 2.5)


def test_a_larger_l1_coefficient_fires_fewer_latents() -> None:  # F20
    counts = []
    for coefficient in (0.001, 0.1, 0.3):
        sae = VANILLA.make(l1_coefficient=coefficient)
        train(sae, 150)
        counts.append(l0(sae.encode(X)).float().mean().item())
    assert counts[0] > 1.3 * counts[1] > 1.3 * 1.3 * counts[2] > 0


def test_the_coefficient_in_force_is_logged() -> None:
    sae = RELU.make(penalty={"name": "l1", "warmup_fraction": 0.25})
    losses = sae.losses({HOOK: X[:8]}, Progress(step=10, n_steps=100, tokens=8))
    assert losses.extras["l1_coefficient"] == pytest.approx(0.4 * 0.05)


def test_a_free_decoder_gains_nothing_by_growing() -> None:
    """f ||w|| is what is selected and penalised: rows 3 times as long, latents a third."""
    for row in (RELU, TOPK, JUMPRELU):
        sae, other = (shake(row.make(decoder_norm="free")) for _ in range(2))
        with torch.no_grad():
            other.W_dec *= 3
            other.W_enc /= 3
            other.b_enc /= 3
        one, two = (s.losses({HOOK: X[:64]}, END) for s in (sae, other))
        for name in one.terms:
            torch.testing.assert_close(one.terms[name], two.terms[name], rtol=1e-4, atol=1e-5)


# -- dead latents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [TOPK, BATCHTOPK, MATRYOSHKA], ids=lambda r: r.name)
@pytest.mark.parametrize("revived", [True, False])
def test_auxk_revives_a_killed_latent(row: Row, revived: bool) -> None:  # F53
    # Fewer latents than features: the residual has something left for a dead one to explain.
    small = {"n_latents": 20} | ({"group_sizes": (16, 4)} if row is MATRYOSHKA else {})
    # A fixed length: a search on the first batch would undo the killing.
    sae = row.make(dead_after_tokens=1000, aux_k=8 if revived else 0, init_norm=1.0, **small)
    with torch.no_grad():
        sae.W_enc[:, 5] *= 1e-3  # positive at times, never among the largest
    before = sae.W_enc[:, 5].detach().clone()
    train(sae, 5, batch=200)
    assert not sae.dead.any()
    train(sae, 1, batch=200)
    assert sae.dead[5]
    train(sae, 200, batch=200)
    assert torch.equal(sae.W_enc[:, 5].detach(), before) is not revived
    fired = (dense(sae.losses({HOOK: X}, END).codes)[:, 5] > 0).any().item()
    assert fired is revived
    assert sae.dead[5].item() is not revived


def test_auxk_gives_jumprelu_gradients_to_dead_latents() -> None:  # F53
    sae = JUMPRELU.make(auxk_alpha=1 / 32, aux_k=4, dead_after_tokens=50)
    with torch.no_grad():
        sae.activation.threshold[7] = 99.0  # positive but never above it
    sae.losses({HOOK: X[:256]}, END).total.backward()
    assert not sae.W_enc.grad[:, 7].any()
    sae.zero_grad()
    sae.tokens_since_fired[7] = 51
    sae.losses({HOOK: X[:256]}, END).total.backward()
    assert sae.W_enc.grad[:, 7].any()


def test_terms_keep_their_names_and_auxk_is_zero_until_something_is_dead() -> None:
    sae = TOPK.make(dead_after_tokens=50)
    before = sae.losses({HOOK: X[:32]}, END)
    sae.tokens_since_fired[3] = 51
    after = sae.losses({HOOK: X[:32]}, END)
    assert list(before.terms) == list(after.terms) == ["reconstruction", "auxk"]
    assert before.terms["auxk"] == 0
    assert after.terms["auxk"] > 0


@pytest.mark.parametrize("row", [VANILLA, RELU, GATED, JUMPRELU], ids=lambda r: r.name)
def test_resampling_gives_dead_latents_badly_explained_tokens(row: Row) -> None:
    """Bricken et al. 2023: the token's direction, 0.2 of the living columns' length, biases 0."""
    sae = shake(row.make(resample_every=5, resample_times=2, dead_after_tokens=50))
    sae.tokens_since_fired[[3, 8]] = 51
    x = X[:64].clone()
    x[40] += 100.0  # the token that p ∝ loss² draws
    before = weights(sae)
    torch.manual_seed(0)
    assert sae.resample({HOOK: x}, Progress(step=3, n_steps=99, tokens=1)) == {}
    replaced = sae.resample({HOOK: x}, Progress(step=4, n_steps=99, tokens=1))
    assert set(replaced) == {n for n, p in sae.named_parameters()} - {"b_dec"}
    direction = torch.nn.functional.normalize(sae.standardise(x[40]) - sae.b_dec, dim=0)
    rows = torch.nn.functional.normalize(sae.W_dec[[3, 8]], dim=1)
    assert (rows @ direction).max() > 0.999
    alive = [i for i in range(48) if i not in (3, 8)]
    lengths = before["W_enc"].norm(dim=0)[alive].mean() * 0.2
    torch.testing.assert_close(sae.W_enc[:, [3, 8]].norm(dim=0), lengths.expand(2))
    for name, p in sae.named_parameters():
        if name != "b_dec":
            at = (..., alive) if name == "W_enc" else (alive,)
            assert torch.equal(p[at], before[name][at]), name
    assert not sae.dead.any()
    assert sae.resample({HOOK: x}, Progress(step=9, n_steps=99, tokens=1)) == {}  # none is dead
    sae.tokens_since_fired[3] = 51
    assert sae.resample({HOOK: x}, Progress(step=14, n_steps=99, tokens=1)) == {}  # twice is all


def test_adam_forgets_what_was_resampled_and_nothing_else() -> None:
    sae = VANILLA.make()
    optim = Optimizer(sae, OptimSettings(lr=1e-3), 48)
    sae.losses({HOOK: X}, END).total.backward()
    optim.step(1.0)
    before = {k: v.clone() for k, v in optim.tensors().items()}
    ids = torch.tensor([3, 8])
    optim.forget({"W_enc": (..., ids), "W_dec": (ids,)})
    after = optim.tensors()
    for name in ("exp_avg", "exp_avg_sq"):
        assert not after[f"W_enc/{name}"][:, ids].any()
        assert not after[f"W_dec/{name}"][ids].any()
        before[f"W_enc/{name}"][:, ids] = 0
        before[f"W_dec/{name}"][ids] = 0
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_resampling_happens_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted_store(tmp_path / "store")
    sae: dict[str, Any] = {"name": "topk", "n_latents": 48, "k": 1, "aux_k": 0}
    sae |= {"dead_after_tokens": 64, "resample_every": 5}
    forgotten: list[int] = []
    original = Optimizer.forget

    def forget(self: Optimizer, replaced: Any) -> None:
        forgotten.append(len(replaced))
        original(self, replaced)

    monkeypatch.setattr(Optimizer, "forget", forget)
    run_training(settings(tmp_path / "store", tmp_path / "runs", sae=sae))
    assert len(forgotten) == 30
    assert any(forgotten[4:20:5])
    assert not any(forgotten[20:])  # resample_times is 4
    assert not any(n for i, n in enumerate(forgotten) if (i + 1) % 5)


# -- starts ----------------------------------------------------------------------------------------


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    x = torch.randn(200, 6, dtype=torch.float64) ** 3 + 1
    median = init.geometric_median(x)

    def distance(point: torch.Tensor) -> float:
        return (x - point).norm(dim=1).sum().item()

    for _ in range(50):
        assert distance(median) < distance(median + 0.01 * torch.randn(6, dtype=torch.float64))
    assert distance(median) < distance(x.mean(0))
    outlier = torch.cat([torch.zeros(9, 2), torch.full((1, 2), 1e6)])
    assert init.geometric_median(outlier).norm() < 0.01 * outlier.mean(0).norm()
    assert torch.equal(init.geometric_median(torch.ones(3, 2)), torch.ones(2))


def test_biases_start_where_they_are_told() -> None:
    for kind, want in (
        ("zero", torch.zeros(D)),
        ("mean", X.mean(0)),
        ("geometric_median", init.geometric_median(X[:256])),
    ):
        sae = TOPK.make(init_bias=kind, scale="none")
        sae.init_from_data({HOOK: X[:256]})
        torch.testing.assert_close(sae.b_dec.detach(), want)


def test_encoders_start_tied_or_not() -> None:
    for row in (TOPK, RELU):
        tied, free = row.make(), row.make(init_encoder="random")
        assert torch.equal(tied.W_enc, tied.W_dec.T)
        cosines = torch.cosine_similarity(free.W_enc.T, free.W_dec)
        assert cosines.abs().mean() < 0.4
        torch.testing.assert_close(free.W_enc.norm(dim=0), tied.W_enc.norm(dim=0))


@pytest.mark.parametrize(
    "row", [TOPK, RELU, VANILLA, GATED, MATRYOSHKA, JUMPRELU], ids=lambda r: r.name
)
def test_a_searched_norm_minimises_the_first_loss(row: Row) -> None:  # F64
    def error(norm: float | str) -> float:
        sae = row.make(init_norm=norm, init_bias="mean")
        sae.init_from_data({HOOK: X[:512]})
        return sae.losses({HOOK: X[:512]}, END).extras["fvu"].item()

    tried = [error(norm) for norm in init.NORMS]
    if row.name == "jumprelu":  # by trying; else in closed form, between those that are tried
        assert error("search") == pytest.approx(min(tried), rel=1e-6)
    else:
        assert 0.97 * min(tried) < error("search") <= min(tried) * (1 + 1e-6)
    assert min(tried) < 0.99 * max(tried)


def test_a_norm_that_explains_nothing_is_the_smallest() -> None:  # F64
    x = torch.randn(64, 4)
    assert init.best_norm(x, lambda n: x * (1 - n), power=1) == init.NORMS[0]  # the wrong way
    assert init.best_norm(x, lambda n: x * 0, power=1) == init.NORMS[0]
    assert init.best_norm(x, lambda n: 1 + (x - 1) * n / 0.7, power=1) == pytest.approx(0.7)
    assert init.best_norm(x, lambda n: x * n**2 / 0.49, power=2) == pytest.approx(0.7)
    assert init.best_norm(x, lambda n: x * n / 100, power=1) == init.NORMS[-1]


# -- gated -----------------------------------------------------------------------------------------


def test_the_gate_learns_from_its_own_reconstruction_and_leaves_the_decoder_alone() -> None:  # F21
    sae = shake(GATED.make())
    sae.losses({HOOK: X[:256]}, END).terms["gate"].backward()
    assert sae.b_gate.grad.any()
    assert sae.W_enc.grad.any()
    assert sae.W_dec.grad is None
    sae.zero_grad(set_to_none=True)
    sae.losses({HOOK: X[:256]}, END).terms["reconstruction"].backward()
    assert sae.b_gate.grad is None or not sae.b_gate.grad.any()  # a step passes nothing
    assert sae.b_mag.grad.any()
    assert sae.r_mag.grad.any()


def test_gated_equals_a_loop() -> None:  # F21
    sae = shake(GATED.make(scale="none"), 0.3)
    sae.requires_grad_(False)
    codes = sae.encode(X[:5])
    for n in range(5):
        for i in range(48):
            pi = (X[n] - sae.b_dec) @ sae.W_enc[:, i]
            m = max(0.0, float(pi * sae.r_mag[i].exp() + sae.b_mag[i]))
            want = m if float(pi + sae.b_gate[i]) > 0 else 0.0
            assert codes[n, i].item() == pytest.approx(want, rel=1e-4, abs=1e-5)


# -- matryoshka ------------------------------------------------------------------------------------


def test_the_first_group_alone_reconstructs() -> None:  # F24
    def first_group(sae: Any) -> float:
        codes = dense(sae.losses({HOOK: X}, END).codes).clone()
        codes[:, 24:] = 0
        return (X - sae.decode(codes)).square().sum().item() / (X - X.mean(0)).square().sum().item()

    sae, untrained = MATRYOSHKA.make(), MATRYOSHKA.make()
    plain = BATCHTOPK.make()
    train(sae, 300)
    train(plain, 300)
    assert first_group(sae) < 0.5 * first_group(untrained)
    assert first_group(sae) < 0.5 * first_group(plain)


def test_group_sizes_are_saved_and_default_to_those_of_the_paper() -> None:  # F24
    assert MATRYOSHKA.make().to_inference().group_sizes == (24, 16, 8)
    default = MATRYOSHKA.make(n_latents=64, group_sizes=None)
    assert default.group_sizes == (2, 4, 8, 16, 34)
    drawn = MATRYOSHKA.make(group_sizes=None, random_prefixes=4)
    assert drawn.to_inference().group_sizes == (48,)


def test_random_prefixes_follow_their_distribution_and_end_with_all() -> None:  # F24
    torch.manual_seed(0)
    drawn = torch.tensor([random_prefixes(3, 100) for _ in range(4000)])
    assert drawn.min() == 1
    assert drawn.max() == 99
    assert (drawn.diff(dim=1) >= 0).all()
    for m in (2, 10, 50):  # P(length >= m) = P(continuous > m)
        share = (drawn >= m).double().mean().item()
        assert share == pytest.approx((m**-0.5 - 0.1) / 0.9, abs=0.02)
    sae = MATRYOSHKA.make(group_sizes=None, random_prefixes=4)
    assert sae._prefixes()[-1] == 48
    train(sae, 700)
    assert recovery(sae, TRUE) > 0.9


def test_sparse_and_dense_codes_nest_alike() -> None:
    """Topk in groups: gradients of the sparse path equal dense autograd."""
    values = MATRYOSHKA.config(activation={"name": "topk"}, aux_k=0, decoder_norm="unit")
    torch.manual_seed(0)
    sae = shake(make_sae(values, SPACES).double())
    w, x = weights(sae), X[:24].double()
    losses = sae.losses({HOOK: x}, END)
    losses.total.backward()
    x = (x - sae.in_center) * sae.in_scale
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = torch.zeros_like(h).scatter(1, h.topk(2).indices, 1.0) * h.relu()
    each = [
        (x - (f[:, :m] @ w["W_dec"][:m] + w["b_dec"])).square().sum() / 24 / sae.in_variance
        for m in (24, 40, 48)
    ]
    torch.testing.assert_close(losses.total, sum(each) / 3)
    (sum(each) / 3).backward()
    assert_equal_gradients(sae, w)
