"""Every rule of conf/optim against ten lines of NumPy, its state through tensors, and averages."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from saetrain.cli import settings_from
from saetrain.errors import ConfigError
from saetrain.optim import Optimizer, base_lr
from saetrain.optim_settings import READS, OptimSettings
from saetrain.presets import config_dir

RULES = sorted(READS)
LR = 0.01


class Small(nn.Module):
    """A matrix and a vector; float64 where the rule allows it."""

    def __init__(self, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (6, 4)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W = nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator))
        self.b = nn.Parameter(torch.randn(shape[1], dtype=dtype, generator=generator))


def settings(name: str, **more) -> OptimSettings:
    return OptimSettings(name=name, lr=LR, clip_norm=None, **more)  # type: ignore[arg-type]


def gradients(module: nn.Module, n: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{k: rng.normal(size=p.shape) for k, p in module.named_parameters()} for _ in range(n)]


def stepped(module: nn.Module, optim: Optimizer, grads, factors=None) -> None:
    for i, grad in enumerate(grads):
        for name, p in module.named_parameters():
            p.grad = torch.tensor(grad[name], dtype=p.dtype)
        optim.step(1.0 if factors is None else factors[i])
        optim.average()


def adamw(w, grads, lrs, decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    """Loshchilov and Hutter (2019), algorithm 2, without the schedule multiplier."""
    m = v = np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = w * (1 - lr * decay)
        w = w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return w


def signum(w, grads, lrs, decay):
    m = np.zeros_like(w)
    for g, lr in zip(grads, lrs, strict=True):
        m = 0.95 * m + 0.05 * g
        w = w * (1 - lr * decay) - lr * np.sign(m)
    return w


def schedule_free(w, grads, lrs, rule):
    """Defazio et al. (2024): (y, x) with x, z written out and y recomputed; no first moment."""
    x = z = w
    v, total, top, beta = np.zeros_like(w), 0.0, 0.0, 0.9 if rule == "adam" else 0.95
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        v = 0.999 * v + 0.001 * g**2
        adam = g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        z = z - lr * (adam if rule == "adam" else np.sign(g))
        top = max(top, lr)
        total += top**2
        x = x + (top**2 / total) * (z - x)
    return (1 - beta) * z + beta * x, x


def muon(w, grads, lr):
    """Jordan et al. (2024): five quintic steps to U V^T, times 0.2 sqrt(max(A, B)) lr."""
    m = np.zeros_like(w)
    for g in grads:
        m = 0.95 * m + 0.05 * g
        u = 0.05 * g + 0.95 * m  # Nesterov
        x = (u.T if u.shape[0] > u.shape[1] else u) / np.linalg.norm(u)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        x = x.T if u.shape[0] > u.shape[1] else x
        w = w - lr * 0.2 * math.sqrt(max(w.shape)) * x
    return w


FACTORS = [0.5, 1.0, 1.0, 0.25]


@pytest.mark.parametrize("name", ["W", "b"])
@pytest.mark.parametrize(
    ("chosen", "reference"),
    [
        (settings("adam"), adamw),
        (settings("adamw", weight_decay=0.3), lambda w, g, lrs: adamw(w, g, lrs, 0.3)),
        (settings("signum", weight_decay=0.2), lambda w, g, lrs: signum(w, g, lrs, 0.2)),
        (settings("schedulefree"), lambda w, g, lrs: schedule_free(w, g, lrs, "adam")[0]),
        (
            settings("schedulefree", rule="sign"),
            lambda w, g, lrs: schedule_free(w, g, lrs, "sign")[0],
        ),
    ],
    ids=lambda v: f"{v.name}-{v.rule}" if isinstance(v, OptimSettings) else "",
)
def test_each_rule_is_its_paper(chosen: OptimSettings, reference, name: str) -> None:
    module = Small()
    start = module.get_parameter(name).detach().numpy().copy()
    grads = gradients(module, 4)
    stepped(module, Optimizer(module, chosen, 8), grads, FACTORS)
    expected = reference(start, [g[name] for g in grads], [LR * f for f in FACTORS])
    np.testing.assert_allclose(module.get_parameter(name).detach(), expected, rtol=1e-9)


def test_muon_takes_matrices_and_adam_the_rest() -> None:
    module = Small(torch.float32, (24, 16))
    start = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    grads = gradients(module, 3)
    stepped(module, Optimizer(module, settings("muon"), 8), grads)
    expected = muon(start["W"], [g["W"] for g in grads], LR)
    moved = np.linalg.norm(expected - start["W"])
    # torch iterates in bfloat16, 8 bits: about 1 % of the way.
    assert np.linalg.norm(module.W.detach().numpy() - expected) < 0.02 * moved
    vector = adamw(start["b"], [g["b"] for g in grads], [LR] * 3)
    np.testing.assert_allclose(module.b.detach(), vector, rtol=1e-5)


def test_adam_in_8_bits_is_adam_to_the_error_of_8_bits() -> None:
    pytest.importorskip("bitsandbytes")
    module = Small(torch.float32, (96, 64))  # 6,144 entries: 4,096 and more are kept in 8 bits
    start = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    grads = gradients(module, 5)
    optim = Optimizer(module, settings("adam8bit"), 8)
    stepped(module, optim, grads)
    assert optim.tensors()["W/state1"].dtype == torch.uint8
    exact = {n: adamw(start[n], [g[n] for g in grads], [LR] * 5) for n in start}
    np.testing.assert_allclose(module.b.detach(), exact["b"], rtol=1e-4)
    off = np.linalg.norm(module.W.detach().numpy() - exact["W"])
    assert 0 < off < 0.1 * np.linalg.norm(exact["W"] - start["W"])


def test_adam8bit_leaves_encoders_one_latent_after_the_other() -> None:  # F18
    pytest.importorskip("bitsandbytes")
    module = nn.Module()
    module.W_enc = nn.Parameter(torch.randn(96, 64).T)  # (D, F)
    optim = Optimizer(module, settings("adam8bit"), 96)
    start = module.W_enc.detach().clone()
    module.W_enc.grad = torch.randn(96, 64).T
    optim.step(1.0)
    assert module.W_enc.stride() == (1, 64)
    assert (module.W_enc != start).all()


@pytest.mark.parametrize("name", RULES)
def test_state_goes_through_tensors(name: str) -> None:
    """Six steps at once, and three, saved, loaded into a new optimizer, and three."""
    if name == "adam8bit":
        pytest.importorskip("bitsandbytes")
    more = {} if name == "schedulefree" else {"ema_decay": 0.9}
    dtype = torch.float64 if name in ("signum", "schedulefree") else torch.float32
    whole, first, second = (Small(dtype, (96, 64)) for _ in range(3))
    grads = gradients(whole, 6)
    unbroken = Optimizer(whole, settings(name, **more), 8)
    stepped(whole, unbroken, grads, [0.5, 1, 1, 1, 0.5, 0.1])
    optim = Optimizer(first, settings(name, **more), 8)
    assert optim.tensors() == {}
    stepped(first, optim, grads[:3], [0.5, 1, 1])
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second, settings(name, **more), 8)
    resumed.load_tensors({k: v.clone() for k, v in optim.tensors().items()})
    stepped(second, resumed, grads[3:], [1, 0.5, 0.1])
    assert torch.equal(whole.W, second.W)
    assert torch.equal(whole.b, second.b)
    a, b = unbroken.averages(), resumed.averages()
    assert a.keys() == b.keys() == {"W", "b"}
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", RULES)
def test_replaced_entries_have_no_history(name: str) -> None:
    """A replaced row takes its next step as if it stood at the second step with no past."""
    if name == "adam8bit":
        pytest.importorskip("bitsandbytes")
    module = Small(torch.float32, (96, 64))
    optim = Optimizer(module, settings(name), 8)
    grads = gradients(module, 2)
    stepped(module, optim, grads[:1])
    with torch.no_grad():
        module.W[3] = 7.0
    optim.forget({"W": (torch.tensor([3]),)})
    before = module.W.detach().clone()
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optim.step(1.0)
    moved = (module.W.detach() - before).abs().amax(1)
    if name != "schedulefree":  # its average has only one step to average yet
        assert float(moved[4]) > 0.01 * LR, "the others have a past"
    if name != "muon":  # it mixes rows
        assert float(moved[3]) <= 1e-3 * LR
    if name == "schedulefree":
        torch.testing.assert_close(optim.averages()["W"][3], before[3])


def test_averages_of_weights() -> None:
    """The average after n steps, written out; the trained weights come back afterwards."""
    module = Small()
    optim = Optimizer(module, settings("adam", ema_decay=0.3), 8)
    assert optim.averages() == {}
    expected = None
    for n, grad in enumerate(gradients(module, 6)):
        stepped(module, optim, [grad])
        decay = min(0.3, n / (n + 9))
        now = module.W.detach().numpy().copy()
        expected = now if expected is None else decay * expected + (1 - decay) * now
    trained, called = module.W.detach().clone(), []
    with optim.averaged(lambda: called.append(module.W.detach().clone())):
        np.testing.assert_allclose(module.W.detach(), expected, rtol=1e-12)
    torch.testing.assert_close(called[0], torch.from_numpy(expected))
    assert torch.equal(module.W, trained)
    with pytest.raises(ZeroDivisionError), optim.averaged(lambda: None):
        _ = 1 / 0
    assert torch.equal(module.W, trained)


def test_schedule_free_evaluates_its_average() -> None:
    module = Small()
    start, grads = module.W.detach().numpy().copy(), gradients(module, 4)
    optim = Optimizer(module, settings("schedulefree"), 8)
    stepped(module, optim, grads, FACTORS)
    y, x = schedule_free(start, [g["W"] for g in grads], [LR * f for f in FACTORS], "adam")
    with optim.averaged(lambda: None):
        np.testing.assert_allclose(module.W.detach(), x, rtol=1e-9)
    np.testing.assert_allclose(module.W.detach(), y, rtol=1e-9)


def test_thresholds_have_a_rate_of_their_own() -> None:  # F65
    from saetrain.saes import make_sae
    from saetrain.saes.base import HookSpace

    space = HookSpace(name="h", d=8, mean=torch.zeros(8), mean_norm=1.0, variance=1.0)
    sae = make_sae({"name": "jumprelu", "n_latents": 16}, {"h": space})
    optim = Optimizer(sae, settings("adam", jumprelu_lr_factor=0.5), 16)
    (label,) = set(optim.groups) - {"default"}
    assert optim.groups[label] == ("activation.threshold",)
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}
    for p in sae.parameters():
        p.grad = torch.ones_like(p)
    optim.step(1.0)
    for name, p in sae.named_parameters():
        rate = LR * 0.5 if name == "activation.threshold" else LR
        torch.testing.assert_close(before[name] - p, torch.full_like(p, rate), rtol=1e-4, atol=0)
    with pytest.raises(ConfigError, match=r"optim.jumprelu_lr_factor=0.5: expected .*W, b"):
        Optimizer(Small(), settings("adam", jumprelu_lr_factor=0.5), 8)


@pytest.mark.parametrize(
    "path", sorted((config_dir() / "optim").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_file_of_the_group_composes(path: Path) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        got = settings_from(compose("train", ["store=x", "epochs=1", f"optim={path.stem}"]))
    assert got.optim.name == path.stem
    assert got.schedule.decay_fraction == (0.0 if path.stem == "schedulefree" else 0.2)
    assert {p.stem for p in path.parent.glob("*.yaml")} == set(READS)


@pytest.mark.parametrize(
    ("name", "lr"),
    [("adam", 4e-4), ("signum", 4e-4), ("muon", 4e-4), ("schedulefree", 2e-3)],
)
def test_default_rates(name: str, lr: float) -> None:
    assert base_lr(OptimSettings(name=name), 2**12) == lr  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"momentum": 0.9}, r"optim.momentum=0.9 has no effect: optim.name=adam reads lr, betas"),
        ({"name": "signum", "eps": 1e-6}, "optim.eps=1e-06 has no effect"),
        ({"name": "schedulefree", "momentum": 0.9}, "optim.momentum=0.9 has no effect"),
        ({"name": "schedulefree", "ema_decay": 0.9}, "both average"),
        ({"name": "schedulefree", "betas": (0.0, 0.9)}, "give > 0"),
        ({"ema_decay": 1.0}, "optim.ema_decay: expected between 0 and 1"),
        ({"name": "adamw", "weight_decay": -1.0}, "optim.weight_decay"),
        ({"jumprelu_lr_factor": 0.0}, "optim.jumprelu_lr_factor"),
    ],
)
def test_what_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimSettings(**values)


@pytest.mark.parametrize(
    ("name", "package"), [("schedulefree", "schedulefree"), ("adam8bit", "bitsandbytes")]
)
def test_a_missing_package_is_named(name: str, package: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        Optimizer(Small(), settings(name), 8)


def test_an_old_torch_has_no_muon(monkeypatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"needs torch 2\.9"):
        Optimizer(Small(), settings("muon"), 8)
