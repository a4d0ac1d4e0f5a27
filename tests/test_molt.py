"""MoLT beyond the contract of test_saes.py: transforms as whole matrices, planted ones, ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saes_reference import space_of, topk_oracle
from saes_reference_route import maps_found, molt_matrices
from saes_rows import END, shake, train
from saes_rows_route import MAPS, MOLT, PAIR
from torch import Tensor

from saetrain.artefact import ArtefactError, load_sae
from saetrain.errors import ConfigError
from saetrain.saes import make_config
from saetrain.saes.molt import sizes

X, Y = PAIR["resid.0"], PAIR["mlp.1"]


def matrices(module: torch.nn.Module) -> Tensor:
    """(F, D, E): every transform written out."""
    w = {n: p.detach() for n, p in module.named_parameters()}
    return torch.stack(molt_matrices(w, (2, 1)))


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("center", ["none", "mean"])
def test_the_saved_one_is_a_sum_of_whole_matrices(  # F59, F60
    activation: str, center: str, tmp_path: Path
) -> None:
    parts: dict[str, Any] = {"activation": {"name": activation}}
    parts["activation"] |= {"k": 3} if activation == "topk" else {}
    parts["penalty"] = {"name": "l1", "coefficient": 0.1}
    sae = shake(MOLT.make(center=center, **parts))
    sae.to_inference().save(tmp_path)
    saved, x = load_sae(tmp_path), X[:40]
    h = (x - saved.center) @ saved.W_enc + saved.b_enc
    f = topk_oracle(h, 3) if activation == "topk" else h * (h > (0.001 if saved.k is None else 0))
    f = h.clamp(min=0) if activation == "relu" else f
    want = torch.einsum("nf,nd,fde->ne", f, x - saved.center, matrices(saved)) + saved.b_dec
    out = saved(x)
    torch.testing.assert_close(out["feature_acts"], f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["sae_out"], want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sae(x)["sae_out"], want, rtol=1e-3, atol=1e-4)


def test_sizes_are_frobenius_norms_and_latents_do_not_shrink_by_growing_them() -> None:
    sae = shake(MOLT.make())
    want = matrices(sae).flatten(1).norm(dim=1)
    torch.testing.assert_close(sae.row_norms(), want)
    torch.testing.assert_close(MOLT.make().row_norms(), torch.ones(12))
    V, U = torch.randn(3, 5, 2), torch.randn(3, 2, 4)
    torch.testing.assert_close(sizes(V, U), (V @ U).flatten(1).norm(dim=1))
    before = sae.losses(PAIR, END).terms
    with torch.no_grad():  # transforms three times as large, latents a third
        sae.U_2.mul_(3), sae.U_1.mul_(3), sae.W_enc.div_(3), sae.b_enc.div_(3)
    for name, term in sae.losses(PAIR, END).terms.items():
        torch.testing.assert_close(term, before[name])


def test_planted_transforms_are_found() -> None:
    sae = MOLT.make(activation={"name": "topk", "k": 1}, penalty=None)
    assert maps_found(sae, MAPS) < 0.6
    losses = train(sae, 700, PAIR)
    assert losses[-1] < 0.02 * losses[0]
    assert maps_found(sae, MAPS) > 0.95


@pytest.mark.slow
def test_the_presets_penalty_finds_them_too() -> None:
    penalty = {"name": "tanh", "coefficient": 0.01, "stretch": 0.25}
    sae = MOLT.make(penalty=penalty)
    losses = train(sae, 700, PAIR)
    assert losses[-1] < 0.02 * losses[0]
    assert maps_found(sae, MAPS) > 0.85
    assert (sae(X)["feature_acts"] > 0).sum(-1).float().mean() < 4  # of 12


def test_auxk_explains_the_residual_by_dead_transforms() -> None:  # F53
    sae = shake(MOLT.make(auxk_alpha=1 / 32, aux_k=2, dead_after_tokens=50))
    sae.tokens_since_fired[::3] = 51
    x, y = ((PAIR[hook][:32] - 0) for hook in PAIR)
    got = sae.losses({"resid.0": x, "mlp.1": y}, END).terms["auxk"]
    w, T = sae.weights(), matrices(sae)
    T = T / T.flatten(1).norm(dim=1)[:, None, None]
    xs, ys = sae.standardise(x), sae.targets({"resid.0": x, "mlp.1": y})
    h, dead = xs @ w.W_enc + w.b_enc, list(range(0, 12, 3))
    e = (ys - torch.einsum("nf,nd,fde->ne", h.clamp(min=0), xs, T) - sae.b_dec).detach()
    guess = torch.einsum("nf,nd,fde->ne", topk_oracle(h[:, dead], 2), xs, T[dead])
    want = (e - guess).square().sum() / (e - e.mean(0)).square().sum() / 32
    torch.testing.assert_close(got, want)
    got.backward()
    assert sae.U_2.grad[0].any()
    assert not sae.U_2.grad[1].any()  # alive


def test_what_a_transform_adds_depends_on_the_input() -> None:
    sae = MOLT.make()
    for module in (sae, sae.to_inference()):
        with pytest.raises(ValueError, match=r"use reconstruct\(x, codes\), or forward"):
            module.decode(module.encode(X[:2]))


def test_default_ranks_are_the_papers() -> None:
    config = make_config({"name": "molt", "n_latents": 62})
    assert config.rank_counts(62, 2048) == {512: 2, 256: 4, 128: 8, 64: 16, 32: 32}
    assert config.rank_counts(62, 64) == {64: 2, 32: 4, 16: 8, 8: 16, 4: 32}
    assert make_config({"name": "molt", "ranks": {"4": 62}}).ranks == {4: 62}  # from JSON


BAD: list[tuple[dict[str, Any], str]] = [
    ({"ranks": {4: 3, 2: 3}}, r"sae\.ranks=\{4: 3, 2: 3\}: .* add up to sae\.n_latents=12"),
    ({"ranks": {0: 12}}, r"expected ranks and counts of at least 1"),
    ({"ranks": {}}, r"expected ranks and counts of at least 1"),
    ({"ranks": {"two": 12}}, r"sae\.ranks: expected whole numbers as ranks, got 'two'"),
    ({"ranks": {13: 12}}, r"rank 13 is more than the narrower hook's width, 12"),
    ({"ranks": None}, r"sae\.n_latents=12 at width 12: .* a multiple of 31 transforms"),
    ({"hook_out": None}, r"sae\.hook_out=None: sae\.name=molt reads .* such as sae\.hook_out=mlp"),
    ({"hook_out": "resid.0"}, r"sae\.hook_out=resid\.0: sae\.name=molt"),
    ({"decoder_norm": "unit"}, r"sae\.decoder_norm=unit with sae\.name=molt: a transform is a mat"),
    ({"resample_every": 5}, r"sae\.resample_every=5 with sae\.name=molt"),
    ({"init_norm": "search"}, r"sae\.init_norm=search with sae\.name=molt"),
    ({"init_encoder": "tied"}, r"sae\.init_encoder=tied with sae\.name=molt"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MOLT.make(**values)


def test_widths_and_ids_of_both_hooks_are_kept() -> None:  # F63
    saved = MOLT.make().to_inference()
    assert (saved.d_in, saved.d_out, saved.n_latents) == (16, 12, 12)
    assert (saved.hooks_in, saved.hooks_out) == (("resid.0",), ("mlp.1",))
    wide = make_config({"name": "molt", "n_latents": None, "expansion_factor": 2})
    assert wide.latents(space_of(X, "resid.0").d) == 32


@pytest.mark.parametrize("ranks", [None, [], [[2, 8]], [[2, 8], [2, 4]], [[2, 8], [1, 4.0]], [2]])
def test_damaged_options_are_refused(ranks: Any, tmp_path: Path) -> None:
    MOLT.make().to_inference().save(tmp_path)
    described = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(described | {"options": {"ranks": ranks}}))
    with pytest.raises(ArtefactError, match=r"ranks"):
        load_sae(tmp_path)
