"""Saved SAEs: every activation against a loop, files that travel, and files that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saetrain.artefact import JSON_FILE, WEIGHTS_FILE, ArtefactError, InferenceSAE, load_sae
from saetrain.codes import SparseCodes, dense

D, F, E = 5, 12, 7
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 3},
    "jumprelu": {"activation": "jumprelu"},
    "groupmax": {"activation": "groupmax", "k": 3},
    "transcoder": {"activation": "relu", "apply_b_dec_to_input": False},
}


def make(case: str = "topk", seed: int = 0, **more: Any) -> InferenceSAE:
    gen = torch.Generator().manual_seed(seed)
    width = E if case == "transcoder" else D
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, width), "b_dec": (width,)}
    tensors = {n: torch.randn(s, generator=gen) for n, s in shapes.items()}
    if case == "jumprelu":
        tensors["threshold"] = torch.rand(F, generator=gen) * 2
    hooks = {"hooks_in": ("resid.2",), "hooks_out": ("mlp.3" if width == E else "resid.2",)}
    return InferenceSAE(**tensors, **hooks, **{**SETTINGS[case], **more})


def encode_loop(sae: InferenceSAE, case: str, x: Tensor) -> Tensor:
    """Latents of one token (D,), one latent at a time."""
    shifted = x if case == "transcoder" else x - sae.b_dec
    h = [float(shifted @ sae.W_enc[:, i] + sae.b_enc[i]) for i in range(F)]
    if case == "groupmax":
        best = [max(range(i, i + 4), key=lambda j: h[j]) for i in (0, 4, 8)]
        return torch.tensor([v if i in best and v > 0 else 0.0 for i, v in enumerate(h)])
    least = sorted(h)[-3] if case == "topk" else 0.0
    if case == "jumprelu":
        assert sae.threshold is not None
        return torch.tensor([v if v > t else 0.0 for v, t in zip(h, sae.threshold, strict=True)])
    return torch.tensor([v if v >= least and v > 0 else 0.0 for v in h])


@pytest.mark.parametrize("case", SETTINGS)
def test_maths(case: str) -> None:
    sae, x = make(case), torch.randn(2, 4, D)
    codes, out = sae.encode(x), sae(x)
    assert isinstance(codes, SparseCodes) is (case in ("topk", "groupmax"))
    want = torch.stack([encode_loop(sae, case, row) for row in x.reshape(-1, D)])
    torch.testing.assert_close(dense(codes).reshape(-1, F), want)
    torch.testing.assert_close(out["sae_out"].reshape(8, -1), want @ sae.W_dec + sae.b_dec)
    assert torch.equal(out["feature_acts"], dense(codes))


@pytest.mark.parametrize("case", SETTINGS)
def test_round_trip_is_bit_equal(case: str, tmp_path: Path) -> None:
    sae = make(case, source={"architecture": "x"})
    sae.save(tmp_path / "new" / "folder", source={"store_id": "abc", "sae": {"k": 3}})
    loaded = load_sae(tmp_path / "new" / "folder")
    assert loaded.describe() == sae.describe()
    assert loaded.source == {"architecture": "x", "store_id": "abc", "sae": {"k": 3}}
    assert dict(loaded.state_dict()).keys() == dict(sae.state_dict()).keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert not any(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        JSON_FILE,
        WEIGHTS_FILE,
    ]


def test_dtypes(tmp_path: Path) -> None:
    make().to(torch.bfloat16).save(tmp_path)
    assert load_sae(tmp_path).W_enc.dtype == torch.bfloat16
    assert load_sae(tmp_path, dtype=torch.float32).b_dec.dtype == torch.float32
    assert load_sae(tmp_path, "meta").W_enc.device.type == "meta"


def test_json_says_all_that_is_needed_and_names_no_path(tmp_path: Path) -> None:
    make().save(tmp_path)
    text = (tmp_path / JSON_FILE).read_text()
    assert json.loads(text) == {
        "schema": 1,
        "kind": "sae",
        "activation": "topk",
        "k": 3,
        "d_in": D,
        "n_latents": F,
        "d_out": D,
        "hooks_in": ["resid.2"],
        "hooks_out": ["resid.2"],
        "apply_b_dec_to_input": True,
        "options": {},
        "source": {},
    }
    assert str(tmp_path) not in text
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert str(tmp_path) not in str(file.metadata())


def test_loading_needs_only_saetrain(tmp_path: Path) -> None:
    make().save(tmp_path)
    code = (
        "import sys; from saetrain.artefact import load_sae; load_sae(sys.argv[1]); "
        "print([m for m in ('transformers', 'hydra', 'wandb', 'datasets') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def edit_json(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / JSON_FILE).read_text()) | changes
    kept = {k: v for k, v in values.items() if v is not ...}
    (folder / JSON_FILE).write_text(json.dumps(kept))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS_FILE) | changes
    kept = {n: t for n, t in tensors.items() if t is not None}
    save_file(kept, folder / WEIGHTS_FILE, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2 was written by a newer version of saetrain"),
        ({"schema": "1"}, "expected a whole number for schema, got '1'"),
        ({"schema": ...}, "expected a whole number for schema, got None"),
        ({"activaton": "relu"}, "unknown key 'activaton'. Did you mean activation"),
        ({"d_in": ...}, "missing: d_in"),
        ({"d_in": 0}, "d_in, d_out and n_latents: expected at least 1 each"),
        ({"activation": "tanh"}, "activation: expected one of 'relu', 'topk', 'jumprelu', 'gr"),
        ({"activation": "relu"}, "activation=relu with k=3"),
        ({"k": None}, "activation=topk with k=None"),
        ({"k": 13}, "k=13: expected 1 to n_latents=12"),
        ({"d_out": 6}, "apply_b_dec_to_input needs equal widths, got 5 and 6"),
        ({"kind": "saee"}, "kind='saee' is not known, expected one of "),
        ({"options": {"x": 1}}, "options: expected group_sizes or nothing, got ['x']"),
        ({"options": {"group_sizes": [5, 6]}}, "options.group_sizes=[5, 6]: expected whole"),
        ({"options": {"group_sizes": 12}}, "options.group_sizes=12: expected whole"),
        ({"options": {"group_sizes": [True] * 12}}, "options.group_sizes=[True"),
        ({"activation": "groupmax", "k": 5}, "k=5 groups do not divide n_latents=12"),
        ({"n_latents": 10**12}, "W_enc has shape (5, 12), expected (5, 1000000000000)"),
        ({"hooks_in": ["resid.9"]}, "not from the same save"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make().save(tmp_path)
    edit_json(tmp_path, **changes)
    with pytest.raises(ArtefactError) as error:
        load_sae(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_dec": None}, "W_dec is missing"),
        ({"W_skip": torch.zeros(2)}, "W_skip is unexpected"),
        ({"threshold": torch.zeros(F)}, "threshold is unexpected"),
        ({"W_enc": torch.zeros(F, D)}, "W_enc has shape (12, 5), expected (5, 12)"),
        ({"b_enc": torch.zeros(F, dtype=torch.int64)}, "b_enc is I64, expected floats"),
    ],
)
def test_bad_tensors_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make().save(tmp_path)
    edit_tensors(tmp_path, **changes)
    with pytest.raises(ArtefactError) as error:
        load_sae(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (JSON_FILE, None, "holds no saved SAE: sae.json is missing"),
        (WEIGHTS_FILE, None, "is incomplete: sae.safetensors is missing"),
        (JSON_FILE, b"{", "is damaged"),
        (JSON_FILE, b"[" * 100_000, "is damaged"),
        (JSON_FILE, b"\xff\xfe\x00", "is damaged"),
        (JSON_FILE, b"[1]", "expected a whole number for schema, got None"),
        (JSON_FILE, b" " * (17 << 20), "is too large"),
        (WEIGHTS_FILE, b"\x80\x04K\x01.", "is damaged"),  # a pickle
        (WEIGHTS_FILE, b"\xff" * 64, "is damaged"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    make().save(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError) as error:
        load_sae(tmp_path)
    assert message in str(error.value)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    make().save(tmp_path)
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[:-4])
    with pytest.raises(ArtefactError, match="is damaged"):
        load_sae(tmp_path)


def test_halves_of_two_saves_are_refused(tmp_path: Path) -> None:
    make(seed=0, source={"run": 0}).save(tmp_path / "a")
    make(seed=1, source={"run": 1}).save(tmp_path / "b")
    (tmp_path / "a" / WEIGHTS_FILE).write_bytes((tmp_path / "b" / WEIGHTS_FILE).read_bytes())
    with pytest.raises(ArtefactError, match="not from the same save"):
        load_sae(tmp_path / "a")


def test_a_failing_save_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make(seed=0)
    old.save(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saetrain.artefact.save_file", full)
    with pytest.raises(OSError, match="No space"):
        make(seed=1).save(tmp_path)
    assert torch.equal(load_sae(tmp_path).W_enc, old.W_enc)
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file is left


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": None}, "activation=topk with k=None"),
        ({"k": 13}, "k=13: expected 1 to n_latents=12"),
        ({"threshold": torch.zeros(F)}, "threshold is unexpected"),
        ({"activation": "jumprelu", "k": None}, "threshold is missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtefactError) as error:
        make("topk", **settings)
    assert message in str(error.value)
