"""Every architecture under the same checks: one row each. What only one of them promises is in
test_dictionary.py, test_activations.py and test_penalties.py.

`python tests/test_saes.py` writes the golden loss curves anew; look at the difference before you
commit it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from saes_reference import (
    batchtopk_oracle,
    gated_reference,
    groupmax_oracle,
    jumprelu_oracle,
    l1_reference,
    matryoshka_reference,
    recovery,
    sae_reference,
    topk_oracle,
    weighted_relu_reference,
)
from saes_rows import (
    END,
    HOOK,
    SPACES,
    TRUE,
    UNITS,
    D,
    Row,
    X,
    above,
    assert_equal_gradients,
    exactly,
    on_average,
    one_of_each,
    shake,
    train,
    weights,
)
from torch import Tensor

from saetrain.artefact import load_sae
from saetrain.codes import dense, l0
from saetrain.saes import make_config
from saetrain.saes.base import SAE

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


def l1(f: Tensor, h: Tensor, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"l1": 0.05 * l1_reference(f)}


def p_half(f: Tensor, h: Tensor, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lp at the end of training, p = 0.5."""
    sizes = torch.stack([((row + 0.01) ** 0.5 - 0.01**0.5).sum() for row in f])
    return {"lp": 0.05 * sizes.mean()}


def step_count(f: Tensor, h: Tensor, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    steps = jumprelu_oracle(h, w["activation.threshold"], 0.5)[1]
    return {"l0": 0.01 * steps.sum() / len(h)}


TOPK = Row(
    name="topk",
    values={"k": 2, "aux_k": 3},
    trained=exactly(2),
    inferred=exactly(2),
    reference=sae_reference(lambda h, w: topk_oracle(h, 2), aux_k=3),
    recovers=0.95,
)
RELU = Row(
    name="relu",
    values={"l1_coefficient": 0.05},
    trained=above(0),
    inferred=above(0),
    reference=weighted_relu_reference,
)
VANILLA = Row(
    name="vanilla",
    values={"l1_coefficient": 0.05},
    recovery_values={"l1_coefficient": 0.1},
    trained=above(0),
    inferred=above(0),
    reference=sae_reference(lambda h, w: h.clamp(min=0), l1),
)
BATCHTOPK = Row(
    name="batchtopk",
    values={"k": 2, "aux_k": 3},
    trained=on_average(2),
    inferred=above(0),  # no step has set a threshold yet
    reference=sae_reference(lambda h, w: batchtopk_oracle(h, 2), aux_k=3),
    recovers=0.95,
)
JUMPRELU = Row(
    name="jumprelu",
    recovery_values={"penalty": {"name": "l0", "coefficient": 0.02}},
    values={
        "activation": {"name": "jumprelu", "threshold": 0.3, "bandwidth": 0.5},
        "penalty": {"name": "l0", "coefficient": 0.01},
        "scale": "sqrt_d",
        "reconstruction": "fvu",
    },
    trained=above(0.3),
    inferred=above(0.3),
    reference=sae_reference(
        lambda h, w: jumprelu_oracle(h, w["activation.threshold"], 0.5)[0], step_count
    ),
)
GATED = Row(
    name="gated",
    values={"l1_coefficient": 0.05},
    recovery_values={"l1_coefficient": 0.4},
    trained=above(0),
    inferred=above(0),
    reference=gated_reference,
)
MATRYOSHKA = Row(
    name="matryoshka",
    recovery_values={"group_sizes": (32, 16)},
    values={"k": 2, "group_sizes": (24, 16, 8), "aux_k": 3},
    trained=on_average(2),
    inferred=above(0),
    reference=matryoshka_reference([24, 16, 8], 2, 3),
)
P_ANNEAL = Row(
    name="p_anneal",
    recovery_values={"penalty": {"name": "lp", "coefficient": 0.08, "p_end": 0.5}},
    values={"penalty": {"name": "lp", "coefficient": 0.05, "p_end": 0.5, "epsilon": 0.01}},
    trained=above(0),
    inferred=above(0),
    reference=sae_reference(lambda h, w: h.clamp(min=0), p_half),
)
GROUPMAX = Row(
    name="sae",
    more="groupmax",
    values={"activation": {"name": "groupmax", "k": 4}, "aux_k": 3},
    trained=one_of_each(4),
    inferred=one_of_each(4),
    reference=sae_reference(lambda h, w: groupmax_oracle(h, 4), aux_k=3),
)
ROWS = [TOPK, RELU, VANILLA, BATCHTOPK, JUMPRELU, GATED, MATRYOSHKA, P_ANNEAL, GROUPMAX]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.more or r.name)


def gate_or_encoder_bias(sae: SAE) -> Tensor:
    return dict(sae.named_parameters()).get("b_gate", getattr(sae, "b_enc", None))


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
        gate_or_encoder_bias(sae).sub_(1.5)  # some tokens have fewer than k positive ones
        if row.name == "gated":
            sae.b_mag += 10  # what the gate lets through is positive
    w = sae.weights()
    h_BF = (sae.standardise(X) - w.b_dec) @ w.W_enc + w.b_enc
    assert (l0(sae.encode(X)) < 2).any()
    assert (dense(sae.encode(X)) >= 0).all()
    row.inferred(sae.encode(X), h_BF)
    row.trained(sae.losses({HOOK: X}, END).codes, h_BF)


@rows
@pytest.mark.parametrize("kind", ["fvu", "mse", "sse"])
def test_every_loss_term_and_gradient_equals_the_reference(  # F20 F21 F22 F23 F24 F32 F53
    row: Row, kind: str
) -> None:
    """Terms by ten dense lines, gradients by autograd through those; with dead latents."""
    sae = shake(row.make(reconstruction=kind, dead_after_tokens=50).double(), 0.3)
    sae.tokens_since_fired[::5] = 51
    w, x = weights(sae), X[:24].double()
    losses = sae.losses({HOOK: x}, END)
    losses.total.backward()
    x = (x - sae.in_center) * sae.in_scale
    want = row.reference(w, x, sae.dead, kind, sae.in_variance.item())
    assert list(losses.terms) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(losses.terms[name], value, msg=lambda m, n=name: f"{n}: {m}")
        assert value > 0, name
    sum(want.values()).backward()
    assert_equal_gradients(sae, w)
    assert losses.extras["fvu"] > 0


@rows
def test_every_weight_gets_a_gradient(row: Row) -> None:  # F19, F21
    sae = shake(row.make())
    sae.losses({HOOK: X[:512]}, END).total.backward()
    for name, p in sae.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@rows
def test_loss_falls_and_the_planted_dictionary_is_found(row: Row) -> None:
    sae = row.make(**row.recovery_values)
    assert recovery(sae, TRUE) < 0.6  # not there from the start
    losses = train(sae, 700, lr=row.lr)
    assert losses[-1] < 0.3 * losses[0]
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
    train(sae, 3)
    other = row.make(seed=9)
    other.load_state_dict(sae.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in sae.state_dict().items())
    sae.to_inference().save(tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.source["architecture"] == sae.name
    assert loaded.describe() == sae.to_inference().describe()
    for name, value in sae.to_inference()(X[:8]).items():
        assert torch.equal(loaded(X[:8])[name], value)


@rows
def test_configs_survive_a_round_trip(row: Row) -> None:  # F19
    config = make_config(row.config())
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    assert make_config({"name": row.make().name, **plain}) == config


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
@pytest.mark.parametrize("policy", ["unit", "free"])
def test_unit_norm_decoders_stay_on_the_sphere_and_free_ones_leave_it(
    row: Row, policy: str
) -> None:
    sae = row.make(decoder_norm=policy)
    train(sae, 5)
    norms = sae.W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones(48), atol=1e-6) is (policy == "unit")
    torch.testing.assert_close(sae.weights().W_dec.norm(dim=1), torch.ones(48))
    sae.losses({HOOK: X[:64]}, END).total.backward()
    sae.before_step()
    radial = (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() / sae.W_dec.grad.norm(dim=1).max()
    assert (radial < 1e-5).item() is (policy == "unit")


# -- golden loss curves ----------------------------------------------------------------------------


def curve(row: Row) -> list[float]:
    """The reconstruction loss at every tenth of 200 steps."""
    return [float(f"{v:.4g}") for v in train(row.make(), 200)[::10]]


@rows
def test_the_loss_curve_is_the_one_in_git(row: Row) -> None:
    golden = json.loads((GOLDEN / f"{row.more or row.name}.json").read_text())
    assert curve(row) == pytest.approx(golden, rel=0.02)


def test_golden_curves_and_rows_agree() -> None:
    assert {p.stem for p in GOLDEN.glob("*.json")} == {row.more or row.name for row in ROWS}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in ROWS:
        (GOLDEN / f"{each.more or each.name}.json").write_text(json.dumps(curve(each)) + "\n")
