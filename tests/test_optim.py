"""The learning rate as a closed form, Adam against ten lines of NumPy, groups, clipping, state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from saetrain.errors import ConfigError, TrainingError
from saetrain.optim import Optimizer, base_lr, schedule_factor
from saetrain.settings import OptimSettings, ScheduleSettings


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
        self.threshold = nn.Parameter(torch.tensor([0.1, 0.2]))

    def loss(self, scale: float = 1.0) -> torch.Tensor:
        return scale * (self.W.square().sum() + (self.threshold * self.W[0]).sum())


def trapezoid(n: int, up: int, down: int) -> list[float]:
    """Warm-up, plateau and decay written out one after the other."""
    rise = [(i + 1) / up for i in range(up)]
    fall = [(down - i) / down for i in range(down)]
    return rise + [1.0] * (n - up - down) + fall


@pytest.mark.parametrize(
    ("n", "settings", "up", "down"),
    [
        (100, {}, 5, 20),  # the defaults
        (100, {"warmup_fraction": 0.1, "decay_fraction": 0.5}, 10, 50),
        (50, {"warmup_steps": 7, "decay_fraction": 0.0}, 7, 0),
        (10, {"warmup_steps": 0, "decay_fraction": 1.0}, 0, 10),
        (1, {}, 0, 0),
    ],
)
def test_schedule_is_the_closed_form(n: int, settings: dict, up: int, down: int) -> None:
    got = [schedule_factor(t, n, ScheduleSettings(**settings)) for t in range(n)]
    assert got == pytest.approx(trapezoid(n, up, down), abs=1e-15)
    assert all(0 < f <= 1 for f in got)


def test_default_rate_follows_the_number_of_latents() -> None:
    assert base_lr(OptimSettings(), 2**14) == 2e-4
    assert base_lr(OptimSettings(), 2**12) == 4e-4
    assert base_lr(OptimSettings(lr=0.5), 2**12) == 0.5


def test_short_runs_get_a_higher_rate_up_to_a_limit() -> None:
    adam = OptimSettings()
    for n_latents in (2**12, 2**14, 2**16):
        long = base_lr(adam, n_latents)
        assert [base_lr(adam, n_latents, 2**n) for n in (15, 16, 20)] == [long] * 3
        assert base_lr(adam, n_latents, 2**13) == pytest.approx(2 * long)
        rates = [base_lr(adam, n_latents, n) for n in (1, 30, 500, 5000, 2**15)]
        assert rates == sorted(rates, reverse=True)
        assert max(rates) <= 1e-2
    assert base_lr(adam, 2**14, 1) == 1e-2
    assert base_lr(adam, 4, 10) == base_lr(adam, 4) > 1e-2  # the limit takes nothing away
    assert base_lr(OptimSettings(lr=0.5), 2**12, 10) == 0.5
    for name, faster in (
        ("muon", True),
        ("adamw", True),
        ("signum", False),
        ("schedulefree", False),
    ):
        rule = OptimSettings(name=name)
        assert (base_lr(rule, 2**14, 500) > base_lr(rule, 2**14)) is faster


def numpy_adam(grads: list[np.ndarray], w: np.ndarray, lrs: list[float], clip: float) -> np.ndarray:
    """Kingma and Ba (2014), algorithm 1, after clipping the gradient's norm."""
    m = v = np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        g = g * min(1.0, clip / (np.linalg.norm(g) + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    return w


def test_steps_are_adam_on_the_clipped_gradient() -> None:
    w = np.array([1.0, -2.0, 3.0])
    grads = [np.array(g) for g in ([3.0, 4.0, 0.0], [0.1, 0.0, -0.2], [-9.0, 1.0, 2.0])]
    factors = [0.5, 1.0, 0.25]
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    optim = Optimizer(module, OptimSettings(lr=0.1, betas=(0.9, 0.99), clip_norm=1.0), 8)
    for grad, factor in zip(grads, factors, strict=True):
        module.w.grad = torch.tensor(grad)
        assert float(optim.clip()) == pytest.approx(np.linalg.norm(grad))
        optim.step(factor)
        assert module.w.grad is None
    expected = numpy_adam(grads, w, [0.1 * f for f in factors], 1.0)
    np.testing.assert_allclose(module.w.detach().numpy(), expected, rtol=1e-7)


def test_the_number_of_threads_does_not_change_the_bits() -> None:
    def trained(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        module = nn.Module()
        module.w = nn.Parameter(torch.linspace(-3, 3, 100_003))
        optim = Optimizer(module, OptimSettings(lr=0.1), 8)
        for i in range(3):
            module.w.grad = torch.sin(module.w.detach() * (i + 1))
            optim.step(1.0)
        return module.w.detach()

    before = torch.get_num_threads()
    try:
        assert torch.equal(trained(1), trained(3))
    finally:
        torch.set_num_threads(before)


def test_without_clipping_the_norm_is_reported_and_the_gradient_left() -> None:
    module = Two()
    optim = Optimizer(module, OptimSettings(clip_norm=None), 8)
    module.loss(1e3).backward()
    before = module.W.grad.clone()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))
    assert float(optim.clip()) == pytest.approx(norm)
    assert torch.equal(module.W.grad, before)


def test_a_named_group_has_its_own_rate() -> None:  # F65
    module = Two()
    settings = OptimSettings(lr=0.1, lr_factors={"thresh*": 0.1})
    optim = Optimizer(module, settings, 8)
    assert optim.groups == {"default": ("W",), "thresh*": ("threshold",)}
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    module.loss().backward()
    optim.step(0.5)
    # The first Adam step moves every entry by the rate, whatever the gradient.
    assert (module.W - before["W"]).abs().detach().numpy() == pytest.approx(0.05, rel=1e-5)
    moved = (module.threshold - before["threshold"]).abs().detach().numpy()
    assert moved == pytest.approx(0.005, rel=1e-5)


@pytest.mark.parametrize("factors", [{"nothing": 0.1}, {"W": 0.0}])
def test_a_group_that_cannot_be_is_refused_with_the_names(factors: dict) -> None:
    with pytest.raises(ConfigError, match=r"optim.lr_factors.*W, threshold"):
        Optimizer(Two(), OptimSettings(lr_factors=factors), 8)


def test_state_goes_through_tensors() -> None:
    one, other = Two(), Two()
    optim, fresh = (Optimizer(m, OptimSettings(lr=0.1), 8) for m in (one, other))
    assert optim.tensors() == {}
    for _ in range(3):
        one.loss().backward()
        optim.step(1.0)
    other.load_state_dict(one.state_dict())
    fresh.load_tensors(optim.tensors())
    for module, each in ((one, optim), (other, fresh)):
        module.loss().backward()
        each.step(1.0)
    assert torch.equal(one.W, other.W)
    with pytest.raises(TrainingError, match="no parameter"):
        fresh.load_tensors({"V/step": torch.zeros(())})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimSettings(lr=-1.0), "optim.lr"),
        (lambda: OptimSettings(betas=(0.9, 1.0)), "optim.betas"),
        (lambda: ScheduleSettings(warmup_fraction=0.1, warmup_steps=3), "not both"),
        (lambda: ScheduleSettings(decay_fraction=1.5), "decay_fraction"),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
