"""What only transcoders, crosscoders and cross-layer transcoders promise; see test_saes.py for the
checks that all architectures share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from saes_reference import batchtopk_oracle
from saes_reference_multi import clt_reference
from saes_rows import END, assert_equal_gradients, shake, train, weights
from saes_rows_multi import (
    BOTH,
    CLT,
    CLT_TOPK,
    CODES_OF_BOTH,
    CROSSCODER,
    INS,
    LAYERS,
    LINKED,
    OUTS,
    PAIR,
    SKIP,
    TRANSCODER,
    WRITES,
    D,
    E,
    LinkedRow,
)
from torch import Tensor

from saetrain.codes import SparseCodes, dense, l0
from saetrain.errors import ConfigError

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {"name": "relu"},
    "topk": {"name": "topk", "k": 4},
    "batchtopk": {"name": "batchtopk", "k": 4.0},
    "jumprelu": {"name": "jumprelu", "threshold": 0.05, "bandwidth": 0.5},
    "groupmax": {"name": "groupmax", "k": 4},
}
PENALTIES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "l1": {"name": "l1", "coefficient": 0.01},
    "tanh": {"name": "tanh", "coefficient": 0.01},
    "tanh_quad": {"name": "tanh_quad", "coefficient": 0.01},
    "l0": {"name": "l0", "coefficient": 0.01},
    "lp": {"name": "lp", "coefficient": 0.01, "p": 0.5},
}
TOPOLOGIES = [TRANSCODER, SKIP, CROSSCODER, CLT]
ids = lambda row: row.more or row.name  # noqa: E731
topologies = pytest.mark.parametrize("row", TOPOLOGIES, ids=ids)


def parts(row: LinkedRow, activation: str, penalty: str = "none", **more: Any) -> Any:
    """An SAE of the row's topology with other parts."""
    short = {"k": None, "l1_coefficient": None}
    plain = replace(row, values=row.values | {k: v for k, v in short.items() if k in row.values})
    given = {"activation": ACTIVATIONS[activation], "penalty": PENALTIES[penalty]}
    return plain.make(**({"init_norm": 1.0} | given | more))


# -- parts -----------------------------------------------------------------------------------------


@topologies
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.filterwarnings("ignore:nothing makes latents sparse")
def test_any_activation_and_penalty(row: LinkedRow, activation: str, penalty: str) -> None:  # F60
    """Every pair learns, or is refused by name."""
    if penalty == "l0" and activation != "jumprelu":
        with pytest.raises(ConfigError, match=rf"penalty\.name=l0 with .*name={activation}"):
            parts(row, activation, penalty)
        return
    sae = parts(row, activation, penalty)
    losses = train(sae, 25, row.acts, lr=1e-2)
    assert losses[-1] < 0.97 * losses[0]
    terms = sae.losses(row.batch(slice(64)), END).terms
    assert set(terms) == {"reconstruction"} | ({penalty} - {"none"}) | ({"auxk"} & set(terms))
    codes, folded = sae.encode(row.inputs(sae)), sae.to_inference()
    kept = folded.encode(row.inputs(sae))
    assert isinstance(codes, SparseCodes) is (activation in ("topk", "groupmax"))
    torch.testing.assert_close(dense(kept), dense(codes), rtol=1e-3, atol=1e-4)


def test_batchtopk_of_a_clt_pools_all_layers_and_its_threshold_keeps_l0() -> None:  # F60
    sae = shake(parts(CLT, "batchtopk", auxk_alpha=0.0).double(), 0.3)
    w = weights(sae)
    losses = sae.losses({h: x.double() for h, x in CLT.batch(slice(32)).items()}, END)
    h = sae.pre_activations(sae.inputs(CLT.batch(slice(32))), sae.weights())
    want = batchtopk_oracle(h.flatten(0, 1), 4).reshape(32, -1)  # 4 per token and layer
    torch.testing.assert_close(dense(losses.codes), want)
    kept = iter((want > 0).reshape(32, 3, -1).unbind(1))
    reference = clt_reference(lambda h, w, i: h * next(kept), lambda f: {})
    x, y = (
        torch.stack([CLT._own(hook, slice(32))[0] for hook in hooks], 1) for hooks in (INS, OUTS)
    )
    variances = [CLT._own(hook, slice(32))[1] for hook in OUTS]
    terms = reference(w, x, y, sae.dead, "fvu", variances)
    torch.testing.assert_close(losses.terms["reconstruction"], terms["reconstruction"])
    losses.total.backward()
    terms["reconstruction"].backward()
    assert_equal_gradients(sae, w)
    sae.calibrate([CLT.acts])
    mean = l0(sae.encode(CLT.inputs(sae).double())).double().mean()
    assert abs(mean.item() - 12) < 0.05


@pytest.mark.parametrize("norm", ["sum", "concat"])
@pytest.mark.parametrize("policy", ["free", "unit"])
def test_what_a_latent_of_a_crosscoder_costs(norm: str, policy: str) -> None:
    """Σ_i f_i Σ_g ||W_g,i|| or Σ_i f_i ||W_i||, whichever way the decoder is kept."""
    sae = shake(CROSSCODER.make(row_norm=norm, decoder_norm=policy).double())
    sae.after_step()  # back to length 1 under unit
    w = {n: p.detach() for n, p in sae.named_parameters()}
    x = sae.inputs(CROSSCODER.batch(slice(32)))
    f = (x @ w["W_enc"] + w["b_enc"]).relu()
    rows = w["W_dec"].reshape(-1, 2, D)
    sizes = rows.norm(dim=2).sum(1) if norm == "sum" else rows.flatten(1).norm(dim=1)
    got = sae.losses(CROSSCODER.batch(slice(32)), END).terms["l1"]
    torch.testing.assert_close(got, 0.05 * (f * sizes).sum(1).mean())


def test_selection_of_a_free_crosscoder_weighs_norms_and_that_of_a_unit_one_does_not() -> None:
    free, unit = (parts(CROSSCODER, "topk", decoder_norm=p) for p in ("free", "unit"))
    with torch.no_grad():
        free.W_dec[7] *= 1000
    fires = lambda sae: (dense(sae.encode(CROSSCODER.inputs(sae)))[:, 7] > 0).float().mean()  # noqa: E731
    h = free.inputs(CROSSCODER.acts) @ free.W_enc + free.b_enc
    assert abs(fires(free) - (h[:, 7] > 0).float().mean()) < 0.01  # whenever it is positive
    assert fires(unit) < 0.5 * fires(free)
    with pytest.warns(UserWarning, match=r"sae\.row_norm=concat has no effect"):
        parts(CROSSCODER, "topk", decoder_norm="unit", row_norm="concat")


# -- planted structure -----------------------------------------------------------------------------


def best(truth: Tensor, found: Tensor) -> Tensor:
    """Largest cosine of each true row with a found one."""
    truth, found = (torch.nn.functional.normalize(x, dim=1) for x in (truth, found))
    return (truth @ found.T).max(1).values


def test_a_crosscoder_finds_features_of_both_hooks_and_of_one() -> None:  # F59
    features = CODES_OF_BOTH[1].clone()
    features[:6, D:] = 0  # of the first hook alone
    features[6:12, :D] = 0  # of the second
    gen = torch.Generator().manual_seed(3)
    chosen = torch.rand(2048, 24, generator=gen).argsort(1)[:, :2]
    codes = torch.zeros(2048, 24).scatter_(1, chosen, 1 + torch.rand(2048, 2, generator=gen))
    x = codes @ features
    acts = {"base:resid.2": x[:, :D] + 2, "chat:resid.2": x[:, D:]}  # as joined stores name them
    row = replace(CROSSCODER, acts=acts, values={"hooks_in": tuple(acts), "l1_coefficient": 0.02})
    sae = row.make()
    assert best(features, sae.W_dec.detach()).mean() < 0.6
    train(sae, 900, acts, lr=5e-3)
    W = sae.to_inference().W_dec.transpose(0, 1)  # (F, 2, D), raw units
    cosines = (
        torch.nn.functional.normalize(W.flatten(1), dim=1)
        @ torch.nn.functional.normalize(features, dim=1).T
    )
    assert cosines.max(0).values.mean() > 0.95
    share = W.norm(dim=2)[cosines.argmax(0)]
    share = share[:, 1] / share.sum(1)  # of the second hook: what model diffing looks at
    assert share[:6].max() < 0.1
    assert share[6:12].min() > 0.9
    assert share[12:].min() > 0.1
    assert share[12:].max() < 0.9


def test_a_clt_finds_what_features_write_to_later_layers() -> None:  # F59
    sae = CLT_TOPK.make(n_latents=16)
    train(sae, 700, LAYERS, lr=1e-2)
    saved = sae.to_inference()
    for i in range(3):
        truth = torch.stack([WRITES[i, t] * 3.0**t for t in range(i, 3)], 1)
        found = saved.layer("W_dec", i)
        scale = sae.out_scale.reshape(3, E)[i:]  # so that every target layer counts
        assert best((truth * scale).flatten(1), (found * scale).flatten(1)).mean() > 0.9, i


def test_a_transcoder_finds_the_map_and_a_skip_what_is_linear() -> None:  # F59
    gen = torch.Generator().manual_seed(4)
    linear = torch.randn(D, E, generator=gen)
    acts = {"resid.1": PAIR["resid.1"], "mlp.2": 3 * PAIR["resid.1"] @ linear + 5}
    row = replace(SKIP, acts=acts)
    few = {"n_latents": 4, "k": 1}
    plain, skip = row.make(skip=False, **few), row.make(**few)
    losses = train(plain, 300, acts)[-1], train(skip, 300, acts)[-1]
    assert losses[1] < 0.05 * losses[0]
    W_skip = skip.to_inference().W_skip
    assert (W_skip - 3 * linear.T).norm() < 0.3 * (3 * linear).norm()  # latents do the rest


def test_a_transcoder_recovers_a_planted_map() -> None:  # F59
    gen = torch.Generator().manual_seed(9)
    codes = (torch.rand(2048, 12, generator=gen) < 0.12) * (1 + torch.rand(2048, 12, generator=gen))
    reads, writes = torch.randn(12, D, generator=gen), torch.randn(12, E, generator=gen)
    acts = {"resid.1": codes @ reads + 3, "mlp.2": codes @ writes - 2}
    sae = replace(TRANSCODER, acts=acts).make()
    assert best(writes, sae.W_dec.detach()).mean() < 0.75
    train(sae, 400, acts, lr=1e-2)
    assert best(writes, sae.to_inference().W_dec).mean() > 0.9


# -- units, starts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", LINKED, ids=ids)
def test_it_starts_at_the_mean_of_every_output_whatever_the_centre(row: LinkedRow) -> None:
    for center in ("none", "mean"):
        sae = row.make(center=center)
        nothing = torch.zeros(1, sae.n_latents)
        want = torch.stack([row.acts[hook].mean(0) for hook in sae.hooks_out])
        got = sae.to_inference().decode(nothing).reshape(len(want), -1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    same = [row.make(center=c).to_inference() for c in ("none", "mean")]
    for one, other in zip(same[0].parameters(), same[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_hooks_have_their_own_units_so_none_drowns_another() -> None:
    plain, other = CROSSCODER.make(), None
    big = {"resid.1": BOTH["resid.1"] * 1000 - 70, "resid.2": BOTH["resid.2"]}
    other = replace(CROSSCODER, acts=big).make(scale="unit")
    moved = replace(CROSSCODER, acts={h: x * 7 for h, x in BOTH.items()}).make()
    one, seven = (s.losses(a, END) for s, a in ((plain, BOTH), (moved, _times(BOTH, 7))))
    torch.testing.assert_close(one.total, seven.total)  # no trace of the raw size
    assert other.out_scale[0] < 0.01 * other.out_scale[-1]
    e = torch.zeros(4, 2 * D)
    e[:, :D] = torch.randn(4, D)
    swapped = torch.cat([e[:, D:], e[:, :D]], 1)
    sse = plain._sse(e)[0] / plain.out_variance
    torch.testing.assert_close(plain.reconstruction(e), sse[0] / 2)
    torch.testing.assert_close(plain.reconstruction(swapped), sse[1] / 2)


def _times(acts: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {hook: x * factor for hook, x in acts.items()}


@pytest.mark.parametrize("row", [TRANSCODER, CROSSCODER, CLT_TOPK], ids=ids)
def test_the_searched_norm_is_the_best_of_the_grid(row: LinkedRow) -> None:  # F64
    sae, first = row.make(init_norm="search"), row.batch(slice(256))
    before = sae.losses(first, END).terms["reconstruction"]
    sae.init_from_data(first)
    searched = sae.losses(first, END).terms["reconstruction"]
    assert searched < before
    for norm in (0.05, 0.3, 1.0, 3.0):
        fixed = row.make(init_norm=norm).losses(first, END).terms["reconstruction"]
        assert searched <= fixed * 1.001


def test_expansion_factor_counts_one_hook() -> None:  # F63
    values = {"n_latents": None, "expansion_factor": 2}
    assert CROSSCODER.make(**values).n_latents == 2 * D
    assert TRANSCODER.make(**values).n_latents == 2 * D
    assert CLT.make(**values).n_latents == 3 * 2 * D  # of each layer


# -- dead latents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [TRANSCODER, SKIP, CROSSCODER], ids=ids)
def test_resampling_points_dead_latents_at_what_was_missed(row: LinkedRow) -> None:
    sae = row.make(resample_every=1, dead_after_tokens=10, center="none")
    sae.tokens_since_fired[[3, 5]] = 11
    from saetrain.progress import Progress

    acts = row.batch(slice(64))
    replaced = sae.resample(acts, Progress(step=0, n_steps=5, tokens=64))
    assert set(replaced) == {"W_dec", "W_enc", "b_enc"}
    x, y = sae.inputs(acts), sae.targets(acts)
    for latent in (3, 5):
        seen = torch.nn.functional.cosine_similarity(x - sae.in_origin, sae.W_enc[:, latent], dim=1)
        missed = torch.nn.functional.cosine_similarity(y - sae.b_dec, sae.W_dec[latent], dim=1)
        assert seen.argmax() == missed.argmax()  # one token
        assert min(seen.max(), missed.max()) > 0.9999
        h = (x @ sae.W_enc + sae.b_enc)[:, latent]
        assert h.mean().abs() < 0.5 * h.std()  # centred, although inputs are not


def test_auxk_brings_dead_latents_of_a_clt_back() -> None:  # F53
    living = {}
    for alpha in (0.0, 1 / 4):
        sae = CLT_TOPK.make(auxk_alpha=alpha, aux_k=8 if alpha else 0, dead_after_tokens=2000)
        with torch.no_grad():
            sae.W_enc[:, :, :20] *= 1e-4  # of 24 in each layer: never among the largest
        train(sae, 150, LAYERS, lr=1e-2)
        living[alpha] = int((dense(sae.encode(CLT.inputs(sae))) > 0).any(0).sum())
    assert living[1 / 4] > 1.5 * living[0.0]
