"""The one-command front ends: what they take, what they refuse, and what comes out."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import yaml

from actcache.host import Host, HostSettings
from actcache.run import CacheSettings, run
from actcache.sources import DataSettings
from actcache.store import FLAG_SPECIAL, open_store
from actcache.store.split import held_out
from pipelines import both, from_yaml, sae
from saetrain import TrainSettings, load_sae, train
from saetrain.saes.topk import TopKConfig
from saetrain.settings import EvalSettings, OptimSettings, WandbSettings

ROOT = Path(__file__).resolve().parents[1]
TINY = "--ctx_len 16 --batch_size 2 --k 4 --expansion_factor 2 --device cpu --eval_bootstrap 5"
TINY += " --no-report --no-progress"

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


@pytest.fixture(scope="module")
def store(tiny_host: Path, tiny_parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contexts of 16 tokens of the tiny corpus, residual stream of all 3 layers."""
    path = tmp_path_factory.mktemp("pipelines") / "store"
    host, data = HostSettings(model=str(tiny_host)), DataSettings(files=str(tiny_parquet))
    run(CacheSettings(host=host, data=data, store=str(path), context=16, progress=False))
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_rows(store: Path) -> int:
    """Rows a run trains on, counted from the token tables: no specials, not held out."""
    tables = [s.tokens() for s in open_store(store).snapshot().segments]
    return sum(
        int(np.sum(((t.flags & FLAG_SPECIAL) == 0) & ~held_out(t.doc, 0.05))) for t in tables
    )


def python(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-m", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# -- python -m pipelines.sae -----------------------------------------------------------------------


def test_help_lists_every_field_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # F45
    monkeypatch.setenv("COLUMNS", "500")  # no line is broken
    with pytest.raises(SystemExit) as stopped:
        sae.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    fields = dataclasses.fields(sae.TrainConfig)
    assert len(fields) > 50
    for f in fields:
        shown = f.name.upper() if f.name in sae.POSITIONAL else f"--{f.name}"
        about = f.metadata["help"]
        if f.default is None:
            about += f" (default: {f.metadata['unset']})"
        assert re.search(rf" {shown}\b[^()]* {re.escape(about)}", text), f.name
    assert "--k N latents that fire per token (default: 32)" in text
    assert "(default: 10_000_000)" in text
    assert "(default: 0.9 0.999)" in text


def leaves(cls: Any, path: str) -> set[str]:
    """Dotted paths of the settings in a dataclass and in those inside it."""
    found: set[str] = set()
    for name, hint in get_type_hints(cls).items():
        inner = dataclasses.is_dataclass(hint)
        found |= leaves(hint, f"{path}.{name}") if inner else {f"{path}.{name}"}
    return found


def test_every_setting_is_an_option_of_the_command() -> None:
    # F45
    options = {p for f in dataclasses.fields(sae.TrainConfig) for p in f.metadata["to"]}
    every = leaves(CacheSettings, "cache") | leaves(TrainSettings, "train")
    every |= leaves(TopKConfig, "train.sae")
    decided = {
        *("cache.data.kind", "train.store", "train.hook", "train.snapshot", "train.sae"),
        *("train.optim.name", "train.schedule.name", "train.wandb.mode"),  # the last: by an option
        "train.sae.hook_out",  # an autoencoder's output hook is its input
        "train.optim.lr_factors",
        "train.saes_path",  # this command trains TopK
    }
    assert every - options - decided == set()
    assert options - every == set()


def test_one_command_caches_trains_and_evaluates_a_layer_each(
    tiny_host: Path, tiny_parquet: Path, tmp_path: Path
) -> None:
    # F45, F50, F52, F55
    places = ["--store", str(tmp_path / "s"), "--runs_dir", str(tmp_path / "r")]
    words = [str(tiny_host), str(tiny_parquet), *TINY.split(), *places, "--run_name", "both"]
    done = python("pipelines.sae", *words, "--layers", "0", "2")
    assert done.returncode == 0, done.stderr
    assert set(open_store(tmp_path / "s").snapshot().hooks) == {"resid.0", "resid.2"}
    folders = sorted((tmp_path / "r" / "both").iterdir())
    assert [f.name.rsplit("-", 1)[0] for f in folders] == ["topk-resid.0", "topk-resid.2"]
    for folder in folders:
        assert read(folder / "run.json")["status"] == "finished"
        assert read(folder / "eval.json")["l0"] <= 4
        assert load_sae(folder / "sae").W_enc.shape == (32, 64)
        # A step is 2 sequences of 16 tokens.
        assert read(folder / "config.json")["batch_tokens"] == 32
        assert read(folder / "run.json")["n_steps"] == train_rows(tmp_path / "s") // 32
        assert rows_of(folder)[-1]["tokens"] == train_rows(tmp_path / "s") // 32 * 32
    assert done.stdout.count("topk-resid.0") == 2  # its own table, and the one of all


def test_another_k_uses_the_cached_activations(
    tiny_host: Path,
    tiny_parquet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # F42
    words = [str(tiny_host), str(tiny_parquet), *TINY.split(), "--layers", "1"]
    assert sae.main(words) == 0
    assert "960 of them computed now" in capsys.readouterr().err

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Host, "load", load)
    assert sae.main([*words, "--k", "8"]) == 0
    assert "960 tokens in the store, 0 of them computed now" in capsys.readouterr().err
    configs = [read(f / "config.json") for f in sorted(Path("runs").glob("topk-resid.1-*"))]
    assert sorted(c["sae"]["k"] for c in configs) == [4, 8]
    assert len({c["store"] for c in configs}) == 1
    with pytest.raises(AssertionError, match="was loaded"):
        sae.main([*words, "--ctx_len", "8"])  # other contexts are other activations


def test_a_finished_run_is_found_again_after_the_store_has_grown(
    tiny_host: Path, tiny_parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_host), str(tiny_parquet), *TINY.split()]
    assert sae.main([*words, "--layers", "1"]) == 0
    before = {p: p.read_bytes() for p in Path("runs").glob("topk-*/eval.json")}
    assert sae.main([*words, "--layers", "0"]) == 0  # one more hook: a new snapshot
    capsys.readouterr()
    assert sae.main([*words, "--layers", "1"]) == 0
    assert "is finished" in capsys.readouterr().err
    assert len(list(Path("runs").glob("topk-*"))) == 2
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize(
    ("words", "hooks", "layers"),
    [
        ("", "resid", None),
        ("--layers 0 2", "resid", (0, 2)),
        ("--layer_stride 2", "resid", (0, 2)),
        ("--hookpoints mlp.1 layers.0:in", ("mlp.1", "layers.0:in"), None),
    ],
)
def test_hooks_asked_for(
    words: str, hooks: Any, layers: Any, tiny_host: Path, tiny_parquet: Path, captured: Any
) -> None:
    # F50, F55
    assert sae.main([str(tiny_host), str(tiny_parquet), *words.split()]) == 0
    assert (captured[0][0].hooks, captured[0][0].layers) == (hooks, layers)


def test_options_reach_both_stages(
    tiny_host: Path, tiny_parquet: Path, captured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # F52
    words = "--auxk_alpha 0 --lr 3e-4 --adam_betas 0.8 0.9 --clip_norm none --max_tokens 1e3"
    words += " --num_latents 100 --device cuda:1 --batch_size 4 --ctx_len 32 --save_every 7"
    words += " --train_tokens 4_096 --no-report --seed 5 --dtype bfloat16 --log_to_wandb"
    assert sae.main([str(tiny_host), f"{tiny_parquet}/*.parquet", *words.split()]) == 0
    cached, trained = captured[0]
    assert trained.sae["auxk_alpha"] == 0
    assert (trained.sae["n_latents"], trained.sae["expansion_factor"]) == (100, None)
    assert (trained.optim.lr, trained.optim.betas, trained.optim.clip_norm) == (
        3e-4,
        (0.8, 0.9),
        None,
    )
    assert (cached.tokens, cached.context, trained.batch_tokens) == (1000, 32, 4 * 32)
    assert cached.host.device == trained.device == "cuda:1"
    assert trained.checkpoint.every_steps == 7
    assert (trained.tokens, trained.epochs, trained.seed) == (4096, None, 5)
    assert (trained.report, trained.wandb.mode) == (False, "online")
    assert cached.host.dtype == "bfloat16"
    assert cached.data.files == f"{tiny_parquet}/*.parquet"
    assert sae.main([str(tiny_host), "some/dataset"]) == 0
    cached, trained = captured[1]
    assert (cached.data.kind, cached.data.dataset) == ("hub", "some/dataset")
    assert cached.tokens == both.STREAM_TOKENS  # said, not silently
    assert "--max_tokens=10,000,000 of the stream" in capsys.readouterr().err
    assert cached.context == 128  # the model has no more positions
    assert trained.sae["expansion_factor"] == 32
    assert trained.epochs == 1
    assert sae.main([str(tiny_host), "some/dataset", "--max_samples", "9"]) == 0
    assert captured[2][0].tokens is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers 0 --layer_stride 2", "give --layers or --layer_stride, not both"),
        ("--hookpoints mlp.0 --layers 0", "give --hookpoints or --layers, not both"),
        ("--layer_stride 0", "--layer_stride: expected at least 1, got 0"),
        ("--layers 3", "the host has 3 blocks, 0 to 2"),
        ("--k 0", "--k: expected at least 1, got 0"),
        ("--k 65 --num_latents 64", "--k=65 is larger than --num_latents=64"),
        (
            "--num_latents 64 --expansion_factor 2",
            "give --num_latents or --expansion_factor, not both",
        ),
        ("--lr 0", "--lr: expected more than 0, got 0.0"),
        ("--batch_size 0", "--batch_size x --ctx_len: expected more than 0"),
        ("--ctx_len 129", "--ctx_len=129 is more than the 128 positions of the model"),
        ("--segment_rows 100", "--segment_rows=100 must be a multiple of"),
        ("--text_column nothing", "--text_column=nothing: no text column 'nothing'"),
        ("--split test", "--split=test has no effect on local parquet files"),
        ("--log_to_wandb --wandb_mode disabled", "contradict each other"),
        ("--device tpu9", "device: expected auto, cpu, cuda"),
    ],
)
def test_wrong_values_are_refused_in_the_words_typed(
    words: str,
    message: str,
    tiny_host: Path,
    tiny_parquet: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Host, "load", None)  # nothing of this needs the weights
    assert sae.main([str(tiny_host), str(tiny_parquet), "--ctx_len", "16", *words.split()]) == 1
    assert message in capsys.readouterr().err


def test_wrong_places_are_refused_in_the_words_typed(
    tiny_host: Path, tiny_parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sae.main(["./no/model", str(tiny_parquet)]) == 1
    assert "MODEL=./no/model: there is no such folder" in capsys.readouterr().err
    assert sae.main([str(tiny_host), "./no/text"]) == 1
    assert "DATASET=./no/text: no parquet file there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--distribute_layers",
        "--grad_acc_steps 8",
        "--micro_acc_steps 2",
        "--load_in_8bit",
        "--la 1",
    ],
)
def test_what_this_version_cannot_do_is_not_an_option(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        sae.main(["model", "dataset", *words.split()])
    assert stopped.value.code == 2
    assert "unrecognized arguments: " + words in capsys.readouterr().err


def test_several_processes_are_refused(
    tiny_host: Path,
    tiny_parquet: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sae.main([str(tiny_host), str(tiny_parquet)]) == 1
    assert "torchrun" in capsys.readouterr().err


def test_messages_in_the_users_words() -> None:
    words = {"sae.k": "--k", "sae.k_more": "--more", "store": "--store"}
    message = "sae.k=3, sae.k_more; the store: see /a/store=b or store=PATH. Lower sae.k."
    expected = "--k=3, --more; the --store: see /a/store=b or --store=PATH. Lower --k."
    assert both.in_words(message, words) == expected
    assert both.in_words(message, {}) == message


# -- python -m pipelines.from_yaml -----------------------------------------------------------------


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
    ours = yaml.safe_load((ROOT / "conf/seed/default.yaml").read_text("utf-8"))
    sections = get_type_hints(from_yaml.SeedConfig)
    assert {s: set(keys) for s, keys in ours.items()} == {
        s: {f.name for f in dataclasses.fields(cls)} for s, cls in sections.items()
    }
    for section, keys in yaml.safe_load(DEFAULT).items():
        for key, value in keys.items():
            # A coefficient that TopKSAE has no use for is left out of our default.
            assert ours[section][key] == (None if key == "l1_coefficient" else value)


# -- from Python -----------------------------------------------------------------------------------


def test_the_snippet_of_settings(store: Path) -> None:
    # F62, F63, F66, F68
    settings = TrainSettings(
        sae={"name": "topk", "expansion_factor": 2, "k": 4},
        store=str(store),
        hook="blocks.1.hook_resid_post",
        optim=OptimSettings(lr=5e-5),
        batch_tokens=32,
        tokens=320,
        eval=EvalSettings(bootstrap=5),
        wandb=WandbSettings(mode="offline", project="lm-saes", name="experiment"),
        device="cpu",
        sae_name="L1R",
        sae_series="tiny-sae",
        progress=False,
        report=False,
    )
    done = train(settings)
    assert done.trained_steps == 320 // 32
    assert done.run_dir.parent == Path("runs/tiny-sae")
    assert done.run_dir.name.startswith("L1R-")
    record = read(done.run_dir / "run.json")
    assert (record["sae_name"], record["sae_series"]) == ("L1R", "tiny-sae")
    assert record["hooks"] == {"in": "resid.1", "out": "resid.1"}  # out is in unless given
    assert record["n_latents"] == 32 * 2  # d · f
    assert load_sae(done.run_dir / "sae").W_dec.shape == (64, 32)
    assert list((done.run_dir / "wandb").glob("offline-run-*/*.wandb"))
