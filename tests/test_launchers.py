"""Sweeps through Hydra's launchers for one box and for Slurm, and through its Optuna sweeper."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from training import planted_store

from saetrain import outcomes
from saetrain.cli import main
from saetrain.outcomes import Outcome
from saetrain.presets import config_dir

SMALL = (
    "store=store",
    "hook=resid.2",
    "sae.n_latents=48",
    "batch_tokens=64",
    "epochs=null",
    "tokens=960",
    "held_out_fraction=0.2",
    "eval.pca_tokens=0",
    "report=false",
    "progress=false",
)
LAUNCHERS = config_dir() / "hydra" / "launcher"
PLUGINS = {
    "box": "hydra_joblib_launcher",
    "slurm": "hydra_submitit_launcher",
    "slurm_here": "hydra_submitit_launcher",
    "ray_cluster": "hydra_ray_launcher",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launchers")
    planted_store(path / "store", segments=(1024,))
    return path


@pytest.fixture
def here(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "store").symlink_to(folder / "store")
    return tmp_path


def saetrain(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with one thread per job."""
    command = [sys.executable, "-m", "saetrain", *words, *SMALL]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=here, env=own, capture_output=True, text=True, timeout=240, check=False
    )


def runs_of(here: Path) -> dict[int, dict]:
    """sae.k -> eval.json of every run."""
    found = {}
    for file in (here / "runs").glob("*/eval.json"):
        config = json.loads((file.parent / "config.json").read_text())
        found[config["sae"]["k"]] = json.loads(file.read_text())
    return found


# F117: configs compose. Ray's plugin is looked at where it is installed.
@pytest.mark.parametrize("name", sorted(PLUGINS))
def test_every_launcher_composes(name: str) -> None:
    pytest.importorskip(f"hydra_plugins.{PLUGINS[name]}")
    assert {p.stem for p in LAUNCHERS.glob("*.yaml")} == set(PLUGINS)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        words = [f"hydra/launcher={name}"]
        found = compose("train", words, return_hydra_config=True).hydra.launcher
    own = yaml.safe_load((LAUNCHERS / f"{name}.yaml").read_text())
    own.pop("defaults")
    assert PLUGINS[name] in found._target_
    assert {k: found[k] for k in own} == own


def test_a_missing_plugin_is_named(capsys) -> None:
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None:
        pytest.skip("Ray is installed here: nothing is missing")
    with pytest.raises(SystemExit):
        main(["+experiment=topk_demo", "hydra/launcher=ray_cluster"])
    assert "pip install hydra-ray-launcher" in capsys.readouterr().err


def test_a_machine_without_slurm_is_told_so(capsys, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    if shutil.which("srun") is not None:
        pytest.skip("Slurm is here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["-m", "store=x", "sae.k=2,4", "hydra/launcher=slurm"])
    assert "this machine has no Slurm (srun is not found)" in capsys.readouterr().err


# F117: submitit's local executor and joblib run, each job in a process of its own.
@pytest.mark.parametrize("launcher", ["slurm_here", pytest.param("box", marks=pytest.mark.slow)])
def test_jobs_in_other_processes_come_to_one_table(launcher: str, here: Path) -> None:
    pytest.importorskip(f"hydra_plugins.{PLUGINS[launcher]}")
    done = saetrain(here, "-m", "sae.k=100,4", f"hydra/launcher={launcher}")
    assert done.returncode == 1, done.stderr
    assert "1 of 2 jobs finished" in done.stdout, done.stdout + done.stderr
    lines = {w.split()[0]: w for w in done.stdout.splitlines() if w.startswith("sae.k=")}
    assert "failed" in lines["sae.k=100"]
    assert "sae.k=100 is larger than sae.n_latents=48" in lines["sae.k=100"]
    found = runs_of(here)
    assert sorted(found) == [4]
    assert f"{found[4]['fve']:.4f}" in lines["sae.k=4"]
    if launcher == "slurm_here":
        assert len(list((here / "runs" / ".sweeps" / ".submitit").rglob("*_log.out"))) == 2


def test_optuna_looks_for_the_best_fve_at_a_target_l0(here: Path) -> None:
    """Of the FVEs it has seen, it names the one with the highest score, and tells every trial."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = (
        "-m",
        "+sweep=target_l0",
        "sae=topk",
        "sae.k=choice(2,4,8,64)",
        "target_l0=4",
        "hydra.sweeper.n_trials=8",
        "hydra.sweeper.sampler.n_startup_trials=4",
    )
    done = saetrain(here, *words)
    assert "of 8 jobs finished" in done.stdout, done.stdout + done.stderr
    found = runs_of(here)
    assert 4 in found
    scores = {k: m["fve"] - abs(m["l0"] / 4 - 1) for k, m in found.items()}
    best = max(scores, key=scores.__getitem__)
    results = yaml.safe_load((here / "runs/.sweeps/optimization_results.yaml").read_text())
    assert int(results["best_params"]["sae.k"]) == best == 4
    assert results["best_value"] == pytest.approx(scores[best])
    assert "best at L0 = 4: runs/topk-resid.2-" in done.stdout
    assert f"(score {scores[best]:.4f})" in done.stdout


def test_the_search_for_jumprelu_composes() -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        words = ["+sweep=target_l0_jumprelu", "store=x", "epochs=1", "target_l0=20"]
        cfg = compose("train", words, return_hydra_config=True)
    assert cfg.target_l0 == 20
    assert cfg.sae.activation.name == "jumprelu"
    assert str(cfg.hydra.sweeper.direction).endswith("maximize")
    for key in cfg.hydra.sweeper.params:  # parameters that there are
        at = cfg
        for part in key.split("."):
            at = at[part]


@pytest.mark.parametrize(
    ("l0", "target", "expected"),
    [(40.0, None, 0.8), (40.0, 40.0, 0.8), (60.0, 40.0, 0.3), (20.0, 40.0, 0.3)],
)
def test_score(l0: float, target: float | None, expected: float) -> None:
    assert outcomes.score({"fve": 0.8, "l0": l0}, target) == pytest.approx(expected)


def test_outcomes_are_read_in_the_order_of_jobs(tmp_path: Path, monkeypatch) -> None:
    file = outcomes.new_record(["seed=1", f"runs_dir={tmp_path}/r"])
    assert file.parent == tmp_path / "r" / ".sweeps"
    assert outcomes.new_record([f"runs_dir={tmp_path}/r"]) != file  # in the same second
    for each in ("r/${store}", "a,b", "choice(a,b)"):  # a folder for each job
        assert outcomes.new_record([f"runs_dir={each}"]).parent == Path.cwd() / "runs/.sweeps"
    outcomes.note(Outcome(job=9, overrides=()))  # no sweep: nowhere to write
    assert outcomes.read(file) == []
    monkeypatch.setenv(outcomes.RECORD, str(file))
    made = [Outcome(job=n, overrides=("a=1", f"b={n}"), reason="no") for n in (1, 0)]
    for outcome in made:
        outcomes.note(outcome)
    assert outcomes.read(file) == made[::-1]
    assert "0 of 2 jobs finished" in outcomes.told(made)
    assert "b=1  failed   -  no" in outcomes.told(made)
    monkeypatch.chdir(tmp_path)
    for folder, told in (("r", "."), (str(tmp_path / "s" / "t"), "s"), ("/elsewhere", "..")):
        two = [Outcome(job=i, overrides=(), run_dir=f) for i, f in ((0, "s/x"), (1, f"{folder}/y"))]
        line = outcomes._page(two).strip()
        assert line.startswith(f"one page for all of them: saetrain report {told}")
    early = Outcome(job=0, overrides=("a=1",), reason="stopped early at step 4: fve 0.1 is below")
    assert "1 job finished\n" in outcomes.told([early])
    assert "job 0  stopped   -  stopped early at step 4" in outcomes.told([early])
    assert -math.inf == outcomes.FAILED
