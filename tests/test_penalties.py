"""Penalties against sums written out, their schedules, and every pair with every activation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from saes_rows import HOOK, SPACES, D, X, train
from torch import Tensor

from saetrain.activations import ReLUConfig, make_activation
from saetrain.codes import SparseCodes, topk_codes
from saetrain.errors import ConfigError
from saetrain.penalties import (
    PENALTIES,
    L1Config,
    LpConfig,
    TanhConfig,
    TanhQuadConfig,
    make_penalty,
)
from saetrain.progress import Progress
from saetrain.saes import make_sae

END = Progress(step=1000, n_steps=1000, tokens=1)
N, F = 9, 7
H = torch.randn(N, F, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NORMS = torch.rand(F, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
PLAIN = make_activation(ReLUConfig(), F)


def tanh(v: float) -> float:
    return math.tanh(3 * v)


def by_hand(cfg: Any, f: Tensor, norms: Tensor) -> float:
    """One latent of one token at a time."""
    v = [[f[n, i].item() * norms[i].item() for i in range(F)] for n in range(N)]
    if isinstance(cfg, L1Config):
        return sum(sum(row) for row in v) / N
    if isinstance(cfg, TanhConfig):
        return sum(sum(tanh(a) for a in row) for row in v) / N
    if isinstance(cfg, LpConfig):
        return sum(sum((a + 0.01) ** 0.6 - 0.01**0.6 for a in row) for row in v) / N
    density = [sum(tanh(v[n][i]) for n in range(N)) / N for i in range(F)]
    return sum(p * (1 + p / 0.2) for p in density)


FORMULAS = [
    L1Config(coefficient=0.5),
    TanhConfig(coefficient=0.5, stretch=3),
    TanhQuadConfig(coefficient=0.5, stretch=3, density=0.2),
    LpConfig(coefficient=0.5, p=0.6, epsilon=0.01),
]


@pytest.mark.parametrize("cfg", FORMULAS, ids=lambda c: c.name)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_penalties_equal_their_formulas(cfg: Any, sparse: bool, weighted: bool) -> None:  # F61
    codes = topk_codes(H, 3) if sparse else H.relu()
    f = codes.dense() if isinstance(codes, SparseCodes) else codes
    norms = NORMS if weighted else None
    got = make_penalty(cfg, PLAIN)(codes, None, norms, END)
    assert got.item() == pytest.approx(
        0.5 * by_hand(cfg, f, NORMS if weighted else torch.ones(F)), rel=1e-6
    )


@pytest.mark.parametrize("cfg", FORMULAS, ids=lambda c: c.name)
def test_gradients_are_right(cfg: Any) -> None:  # F61
    penalty = make_penalty(cfg, PLAIN).double()
    f = (H.abs() + 0.1).requires_grad_()
    norms = NORMS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, n: penalty(f, None, n, END), (f, norms))


def test_sparse_and_dense_codes_pay_the_same_and_tokens_may_be_in_contexts() -> None:
    for cfg in FORMULAS:
        penalty = make_penalty(cfg, PLAIN)
        sparse = topk_codes(H, 3)
        want = penalty(sparse.dense(), None, NORMS, END)
        torch.testing.assert_close(penalty(sparse, None, NORMS, END), want)
        in_contexts = penalty(sparse.dense().reshape(3, 3, F), None, NORMS, END)
        torch.testing.assert_close(in_contexts, want)


def test_a_slope_at_zero_is_finite() -> None:
    f = torch.zeros(2, F, requires_grad=True)
    make_penalty(LpConfig(coefficient=1.0, p=0.3), PLAIN)(f, None, None, END).backward()
    assert f.grad.isfinite().all()


def test_coefficients_warm_up_linearly() -> None:
    penalty = make_penalty(L1Config(coefficient=2.0, warmup_fraction=0.25), PLAIN)
    full = penalty(H.relu(), None, None, END)
    for step, expected in ((0, 0.0), (10, 0.4), (25, 1.0), (99, 1.0)):
        at = Progress(step=step, n_steps=100, tokens=8)
        assert penalty.coefficient(at) == pytest.approx(2 * expected)
        torch.testing.assert_close(penalty(H.relu(), None, None, at), expected * full)


# -- p-anneal --------------------------------------------------------------------------------------


def annealed() -> Any:
    cfg = LpConfig(coefficient=1.0, p_end=0.2, anneal_from=0.2, anneal_updates=4, warmup_fraction=0)
    return make_penalty(cfg, PLAIN)


def test_p_falls_in_equal_steps() -> None:
    penalty = annealed()
    p = [penalty.p_at(Progress(step=s, n_steps=1000, tokens=1)) for s in range(1000)]
    assert p[:200] == [1.0] * 200
    assert sorted(set(p), reverse=True) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert p == sorted(p, reverse=True)
    lengths = [p.count(value) for value in sorted(set(p), reverse=True)]
    assert max(lengths[1:]) - min(lengths[1:]) <= 2  # each in force for as long as the others


def test_the_penalty_does_not_jump_where_p_falls() -> None:
    """On the same codes it keeps its value through every change; only its shape changes."""
    penalty, values = annealed(), []
    for step in range(100):
        values.append(penalty(H.relu(), None, None, Progress(step=step, n_steps=100, tokens=1)))
        penalty.settle()
    torch.testing.assert_close(torch.stack(values), values[0].expand(100))
    assert penalty.factor != 1


def test_the_rescaling_survives_a_checkpoint() -> None:
    penalty, other = annealed(), annealed()
    for step in range(60):
        penalty(H.relu(), None, None, Progress(step=step, n_steps=100, tokens=1))
        penalty.settle()
    other.load_state_dict(penalty.state_dict())
    at = Progress(step=60, n_steps=100, tokens=1)
    assert torch.equal(penalty(H.relu(), None, None, at), other(H.relu(), None, None, at))


def test_looking_at_a_loss_twice_does_not_rescale_twice() -> None:
    penalty = annealed()
    change = next(
        at
        for at in (Progress(step=s, n_steps=100, tokens=1) for s in range(100))
        if penalty.p_at(at) != 1
    )
    first = penalty(H.relu(), None, None, change)
    assert torch.equal(first, penalty(H.relu(), None, None, change))


# -- every activation with every penalty in every architecture -------------------------------------

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "jumprelu": {"threshold": 0.1, "bandwidth": 0.5},
    "groupmax": {"k": 4},
}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "sae": {},
    "gated": {"auxk_alpha": 0},
    # Rows of length 0.1, the preset's, would start far below jumprelu's threshold.
    "matryoshka": {"group_sizes": [8, 24], "init_norm": 1.0},
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("penalty", [None, *PENALTIES])
def test_any_activation_goes_with_any_penalty_in_any_architecture(  # F60 F61
    topology: str, activation: str, penalty: str | None
) -> None:
    values = {
        "name": topology,
        "n_latents": 32,
        "expansion_factor": None,
        "k": None,
        "l1_coefficient": None,
        "activation": {"name": activation, **ACTIVATIONS[activation]},
        "penalty": penalty and {"name": penalty, "coefficient": 0.01},
        **TOPOLOGIES[topology],
    }
    torch.manual_seed(0)
    if penalty == "l0" and activation != "jumprelu":
        with pytest.raises(ConfigError, match=f"l0 with sae.activation.name={activation}"):
            make_sae(values, SPACES)
        return
    if penalty is None and activation in ("relu", "jumprelu"):
        with pytest.warns(UserWarning, match="nothing makes latents sparse"):
            sae = make_sae(values, SPACES)
    else:
        sae = make_sae(values, SPACES)
    first, *_, last = train(sae, 20, batch=128)
    assert last < first
    losses = sae.losses({HOOK: X[:64]}, END)
    assert (penalty in losses.terms) is (penalty is not None)
    assert sae.to_inference()(X[:3])["sae_out"].shape == (3, D)
