"""`python -m pipelines.from_yaml`: the seed's YAML word for word, and what every key does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from commands import ROOT, python, read, rows_of, train_rows

from actcache.run import CacheSettings
from actcache.store import open_store
from pipelines import both, from_yaml
from saetrain import TrainSettings

# The YAML of the seed document, word for word.
DEFAULT = """\
model:
  type: TopKSAE  # Model type
  hidden_size: 2048
  latent_size: 65536
  k: 50  # For TopK models
  language_model_path: "Qwen/Qwen3-1.7B"

training:
  batch_size: 128
  lr: 0.0005
  num_epochs: 1
  device: "cuda:0"
  l1_coefficient: 0.001

data:
  train_path: "openbmb/ultra-fineweb"
  dataset_split: "train"
  streaming: true
  max_samples: 10000000

wandb:
  use_wandb: false
  project: "sae-experiments"
"""
TOPK = """\
model:
  type: TopKSAE
  k: 50  # Number of active features
"""
LATER = {
    "JumpReLUSAE": """\
model:
  type: JumpReLUSAE
  threshold: 0.001  # Activation threshold
  bandwidth: 0.001  # Gradient smoothing
""",
    "MatryoshkaSAE": """\
model:
  type: MatryoshkaSAE
  group_sizes: [8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192]
  k: 50
""",
    "RouteSAE": """\
model:
  type: RouteSAE
  base_sae_type: TopKSAE  # Underlying SAE type
  n_layers: 28
  aggre: 'sum'  # 'sum' or 'mean'
  routing: 'hard'  # 'hard' or 'soft'
""",
    "GatedSAE": "model: {type: GatedSAE}\n",
    "RouteMatryoshkaSAE": "model: {type: RouteMatryoshkaSAE}\n",
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written by default goes to the test's folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CacheSettings, TrainSettings]]:
    """Settings of the commands that are run from now on, which do nothing else."""
    found: list[tuple[CacheSettings, TrainSettings]] = []
    monkeypatch.setattr(both, "cache_then_train", lambda c, t, host, say: found.append((c, t)))
    return found


@pytest.fixture
def tiny(tiny_host: Path, tiny_parquet: Path) -> dict[str, dict[str, Any]]:
    """What a test puts over the seed's YAML: paths that are here, and tiny sizes."""
    return {
        "model": {"hidden_size": 32, "latent_size": 64, "language_model_path": str(tiny_host)},
        "training": {"batch_size": 2, "device": "cpu", "report": False, "progress": False},
        "data": {"train_path": str(tiny_parquet), "max_length": 16},
    }


def configs(*contents: str | dict[str, Any]) -> list[str]:
    """Files with these contents, as words of the command."""
    words = []
    for n, content in enumerate(contents):
        file = Path(f"{n}.yaml").absolute()
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        words += ["--config", str(file)]
    return words


def result(
    tiny: dict[str, dict[str, Any]], name: str, **changes: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """run.json and metrics of the seed's default config with `tiny` and then `changes` over it."""
    runs = {"training": {"runs_dir": name, "log_every": 1}, "data": {"store": f"{name}/store"}}
    assert from_yaml.main(configs(DEFAULT, tiny, runs, changes)) == 0
    (folder,) = (p.parent for p in Path(name).glob("*/run.json"))
    return read(folder / "run.json"), rows_of(folder)


def test_the_seeds_default_config_trains_then_evaluates(tiny: Any, tmp_path: Path) -> None:
    # F27, F28
    tiny["training"]["runs_dir"] = str(tmp_path / "runs")
    done = python("pipelines.from_yaml", *configs(DEFAULT, tiny | {"model": tiny["model"]}))
    assert done.returncode == 0, done.stderr
    (folder,) = (p.parent for p in (tmp_path / "runs").glob("*/run.json"))
    assert list((folder / "checkpoints").iterdir())
    assert rows_of(folder)[-1]["loss"] > 0
    assert 0 < read(folder / "eval.json")["tokens"] < 960
    config = read(folder / "config.json")
    assert (config["sae"]["n_latents"], config["sae"]["k"]) == (64, 50)
    assert config["wandb"] == {**config["wandb"], "mode": "disabled", "project": "sae-experiments"}
    assert read(folder / "run.json")["hooks"]["in"] == "resid.1"  # the middle of 3
    assert "model.layer=1 by default" in done.stderr
    assert "training.l1_coefficient=0.001 has no effect with TopKSAE" in done.stderr


def test_the_seeds_topk_block(tiny: Any) -> None:
    # F27
    assert from_yaml.main(configs(DEFAULT, {"model": {"k": 3}}, TOPK, tiny)) == 0
    (folder,) = (p.parent for p in Path("runs").glob("*/run.json"))
    assert read(folder / "config.json")["sae"]["k"] == 50  # a later file wins


@pytest.mark.parametrize("name", LATER)
def test_later_architectures_are_known_and_refused(
    name: str, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # F27
    assert from_yaml.main(configs(DEFAULT, LATER[name], tiny)) == 1
    expected = f"model.type={name} is not in this version yet; this version has TopKSAE, VanillaSAE"
    assert expected in capsys.readouterr().err
    assert not Path("runs").exists()


def test_training_keys_change_the_run(tiny: Any) -> None:
    # F38a, F29
    run_json, rows = result(tiny, "plain")
    rows_in_train = train_rows(Path("plain/store"))
    assert run_json["n_steps"] == rows_in_train // 32 == len(rows)
    assert run_json["lr"] == 5e-4
    larger, _ = result(tiny, "larger", training={"batch_size": 4})
    assert larger["n_steps"] == rows_in_train // 64
    twice, _ = result(tiny, "twice", training={"num_epochs": 2, "lr": 1e-3})
    assert (twice["n_steps"], twice["lr"]) == (2 * run_json["n_steps"], 1e-3)
    few, _ = result(tiny, "few", data={"max_samples": 16, "max_length": 8})
    documents = [set(s.tokens().doc) for s in open_store("few/store").snapshot().segments]
    assert len(set.union(*documents)) == 16
    assert few["n_steps"] == train_rows(Path("few/store")) // 16


def test_the_l1_coefficient_enters_the_loss_of_a_vanilla_sae(
    tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # F38a
    vanilla = {"model": {"type": "VanillaSAE"}}
    _, one = result(tiny, "one", **vanilla)
    assert "model.k=50 has no effect with VanillaSAE" in capsys.readouterr().err
    _, two = result(tiny, "two", **vanilla, training={"l1_coefficient": 0.002})
    # Step 1: same weights and same batch, so the penalty doubles and nothing else changes.
    assert two[0]["loss/l1"] == pytest.approx(2 * one[0]["loss/l1"], rel=1e-6)
    assert two[0]["loss/reconstruction"] == one[0]["loss/reconstruction"]
    assert one[0]["l1_coefficient"] == pytest.approx(0.001)  # in force from the first step
    for row in one:
        assert row["loss"] == pytest.approx(row["loss/reconstruction"] + row["loss/l1"], rel=1e-6)


def test_device_and_data_keys_reach_the_settings(
    tiny: Any, captured: list[tuple[CacheSettings, TrainSettings]]
) -> None:
    # F38a
    del tiny["training"]["device"]
    assert from_yaml.main(configs(DEFAULT, tiny, {"training": {"lr": "5e-3"}})) == 0
    cached, trained = captured[0]
    assert cached.host.device == trained.device == "cuda:0"
    assert trained.optim.lr == 5e-3  # YAML reads 5e-3 as text
    assert (cached.data.kind, cached.data.split) == ("hub", "train")  # a local folder, streamed
    assert cached.data.max_samples == 10_000_000
    on = {"wandb": {"use_wandb": True, "project": "p"}, "data": {"streaming": False}}
    assert from_yaml.main(configs(DEFAULT, tiny, on)) == 0
    cached, trained = captured[1]
    assert (trained.wandb.mode, trained.wandb.project) == ("online", "p")
    assert (cached.data.kind, cached.data.files) == ("parquet", tiny["data"]["train_path"])
    tiny["data"]["train_path"] = "openbmb/ultra-fineweb"
    assert from_yaml.main(configs(DEFAULT, tiny, {"data": {"dataset_split": "en"}})) == 0
    assert captured[2][0].data.dataset == "openbmb/ultra-fineweb"
    assert captured[2][0].data.split == "en"


def test_a_device_that_is_not_there_is_refused_before_caching(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # F38a
    del tiny["training"]["device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert from_yaml.main(configs(DEFAULT, tiny)) == 1
    assert "training.device=cuda:0, but torch sees no CUDA device" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {"k": 1}}, "unknown key 'modle'. Did you mean model?"),
        ({"training": {"learning_rte": 1}}, "unknown key 'training.learning_rte'"),
        ({"training": {"batch_sise": 1}}, "Did you mean batch_size"),
        ({"training": {"batch_size": "many"}}, "training.batch_size: expected a whole number"),
        ({"training": {"lr": -1}}, "training.lr: expected more than 0"),
        ({"model": {"k": None}}, "missing: model.k (TopKSAE needs it)"),
        ({"model": {"k": 65}}, "model.k=65 is larger than model.latent_size=64"),
        ({"model": {"type": "TopSAE"}}, "not a known type. Did you mean TopKSAE"),
        ({"model": {"hidden_size": 2048}}, "model.hidden_size=2048, but"),
        ({"model": {"layer": 1, "hook": "mlp.1"}}, "give model.layer or model.hook, not both"),
        ({"model": "TopKSAE"}, "expected sections with keys"),
        ({"data": {"dataset_split": "test"}}, "data.train_path="),
        (
            {"model": {"type": "VanillaSAE"}, "training": {"l1_coefficient": None}},
            "missing: training.l1_coefficient",
        ),
    ],
)
def test_wrong_yaml_is_refused(
    changes: Any, message: str, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # F27
    assert from_yaml.main(configs(DEFAULT, tiny, changes)) == 1
    assert message in capsys.readouterr().err


def test_unreadable_yaml_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert from_yaml.main(["--config", "nothing.yaml"]) == 1
    assert "--config nothing.yaml cannot be read" in capsys.readouterr().err
    assert from_yaml.main(configs("model: [")) == 1
    assert "0.yaml cannot be read" in capsys.readouterr().err


def test_the_default_file_shows_every_key() -> None:
    # F27
    ours = yaml.safe_load((ROOT / "pipelines/seed.yaml").read_text("utf-8"))
    sections = get_type_hints(from_yaml.SeedConfig)
    assert {s: set(keys) for s, keys in ours.items()} == {
        s: {f.name for f in dataclasses.fields(cls)} for s, cls in sections.items()
    }
    for section, keys in yaml.safe_load(DEFAULT).items():
        for key, value in keys.items():
            # A coefficient that TopKSAE has no use for is left out of our default.
            assert ours[section][key] == (None if key == "l1_coefficient" else value)
