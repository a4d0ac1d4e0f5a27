"""ReLU and JumpReLU at high sparsity: lists of what fires, against dense codes and autograd."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from saes_reference import jumprelu_oracle
from saes_rows import END, HOOK, SPACES, X
from saes_rows_multi import CLT, CROSSCODER, TRANSCODER, LinkedRow
from test_topk_step import Recorder
from torch import Tensor, nn

from saetrain.activations import JumpReLU
from saetrain.codes import SparseCodes, dense
from saetrain.init import transposed
from saetrain.kernels import above as kernel
from saetrain.kernels import encode
from saetrain.kernels.above import above, encode_above
from saetrain.saes import make_sae
from saetrain.saes.base import SAE

JUMP = {"name": "jumprelu", "threshold": 0.3, "bandwidth": 0.3}
L0 = {"name": "l0", "coefficient": 0.02, "warmup_fraction": 0}


def a_jumprelu(**more: Any) -> SAE:
    torch.manual_seed(0)
    values = {"name": "sae", "n_latents": 48, "activation": JUMP, "penalty": L0, "aux_k": 0}
    sae = make_sae(values | more, SPACES).double()
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.1 * torch.randn_like(p)
    return sae


def step(sae: SAE, x: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Loss terms and gradients by name, and the codes."""
    sae.zero_grad()
    losses = sae.losses(x, END)
    losses.total.backward()
    found = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
    return {**losses.terms, **found}, losses.codes


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Terms and gradients of a step by lists and by dense codes, both checked to be so."""

    def run(sae: SAE, x: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        monkeypatch.setattr(kernel, "LEAST", 8)
        monkeypatch.setattr(encode, "LEAST", 8)  # several pieces
        monkeypatch.setattr(encode, "CACHED", 8 * 48)
        results = []
        for limit, form in ((2.0, SparseCodes), (-1.0, Tensor)):
            monkeypatch.setattr(kernel, "DENSE", limit)
            found, codes = step(sae, x)
            assert isinstance(codes, form)
            results.append(found | {"codes": dense(codes)})
        return results[0], results[1]

    return run


# -- the list --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_latents", [7, 64, 100])
@pytest.mark.parametrize("compiled", [True, False])
def test_everything_above_the_floor_is_found_in_order(
    n_latents: int, compiled: bool, request: pytest.FixtureRequest
) -> None:  # F118
    if not compiled:
        request.getfixturevalue("uncompiled")
    torch.manual_seed(n_latents)
    h_BF, floor_F = torch.randn(9, n_latents), torch.randn(n_latents)
    h_BF[2], h_BF[3, 5], h_BF[4] = -9.0, torch.nan, floor_F  # none; kept; equal is not above
    want = [
        b * n_latents + i
        for b in range(9)
        for i in range(n_latents)
        if not h_BF[b, i] <= floor_F[i]
    ]
    values, latents, counts = above(h_BF, floor_F)
    at = torch.arange(9).repeat_interleave(counts) * n_latents + latents
    assert at.tolist() == want
    assert torch.equal(values.nan_to_num(), h_BF.flatten()[at].nan_to_num())
    assert 3 * n_latents + 5 in want


def test_a_nan_in_the_input_reaches_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "DENSE", 2.0)
    x = X[:32].clone().double()
    x[4, 3] = torch.nan
    assert a_jumprelu().losses({HOOK: x}, END).total.isnan()


# -- the step --------------------------------------------------------------------------------------


def test_a_sparse_jumprelu_step_is_that_of_ten_dense_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # F23, F118
    monkeypatch.setattr(kernel, "DENSE", 2.0)
    sae, x = a_jumprelu(reconstruction="sse", scale="none", center="none"), X[:64].double()
    w = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f, steps = jumprelu_oracle(h, w["activation.threshold"], 0.3)
    e = x - f @ w["W_dec"] - w["b_dec"]
    loss = e.square().sum(1).mean() + 0.02 * steps.sum(1).mean()
    loss.backward()
    found, codes = step(sae, {HOOK: x})
    assert isinstance(codes, SparseCodes)
    torch.testing.assert_close(dense(codes), f.detach())
    torch.testing.assert_close(found["reconstruction"] + found["l0"], loss.detach())
    for name, p in w.items():
        torch.testing.assert_close(found[name], p.grad)
    assert w["activation.threshold"].grad.any()


PENALTIES: dict[str, dict[str, Any] | None] = {
    "l0": L0,
    "l0 with a target": {**L0, "target": 3.0},
    "l1": {"name": "l1", "coefficient": 0.1},
    "tanh": {"name": "tanh", "coefficient": 0.1},
    "tanh_quad": {"name": "tanh_quad", "coefficient": 0.1},
    "lp": {"name": "lp", "coefficient": 0.1, "p": 0.5},
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("more", [{}, {"kernel": "triangle"}, {"ste_to_input": True}])
def test_every_option_gives_the_dense_step(
    penalty: str, more: dict[str, Any], both: Any
) -> None:  # F23, F118
    sae = a_jumprelu(
        penalty=PENALTIES[penalty],
        activation=JUMP | more,
        decoder_norm="free" if more else "unit",
        aux_k=5,
        dead_after_tokens=10,
    )
    sae.tokens_since_fired[::3] = 99
    sparse, plain = both(sae, {HOOK: X[:64].double()})
    assert sparse.keys() == plain.keys()
    assert plain["auxk"] > 0
    for name, want in plain.items():
        torch.testing.assert_close(sparse[name], want, msg=lambda m, n=name: f"{n}: {m}")
    assert plain["activation.threshold"].any()


TOPOLOGIES = {"transcoder": TRANSCODER, "crosscoder": CROSSCODER, "clt": CLT}


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
@pytest.mark.parametrize("topology", [*TOPOLOGIES, "matryoshka"])
@pytest.mark.filterwarnings("ignore:nothing makes latents sparse")
def test_every_topology_gives_the_dense_step(topology: str, kind: str, both: Any) -> None:  # F60
    more: dict[str, Any] = {"activation": JUMP if kind == "jumprelu" else {"name": "relu"}}
    more |= {"penalty": PENALTIES["l0" if kind == "jumprelu" else "l1"], "init_norm": 1.0}
    more |= {"dead_after_tokens": 10, "auxk_alpha": 0.1, "aux_k": 4}
    if topology == "matryoshka":
        sae, x = a_jumprelu(name="matryoshka", group_sizes=[8, 8, 32], **more), {HOOK: X[:64]}
    else:
        row: LinkedRow = TOPOLOGIES[topology]
        short = {k: None for k in ("k", "l1_coefficient") if k in row.values}
        sae = dataclasses.replace(row, values=row.values | short).make(**more).double()
        x = row.batch(slice(64))
    sae.tokens_since_fired[::3] = 99
    sparse, plain = both(sae, {hook: v.double() for hook, v in x.items()})
    assert plain["auxk"] > 0
    for name, want in plain.items():
        torch.testing.assert_close(sparse[name], want, msg=lambda m, n=name: f"{n}: {m}")


def test_a_gaussian_reaches_everything_and_stays_dense() -> None:
    sae = a_jumprelu(activation=JUMP | {"kernel": "gaussian", "threshold": 3.0})
    assert isinstance(sae.losses({HOOK: X[:32].double()}, END).codes, Tensor)


def test_the_form_is_chosen_by_what_fires_in_this_batch() -> None:
    """Dense while many latents fire, a list once few do; the first tokens decide."""
    sae, x = a_jumprelu(activation=JUMP | {"bandwidth": 0.01}), {HOOK: X[:200].double()}
    assert isinstance(sae.losses(x, END).codes, Tensor)
    assert isinstance(sae.activation, JumpReLU)
    with torch.no_grad():
        h_BF = sae.pre_activations(sae.inputs(x), sae.weights())
        sae.activation.threshold.fill_(h_BF.flatten().topk(200)[0][-1] - 0.1)
    codes = sae.losses(x, END).codes
    assert isinstance(codes, SparseCodes)
    assert 0 < (codes.values > 0).sum() < 200 * 48 / 16


@pytest.mark.filterwarnings("ignore")  # of torch about torch, while it traces
def test_traced_losses_are_dense_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile cannot trace lists whose length is data; "eager" needs no C++ compiler."""
    monkeypatch.setattr(kernel, "DENSE", 2.0)
    sae, x = a_jumprelu(), {HOOK: X[:64].double()}
    want, codes = step(sae, x)
    assert isinstance(codes, SparseCodes)
    sae.zero_grad()
    torch._dynamo.reset()
    losses = torch.compile(sae.losses, backend="eager")(x, END)
    assert isinstance(losses.codes, Tensor)
    losses.total.backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, want[name])


def test_bf16_misses_few_and_computes_the_rest_exactly() -> None:
    torch.manual_seed(7)
    x_BD, b_F = torch.randn(512, 64), 0.1 * torch.randn(4096)
    W_DF = transposed(nn.functional.normalize(torch.randn(4096, 64), dim=1))
    floor_F = torch.full((4096,), 2.5)
    h_BF = x_BD @ W_DF + b_F
    found = encode_above(x_BD, W_DF, b_F, floor_F, bf16=True)
    assert found is not None
    (values, indices), used, _ = found
    exact = h_BF.gather(1, indices)
    torch.testing.assert_close(values[used], exact[used], rtol=1e-5, atol=1e-5)
    chosen = torch.zeros(512, 4097, dtype=torch.bool)
    chosen.scatter_(1, indices.where(used, torch.tensor(4096)), True)
    missed = (h_BF > floor_F) & ~chosen[:, :4096]
    n = (h_BF > floor_F).sum()
    assert missed.sum() <= 1e-4 * n
    coarse = x_BD.bfloat16() @ W_DF.bfloat16() + b_F.bfloat16()
    assert ((h_BF > floor_F) & (coarse <= floor_F)).sum() > 1e-3 * n  # the test can fail


# -- nothing dense ---------------------------------------------------------------------------------

FEW = {"name": "jumprelu", "threshold": 2.0, "bandwidth": 0.05}
TOPK, BATCHTOPK = {"name": "topk", "k": 4}, {"name": "batchtopk", "k": 4.0}


@pytest.mark.parametrize("topology", ["sae", "matryoshka", *TOPOLOGIES])
@pytest.mark.parametrize("activation", [TOPK, BATCHTOPK, FEW], ids=lambda a: a["name"])
@pytest.mark.filterwarnings("ignore:nothing makes latents sparse")
def test_no_tensor_of_batch_times_latents_after_the_product(
    topology: str, activation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:  # F118
    """Only batchtopk may hold the product itself (and boolean results over it), to select in it."""
    monkeypatch.setattr(encode, "CACHED", 128 * 2048)
    more = {"activation": activation, "penalty": L0 if activation is FEW else None}
    more |= {"n_latents": 2048, "init_norm": 1.0}
    if topology in ("sae", "matryoshka"):
        torch.manual_seed(0)
        sae, x = make_sae({"name": topology, **more}, SPACES), {HOOK: X[:1024]}
    else:
        row = TOPOLOGIES[topology]
        short = {k: None for k in ("k", "l1_coefficient") if k in row.values}
        sae = dataclasses.replace(row, values=row.values | short).make(**more)
        x = row.batch(slice(1024))
    layers = 3 if topology == "clt" else 1
    forward, backward = Recorder(1024 * 2048), Recorder(1024 * 2048 // 2)
    with forward:
        losses = sae.losses(x, END)
    with backward:
        losses.total.backward()
    assert isinstance(losses.codes, SparseCodes)
    assert (losses.codes.values > 0).any()
    assert losses.codes.values.numel() < layers * 1024 * 2048 / 4
    assert not backward.large
    product = {"addmm", "mm", "add_", "_linear_pointwise", "stack"}
    views = {"view", "reshape", "_unsafe_view", "unbind", "select", "slice", "t", "transpose"}
    allowed = product | views | {"detach", "alias"} if activation is BATCHTOPK else set()
    assert forward.large <= allowed, forward.large - allowed
