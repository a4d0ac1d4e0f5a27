"""Every architecture under the same checks: one row each, and what only one of them promises."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from saes_reference import (
    auxk_reference,
    planted,
    recovery,
    relu_reference,
    space_of,
    topk_reference,
)
from torch import Tensor

from saetrain.artefact import load_sae
from saetrain.codes import Codes, dense, l0
from saetrain.saes import make_config, make_sae
from saetrain.saes.base import SAE, Progress

ROOT = Path(__file__).parents[1]
HOOK = "resid.2"
D, FEATURES, ACTIVE = 16, 24, 2
X, TRUE = planted(4096, D, FEATURES, ACTIVE)
SPACES = {HOOK: space_of(X, HOOK)}
UNITS = list(itertools.product(["none", "mean"], ["none", "sqrt_d", "unit"]))
END = Progress(step=10, n_steps=10, tokens=10_000)


def exactly(k: int) -> Callable[[Codes, Tensor], None]:
    """L0 is k wherever at least k pre-activations h are positive, and all positive ones if not."""

    def law(codes: Codes, h_BF: Tensor) -> None:
        assert torch.equal(l0(codes), (h_BF > 0).sum(-1).clamp(max=k))

    return law


def positive_part(codes: Codes, h_BF: Tensor) -> None:
    """Latents are relu(h): as many as are positive, none below zero."""
    assert torch.equal(l0(codes), (h_BF > 0).sum(-1))
    assert (dense(codes) >= 0).all()


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    l0_law: Callable[[Codes, Tensor], None]
    recovers: float  # mean max cosine with a planted dictionary after a short training

    def config(self, **more: Any) -> dict[str, Any]:
        return {"name": self.name, "n_latents": 48, **self.values, **more}

    def make(self, seed: int = 0, **more: Any) -> SAE:
        torch.manual_seed(seed)
        return make_sae(self.config(**more), SPACES)


ROWS = [
    Row(name="topk", values={"k": 2}, l0_law=exactly(2), recovers=0.95),
    Row(
        name="relu",
        values={"l1_coefficient": 0.05},
        l0_law=positive_part,
        recovers=0.9,
    ),
    Row(
        name="relu",
        values={"l1_coefficient": 0.05, "decoder_norm_weighted": False},
        l0_law=positive_part,
        recovers=0.9,
    ),
]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.name}-{len(r.values)}")
TOPK, RELU, UNIT = ROWS


def train(
    sae: SAE, steps: int, x: Tensor = X, lr: float = 5e-3, batch: int = 256
) -> tuple[float, float]:
    """The trainer's order of calls. (first loss, last loss)."""
    optim = torch.optim.Adam(sae.parameters(), lr)
    gen, seen = torch.Generator().manual_seed(1), []
    for step in range(steps):
        optim.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        rows_B = torch.randint(0, len(x), (batch,), generator=gen)
        progress = Progress(step=step, n_steps=steps, tokens=(step + 1) * batch)
        losses = sae.losses({HOOK: x[rows_B]}, progress)
        optim.zero_grad()
        losses.total.backward()
        sae.before_step()
        optim.step()
        sae.after_step()
        sae.note_firing(losses.codes)
        seen.append(losses.terms["reconstruction"].item())
    return seen[0], seen[-1]


def weights(sae: SAE) -> dict[str, Tensor]:
    """Copies of the weights that record gradients of their own."""
    return {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}


def shake(sae: SAE, size: float = 0.1) -> SAE:
    """Move every weight off its special starting value."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in sae.parameters():
            p += size * torch.randn(p.shape, generator=gen).to(p)
    return sae


def assert_equal_gradients(sae: SAE, w: Mapping[str, Tensor]) -> None:
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad, msg=lambda m, n=name: f"{n}: {m}")


# -- the contract, every row -----------------------------------------------------------------------


@rows
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_shapes_and_forward(row: Row, lead: tuple[int, ...]) -> None:  # F19
    sae, x = shake(row.make()), X[:6].reshape(*lead, D)
    for module in (sae, sae.to_inference()):
        out = module(x)
        assert set(out) == {"sae_out", "feature_acts"}
        assert out["sae_out"].shape == (*lead, D)
        assert out["feature_acts"].shape == (*lead, 48)
        codes = module.encode(x)
        assert torch.equal(out["sae_out"], module.decode(codes))
        assert torch.equal(out["feature_acts"], dense(codes))


@rows
def test_l0_law(row: Row) -> None:  # F20, F22, F44
    sae = shake(row.make())
    with torch.no_grad():
        sae.b_enc -= 1.5  # some tokens have fewer than k positive pre-activations
    h_BF = (sae.standardise(X) - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert (l0(sae.encode(X)) < 2).any()
    row.l0_law(sae.encode(X), h_BF)
    row.l0_law(sae.losses({HOOK: X}, END).codes, h_BF)


@rows
def test_every_weight_gets_a_gradient(row: Row) -> None:  # F19
    sae = shake(row.make())
    sae.losses({HOOK: X[:512]}, END).total.backward()
    for name, p in sae.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@rows
def test_loss_falls_and_the_planted_dictionary_is_found(row: Row) -> None:
    sae = row.make()
    first, last = train(sae, 700)
    assert last < 0.3 * first
    assert recovery(sae, TRUE) > row.recovers


@rows
@pytest.mark.parametrize(("center", "scale"), UNITS)
def test_folding_changes_nothing(row: Row, center: str, scale: str) -> None:
    sae = shake(row.make(center=center, scale=scale), 0.02)
    folded = sae.to_inference()
    with torch.no_grad():
        want, got = sae(X[:256]), folded(X[:256])
    for name in want:
        error = (want[name] - got[name]).norm() / want[name].norm()
        assert error < 1e-5, name
    assert all(not p.requires_grad for p in folded.parameters())


@rows
def test_the_decoder_bias_starts_at_the_mean(row: Row) -> None:
    for center, scale in UNITS:
        bias = row.make(center=center, scale=scale).to_inference().b_dec
        torch.testing.assert_close(bias, SPACES[HOOK].mean)


@rows
def test_saving_and_loading_is_bit_equal(row: Row, tmp_path: Path) -> None:  # F19
    sae = shake(row.make())
    sae.note_firing(sae.encode(X[:4]))
    other = row.make(seed=9)
    other.load_state_dict(sae.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in sae.state_dict().items())
    sae.to_inference().save(tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.source["architecture"] == row.name
    for name, value in sae.to_inference()(X[:8]).items():
        assert torch.equal(loaded(X[:8])[name], value)


@rows
def test_configs_survive_a_round_trip(row: Row) -> None:  # F19
    config = make_config(row.config())
    assert make_config({"name": row.name, **dataclasses.asdict(config)}) == config


@rows
def test_bfloat16_inference_is_close(row: Row, tmp_path: Path) -> None:
    sae = row.make()
    train(sae, 60)
    sae.to_inference().save(tmp_path)
    full, half = load_sae(tmp_path), load_sae(tmp_path, dtype=torch.bfloat16)
    want, got = full(X[:512])["sae_out"], half(X[:512].bfloat16())["sae_out"]
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()


@rows
def test_bfloat16_training_is_close(row: Row) -> None:
    exact, mixed = shake(row.make()), shake(row.make())
    exact.losses({HOOK: X[:512]}, END).total.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = mixed.losses({HOOK: X[:512]}, END)
    assert losses.total.dtype == torch.float32
    losses.total.backward()
    for (name, p), q in zip(exact.named_parameters(), mixed.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.1 * p.grad.norm(), name


@rows
def test_inference_does_not_depend_on_the_batch(row: Row) -> None:
    folded = shake(row.make()).to_inference()
    whole, order = folded(X[:64])["sae_out"], torch.randperm(64)
    torch.testing.assert_close(folded(X[:64][order])["sae_out"], whole[order])
    alone = torch.cat([folded(x[None])["sae_out"] for x in X[:64]])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)


@rows
def test_dead_latents_are_counted_in_tokens(row: Row) -> None:  # F53
    sae = row.make(dead_after_tokens=25)
    fires, silent = torch.zeros(2, 5, 48), torch.zeros(10, 48)
    fires[1, 4, 7] = 0.1
    for _ in range(2):
        sae.note_firing(fires)  # contexts (2, 5): 10 tokens
    for expected in (False, False, True):
        sae.note_firing(silent)
        assert sae.dead[7].item() is expected
    assert sae.tokens_since_fired[7] == 30
    assert (sae.tokens_since_fired[8:] == 50).all()
    sae.note_firing(fires)
    assert not sae.dead[7]


@rows
def test_unit_norm_decoders_stay_on_the_sphere(row: Row) -> None:
    sae = row.make()
    train(sae, 5)
    norms = sae.W_dec.norm(dim=1)
    free = getattr(sae.cfg, "decoder_norm_weighted", False)
    assert torch.allclose(norms, torch.ones(48), atol=1e-6) is not free
    sae.losses({HOOK: X[:64]}, END).total.backward()
    sae.before_step()
    radial = (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() / sae.W_dec.grad.norm(dim=1).max()
    assert (radial < 1e-5).item() is not free


# -- loss terms and gradients, against the references ----------------------------------------------


@pytest.mark.parametrize("kind", ["fvu", "mse", "sse"])
@pytest.mark.parametrize("aux_k", [0, 3, 48])
def test_topk_loss_and_gradients(kind: str, aux_k: int) -> None:  # F53
    sae = shake(TOPK.make(reconstruction=kind, aux_k=aux_k, dead_after_tokens=50).double())
    sae.tokens_since_fired[::5] = 51
    w, variance = weights(sae), sae.in_variance.item()
    losses = sae.losses({HOOK: X[:24].double()}, END)
    losses.total.backward()
    x = (X[:24].double() - sae.in_center) * sae.in_scale
    want, e, h = topk_reference(w, x, 2, kind, variance)
    torch.testing.assert_close(losses.terms["reconstruction"], want)
    if aux_k:
        aux = auxk_reference(w, e, h, sae.dead, aux_k) / 32
        torch.testing.assert_close(losses.terms["auxk"], aux)
        want = want + aux
    assert set(losses.terms) == {"reconstruction", *(["auxk"] if aux_k else [])}
    want.backward()
    assert_equal_gradients(sae, w)
    torch.testing.assert_close(losses.extras["fvu"], e.detach().square().sum() / 24 / variance)


@pytest.mark.parametrize("kind", ["fvu", "mse", "sse"])
@pytest.mark.parametrize("weighted", [True, False])
def test_relu_loss_and_gradients(kind: str, weighted: bool) -> None:  # F32
    sae = shake(RELU.make(reconstruction=kind, decoder_norm_weighted=weighted).double())
    w = weights(sae)
    losses = sae.losses({HOOK: X[:24].double()}, END)
    losses.total.backward()
    x = (X[:24].double() - sae.in_center) * sae.in_scale
    recon, penalty = relu_reference(w, x, kind, sae.in_variance.item(), weighted)
    torch.testing.assert_close(losses.terms["reconstruction"], recon)
    torch.testing.assert_close(losses.terms["l1"], 0.05 * penalty)
    (recon + 0.05 * penalty).backward()
    assert_equal_gradients(sae, w)


def test_mse_plus_lambda_l1_by_hand() -> None:  # F32
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    values = {"name": "relu", "n_latents": 2, "l1_coefficient": 0.1, "scale": "none"}
    plain = {"reconstruction": "mse", "decoder_norm_weighted": False, "l1_warmup_fraction": 0}
    sae = make_sae({**values, **plain}, {HOOK: space_of(x, HOOK)})
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        sae.b_enc.copy_(torch.tensor([-0.5, 0.0]))
        sae.b_dec.zero_()
    # Latents (0.5, 2) and (2.5, 0); reconstructions (1.7, 1.6) and (2.5, 0).
    losses = sae.losses({HOOK: x}, Progress(step=0, n_steps=9, tokens=2))
    torch.testing.assert_close(losses.total.item(), 0.225 + 0.1 * 2.5)


def test_l1_warms_up_linearly() -> None:
    sae = RELU.make(l1_warmup_fraction=0.25)
    for step, expected in ((0, 0.0), (10, 0.4), (25, 1.0), (99, 1.0)):
        losses = sae.losses({HOOK: X[:8]}, Progress(step=step, n_steps=100, tokens=8))
        full = sae.losses({HOOK: X[:8]}, END).terms["l1"]
        torch.testing.assert_close(losses.terms["l1"], expected * full)
        assert losses.extras["l1_coefficient"] == pytest.approx(expected * 0.05)


def test_a_larger_l1_coefficient_fires_fewer_latents() -> None:  # F20
    counts = []
    for coefficient in (0.001, 0.01, 0.1):
        sae = RELU.make(l1_coefficient=coefficient)
        train(sae, 150)
        counts.append(l0(sae.encode(X)).float().mean().item())
    assert counts[0] > 1.2 * counts[1] > 1.4 * counts[2] > 0


# -- dead latents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("revived", [True, False])
def test_auxk_revives_a_killed_latent(revived: bool) -> None:  # F53
    sae = TOPK.make(dead_after_tokens=1000, aux_k=8 if revived else 0)
    with torch.no_grad():
        sae.W_enc[:, 5] *= 1e-3  # positive at times, never among the largest
    before = sae.W_enc[:, 5].detach().clone()
    train(sae, 5, batch=200)
    assert not sae.dead.any()
    train(sae, 1, batch=200)
    assert sae.dead[5]
    train(sae, 100, batch=200)
    assert torch.equal(sae.W_enc[:, 5].detach(), before) is not revived
    assert (l0(sae.encode(X)) > 0).all()
    fired = (dense(sae.encode(X))[:, 5] > 0).any().item()
    assert fired is revived
    assert sae.dead[5].item() is not revived


def test_terms_keep_their_names_and_auxk_is_zero_until_something_is_dead() -> None:
    sae = TOPK.make(dead_after_tokens=50)
    before = sae.losses({HOOK: X[:32]}, END)
    sae.tokens_since_fired[3] = 51
    after = sae.losses({HOOK: X[:32]}, END)
    assert list(before.terms) == list(after.terms) == ["reconstruction", "auxk"]
    assert before.terms["auxk"] == 0
    assert after.terms["auxk"] > 0
