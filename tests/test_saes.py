"""Every architecture under the same checks: one row each. What only one of them promises is in
test_dictionary.py, test_activations.py and test_penalties.py.

`python tests/test_saes.py [NAME …]` writes the golden loss curves anew; look at the difference
before you commit it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
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
    Row,
    above,
    assert_equal_gradients,
    exactly,
    on_average,
    one_of_each,
    rows_apart,
    shake,
    train,
    weights,
)
from saes_rows_multi import LINKED
from saes_rows_route import ROUTED
from saes_rows_sequence import SEQUENCES
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
    half_error=0.05,  # near a tie, 2 of 100 tokens choose others; the median error is 0.002
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
    half_error=0.05,
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
ALONE = [TOPK, RELU, VANILLA, BATCHTOPK, JUMPRELU, GATED, MATRYOSHKA, P_ANNEAL, GROUPMAX]
ROWS = [*ALONE, *LINKED, *ROUTED, *SEQUENCES]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.more or r.name)
with_decoder_rows = pytest.mark.parametrize(
    "row", [r for r in ROWS if r.name != "molt"], ids=lambda r: r.more or r.name
)
alone = pytest.mark.parametrize("row", ALONE, ids=lambda r: r.more or r.name)  # of one hook


def gate_or_encoder_bias(sae: SAE) -> Tensor:
    known = dict(sae.named_parameters())
    return next(known[n] for n in ("b_gate", "b_V", "b_enc") if n in known)


def in_doubles(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x  # masks stay masks


# -- the contract, every row -----------------------------------------------------------------------


@rows
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_shapes_and_forward(row: Row, lead: tuple[int, ...]) -> None:  # F19
    sae = shake(row.make())
    x = row.inputs(sae, slice(6))
    x = x.reshape(*lead, *x.shape[1:])
    for module in (sae, sae.to_inference()):
        out = module(x)
        assert set(out) == {"sae_out", "feature_acts"}
        assert out["sae_out"].shape == (*lead, *row.out_shape)
        assert out["feature_acts"].shape == (*lead, *row.lead, sae.n_latents)
        codes = module.encode(x)
        assert torch.equal(out["sae_out"], module.reconstruct(x, codes))
        if not row.passes_by:
            assert torch.equal(out["sae_out"], module.decode(codes))
        assert torch.equal(out["feature_acts"], dense(codes))


@rows
def test_l0_law(row: Row) -> None:  # F20, F22, F44
    sae = shake(row.make())
    with torch.no_grad():
        gate_or_encoder_bias(sae).sub_(1.5)  # some tokens have fewer than k positive ones
        if row.name == "gated":
            sae.b_mag += 10  # what the gate lets through is positive
    w, x = sae.weights(), row.inputs(sae)
    h_BF = row.flat(sae.pre_activations(sae.inputs(row.acts), w))
    assert (l0(sae.encode(x)) < 2).any()
    assert (dense(sae.encode(x)) >= 0).all()
    row.inferred(rows_apart(sae.encode(x)), h_BF)
    row.trained(sae.losses(row.acts, END).codes, h_BF)


@rows
@pytest.mark.filterwarnings("ignore:sae.reconstruction=.* with sae.routing=soft")
@pytest.mark.parametrize("kind", ["fvu", "mse", "sse"])
def test_every_loss_term_and_gradient_equals_the_reference(  # F20 F21 F22 F23 F24 F32 F53
    row: Row, kind: str
) -> None:
    """Terms by ten dense lines, gradients by autograd through those; with dead latents."""
    sae = shake(row.make(reconstruction=kind, dead_after_tokens=50).double(), 0.3)
    sae.tokens_since_fired[::5] = 51
    w, some = weights(sae), slice(24)
    losses = sae.losses({hook: in_doubles(x) for hook, x in row.batch(some).items()}, END)
    losses.total.backward()
    want = row.terms(sae, w, some, kind)
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
    sae.losses(row.batch(slice(512)), END).total.backward()
    for name, p in sae.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@alone
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
    x = row.inputs(sae, slice(256))
    with torch.no_grad():
        want, got = sae(x), folded(x)
    for name in want:
        error = (want[name] - got[name]).norm() / want[name].norm()
        assert error < 1e-5, name
    assert all(not p.requires_grad for p in folded.parameters())


@alone
def test_the_decoder_bias_starts_at_the_mean(row: Row) -> None:
    for center, scale in UNITS:
        bias = row.make(center=center, scale=scale).to_inference().b_dec
        torch.testing.assert_close(bias, SPACES[HOOK].mean)


@rows
def test_saving_and_loading_is_bit_equal(row: Row, tmp_path: Path) -> None:  # F19
    sae = shake(row.make())
    train(sae, 3, row.acts)
    other = row.make(seed=9)
    other.load_state_dict(sae.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in sae.state_dict().items())
    sae.to_inference().save(tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.source["architecture"] == sae.name
    assert loaded.describe() == sae.to_inference().describe()
    x = row.inputs(sae, slice(8))
    for name, value in sae.to_inference()(x).items():
        assert torch.equal(loaded(x)[name], value)


@rows
def test_configs_survive_a_round_trip(row: Row) -> None:  # F19
    config = make_config(row.config())
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    assert make_config({"name": row.make().name, **plain}) == config


@rows
def test_bfloat16_inference_is_close(row: Row, tmp_path: Path) -> None:
    sae = row.make()
    train(sae, 60, row.acts)
    sae.to_inference().save(tmp_path)
    full, half = load_sae(tmp_path), load_sae(tmp_path, dtype=torch.bfloat16)
    x = row.inputs(sae, slice(512))
    want, got = full(x)["sae_out"], half(x.bfloat16())["sae_out"]
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < row.half_error * want.norm()


@rows
def test_bfloat16_training_is_close(row: Row) -> None:
    exact, mixed = shake(row.make()), shake(row.make())
    exact.losses(row.batch(slice(512)), END).total.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = mixed.losses(row.batch(slice(512)), END)
    assert losses.total.dtype == torch.float32
    losses.total.backward()
    for (name, p), q in zip(exact.named_parameters(), mixed.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < row.half_gradient * p.grad.norm(), name


@rows
def test_inference_does_not_depend_on_the_batch(row: Row) -> None:
    folded = shake(row.make()).to_inference()
    x = row.inputs(folded, slice(64))
    whole, order = folded(x)["sae_out"], torch.randperm(64)
    torch.testing.assert_close(folded(x[order])["sae_out"], whole[order])
    each = torch.cat([folded(one[None])["sae_out"] for one in x])
    torch.testing.assert_close(each, whole, rtol=1e-4, atol=1e-4)


@rows
def test_dead_latents_are_counted_in_tokens(row: Row) -> None:  # F53
    sae = row.make(dead_after_tokens=25)
    fires, silent = torch.zeros(2, 5, sae.n_latents), torch.zeros(10, sae.n_latents)
    fires[1, 4, 7] = 0.1
    fires, silent = (f.repeat_interleave(row.rows_per_token, -2) for f in (fires, silent))
    for _ in range(2):
        sae.note_firing(fires)  # contexts (2, 5): 10 tokens
    for expected in (False, False, True):
        sae.note_firing(silent)
        assert sae.dead[7].item() is expected
    assert sae.tokens_since_fired[7] == 30
    assert (sae.tokens_since_fired[8:] == 50).all()
    sae.note_firing(fires)
    assert not sae.dead[7]


@with_decoder_rows
@pytest.mark.parametrize("policy", ["unit", "free"])
def test_unit_norm_decoders_stay_on_the_sphere_and_free_ones_leave_it(
    row: Row, policy: str
) -> None:
    sae = row.make(decoder_norm=policy)
    train(sae, 5, row.acts)
    effective = sae.weights().W_dec
    for W in effective if isinstance(effective, tuple) else [effective]:
        torch.testing.assert_close(row.norms(W, policy), torch.ones(len(W)))
    sae.losses(row.batch(slice(64)), END).total.backward()
    sae.before_step()
    for W in sae.decoders():
        norms = W.norm(dim=1)
        assert torch.allclose(norms, torch.ones(len(W)), atol=1e-6) is (policy == "unit")
        radial = (W.grad * W).sum(1).abs().max() / W.grad.norm(dim=1).max()
        assert (radial < 1e-5).item() is (policy == "unit")


# -- golden loss curves ----------------------------------------------------------------------------


def curve(row: Row) -> list[float]:
    """The reconstruction loss at every tenth of 200 steps."""
    return [float(f"{v:.4g}") for v in train(row.make(), 200, row.acts)[::10]]


@rows
def test_the_loss_curve_is_the_one_in_git(row: Row) -> None:
    golden = json.loads((GOLDEN / f"{row.more or row.name}.json").read_text())
    assert curve(row) == pytest.approx(golden, rel=0.02)


def test_golden_curves_and_rows_agree() -> None:
    assert {p.stem for p in GOLDEN.glob("*.json")} == {row.more or row.name for row in ROWS}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    wanted = sys.argv[1:]  # names of curves; none: all
    for each in (r for r in ROWS if not wanted or (r.more or r.name) in wanted):
        (GOLDEN / f"{each.more or each.name}.json").write_text(json.dumps(curve(each)) + "\n")
