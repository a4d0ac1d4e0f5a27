"""Routed SAEs and MLSAE beyond the contract of test_saes.py: routers against loops, how they learn,
ranges of layers, what single layers of the saved SAE are. Runs on stores: test_saes_route_runs.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from saes_reference import recovery, space_of, topk_oracle
from saes_reference_route import (
    gather_oracle,
    layers_of_one_kind,
    route_reference,
    router_reference,
    weighted_sum_oracle,
)
from saes_rows import END, TRUE, shake, train, weights
from saes_rows_route import MIXED, MLSAE, ROUTE, ROUTE_MATRYOSHKA, SHARED, SOFT, standardised, top2
from torch import Tensor

from saetrain.artefact import ArtefactError, load_sae
from saetrain.codes import dense
from saetrain.errors import ConfigError
from saetrain.routing import routed
from saetrain.saes import make_config, make_sae

HOOKS = tuple(MIXED)
SOME = {hook: x[:24] for hook, x in MIXED.items()}
STACK = torch.stack(list(MIXED.values()), dim=1)
UNITS = torch.stack([standardised(x, slice(None))[0] for x in MIXED.values()], dim=1)  # x'
ROUTINGS: dict[str, dict[str, Any]] = {
    "hard": {},
    "hard_mean": {"aggre": "mean"},
    "scaled": {"scale_by_weight": True},
    "soft": {"routing": "soft"},
    "soft_mean": {"routing": "soft", "aggre": "mean", "router_alpha": 0.5},
}


def oracle(name: str, x: Tensor, p: Tensor) -> Tensor:
    """The routed vectors."""
    soft = name.startswith("soft")
    return weighted_sum_oracle(x, p) if soft else gather_oracle(x, p, name == "scaled")


# -- the router ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTINGS)
def test_routers_are_the_oracles(name: str) -> None:  # F25
    """Weights sum to 1; hard picks by number, soft adds up; the saved SAE does the same."""
    sae = shake(ROUTE.make(**ROUTINGS[name])).double()
    x, few = UNITS[:64], {hook: x[:64].double() for hook, x in MIXED.items()}
    w = {n: p.detach() for n, p in sae.named_parameters()}
    p = router_reference(w, x, "mean" if "mean" in name else "sum")
    got = sae.router(sae.layers(few))
    torch.testing.assert_close(got.sum(-1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(got, p, rtol=1e-4, atol=1e-6)
    assert len(p.argmax(1).unique()) == 3  # the choice is one
    want = oracle(name, x, p)
    torch.testing.assert_close(sae.inputs(few), want, rtol=1e-4, atol=1e-5)
    saved, raw = sae.to_inference(), STACK[:64].double()
    torch.testing.assert_close(saved.router(raw), p, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(saved.target(raw), want, rtol=1e-4, atol=1e-5)
    shares = saved.layer_shares(raw)
    hard = torch.nn.functional.one_hot(p.argmax(1), 3).double()
    torch.testing.assert_close(shares, p if name.startswith("soft") else hard, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("row", [ROUTE, ROUTE_MATRYOSHKA], ids=lambda r: r.name)
def test_terms_and_gradients_of_the_papers_loss(row: Any, name: str) -> None:  # F25, F26, F32
    """reconstruction=nmse, the default, with every way to route; the target is not detached."""
    values = ROUTINGS[name] | {"activation": {"name": "topk", "k": 2}}
    values |= {"dead_after_tokens": 50, "reconstruction": "nmse"}
    sae = shake(row.make(**values).double(), 0.3)
    sae.tokens_since_fired[::5] = 51
    w, how = weights(sae), ROUTINGS[name]
    losses = sae.losses({hook: x.double() for hook, x in SOME.items()}, END)
    losses.total.backward()
    terms = route_reference(
        top2,
        aux_k=3,
        routing=how.get("routing", "hard"),
        scaled=how.get("scale_by_weight", False),
        aggre=how.get("aggre", "sum"),
        alpha=how.get("router_alpha", 0 if "routing" in how else 1),
        sizes=row.values.get("group_sizes", ()),
    )
    want = terms(w, UNITS[:24], sae.dead, "nmse", 0.0)
    assert list(losses.terms) == list(want)
    for term, value in want.items():
        torch.testing.assert_close(losses.terms[term], value, rtol=1e-4, atol=1e-7)
    sum(want.values()).backward()
    for n, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, w[n].grad, rtol=1e-3, atol=1e-6)


def test_shares_and_fvu_of_a_batch_are_logged() -> None:
    sae = shake(ROUTE.make()).requires_grad_(requires_grad=False)
    extras = sae.losses(MIXED, END).extras
    p = sae.router(sae.layers(MIXED))
    for i, hook in enumerate(HOOKS):
        assert extras[f"layer/{hook}"] == pytest.approx(float((p.argmax(1) == i).float().mean()))
    r = sae.inputs(MIXED)
    e = r - topk_oracle((r - sae.b_dec) @ sae.W_enc + sae.b_enc, 2) @ sae.W_dec - sae.b_dec
    want = float(e.square().sum() / (r - r.mean(0)).square().sum())
    assert extras["fvu"].item() == pytest.approx(want, rel=1e-4)


# -- how a router learns ---------------------------------------------------------------------------


def router_gradient(**values: Any) -> float:
    """Length of the router's gradient before any training, every bias at 0."""
    sae = ROUTE.make(**values)
    sae.losses(MIXED, END).total.backward()
    return float(sae.W_router.grad.norm())


def test_the_router_has_a_gradient_from_the_start_where_the_papers_has_none() -> None:  # F25
    paper = router_gradient(scale_by_weight=True, router_alpha=0.0)
    assert paper < 1e-6  # p_j cancels: TopK is homogeneous, the loss scale-free
    assert router_gradient() > 1e-2
    assert router_gradient(routing="soft") > 1e-2


def test_a_straight_through_gate_would_not_help() -> None:
    """∂loss/∂r has no part along the chosen layer, so its weight would get no gradient."""
    sae = ROUTE.make()
    x = sae.layers(SOME)
    r = routed(x, sae.gates(sae.router(x))).detach().requires_grad_()
    w = sae.weights()
    (guess,) = sae.levels(sae.pick(r, w).codes, w)
    ((r - guess).square().sum(-1) / r.square().sum(-1)).sum().backward()
    along = (r.grad * r).sum(-1).abs()
    assert (along < 1e-5).all()
    assert (r.grad.norm(dim=-1) > 1e-3).all()


LEARNERS: dict[str, dict[str, Any]] = {
    "hard": {},
    "soft": {"routing": "soft"},
    "hard_mean": {"aggre": "mean"},
    "scaled": {"scale_by_weight": True},
    "batchtopk": {"activation": {"name": "batchtopk", "k": 2}},
    "relu": {"activation": "relu", "penalty": {"name": "l1", "coefficient": 0.1}},
    "jumprelu_soft": {
        "activation": {"name": "jumprelu", "threshold": 0.3, "bandwidth": 0.5},
        "penalty": {"name": "l0", "coefficient": 0.05},
        "routing": "soft",
        "k": None,
    },
}


RARE = ("hard_mean", "scaled")  # tried with the slow tests


def shares_after(values: Mapping[str, Any], sparse: int, steps: int = 400) -> Tensor:
    """Each layer's share of the routing on the planted data after a short training."""
    acts = layers_of_one_kind(2048, 16, sparse=sparse, n_layers=4)
    torch.manual_seed(0)
    values = {"name": "route", "k": 2, "n_latents": 48, "hooks_in": tuple(acts)} | values
    values = {k: v for k, v in values.items() if k != "k" or "activation" not in values}
    sae = make_sae(values, {hook: space_of(x, hook) for hook, x in acts.items()})
    train(sae, steps, acts, lr=1e-2)
    return sae.to_inference().layer_shares(torch.stack(list(acts.values()), 1)).mean(0)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in RARE)) for n in LEARNERS]
)
def test_the_router_finds_the_sparse_layer_among_noise(name: str) -> None:  # F25
    shares = shares_after(LEARNERS[name], sparse=2)
    assert shares[1] > 0.7, shares.tolist()


@pytest.mark.parametrize("sparse", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_it_does_so_wherever_the_sparse_layer_is(sparse: int) -> None:  # F25
    assert shares_after({}, sparse)[sparse - 1] > 0.9


def test_route_matryoshka_finds_it_too() -> None:  # F26
    values = {"name": "route_matryoshka", "group_sizes": (32, 16)}
    assert shares_after(values, sparse=3)[2] > 0.8


def test_the_papers_hard_router_does_not_find_it() -> None:
    shares = shares_after({"scale_by_weight": True, "router_alpha": 0.0}, sparse=2)
    assert shares[1] < 0.5, shares.tolist()


# -- which layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ({"hooks_in": ["mlp.0", "mlp.3"]}, None),
        ({"start_layer": 2, "end_layer": 5}, (2, 3, 4)),
        ({"n_layers": 16}, tuple(range(3, 12))),  # hidden_states 4 to 12: the paper's nine
        ({"n_layers": 28}, tuple(range(6, 21))),  # 7 to 21: the paper's fifteen
        ({"n_layers": 4}, (0, 1, 2)),
        ({"n_layers": 16, "end_layer": 5}, (3, 4)),
    ],
)
def test_ranges_of_layers(values: dict[str, Any], layers: tuple[int, ...] | None) -> None:  # F25
    want = ("mlp.0", "mlp.3") if layers is None else tuple(f"resid.{i}" for i in layers)
    for name in ("route", "route_matryoshka", "mlsae"):
        config = make_config({"name": name, **values})
        assert config.hooks("blocks.7.hook_resid_post") == (want, want)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, r"several layers: give sae\.hooks_in=\[resid\.1,resid\.2,…\], or sae\.start_layer"),
    ({"hooks_in": ["resid.1"]}, r"sae\.hooks_in=\['resid\.1'\]: expected two or more different"),
    ({"hooks_in": ["resid.1", "resid.1"]}, r"expected two or more different hooks"),
    ({"hooks_in": ["resid.1", "resid.2"], "n_layers": 8}, r"sae\.hooks_in or sae\.n_layers, not"),
    ({"n_layers": 3}, r"sae\.n_layers=3: routing needs a host of at least 4 layers"),
    ({"start_layer": 1}, r"sae\.start_layer=1, sae\.end_layer=None: give both, or sae\.n_layers"),
    ({"start_layer": 3, "end_layer": 4}, r"a range of at least two layers, the end not included"),
    ({"start_layer": -1, "end_layer": 4}, r"sae\.start_layer=-1, sae\.end_layer=4"),
    ({"n_layers": 8, "end_layer": 9}, r"sae\.end_layer=9.*which are 0 to 7 by sae\.n_layers=8"),
    ({"hooks_in": ["a", "b"], "hook_out": "mlp.1"}, r"sae\.hook_out='mlp\.1': this SAE reconstru"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_layers(values: dict[str, Any], message: str) -> None:  # F25
    with pytest.raises(ConfigError, match=message):
        make_config({"name": "route", **values}).hooks("resid.2")


def test_a_range_needs_the_name_of_a_layer() -> None:
    config = make_config({"name": "mlsae", "start_layer": 0, "end_layer": 2})
    with pytest.raises(ConfigError, match=r"hook=embed: a range of layers needs .*resid\.2"):
        config.hooks("embed")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router_alpha": -1.0}, r"sae\.router_alpha: expected 0 or more, got -1\.0"),
        ({"router_tokens": 0}, r"sae\.router_tokens: expected at least 1, got 0"),
        ({"routing": "soft", "scale_by_weight": True}, r"which weights all layers already"),
        ({"router_alpha": 0.0}, r"sae\.router_alpha=0 with sae\.routing=hard: nothing would train"),
        ({"routing": "both"}, r"sae\.routing: expected one of 'hard', 'soft', got 'both'"),
        ({"aggre": "max"}, r"sae\.aggre: expected one of 'sum', 'mean', got 'max'"),
    ],
)
def test_bad_routing(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({"name": "route", "hooks_in": list(HOOKS), **values})


def test_options_that_have_no_effect_or_mislead_are_said() -> None:
    soft = {"name": "route", "hooks_in": list(HOOKS), "routing": "soft"}
    with pytest.warns(UserWarning, match=r"sae\.router_tokens=9 has no effect: the router loss is"):
        make_config(soft | {"router_tokens": 9})
    with pytest.warns(UserWarning, match=r"reconstruction=mse with sae\.routing=soft: the router"):
        make_config(soft | {"reconstruction": "mse"})


def test_hooks_of_different_width_are_refused() -> None:
    acts = MIXED | {"mlp.1": torch.randn(50, 12)}
    spaces = {hook: space_of(x, hook) for hook, x in acts.items()}
    with pytest.raises(ConfigError, match=r"sae\.hooks_in: .*resid\.1 has 16.*mlp\.1 has 12"):
        make_sae(ROUTE.config(hooks_in=(*HOOKS, "mlp.1")), spaces)


# -- the saved SAE ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [ROUTE, SOFT, ROUTE_MATRYOSHKA, MLSAE], ids=lambda r: r.name)
def test_single_layers_are_plain_saes(row: Any, tmp_path: Path) -> None:
    """A routed vector that is one whole layer gives what the SAE folded for that layer gives."""
    saved = shake(row.make()).to_inference()
    for i, hook in enumerate(saved.hooks_in):
        x = row.acts[hook][:64]
        alone = saved.single(hook)
        alone.save(tmp_path / str(i))
        out = load_sae(tmp_path / str(i))(x)
        rows_D = (x - saved.center[i]) * saved.scale[i]
        codes = saved.latents_of(rows_D)
        torch.testing.assert_close(out["feature_acts"], dense(codes), rtol=1e-3, atol=1e-4)
        want = saved.rows_of(codes) / saved.scale[i] + saved.center[i]
        torch.testing.assert_close(out["sae_out"], want, rtol=1e-3, atol=1e-3)
        assert alone.hooks_in == alone.hooks_out == (hook,)
    with pytest.raises(ValueError, match=r"'mlp\.9' is not a layer of this SAE: resid\.1, resid"):
        saved.single("mlp.9")


@pytest.mark.parametrize("scaled", [False, True])
def test_the_chosen_layer_is_replaced_and_its_weight_divided_out(scaled: bool) -> None:
    sae = shake(ROUTE.make(scale_by_weight=scaled))
    saved, x = sae.to_inference(), STACK[:32]
    p, got = saved.router(x), saved.replaced(x)
    for n in range(32):
        j = int(p[n].argmax())
        guess = saved.decode(saved.encode(x[n])) / (p[n, j] if scaled else 1)
        want = x[n].clone()
        want[j] = guess / saved.scale[j] + saved.center[j]
        torch.testing.assert_close(got[n], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="soft routing mixes layers"):
        SOFT.make().to_inference().replaced(x)


def test_what_is_saved_names_router_and_layers(tmp_path: Path) -> None:  # F25, F26
    shake(ROUTE_MATRYOSHKA.make()).to_inference().save(tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.hooks_in == loaded.hooks_out == HOOKS
    assert loaded.group_sizes == (24, 16, 8)
    names = set(dict(loaded.named_parameters()))
    assert {"W_router", "b_router", "center", "scale", "W_enc", "W_dec"} <= names
    options = json.loads((tmp_path / "sae.json").read_text())["options"]
    assert options == {"routing": "hard", "scale_by_weight": False, "group_sizes": [24, 16, 8]}
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, 16\) of resid\.1, resid\.2, resid\.3, got"):
        loaded.encode(STACK[:4, :2])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routing": "best", "scale_by_weight": False},
        {"routing": "hard", "scale_by_weight": 1},
        {"routing": "hard", "scale_by_weight": False, "group_sizes": [1, 2]},
        {"routing": "hard", "scale_by_weight": False, "more": 1},
    ],
)
def test_damaged_options_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    ROUTE.make().to_inference().save(tmp_path)
    described = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(described | {"options": options}))
    with pytest.raises(ArtefactError, match="options of kind=route: expected routing"):
        load_sae(tmp_path)


@pytest.mark.parametrize("row", [ROUTE, SOFT, ROUTE_MATRYOSHKA, MLSAE], ids=lambda r: r.name)
def test_bfloat16_is_close_wherever_the_same_latents_fire(row: Any, tmp_path: Path) -> None:
    sae = row.make()
    train(sae, 60, row.acts)
    sae.to_inference().save(tmp_path)
    x = row.inputs(sae, slice(512))
    want, got = load_sae(tmp_path)(x), load_sae(tmp_path, dtype=torch.bfloat16)(x.bfloat16())
    fire, fires = (out["feature_acts"].flatten(1) > 0 for out in (want, got))
    same = (fire == fires).all(1)
    assert same.float().mean() > 0.95
    want, got = (out["sae_out"][same].float() for out in (want, got))
    assert (want - got).norm() < 0.01 * want.norm()


SLOW = [pytest.param(row, marks=pytest.mark.slow) for row in (SOFT, ROUTE_MATRYOSHKA)]


@pytest.mark.parametrize("row", [ROUTE, MLSAE, *SLOW], ids=lambda r: r.more or r.name)
def test_what_was_planted_is_found(row: Any) -> None:  # F25, F26
    sae = row.make(**({"group_sizes": (32, 16)} if row is ROUTE_MATRYOSHKA else {}))
    assert recovery(sae, TRUE) < 0.6
    losses = train(sae, 400, row.acts)
    assert losses[-1] < 0.3 * losses[0]
    assert recovery(sae, TRUE) > 0.9


# -- MLSAE -----------------------------------------------------------------------------------------


def test_mlsae_counts_tokens_and_scores_each_layer() -> None:
    sae = shake(MLSAE.make(dead_after_tokens=25))
    few = {hook: x[:10] for hook, x in SHARED.items()}
    losses = sae.losses(few, END)
    sae.note_firing(losses.codes)
    fired = dense(losses.codes).gt(0).any(0)
    assert (sae.tokens_since_fired[fired] == 0).all()
    assert (sae.tokens_since_fired[~fired] == 10).all()  # tokens, not rows
    for i, (hook, x) in enumerate(few.items()):
        raw = SHARED[hook]
        guess = sae.decode(sae.encode(torch.stack(list(few.values()), 1)))[:, i]
        want = (x - guess).square().sum(-1).mean() / raw.var(0, correction=0).sum()
        torch.testing.assert_close(losses.extras[f"fvu/{hook}"], want.detach(), rtol=1e-3, atol=0)


def test_layers_of_any_length_count_alike() -> None:
    """x' of each layer has mean square D, or the layers' common mean where it is left on."""
    for center in ("mean", "none"):
        x = MLSAE.make(center=center).layers(SHARED)
        if center == "mean":
            torch.testing.assert_close(x.square().sum(-1).mean(0), torch.full((2,), 16.0))
            torch.testing.assert_close(x.mean(0), torch.zeros(2, 16), atol=1e-4, rtol=0)
        else:
            torch.testing.assert_close(x.norm(dim=-1).mean(0), torch.full((2,), 4.0))
