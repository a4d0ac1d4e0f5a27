"""Settings of an SAE that cannot work, and how an architecture of your own is found."""

from __future__ import annotations

import dataclasses
import os
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
from saes_rows import END, HOOK, SPACES, D, Row, X
from test_saes import GATED, JUMPRELU, MATRYOSHKA, RELU, ROOT, ROWS, TOPK

import saetrain.saes as saes
from actcache.store import plugins
from saetrain import presets
from saetrain.activations import TopKConfig
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
    "warmup": (
        RELU,
        {"penalty": {"warmup_fraction": 1.5}},
        "sae.penalty.warmup_fraction: expected 0 to 1",
    ),
    "λ without penalty": (
        TOPK,
        {"l1_coefficient": 0.1},
        "sae.l1_coefficient=0.1: this SAE has no sae.penalty. Remove it, or choose one",
    ),
    "λ of another penalty": (
        JUMPRELU,
        {"l1_coefficient": 0.1},
        "sae.l1_coefficient=0.1 has no meaning with sae.penalty.name=l0; its weight is "
        "sae.penalty.coefficient",
    ),
    "k without topk": (
        TOPK,
        {"activation": "relu", "penalty": {"name": "l1", "coefficient": 0.1}},
        "sae.k=2 has no meaning with sae.activation.name=relu. Remove it, sae.k=null",
    ),
    "k twice": (
        TOPK,
        {"activation": {"name": "topk", "k": 3}},
        "sae.k=2 and sae.activation.k=3 contradict each other",
    ),
    "l0 of topk": (
        TOPK,
        {"penalty": {"name": "l0", "coefficient": 0.1}},
        "sae.penalty.name=l0 with sae.activation.name=topk",
    ),
    "no such activation": (
        TOPK,
        {"activation": "topkk"},
        "sae.activation.name='topkk' is not known. Did you mean topk",
    ),
    "no such penalty": (
        TOPK,
        {"penalty": {"name": "l7", "coefficient": 0.1}},
        "sae.penalty.name='l7' is not known",
    ),
    "typo in a part": (
        JUMPRELU,
        {"activation": {"bandwith": 0.1}},
        "unknown key 'sae.activation.bandwith'. Did you mean bandwidth",
    ),
    "no coefficient": (TOPK, {"penalty": "l1"}, "missing: sae.l1_coefficient"),
    "groups": (  # F24
        MATRYOSHKA,
        {"group_sizes": [8, 16]},
        "sae.group_sizes=[8, 16] adds up to 24, expected sizes above 0 that add up to "
        "sae.n_latents=48",
    ),
    "groups of eF": (
        MATRYOSHKA,
        {"group_sizes": [8, 16], "n_latents": None, "expansion_factor": 2},
        "adds up to 24, expected sizes above 0 that add up to sae.n_latents=32",
    ),
    "groups twice": (MATRYOSHKA, {"random_prefixes": 3}, "not both"),
    "one prefix": (
        MATRYOSHKA,
        {"group_sizes": None, "random_prefixes": 1},
        "sae.random_prefixes: expected at least 2, got 1",
    ),
    "too few for groups": (
        MATRYOSHKA,
        {"group_sizes": None, "n_latents": 31},
        "sae.n_latents=31 is too few for the default groups",
    ),
    "groupmax": (
        TOPK,
        {"activation": {"name": "groupmax"}, "k": 5},
        "sae.k=5 does not divide sae.n_latents=48",
    ),
    "auxk of gated": (GATED, {"auxk_alpha": 0.1}, "sae.auxk_alpha=0.1 with sae.name=gated"),
    "gate": (GATED, {"gate_alpha": 0.0}, "sae.gate_alpha: expected more than 0, got 0.0"),
    "bandwidth": (
        JUMPRELU,
        {"activation": {"bandwidth": 0.0}},
        "sae.activation.bandwidth: expected more than 0, got 0.0",
    ),
    "p": (
        RELU,
        {"penalty": {"name": "lp", "coefficient": 0.1, "p": 2}, "l1_coefficient": None},
        "sae.penalty.p: expected above 0 and up to 1, got 2",
    ),
    "init": (TOPK, {"init_norm": 0.0}, "sae.init_norm: expected more than 0 or 'search', got 0.0"),
    "resample": (TOPK, {"resample_every": 0}, "sae.resample_every: expected at least 1, got 0"),
}
EVERY = {
    "neither": ({"n_latents": None}, "exactly one of n_latents and expansion_factor"),
    "both": ({"expansion_factor": 2}, "exactly one of n_latents and expansion_factor"),
    "no latents": ({"n_latents": 0}, "sae.n_latents: expected at least 1, got 0"),
    "typo": ({"n_latent": 9}, "unknown key 'sae.n_latent'. Did you mean n_latents"),
    "type": ({"dead_after_tokens": "many"}, "sae.dead_after_tokens: expected a whole number"),
    "choice": ({"scale": "sqrt"}, "sae.scale: expected one of 'none', 'sqrt_d', 'unit'"),
    "other hook": ({"hook_out": "mlp.3"}, "sae.hook_out='mlp.3' differs from the input hook"),
}
ALL_BAD = [(f"{n}", r, v, m) for n, (r, v, m) in BAD.items()]
ALL_BAD += [(f"{n}-{r.name}", r, v, m) for n, (v, m) in EVERY.items() for r in (TOPK, GATED)]


@pytest.mark.parametrize(
    ("row", "values", "message"), [b[1:] for b in ALL_BAD], ids=[b[0] for b in ALL_BAD]
)
def test_bad_settings(row: Row, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        row.make(**values)
    assert message in str(error.value)


def test_k_has_no_default_but_a_preset_has() -> None:
    with pytest.raises(ConfigError, match=r"missing: sae\.k"):
        make_config({"name": "sae", "n_latents": 8, "activation": "topk"})
    assert make_config({"name": "topk", "n_latents": 64}).activation.k == 32


def test_presets_in_python_are_those_of_the_command() -> None:
    for name in presets.names():
        values = presets.preset(name)
        assert make_config({"name": name}) == make_config(values), name
        assert make_config({"name": name, "n_latents": 192}).n_latents == 192
        assert make_config({"name": name, "expansion_factor": 3}).n_latents is None


def test_parts_replace_or_change_those_of_a_preset() -> None:
    changed = make_config({"name": "batchtopk", "activation": {"threshold_decay": 0.5}})
    assert (changed.activation.k, changed.activation.threshold_decay) == (32, 0.5)
    tanh = {"name": "tanh", "coefficient": 0.1}
    replaced = make_config({"name": "vanilla", "activation": "jumprelu", "penalty": tanh})
    assert (replaced.activation.name, replaced.penalty.name) == ("jumprelu", "tanh")
    assert make_config({"name": "topk", "activation": {"k": 7}}).activation.k == 7
    built = make_config({"name": "sae", "n_latents": 9, "activation": TopKConfig(k=4)})
    assert built.activation == TopKConfig(k=4)
    with pytest.raises(ConfigError, match="finished TopKConfig; set it there"):
        make_config({"name": "sae", "n_latents": 9, "activation": TopKConfig(k=4), "k": 3})


def test_no_sparsity_is_said_aloud() -> None:
    with pytest.warns(
        UserWarning, match=r"nothing makes latents sparse: sae\.activation\.name=relu"
    ):
        make_config({"name": "vanilla", "penalty": "none"})
    with pytest.warns(UserWarning, match="one group: this is a plain SAE"):
        make_config({"name": "matryoshka", "n_latents": 8, "k": 2, "group_sizes": [8]})


def test_a_short_name_for_run_folders() -> None:
    for values, name in (
        ({"name": "topk"}, "topk"),
        ({"name": "sae", "activation": {"name": "relu"}}, "relu"),
        ({"name": "sae", "activation": "jumprelu"}, "jumprelu"),
        ({"name": "gated", "activation": {"name": "relu"}}, "gated"),
    ):
        assert presets.label(values) == name


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
        assert TOPK.make(auxk_alpha=0.0, aux_k=None).aux_k == 0


def test_aux_k_defaults_to_half_the_width_within_the_latents() -> None:
    assert TOPK.make(aux_k=None).aux_k == D // 2
    assert TOPK.make(n_latents=3, aux_k=None).aux_k == 3
    assert TOPK.make(aux_k=1000).aux_k == 48


# -- files, and adding your own --------------------------------------------------------------------


def test_files_configs_and_rows_agree() -> None:
    files = {p.stem for p in (ROOT / "saetrain/saes").glob("*.py")}
    names = files - {"base", "__init__", "__main__"}
    configs = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / "conf/sae").glob("*.yaml")}
    assert {values["name"] for values in configs.values()} == names
    assert {row.name for row in ROWS} - {"sae"} == set(configs)  # every preset has a row
    assert {row.make().name for row in ROWS} == names
    for stem, values in configs.items():
        fields = {f.name for f in dataclasses.fields(load_all()[values["name"]].Config)}
        short = set(presets.SHORT) if "activation" in fields else set()
        assert fields <= set(values) - {"name"} <= fields | short, stem


@pytest.mark.parametrize("path", sorted((ROOT / "conf/sae").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_spell_out_every_key_of_their_parts(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    config, shown = make_config(values), dict(values)
    for part in (p for p in presets.PARTS if values.get(p)):
        short = {k for s, (p, k) in presets.SHORT.items() if p == part and s in values}
        built = {f.name for f in dataclasses.fields(getattr(config, part))}
        assert set(shown[part]) | short == built, f"{path.name}: {part}"


CUSTOM = '''
from dataclasses import dataclass
import torch
from torch import nn
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
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_installed_package_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:  # F36
    """Also in a folder that has been searched before."""
    if when == "meanwhile":
        os.utime(tmp_path, (0, 0))  # long before: clocks of file systems are coarse
        monkeypatch.syspath_prepend(tmp_path)
        assert "linear_meanwhile" not in load_all()
    (tmp_path / f"somebodys_{when}.py").write_text(CUSTOM.format(suffix=when))
    info = tmp_path / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[saetrain.saes]\nlinear = somebodys_{when}\n")
    if when == "before":
        monkeypatch.syspath_prepend(tmp_path)
    sae = make_sae({"name": f"linear_{when}", "n_latents": 20}, SPACES)
    assert type(sae).__module__ == f"somebodys_{when}"


def test_entry_points_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    load_all()
    monkeypatch.setattr(plugins, "entry_points", lambda **_: pytest.fail("looked again"))
    assert "sae" in load_all()


def test_a_preset_belongs_to_whoever_asks() -> None:
    presets.preset("topk")["activation"]["name"] = "spoilt"
    assert presets.preset("topk")["activation"]["name"] == "topk"


def test_a_missing_saes_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_all([tmp_path / "nowhere.py"])


@pytest.mark.usefixtures("own_names")
def test_a_taken_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "thief.py").write_text(CUSTOM.replace("linear_{suffix}", "gated").format())
    with pytest.raises(ConfigError, match=r"'gated' is taken by saetrain\.saes\.gated\.Gated"):
        load_all([tmp_path])
    (tmp_path / "thief.py").write_text(CUSTOM.replace("linear_{suffix}", "topk").format())
    with pytest.raises(ConfigError, match=r"'topk' is taken by the preset conf/sae/topk\.yaml"):
        load_all([tmp_path])
