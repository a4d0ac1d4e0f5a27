"""Saved transcoders, crosscoders and cross-layer transcoders: codes by layer, names, orientation,
files and settings that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saes_reference import space_of
from saes_rows import shake
from saes_rows_multi import (
    BOTH,
    CLT,
    CLT_TOPK,
    CROSSCODER,
    INS,
    LINKED,
    OUTS,
    PAIR,
    SKIP,
    TRANSCODER,
    D,
    E,
    LinkedRow,
)
from safetensors.torch import load_file

from saetrain.artefact import JSON_FILE, WEIGHTS_FILE, ArtefactError, load_sae
from saetrain.codes import SparseCodes, decode_codes
from saetrain.cross_layer import by_layer, layer_after_layer
from saetrain.errors import ConfigError
from saetrain.saes import make_sae

ids = lambda row: row.more or row.name  # noqa: E731


# -- codes and files of a clt ----------------------------------------------------------------------


def test_codes_of_layers_in_any_order() -> None:
    values, indices = torch.rand(5, 3, 2), torch.randint(0, 8, (5, 3, 1)) + torch.tensor([0, 1])
    codes = layer_after_layer(SparseCodes(values, indices % 8, 8))
    assert isinstance(codes, SparseCodes)
    order = torch.randperm(6)
    mixed = SparseCodes(codes.values[:, order], codes.indices[:, order], 24)
    full = codes.dense().reshape(5, 3, 8)
    for given in (codes, mixed, codes.dense()):
        for part, want in zip(by_layer(given, 3), full.unbind(1), strict=True):
            torch.testing.assert_close(decode_codes(part, torch.eye(8)), want)
    assert by_layer(codes, 3)[0].values.shape == (5, 2)  # cut, not masked
    sae = CLT_TOPK.make().to_inference()
    mine = sae.encode(CLT.inputs(sae, slice(9)))
    assert isinstance(mine, SparseCodes)
    flipped = SparseCodes(mine.values.flip(-1), mine.indices.flip(-1), mine.n_latents)
    torch.testing.assert_close(sae.decode(flipped), sae.decode(mine))


def test_a_latent_writes_to_its_layer_and_later_ones_only() -> None:
    sae = shake(CLT.make())
    for module in (sae, sae.to_inference()):
        nothing = module.decode(torch.zeros(1, 72))
        for i in range(3):
            code = torch.zeros(1, 72)
            code[0, 24 * i + 5] = 1.0
            moved = (module.decode(code) - nothing).abs().sum(-1)[0] > 1e-6
            assert moved.tolist() == [t >= i for t in range(3)]


def test_files_are_named_and_turned_as_elsewhere(tmp_path: Path) -> None:
    """SAELens: W_enc (d_in, d_sae), W_dec (d_sae, d_out), W_skip (d_out, d_in). circuit-tracer:
    W_enc_i (F, d), W_dec_i (F, L - i, d), b_enc_i, b_dec_i, threshold_i."""
    shapes = {}
    for row in (SKIP, CROSSCODER, CLT):
        row.make().to_inference().save(tmp_path / ids(row))
        tensors = load_file(tmp_path / ids(row) / WEIGHTS_FILE)
        shapes[ids(row)] = {name: tuple(t.shape) for name, t in tensors.items()}
    assert shapes["skip"] == {
        "W_enc": (D, 48),
        "b_enc": (48,),
        "W_dec": (48, E),
        "b_dec": (E,),
        "W_skip": (E, D),
    }
    assert shapes["crosscoder"] == {
        "W_enc": (2, D, 48),
        "b_enc": (48,),
        "W_dec": (2, 48, D),
        "b_dec": (2, D),
    }
    for i in range(3):
        assert shapes["clt"][f"W_enc_{i}"] == (24, D)
        assert shapes["clt"][f"W_dec_{i}"] == (24, 3 - i, E)
        assert shapes["clt"][f"threshold_{i}"] == shapes["clt"][f"b_enc_{i}"] == (24,)
        assert shapes["clt"][f"b_dec_{i}"] == (E,)
    said = json.loads((tmp_path / "clt" / JSON_FILE).read_text())
    assert (said["hooks_in"], said["hooks_out"]) == (list(INS), list(OUTS))
    assert (said["kind"], said["n_latents"], said["d_in"], said["d_out"]) == ("clt", 72, D, E)


HOSTILE = {
    "fewer hooks out": (
        "clt",
        {"hooks_out": ["mlp.0"]},
        "as many hooks out as in, got 3 in, 1 out",
    ),
    "no hooks": ("clt", {"hooks_in": [], "hooks_out": []}, "as many hooks out as in"),
    "uneven": ("clt", {"n_latents": 71}, "3 layers do not divide n_latents=71"),
    "k of a layer": ("clt_topk", {"k": 25}, "k=25 does not fit 24 latents per layer"),
    "b_dec on the input": ("skip", {"apply_b_dec_to_input": True, "d_out": D}, "expected apply_b_"),
    "options": ("crosscoder", {"options": {"a": 1}}, "has no options, got ['a']"),
    "one hook more": ("crosscoder", {"hooks_in": ["a", "b", "c"]}, "W_enc has shape (2, 16, 48)"),
    "a huge layer": ("clt", {"n_latents": 3 << 40}, "W_enc_0 has shape (24, 16), expected"),
    "no hook": ("crosscoder", {"hooks_in": []}, "at least one hook in"),
    "a number": ("crosscoder", {"hooks_in": [1, 2]}, "hooks_in[0]: expected text"),
}


@pytest.mark.parametrize(("name", "changes", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    next(row for row in LINKED if ids(row) == name).make().to_inference().save(tmp_path)
    said = json.loads((tmp_path / JSON_FILE).read_text())
    (tmp_path / JSON_FILE).write_text(json.dumps(said | changes))
    with pytest.raises(ArtefactError) as error:
        load_sae(tmp_path)
    assert message in str(error.value)


# -- bad settings ----------------------------------------------------------------------------------

BAD = {
    "no output": (TRANSCODER, {"hook_out": None}, "missing: sae.hook_out"),
    "input as output": (TRANSCODER, {"hook_out": "resid.1"}, "hook_out=resid.1 is the input hook"),
    "tied": (TRANSCODER, {"init_encoder": "tied"}, "inputs have width 16 and outputs 12"),
    "no hooks": (CROSSCODER, {"hooks_in": None}, "missing: sae.hooks_in"),
    "one hook": (CROSSCODER, {"hooks_in": ["resid.1"]}, "a crosscoder reads at least two hooks"),
    "twice": (
        CROSSCODER,
        {"hooks_in": ["resid.1", "resid.1"]},
        "sae.hooks_in names resid.1 more than once",
    ),
    "nothing out": (CROSSCODER, {"hooks_out": []}, "sae.hooks_out=[]"),
    "single out": (CROSSCODER, {"hook_out": "mlp.1"}, "sae.hook_out=mlp.1 has no meaning"),
    "a clt's single out": (CLT, {"hook_out": "mlp.1"}, "no meaning with sae.name=clt"),
    "no outputs": (CLT, {"hooks_out": None}, "missing: sae.hooks_out"),
    "fewer": (CLT, {"hooks_out": OUTS[:2]}, "names 3 hooks and sae.hooks_out 2"),
    "one layer": (CLT, {"hooks_in": INS[:1], "hooks_out": OUTS[:1]}, "at least two layers"),
    "order": (CLT, {"hooks_in": INS[::-1]}, "expected layers in ascending order"),
    "a clt's tied": (CLT, {"init_encoder": "tied"}, "one encoder and several decoders"),
    "resampling": (CLT, {"resample_every": 5}, "sae.resample_every=5 with sae.name=clt"),
    "k of a layer": (
        CLT_TOPK,
        {"activation": {"name": "topk", "k": 25}},
        "sae.k=25 is larger than sae.n_latents=24",
    ),
    "k of eF": (
        CLT_TOPK,
        {"activation": {"name": "topk", "k": 17}, "n_latents": None, "expansion_factor": 1},
        "sae.k=17 is larger than sae.n_latents=16 (sae.expansion_factor=1 x width 16)",
    ),
}


@pytest.mark.parametrize(("row", "values", "message"), BAD.values(), ids=BAD)
def test_bad_settings(row: LinkedRow, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        row.make(**values)
    assert message in str(error.value)


def test_hooks_of_other_widths_are_refused_by_name() -> None:
    acts = {"resid.1": PAIR["resid.1"], "mlp.2": PAIR["mlp.2"]}
    spaces = {h: space_of(x, h) for h, x in acts.items()}
    with pytest.raises(ConfigError, match=r"sae\.hooks_in: .*resid\.1 has 16, mlp\.2 has 12"):
        make_sae(CROSSCODER.config(hooks_in=tuple(acts)), spaces)
    flat = spaces | {"mlp.2": space_of(torch.ones(8, E), "mlp.2")}
    with pytest.raises(ConfigError, match=r"mlp\.2.*variance 0\.0.*nothing to learn"):
        make_sae(TRANSCODER.config(), flat)


def test_inputs_of_the_wrong_shape_are_refused() -> None:
    sae = CROSSCODER.make()
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 2 hooks, width\), got \(4, 16\)"):
        sae.encode(torch.zeros(4, D))
    with pytest.raises(ValueError, match="2 hooks"):
        sae.to_inference().encode(torch.zeros(4, 3, D))


def test_outputs_other_than_inputs_make_an_acausal_transcoder() -> None:
    acts = dict(BOTH) | {"mlp.2": PAIR["mlp.2"]}
    values = CROSSCODER.values | {"hooks_out": ("mlp.2",), "init_encoder": "random"}
    sae = replace(CROSSCODER, acts=acts, values=values, targets=("mlp.2",)).make()
    x = torch.stack(list(BOTH.values()), 1)[:6]
    assert sae(x)["sae_out"].shape == sae.to_inference()(x)["sae_out"].shape == (6, E)
