"""Settings of an SAE that cannot work, and how an architecture of your own is found."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from saes_reference import (
    space_of,
)
from test_saes import END, HOOK, RELU, ROOT, ROWS, SPACES, TOPK, D, Row, X

import saetrain.saes as saes
from saetrain.errors import ConfigError
from saetrain.saes import load_all, make_config, make_sae
from saetrain.saes.base import registry

# -- settings --------------------------------------------------------------------------------------

BAD = {
    "k=0": (TOPK, {"k": 0}, "sae.k: expected at least 1, got 0"),
    "k>F": (TOPK, {"k": 64, "n_latents": 32}, "sae.k=64 is larger than sae.n_latents=32"),
    "k>eF": (
        TOPK,
        {"k": 64, "n_latents": None, "expansion_factor": 2},
        "sae.k=64 is larger than sae.n_latents=32 (sae.expansion_factor=2 x width 16)",
    ),
    "aux_k": (TOPK, {"aux_k": -1}, "sae.aux_k: expected 0 (off) or more, got -1"),
    "alpha": (TOPK, {"auxk_alpha": -1.0}, "sae.auxk_alpha: expected 0 (off) or more, got -1.0"),
    "l1": (RELU, {"l1_coefficient": -0.1}, "sae.l1_coefficient: expected 0 or more, got -0.1"),
    "nan": (RELU, {"l1_coefficient": float("nan")}, "expected 0 or more, got nan"),
    "warmup": (RELU, {"l1_warmup_fraction": 1.5}, "sae.l1_warmup_fraction: expected 0 to 1"),
}
EVERY = {
    "neither": ({"n_latents": None}, "exactly one of n_latents and expansion_factor"),
    "both": ({"expansion_factor": 2}, "exactly one of n_latents and expansion_factor"),
    "no latents": ({"n_latents": 0}, "sae.n_latents: expected at least 1, got 0"),
    "typo": ({"n_latent": 9}, "unknown key 'sae.n_latent'. Did you mean n_latents"),
    "type": ({"dead_after_tokens": "many"}, "sae.dead_after_tokens: expected a whole number"),
    "choice": ({"scale": "sqrt"}, "sae.scale: expected one of 'none', 'sqrt_d', 'unit'"),
    "transcoder": ({"hook_out": "mlp.3"}, "sae.hook_out='mlp.3' differs from the input hook"),
}
ALL_BAD = [(f"{n}", r, v, m) for n, (r, v, m) in BAD.items()]
ALL_BAD += [(f"{n}-{r.name}", r, v, m) for n, (v, m) in EVERY.items() for r in (TOPK, RELU)]


@pytest.mark.parametrize(("row", "values", "message"), [b[1:] for b in ALL_BAD], ids=lambda v: "")
def test_bad_settings(row: Row, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        row.make(**values)
    assert message in str(error.value)


def test_k_has_no_default() -> None:
    with pytest.raises(ConfigError, match=r"missing: sae\.k"):
        make_config({"name": "topk", "n_latents": 8})


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean topk"):
        make_config({"name": "topkk", "n_latents": 8})


def test_naming_the_input_hook_as_output_is_an_autoencoder() -> None:
    assert TOPK.make(hook_out=HOOK).hooks_out == (HOOK,)


def test_a_hook_that_does_not_vary_is_refused() -> None:
    flat = {HOOK: space_of(torch.ones(8, D), HOOK)}
    with pytest.raises(ConfigError, match=r"resid\.2.*variance 0\.0.*nothing to learn"):
        make_sae(TOPK.config(), flat)
    with pytest.raises(ConfigError, match=r"sae\.scale=sqrt_d divides by the mean norm"):
        make_sae(TOPK.config(), {HOOK: space_of(torch.zeros(8, D), HOOK)})


def test_several_input_hooks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reads one hook, got 2: resid\.2, resid\.3"):
        make_sae(TOPK.config(), SPACES | {"resid.3": space_of(X, "resid.3")})


def test_an_option_without_effect_is_said_aloud() -> None:
    with pytest.warns(UserWarning, match=r"sae\.aux_k=5 has no effect: sae\.auxk_alpha=0"):
        sae = TOPK.make(aux_k=5, auxk_alpha=0.0)
    assert "auxk" not in sae.losses({HOOK: X[:4]}, END).terms
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TOPK.make(auxk_alpha=0.0).aux_k == 0


def test_aux_k_defaults_to_half_the_width_within_the_latents() -> None:
    assert TOPK.make().aux_k == D // 2
    assert TOPK.make(n_latents=3).aux_k == 3
    assert TOPK.make(aux_k=1000).aux_k == 48


# -- files, and adding your own --------------------------------------------------------------------


def test_files_configs_and_rows_agree() -> None:
    files = {p.stem for p in (ROOT / "saetrain/saes").glob("*.py")}
    names = files - {"base", "__init__", "__main__"}
    configs = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / "conf/sae").glob("*.yaml")}
    assert names == set(configs) == {row.name for row in ROWS}
    for stem, values in configs.items():
        assert values["name"] == stem
        fields = dataclasses.fields(load_all()[stem].Config)
        assert set(values) - {"name"} == {f.name for f in fields}
        for f in (f for f in fields if f.default not in (dataclasses.MISSING, None)):
            assert values[f.name] == f.default, f"{stem}.yaml and the class differ in {f.name}"
        make_config(values)


CUSTOM = '''
from dataclasses import dataclass
import torch
from torch import nn
from saetrain.artefact import fold
from saetrain.losses import reconstruction
from saetrain.saes.base import SAE, Losses, SAEConfig, register

@dataclass(frozen=True, kw_only=True)
class LinearConfig(SAEConfig):
    gain: float = 1.0

@register("linear_{suffix}", LinearConfig)
class Linear(SAE):
    """No sparsity at all."""

    def __init__(self, cfg, spaces):
        super().__init__(cfg, spaces)
        self.W = nn.Parameter(cfg.gain * torch.eye(self.d_in, self.n_latents))

    def encode(self, x):
        return (self.standardise(x) @ self.W).relu()

    def decode(self, codes):
        return self.unstandardise(codes @ self.W.T)

    def losses(self, acts, progress):
        x = acts[self.hooks_in[0]]
        codes = self.encode(x)
        e = self.standardise(x) - codes @ self.W.T
        return Losses({{"reconstruction": reconstruction(e, "mse", 1.0, self.d_in)}}, codes)

    def to_inference(self):
        raise NotImplementedError
'''


@pytest.fixture
def own_names() -> Iterator[None]:
    """Forget architectures that a test registers."""
    known = set(load_all())
    yield
    for name in set(registry()) - known:
        del saes.base._REGISTRY[name]


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize("as_folder", [False, True])
def test_your_own_file_is_found(tmp_path: Path, as_folder: bool) -> None:  # F36
    suffix = "folder" if as_folder else "file"
    file = tmp_path / f"mine_{suffix}.py"
    file.write_text(CUSTOM.format(suffix=suffix))
    values = {"name": f"linear_{suffix}", "n_latents": 20, "gain": 2}
    with pytest.raises(ConfigError, match="saes_path"):
        make_config(values)
    sae = make_sae(values, SPACES, [tmp_path if as_folder else file])
    assert sae.name == f"linear_{suffix}"
    assert sae.losses({HOOK: X[:8]}, END).total > 0
    with pytest.raises(ConfigError, match="Did you mean gain"):
        make_config({**values, "gian": 2.0}, [file])


@pytest.mark.usefixtures("own_names")
def test_an_installed_package_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F36
    (tmp_path / "somebodys_saes.py").write_text(CUSTOM.format(suffix="installed"))
    info = tmp_path / "somebodys_saes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-saes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[saetrain.saes]\nlinear = somebodys_saes\n")
    monkeypatch.syspath_prepend(tmp_path)
    sae = make_sae({"name": "linear_installed", "n_latents": 20}, SPACES)
    assert type(sae).__module__ == "somebodys_saes"


def test_a_missing_saes_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_all([tmp_path / "nowhere.py"])


@pytest.mark.usefixtures("own_names")
def test_a_taken_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "thief.py").write_text(CUSTOM.replace("linear_{suffix}", "topk").format())
    with pytest.raises(ConfigError, match=r"'topk' is taken by saetrain\.saes\.topk\.TopK"):
        load_all([tmp_path])
