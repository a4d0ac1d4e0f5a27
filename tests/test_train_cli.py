"""The `saetrain` command: settings from YAML, runs, sweeps, messages, exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from stores import make_store
from training import rows, same, stop_after

from saetrain.cli import config_dir, main, settings_from
from saetrain.evals.run import EVAL
from saetrain.saes import make_config
from saetrain.settings import TrainSettings
from saetrain.trainer import Trainer

SMALL = (
    "sae.n_latents=48",
    "batch_tokens=64",
    "epochs=null",
    "tokens=1920",
    "held_out_fraction=0.2",
    "report=false",
)
QUIET = (*SMALL, "progress=false")
YAML = {group: sorted((config_dir() / group).glob("*.yaml")) for group in ("sae", "experiment")}


def run(*args: str) -> int:
    """Exit status of the command."""
    try:
        main(args)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0


def only_run() -> Path:
    (found,) = (p.parent for p in Path("runs").rglob("run.json"))
    return found


def composed(*overrides: str) -> TrainSettings:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return settings_from(compose("train", list(overrides)))


# -- settings -----------------------------------------------------------------------------------


def test_yaml_and_dataclass_have_the_same_defaults() -> None:
    got = composed("store=x", "epochs=1")
    assert got == TrainSettings(store="x", epochs=1, sae=got.sae)
    assert (got.sae["name"], got.sae["activation"], got.sae["k"]) == ("sae", {"name": "topk"}, 32)


def test_no_folder_of_conf_has_the_name_of_a_plain_setting() -> None:
    """Hydra takes `seed=1` for the choice of a file as soon as there is a folder conf/seed."""
    groups = {d.name for d in config_dir().iterdir() if d.is_dir()}
    assert groups & {f.name for f in fields(TrainSettings)} == {"sae", "optim", "schedule"}


@pytest.mark.parametrize("path", YAML["sae"], ids=lambda p: p.stem)
def test_every_architecture_composes(path: Path) -> None:
    cfg = make_config(composed("store=x", "epochs=1", f"sae={path.stem}").sae)
    given = make_config(
        composed("store=x", "epochs=1", f"sae={path.stem}", "sae.n_latents=192").sae
    )
    own = yaml.safe_load(path.read_text())["n_latents"]
    assert (cfg.n_latents, given.n_latents) == (own, 192)


@pytest.mark.parametrize(
    ("words", "activation", "penalty"),
    [
        (("sae=batchtopk", "sae.k=48"), {"name": "batchtopk", "k": 48.0}, None),
        (("sae=matryoshka", "sae.activation=topk"), {"name": "topk", "k": 32}, None),
        (
            ("sae=jumprelu", "sae.penalty={name:l0,coefficient:1e-3,target:40}"),
            {"name": "jumprelu"},
            {"name": "l0", "coefficient": 1e-3, "target": 40.0},
        ),
        (
            ("sae=topk", "sae.penalty={name:tanh,coefficient:0.1}"),
            {"name": "topk"},
            {"name": "tanh", "coefficient": 0.1},
        ),
        (
            ("sae=vanilla", "+sae.activation={name:jumprelu,bandwidth:0.1}"),
            {"name": "jumprelu", "bandwidth": 0.1},
            {"name": "l1", "coefficient": 0.02},
        ),
        (("sae=relu", "sae.l1_coefficient=1"), {"name": "relu"}, {"coefficient": 1.0}),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_parts_are_chosen_on_the_command_line(words, activation, penalty) -> None:  # F60 F61
    cfg = make_config(composed("store=x", "epochs=1", *words).sae)
    assert activation.items() <= vars(cfg.activation).items()
    if penalty is None:
        assert cfg.penalty is None
    else:
        assert penalty.items() <= vars(cfg.penalty).items()


@pytest.mark.parametrize("path", YAML["experiment"], ids=lambda p: p.stem)
def test_every_experiment_composes(path: Path) -> None:
    got = composed(f"+experiment={path.stem}", "store=x")
    make_config(got.sae)
    assert got.sae_name == path.stem
    assert got.run_dir.name.startswith(path.stem)


def test_numbers_may_be_written_as_people_write_them() -> None:
    got = composed("store=x", "tokens=1e6", "batch_tokens=4_096", "optim.lr=1e-3")
    assert (got.tokens, got.batch_tokens, got.optim.lr) == (1_000_000, 4096, 1e-3)


# -- runs ---------------------------------------------------------------------------------------


def test_a_process_trains_without_transformers(here: Path) -> None:  # F102, F126, F14, F34, F66
    script = (
        "import sys; from saetrain.cli import main; main(sys.argv[1:]); "
        "bad = {'transformers', 'datasets', 'actcache.host'} & set(sys.modules); "
        "assert not bad, bad; assert 'wandb' in sys.modules"
    )
    command = [sys.executable, "-W", "error", "-c", script, "+experiment=topk_demo", "store=store"]
    done = subprocess.run(
        [*command, *SMALL, "wandb.mode=online"],
        capture_output=True,
        text=True,
        # Not WANDB_SERVICE, which a test before may have left: the run would be another process's.
        env={k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "FVE" in done.stdout
    assert "± " in done.stdout
    assert "PCA FVE" in done.stdout
    assert "train topk_demo-" in done.stderr
    assert "tok/s" in done.stderr
    assert "100%" in done.stderr
    for what in ("train topk_demo-", "evaluate", "fit PCA"):  # done<left, rate
        bar = rf"{what}[^\r\n]*\[\d\d:\d\d<[\d:?]+, [^\r\n]*tok/s"
        assert re.search(bar, done.stderr), (what, done.stderr)
    assert list(only_run().glob("wandb/offline-run-*/*.wandb"))
    assert not (here / "outputs").exists()
    assert not (here / ".hydra").exists()


def test_without_wandb_it_is_never_imported(here: Path) -> None:  # F14, F34
    script = (
        "import sys; sys.modules['wandb'] = None; from saetrain.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "store=store", *QUIET]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tok/s") == 0


def test_the_command_is_the_python_call(here: Path) -> None:
    from saetrain import train

    assert run("store=store", "sae=relu", "runs_dir=a", *QUIET) == 0
    (a,) = (p.parent for p in Path("a").rglob("run.json"))
    config = json.loads((a / "config.json").read_text())
    b = train(TrainSettings.from_mapping(config | {"runs_dir": "b"})).run_dir
    assert a.name == b.name
    same(a, b)


def test_stopped_and_repeated_it_continues(here: Path, capsys) -> None:
    command = ("store=store", "sae_name=x", "sae_series=s", *QUIET)  # F68
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 11)
        assert run(*command) == 130
    assert "interrupted: stopped at step 11 of 30" in capsys.readouterr().err
    assert run(*command) == 0
    assert "continuing runs/s/x-" in capsys.readouterr().err
    assert run(*command) == 0
    assert "is finished" in capsys.readouterr().err
    assert run(*command, "runs_dir=whole") == 0
    same(only_run(), Path("whole") / only_run().relative_to("runs"))


def test_a_sweep_goes_on_after_a_failed_job(here: Path, capsys) -> None:  # F102
    assert run("-m", "+experiment=topk_demo", "store=store", "sae.k=4,100,8", *QUIET) == 1
    out = capsys.readouterr()
    assert "error: sae.k=100 is larger than sae.n_latents=48" in out.err
    assert "2 of 3 jobs finished" in out.out
    lines = {line.split()[0]: line for line in out.out.splitlines() if line.startswith("sae.k=")}
    assert "failed" in lines["sae.k=100"]
    for job, l0 in (("sae.k=4", 4), ("sae.k=8", 8)):
        metrics = json.loads((Path(lines[job].split()[-1]) / EVAL).read_text())
        assert 0 < metrics["l0"] <= l0
        assert f"{metrics['fve']:.4f}" in lines[job]
    assert len(list(Path("runs").glob("topk_demo-*/eval.json"))) == 2


def test_the_sweep_s_flag_may_stand_anywhere(here: Path, capsys) -> None:
    assert run("store=store", "-m", "sae.k=4,100", *QUIET) == 1
    assert "1 of 2 jobs finished" in capsys.readouterr().out


def test_a_sweep_kept_in_a_file(here: Path, capsys) -> None:
    # At 48 latents k=64 cannot be; the other two run.
    assert run("-m", "+sweep=k", "+experiment=topk_demo", "store=store", *QUIET) == 1
    out = capsys.readouterr().out
    assert "2 of 3 jobs finished" in out
    assert all(f"sae.k={k}" in out for k in (16, 32, 64))


def test_ctrl_c_stops_the_whole_sweep(here: Path, capsys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert run("-m", "store=store", "sae.k=4,8", *QUIET) == 130
    assert capsys.readouterr().err.count("saetrain store=store") == 1
    assert len(list(Path("runs").rglob("run.json"))) == 1


def test_topk_l16_on_a_store_that_has_it(tmp_path: Path, monkeypatch) -> None:  # F102
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "deep", hooks={"resid.16": 8}, segments=(512,))
    tokens = ("batch_tokens=32", "tokens=640")
    assert run("+experiment=topk_l16", "store=deep", *QUIET, *tokens, "sae.k=2") == 0
    record = json.loads((only_run() / "run.json").read_text())
    assert record["hooks"]["in"] == "resid.16"


def test_hooks_go_by_their_transformer_lens_names(here: Path) -> None:
    assert run("store=store", "hook=blocks.3.hook_resid_post", *QUIET) == 0
    assert only_run().name.startswith("topk-resid.3-")


def test_evaluate_gives_the_same_numbers_again(here: Path, capsys) -> None:
    assert run("store=store", *QUIET) == 0
    first = capsys.readouterr().out
    saved = json.loads((only_run() / EVAL).read_text())
    (only_run() / EVAL).write_text(json.dumps(saved | {"fve": 0.0}))
    (here / "store").rename(here / "moved")
    assert run("evaluate", str(only_run())) == 1
    assert "store=store" in capsys.readouterr().err
    assert run("evaluate", str(only_run()), "store=moved") == 0
    assert capsys.readouterr().out == first
    assert json.loads((only_run() / EVAL).read_text()) == saved


def test_evaluate_refuses_another_store(here: Path, capsys) -> None:
    assert run("store=store", *QUIET) == 0
    make_store(here / "other", hooks={"resid.2": 16}, segments=(512,), context=16)
    assert run("evaluate", str(only_run()), "store=other") == 1
    assert "was trained on store sha256:" in capsys.readouterr().err


def test_your_own_conf_folder_beside_ours(here: Path) -> None:
    (here / "mine" / "experiment").mkdir(parents=True)
    own = "# @package _global_\nsae_name: own\nsae:\n  k: 3\n"
    (here / "mine" / "experiment" / "own.yaml").write_text(own)
    assert run("--config-dir", "mine", "+experiment=own", "store=store", *QUIET) == 0
    assert only_run().name.startswith("own-")
    assert max(r["l0"] for r in rows(only_run())) <= 3


def test_help_explains(here: Path, capsys) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    for word in (
        "+experiment=topk_demo",
        "saetrain evaluate RUN_DIR",
        f"sae: {', '.join(p.stem for p in YAML['sae'])}",
        "seed: 0",
    ):
        assert word in out
    assert run("evaluate", "--help") == 0
    assert "store=PATH" in capsys.readouterr().out


# -- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("optim.lrr=1",), "unknown key 'optim.lrr'. Did you mean lr"),
        (("batch_token=1",), "unknown key 'batch_token'. Did you mean batch_tokens"),
        (("+lerning=1",), "unknown key 'lerning'"),
        (("sae.kk=1",), "unknown key 'sae.kk'"),
        (("+sae.kk=1",), "unknown key 'sae.kk'. Did you mean k?"),
        (("sae=topc",), "Available options in 'sae'"),
        (("sae=1",), "expected the name of a file for a group"),
        (("+experiment=none",), "topk_demo"),
        (("seed=abc",), "seed: expected a whole number, got 'abc'"),
        (("epochs=1",), "tokens=1920, epochs=1"),
        (("store=nowhere",), "store=nowhere: nowhere does not exist"),
        (("store=null",), "store=PATH"),
        (("hook=resid.16",), "It has: resid.2, resid.3"),
        (("+experiment=topk_l16", "sae.k=4"), "It has: resid.2, resid.3"),  # F102
        (("sae.k=49",), "sae.k=49 is larger than sae.n_latents=48"),
        (("batch_tokens=4096",), "batch_tokens=4,096 is more than"),
        (("wandb.mode=on",), "wandb.mode: expected one of"),
        (("tokens",), "missing EQUAL"),
        (("optim.momentum=0.9",), "add it with a plus: +optim.momentum=…"),
    ],
)
def test_bad_input_is_one_clear_message(here: Path, capsys, args: tuple, message: str) -> None:
    assert run("store=store", *QUIET, *args) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not (here / "runs").exists()


@pytest.mark.parametrize("args", [(), ("a", "b"), ("nowhere",), ("nowhere", "seed=1")])
def test_evaluate_says_what_it_needs(here: Path, capsys, args: tuple) -> None:
    assert run("evaluate", *args) == 1
    out = capsys.readouterr()
    assert "RUN_DIR" in out.out + out.err or "is not a run folder" in out.err


def test_a_misspelt_command_is_named(capsys) -> None:
    assert run("sweepstatus", "runs") == 1
    assert "'sweepstatus' is no command. Did you mean sweep-status?" in capsys.readouterr().err


def test_a_launcher_without_a_sweep_has_no_effect(here: Path, capsys) -> None:
    assert run("store=store", "hydra/launcher=fused", *QUIET) == 0
    assert "hydra/launcher=fused has no effect without -m" in capsys.readouterr().err


def test_a_second_ctrl_c_says_what_to_do(here: Path, capsys) -> None:
    def train_step(self, batch):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", train_step)
        assert run("store=store", *QUIET) == 130
    err = capsys.readouterr().err
    assert err.endswith("interrupted: run the same command again to continue\n")
