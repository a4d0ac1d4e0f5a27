"""`python -m pipelines.sae`, and training from Python: what is taken, refused, and comes out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from commands import python, read, rows_of, train_rows

from actcache.host import Host, HostSettings
from actcache.run import CacheSettings, run
from actcache.sources import DataSettings
from actcache.store import open_store
from pipelines import both, sae
from saetrain import TrainSettings, load_sae, train
from saetrain.saes.sae import AutoencoderConfig
from saetrain.settings import EvalSettings, OptimSettings, WandbSettings

TINY = "--ctx_len 16 --batch_size 2 --k 4 --expansion_factor 2 --device cpu --eval_bootstrap 5"
TINY += " --no-report --no-progress"


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
    every |= leaves(AutoencoderConfig, "train.sae") | {"train.sae.k"}  # short for activation.k
    decided = {
        *("cache.data.kind", "train.store", "train.hook", "train.snapshot", "train.sae"),
        *("train.optim.name", "train.schedule.name", "train.wandb.mode"),  # the last: by an option
        *("train.sae.penalty", "train.sae.init_norm"),  # those of the preset
        "train.sae.hook_out",  # an autoencoder's output hook is its input
        "train.optim.lr_factors",
        "train.saes_path",  # this command trains TopK
        *("cache.part", "cache.catalog"),  # many writers, shared stores: actcache run
        "cache.host.quantization",  # by --load_in_8bit
        *("cache.host.adapter", "cache.host.device_map", "cache.host.sharding"),
        *("cache.host.rank_timeout", "train.layers", "train.layer_stride", "train.hooks"),
        *("cache.data.options", "cache.data.sources_path", "train.metrics_path"),
        *("train.eval.metrics", "train.target_l0", "train.source", "train.stores", "train.mix"),
        *("cache.data.chat_template", "cache.data.images_column", "cache.data.messages_column"),
        "cache.pack.long_chat",
        *("train.optim.momentum", "train.optim.rule", "train.optim.weight_decay"),  # not Adam's
        "train.optim.jumprelu_lr_factor",
    }
    # What only the commands of the stages have; how a store is read beyond the window.
    groups = ("train.live.", "train.fused.", "train.early_stop.", "train.stream.")
    decided |= {p for p in every - options if p.startswith(groups)}
    every = {p for p in every if not p.rpartition(".")[2].isupper()}  # constants of a class
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


def test_options_reach_the_settings_they_stand_for() -> None:  # F51, F54
    words = ["model", "data.parquet", "--grad_acc_steps", "8", "--micro_acc_steps", "2"]
    cfg = sae.TrainConfig(**vars(sae.parser().parse_args([*words, "--load_in_8bit"])))
    values = sae.values_for(cfg)
    assert values["train.grad_acc_steps"] == 8
    assert values["train.micro_acc_steps"] == 2
    assert values["cache.host.quantization"] == {"load_in_8bit": True}
    plain = sae.values_for(sae.TrainConfig(**vars(sae.parser().parse_args(words[:2]))))
    assert "cache.host.quantization" not in plain


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
