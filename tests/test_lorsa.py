"""Lorsa against loops over rows and heads; its masks, planted attention, runs on real contexts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa_reference import planted_attention, reference_heads, reference_terms
from saes_reference import batchtopk_oracle, jumprelu_oracle, l1_reference, space_of, topk_oracle
from saes_rows import END, shake
from torch import Tensor

from saetrain.artefact import ArtefactError, load_sae
from saetrain.codes import dense, l0
from saetrain.errors import ConfigError
from saetrain.saes import make_config, make_sae
from saetrain.saes.base import SAE
from saetrain.units import DOCUMENT, MASK, PRESENT

S, T, D, E, F = 4, 6, 8, 5, 12
IN, OUT = "layers.1.attention:in", "attn.1"
GEN = torch.Generator().manual_seed(5)
X, Y = 2 * torch.randn(S, T, D, generator=GEN) + 1, torch.randn(S, T, E, generator=GEN) + 3
THERE = torch.arange(T) < torch.tensor([6, 4, 6, 5])[:, None]
THERE[2, 1] = False  # a held-out row inside a context
COUNTS = THERE & (torch.rand(S, T, generator=GEN) < 0.7)
SPACES = {IN: space_of(X.flatten(0, 1), IN), OUT: space_of(Y.flatten(0, 1), OUT)}
SMALL_LORSA = {"name": "lorsa", "n_latents": F, "heads_per_qk": 4, "d_qk": 4, "hook_out": OUT}


def make(seed: int = 0, **values: Any) -> SAE:
    torch.manual_seed(seed)
    more = {"k": 3} if "activation" not in values else {"k": None}
    return make_sae(SMALL_LORSA | more | values, SPACES)


def batch(x: Tensor = X, y: Tensor = Y, **masks: Tensor) -> dict[str, Tensor]:
    return {IN: x, OUT: y, MASK: COUNTS, PRESENT: THERE} | masks


# -- the maths -------------------------------------------------------------------------------------

JUMP = {"name": "jumprelu", "threshold": 0.2, "bandwidth": 0.5}
PARTS: dict[str, tuple[dict[str, Any], Callable[..., Tensor], Callable[..., dict[str, Tensor]]]] = {
    "topk": ({"aux_k": 2}, lambda h, w: topk_oracle(h, 3), lambda f, h, w: {}),
    "batchtopk": (
        {"activation": {"name": "batchtopk", "k": 2.5}, "aux_k": 2},
        lambda h, w: batchtopk_oracle(h, 2.5),
        lambda f, h, w: {},
    ),
    "relu": (
        {
            "activation": {"name": "relu"},
            "penalty": {"name": "l1", "coefficient": 0.05},
            "aux_k": 2,
        },
        lambda h, w: h.clamp(min=0),
        lambda f, h, w: {"l1": 0.05 * l1_reference(f)},
    ),
    "jumprelu": (
        {"activation": JUMP, "penalty": {"name": "l0", "coefficient": 0.01}, "aux_k": 2},
        lambda h, w: jumprelu_oracle(h, w["activation.threshold"], 0.5)[0],
        lambda f, h, w: {
            "l0": 0.01 * jumprelu_oracle(h, w["activation.threshold"], 0.5)[1].sum() / len(h)
        },
    ),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("policy", ["unit", "free"])
@pytest.mark.parametrize("base", [50.0, None])
@pytest.mark.parametrize("kind", ["fvu", "sse"])
def test_terms_and_gradients_equal_loops(  # F59 F119
    part: str, policy: str, base: float | None, kind: str
) -> None:
    """Rows, heads and sources one at a time, rotary positions by complex numbers, dead heads."""
    values, select, penalty = PARTS[part]
    more = {"decoder_norm": policy, "rotary_base": base, "reconstruction": kind}
    sae = shake(make(**values, **more, dead_after_tokens=50).double(), 0.3)
    sae.tokens_since_fired[::3] = 51
    w = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}
    losses = sae.losses(batch(X.double(), Y.double()), END)
    losses.total.backward()
    x = (X.double() - X.flatten(0, 1).mean(0)) * D**0.5 / SPACES[IN].mean_norm
    y = (Y.double() - Y.flatten(0, 1).mean(0)) * E**0.5 / SPACES[OUT].mean_norm
    if policy == "free":
        norms = w["W_dec"].norm(dim=1)
        w_used = w | {"W_V": w["W_V"] * norms, "b_V": w["b_V"] * norms}
        w_used["W_dec"] = w["W_dec"] / norms[:, None]
    else:
        w_used = w
    h = reference_heads(w_used, x, THERE, base, 4)[COUNTS]
    variance = SPACES[OUT].variance * E / SPACES[OUT].mean_norm ** 2
    want = reference_terms(w_used, h, y[COUNTS], select, penalty, sae.dead, 2, kind, variance)
    assert list(losses.terms) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(losses.terms[name], value, rtol=1e-5, atol=1e-6)
    sum(want.values()).backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_encode_equals_loops_and_forward_is_decode() -> None:  # F59
    sae = shake(make(activation={"name": "relu"}, penalty={"name": "l1", "coefficient": 0.1}))
    folded = sae.to_inference()
    w = dict(folded.named_parameters())  # raw units: no scale left to apply
    want = reference_heads(w, X, THERE, 10_000.0, 4).clamp(min=0)
    for module in (sae, folded):
        codes = module.encode(X, THERE)
        torch.testing.assert_close(codes[THERE], want[THERE], rtol=1e-4, atol=1e-5)
        out = module(X)
        assert torch.equal(out["sae_out"], module.decode(module.encode(X)))
        assert out["sae_out"].shape == (S, T, E)
        assert module(X[0])["feature_acts"].shape == (T, F)
        torch.testing.assert_close(module(X[0])["sae_out"], out["sae_out"][0])
    with pytest.raises(ValueError, match="expected contexts"):
        folded.encode(X[0, 0])


def test_l0_law() -> None:
    sae = shake(make())
    h = reference_heads(dict(sae.to_inference().named_parameters()), X, None, 10_000.0, 4)
    assert torch.equal(l0(sae.encode(X)), (h > 0).sum(-1).clamp(max=3))
    codes = sae.losses(batch(), END).codes
    assert codes.values.shape == (int(COUNTS.sum()), 3)


def test_no_row_sees_later_rows_padding_or_held_out_rows() -> None:
    folded = shake(make()).to_inference()
    before = folded(X)["sae_out"]
    later = X.clone()
    later[:, 4:] += 3
    after = folded(later)["sae_out"]
    assert torch.equal(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 5], before[:, 5])
    garbage = torch.where(THERE[..., None], X, torch.full_like(X, 1e4))
    masked, spoilt = (folded.encode(x, THERE) for x in (X, garbage))
    assert torch.equal(dense(masked)[THERE], dense(spoilt)[THERE])
    sae = shake(make())
    a, b = (sae.losses(batch(x), END).total for x in (X, garbage))
    assert torch.equal(a, b)
    a.backward()
    grads = {n: p.grad.clone() for n, p in sae.named_parameters()}
    assert all(g.isfinite().all() and g.any() for g in grads.values())


def test_only_rows_that_count_are_scored_but_others_are_read() -> None:
    sae = shake(make())
    one = torch.zeros_like(COUNTS)
    one[0, 5] = True
    losses = sae.losses(batch(**{MASK: one}), END)
    assert len(losses.codes.values) == 1
    y = Y.clone()
    y[~one] += 9.0
    assert torch.equal(sae.losses(batch(y=y, **{MASK: one}), END).total, losses.total)
    x = X.clone()
    x[0, 2] += 3.0
    assert sae.losses(batch(x, **{MASK: one}), END).total != losses.total
    sae.note_firing(losses.codes)
    assert sae.tokens_since_fired.max() == 1


def test_rows_do_not_depend_on_the_order_or_size_of_the_batch() -> None:
    folded, order = shake(make()).to_inference(), [2, 0, 3, 1]
    whole = dense(folded.encode(X, THERE))
    torch.testing.assert_close(dense(folded.encode(X[order], THERE[order])), whole[order])
    alone = torch.stack([dense(folded.encode(x, m)) for x, m in zip(X, THERE, strict=True)])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)
    padded = torch.cat([X, torch.zeros(S, 3, D)], 1)
    there = torch.cat([THERE, torch.zeros(S, 3, dtype=torch.bool)], 1)
    longer = dense(folded.encode(padded, there))[:, :T]
    torch.testing.assert_close(longer[THERE], whole[THERE], rtol=1e-4, atol=1e-5)


def test_documents_that_the_host_kept_apart_are_apart() -> None:
    """Rotary positions are relative, so a document alone and inside a context is the same."""
    folded = shake(make()).to_inference()
    document = torch.tensor([[1, 1, 2, 2, 2, 3]]).expand(S, T)
    together = dense(folded.encode(X, None, document))
    parts = [dense(folded.encode(X[:, a:b])) for a, b in ((0, 2), (2, 5), (5, 6))]
    torch.testing.assert_close(together, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)
    sae = shake(make())
    full = torch.ones_like(THERE)
    apart = sae.losses(batch(**{DOCUMENT: document, PRESENT: full}), END).total
    assert apart != sae.losses(batch(**{PRESENT: full}), END).total


def test_patterns_are_those_of_the_heads() -> None:
    folded = shake(make(activation={"name": "relu"}, penalty={"name": "l1", "coefficient": 0.1}))
    folded = folded.to_inference()
    A_SGTT = folded.patterns(X, THERE)
    torch.testing.assert_close(A_SGTT.sum(-1), torch.ones(S, F // 4, T))
    v = (X @ folded.W_V).unflatten(-1, (F // 4, 4))
    z = torch.einsum("sgtu,sugh->stgh", A_SGTT, v).flatten(-2) + folded.b_V
    torch.testing.assert_close(z.relu(), folded.encode(X, THERE), rtol=1e-4, atol=1e-5)


# -- starts and artefact ---------------------------------------------------------------------------


@pytest.mark.parametrize("center", ["none", "mean"])
@pytest.mark.parametrize("scale", ["none", "unit", "sqrt_d"])
def test_folding_changes_nothing_and_starts_are_centred(center: str, scale: str) -> None:
    sae = make(center=center, scale=scale)
    folded = sae.to_inference()
    with torch.no_grad():
        torch.testing.assert_close(folded.b_dec, Y.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-4)
        mean = X.flatten(0, 1).mean(0)
        assert (mean @ folded.W_V + folded.b_V).abs().max() < 1e-4
        shake(sae, 0.02)
        folded = sae.to_inference()
        for name, value in sae(X).items():
            error = (value - folded(X)[name]).norm() / value.norm()
            assert error < 1e-5, name
        assert torch.equal(sae.encode(X, THERE).indices, folded.encode(X, THERE).indices)


def test_the_first_batch_decides_median_subspace_and_length() -> None:
    sae = make(init_subspace=2, init_bias="geometric_median", init_norm="search")
    before = sae.losses(batch(), END).extras["fvu"]
    sae.init_from_data(batch())
    y = sae.standard_outputs(Y[COUNTS])
    inside = torch.linalg.svd(y - y.mean(0))[2][:2]
    rows = sae.W_dec.detach()
    torch.testing.assert_close(rows @ inside.T @ inside, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(F))
    assert sae.losses(batch(), END).extras["fvu"] < before
    with pytest.raises(ConfigError, match=r"sae\.init_subspace=9: a first batch of \d+ rows"):
        make(init_subspace=9).init_from_data(batch())


def test_batchtopk_is_calibrated_on_rows_that_count() -> None:
    sae = shake(make(activation={"name": "batchtopk", "k": 2.0}))
    sae.calibrate([batch()])
    codes = sae.encode(X, THERE)[COUNTS]
    assert l0(codes).float().mean() == pytest.approx(2, abs=0.5 / len(codes) + 1e-6)


def test_saving_and_loading_is_bit_equal(tmp_path: Path) -> None:
    sae = shake(make(activation=JUMP, penalty={"name": "l0", "coefficient": 0.1}))
    sae.to_inference().save(tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.describe() == sae.to_inference().describe()
    assert (loaded.unit, loaded.hooks_in, loaded.hooks_out) == ("sequence", (IN,), (OUT,))
    assert torch.equal(loaded.encode(X, THERE), sae.to_inference().encode(X, THERE))
    half = load_sae(tmp_path, dtype=torch.bfloat16)(X.bfloat16())["sae_out"]
    assert (half.float() - loaded(X)["sae_out"]).norm() < 0.03 * loaded(X)["sae_out"].norm()
    config = json.loads(json.dumps(loaded.source["sae"]))
    assert make_config({"name": "lorsa", **config}) == sae.cfg


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads_per_qk": 5}, "heads_per_qk=5, d_qk=4"),
        ({"d_qk": 3}, "rotary_base=10000.0: expected null or"),
        ({"rotary_base": 0.5}, "rotary_base=0.5"),
        ({"more": 1}, "options: expected"),
    ],
)
def test_a_damaged_artefact_is_refused(
    tmp_path: Path, options: Mapping[str, Any], message: str
) -> None:
    make().to_inference().save(tmp_path)
    file = tmp_path / "sae.json"
    text = json.loads(file.read_text())
    text["options"] |= options
    file.write_text(json.dumps(text))
    with pytest.raises(ArtefactError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads_per_qk": 5}, r"sae\.heads_per_qk=5 does not divide sae\.n_latents=12"),
        ({"d_qk": 3}, r"sae\.d_qk=3: rotary positions need .* sae\.rotary_base=null"),
        ({"d_qk": 0}, r"sae\.d_qk: expected at least 1, got 0"),
        ({"resample_every": 5}, r"sae\.resample_every=5 with sae\.name=lorsa"),
        ({"hook_out": None}, r"sae\.hook_out=null: .* predicts what it adds"),
        ({"hook_out": IN}, r"sae\.hook_out=layers\.1\.attention:in: "),
        ({"init_encoder": "tied"}, r"sae\.init_encoder=tied needs equal widths"),
        ({"k": 13}, r"sae\.k=13 is larger than sae\.n_latents=12"),
    ],
)
def test_bad_settings(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**values)


# -- what it finds ---------------------------------------------------------------------------------


def test_planted_attention_is_found() -> None:
    """Three heads that copy from the row before, three that copy from a marked row."""
    plant = planted_attention()
    torch.manual_seed(0)
    spaces = {IN: space_of(plant.x.flatten(0, 1), IN), OUT: space_of(plant.y[plant.counts], OUT)}
    values = {"n_latents": 16, "heads_per_qk": 8, "d_qk": 8, "rotary_base": 100.0, "k": 2}
    sae = make_sae(SMALL_LORSA | values | {"aux_k": 8, "dead_after_tokens": 2000}, spaces)
    optim, gen = torch.optim.Adam(sae.parameters(), 1e-2), torch.Generator().manual_seed(1)
    for step in range(400):
        optim.param_groups[0]["lr"] = 1e-2 * min(1.0, 2 * (1 - step / 400))
        rows = torch.randint(0, len(plant.x), (32,), generator=gen)
        acts = {IN: plant.x[rows], OUT: plant.y[rows], MASK: plant.counts[rows]}
        acts[PRESENT] = torch.ones_like(acts[MASK])
        losses = sae.losses(acts, replace(END, step=step, n_steps=400))
        optim.zero_grad()
        losses.total.backward()
        sae.before_step()
        optim.step()
        sae.after_step()
        sae.note_firing(losses.codes)
    assert losses.extras["fvu"] < 0.05
    folded = sae.to_inference()
    cosines = plant.directions @ torch.nn.functional.normalize(folded.W_dec, dim=1).T
    assert cosines.max(1).values.mean() > 0.95
    head = cosines.max(1).indices // 8  # the pattern that serves each planted head
    copy_before, copy_marked = head[:3].unique(), head[3:].unique()
    assert len(copy_before) == len(copy_marked) == 1 != len(torch.cat([head]).unique())
    A_SGTT = folded.patterns(plant.x)
    rows = torch.arange(3, plant.x.shape[1])
    assert A_SGTT[:, copy_before.item(), rows, rows - 1].mean() > 0.4  # evenly: 0.18
    marked = A_SGTT[torch.arange(len(plant.x)), copy_marked.item(), :, plant.marked][:, 3:]
    assert marked.mean() > 0.85
    rolled = folded(plant.x.roll(1, 0))["sae_out"]  # other contexts do not explain these outputs
    off = (rolled - plant.y)[plant.counts].square().sum(-1).mean() / spaces[OUT].variance
    assert off > 0.5
