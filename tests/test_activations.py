"""Activations: what each selects, and gradients against the smoothed function they are those of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saes_reference import batchtopk_oracle, groupmax_oracle, topk_oracle
from saes_rows import END, HOOK, SPACES, X, train
from test_saes import BATCHTOPK, GATED, JUMPRELU, MATRYOSHKA
from torch import Tensor
from training import planted_store, settings

from saetrain import load_sae
from saetrain import train as run_training
from saetrain.activations import (
    ACTIVATIONS,
    KERNELS,
    Activation,
    BatchTopKConfig,
    Calibrator,
    GroupMaxConfig,
    JumpReLUConfig,
    TopKConfig,
    make_activation,
)
from saetrain.codes import SparseCodes, dense, l0
from saetrain.errors import ConfigError
from saetrain.saes import make_sae

F = 12
H = torch.randn(40, F, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def jumprelu(**values: object) -> Activation:
    return make_activation(JumpReLUConfig(**values), F).double()


# -- what is selected ------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(40,), (5, 8)])
def test_selections_equal_their_oracles(lead: tuple[int, ...]) -> None:  # F22 F44 F60
    h = H.reshape(*lead, F)
    for cfg, want in (
        (TopKConfig(k=3), topk_oracle(H, 3)),
        (BatchTopKConfig(k=3), batchtopk_oracle(H, 3)),
        (BatchTopKConfig(k=0.3), batchtopk_oracle(H, 0.3)),
        (GroupMaxConfig(k=4), groupmax_oracle(H, 4)),
        (JumpReLUConfig(threshold=0.4), H * (H > 0.4)),
    ):
        activation = make_activation(cfg, F)
        codes = activation.select(h)
        assert isinstance(codes, SparseCodes) is activation.sparse
        torch.testing.assert_close(dense(codes), want.reshape(*lead, F))


def test_training_and_inference_forms_differ_for_batchtopk_only() -> None:
    for name, row in ACTIVATIONS.items():
        cfg = row.config(**({"k": 3} if "topk" in name or name == "groupmax" else {}))
        activation = make_activation(cfg, F).double()
        same = torch.equal(dense(activation.select(H)), dense(activation.infer(H)))
        assert same is (name != "batchtopk")


def test_too_few_latents() -> None:
    with pytest.raises(ConfigError, match=r"sae\.k=3 is larger than sae\.n_latents=2"):
        make_activation(BatchTopKConfig(k=3), 2)


# -- straight-through gradients --------------------------------------------------------------------


def smoothed(kernel: Callable[[Tensor], Tensor], what: str, h: float, theta: float, eps: float):
    """E[g(h + ε ξ)] over ξ ~ kernel by a fine sum, g = 1[· > θ] or · 1[· > θ]."""
    xi = torch.linspace(-8, 8, 320_001, dtype=torch.float64)
    mass = kernel(xi) / kernel(xi).sum()
    x = h + eps * xi
    value = (x > theta).double() if what == "step" else x * (x > theta)
    return (mass * value).sum().item()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("h", [0.38, 0.52, 0.61, 0.25])
def test_thresholds_get_the_gradient_of_the_smoothed_function(kernel: str, h: float) -> None:  # F23
    """Against central differences of the expectation, for f, for its count, and for the input."""
    theta, eps, d = 0.5, 0.3, 1e-3
    activation = jumprelu(threshold=theta, bandwidth=eps, kernel=kernel, ste_to_input=True)
    for what in ("step", "jump"):
        x = torch.full((1, F), h, dtype=torch.float64, requires_grad=True)
        out = activation.count(x) if what == "step" else activation.select(x)
        activation.zero_grad()
        out.sum().backward()
        k = KERNELS[kernel]
        by_theta = smoothed(k, what, h, theta + d, eps) - smoothed(k, what, h, theta - d, eps)
        torch.testing.assert_close(
            activation.threshold.grad[0].item(), by_theta / (2 * d), rtol=0.01, atol=2e-3
        )
        by_h = smoothed(k, what, h + d, theta, eps) - smoothed(k, what, h - d, theta, eps)
        hard = float(h > theta) if what == "jump" else 0.0  # exact, where the average is blurred
        blurred = smoothed(k, "step", h, theta, eps) if what == "jump" else 0.0
        want = by_h / (2 * d) - blurred + hard
        torch.testing.assert_close(x.grad[0, 0].item(), want, rtol=0.01, atol=5e-3)


def test_kernels_are_densities() -> None:  # F23
    u = torch.linspace(-9, 9, 180_001, dtype=torch.float64)
    for kernel in KERNELS.values():
        assert kernel(u).sum().item() * 1e-4 == pytest.approx(1, abs=1e-3)


def test_the_input_gets_no_pseudo_gradient_unless_asked() -> None:  # F23
    h = H.clone().requires_grad_()
    activation = jumprelu(threshold=0.5, bandwidth=1.0)
    assert torch.autograd.grad(activation.count(h).sum(), h, allow_unused=True) == (None,)
    activation.select(h).sum().backward()
    assert torch.equal(h.grad, (H > 0.5).double())
    assert activation.threshold.grad.abs().sum() > 0


def test_thresholds_far_from_all_latents_get_none() -> None:
    activation = jumprelu(threshold=90.0, bandwidth=1.0)
    (activation.select(H).sum() + activation.count(H).sum()).backward()
    assert not activation.threshold.grad.any()


def test_thresholds_move_to_lower_l0_and_stay_positive() -> None:  # F23
    counts = {}
    for coefficient in (0.001, 0.05):
        penalty = {"name": "l0", "coefficient": coefficient, "warmup_fraction": 0}
        sae = JUMPRELU.make(penalty=penalty)
        train(sae, 150)
        counts[coefficient] = l0(sae.encode(X)).float().mean().item()
        assert (sae.activation.threshold >= 0).all()
        assert (sae.activation.threshold != 0.3).any()
    assert counts[0.05] < 0.8 * counts[0.001]
    sae.activation.threshold.data.fill_(-1.0)
    sae.after_step()
    assert (sae.activation.threshold == 0).all()


# -- the inference threshold of batchtopk ----------------------------------------------------------


def test_the_average_starts_at_the_first_value_and_ignores_empty_batches() -> None:  # F60
    activation = make_activation(BatchTopKConfig(k=1, threshold_decay=0.9), 3)
    activation.observe(torch.zeros(4, 3))
    assert activation.threshold == 0
    for least in (2.0, 4.0):
        activation.observe(torch.tensor([[0.0, least, 9.0]]))
    assert activation.threshold.item() == pytest.approx(0.9 * 2 + 0.1 * 4)
    assert activation.observed == 2


@pytest.mark.parametrize("k", [1, 2.5, 3.3])
def test_calibration_finds_the_threshold_with_k_latents_per_token(k: float) -> None:  # F60
    h, threshold = torch.randn(3000, F), torch.tensor(0.0)
    calibrator = Calibrator(k, 2500, threshold)
    more = [calibrator.update(part) for part in h.split(700)]
    assert more[:3] == [True] * 3
    assert not more[3]
    calibrator.finish()
    mean_l0 = (h[:2500] > threshold).sum().item() / 2500
    assert mean_l0 == pytest.approx(k, rel=0.002)
    exact = h[:2500].reshape(-1).sort(descending=True).values[round(k * 2500) - 1]
    assert threshold.item() == pytest.approx(exact.item(), rel=1e-3)


def test_calibration_without_rows_or_firing() -> None:
    threshold = torch.tensor(0.7)
    Calibrator(2, 10, threshold).finish()
    assert threshold == pytest.approx(0.7)
    calibrator = Calibrator(2, 10, threshold)
    calibrator.update(-torch.ones(10, 3))
    calibrator.finish()
    assert threshold == 0  # every positive latent fires, and there is none


@pytest.mark.parametrize("row", [BATCHTOPK, MATRYOSHKA], ids=lambda r: r.name)
def test_inference_reproduces_the_mean_l0(row) -> None:  # F60
    sae = row.make(dead_after_tokens=10**6)
    train(sae, 300)
    averaged = l0(sae.encode(X)).float().mean().item()
    assert 1.7 < averaged < 3.5  # the average of minima is low, so more than k fire
    sae.calibrate({HOOK: part} for part in X.split(1000))
    assert l0(sae.to_inference().encode(X)).float().mean().item() == pytest.approx(2, rel=0.01)


def test_a_gated_sae_averages_the_threshold_of_its_gate() -> None:
    values = {**GATED.config(), "activation": {"name": "batchtopk", "k": 2}}
    torch.manual_seed(0)
    sae = make_sae(values, SPACES)
    with torch.no_grad():
        sae.b_mag += 100  # far above any gate
    sae.note_firing(sae.losses({HOOK: X[:64]}, END).codes)
    assert 0 < sae.activation.threshold < 50


def test_training_from_a_store_calibrates_on_held_out_rows(tmp_path: Path) -> None:  # F60
    sae = {"name": "batchtopk", "n_latents": 48, "k": 4}
    planted_store(tmp_path / "store")
    cfg = settings(tmp_path / "store", tmp_path / "runs", sae=sae)
    run_dir = run_training(cfg).run_dir
    evaluated = json.loads((run_dir / "eval.json").read_text())
    assert evaluated["l0"] == pytest.approx(4, rel=0.01)
    assert load_sae(run_dir / "sae").activation == "jumprelu"
