"""hydra/launcher=fused, `saetrain plan` and `saetrain sweep-status` from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train_cli import QUIET, run
from training import rows, same, stop_after

from saetrain import runs
from saetrain.evals.run import EVAL
from saetrain.trainer import Trainer

FUSED = ("-m", "+experiment=topk_demo", "store=store", "hydra/launcher=fused", *QUIET)
GRID = ("sae.k=2,4", "sae.n_latents=32,48")


def made(runs_dir: str = "runs") -> dict[str, Path]:
    return {p.parent.name: p.parent for p in sorted(Path(runs_dir).glob("*/run.json"))}


def stop_once(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C while the first job of a sweep takes step number `step`."""
    original, sent = Trainer._train_step, list[int]()

    def train_step(self, batch):
        if self.step + 1 == step and not sent:
            sent.append(step)
            signal.raise_signal(signal.SIGINT)
        original(self, batch)

    patch.setattr(Trainer, "_train_step", train_step)


def test_a_sweep_is_fused_and_equals_the_jobs_one_by_one(here: Path, capsys) -> None:  # F102 F116
    assert run(*FUSED, *GRID) == 0
    out = capsys.readouterr()
    assert "4 runs share a stream" in out.err
    assert "4 of 4 jobs finished" in out.out
    assert out.out.endswith("\none page for all of them: saetrain report runs\n")
    assert out.err.count("mixing:") == 1
    plain = [w for w in FUSED if not w.startswith("hydra/")]
    assert run(*plain, *GRID, "runs_dir=single") == 0
    fused, single = made(), made("single")
    assert fused.keys() == single.keys()
    assert len(fused) == 4
    for name in fused:
        same(fused[name], single[name])
    # The same command again trains nothing and says the same.
    stamps = [(p / EVAL).stat().st_mtime_ns for p in fused.values()]
    first = out.out
    capsys.readouterr()
    assert run(*FUSED, *GRID) == 0
    assert capsys.readouterr().out == first
    assert [(p / EVAL).stat().st_mtime_ns for p in fused.values()] == stamps


def test_one_failing_job_is_named_and_the_exit_status_says_so(here: Path, capsys) -> None:  # F116
    assert run(*FUSED, "sae.k=2,100,4", "optim.lr=1e-3,1e30") == 1
    out = capsys.readouterr().out
    assert "2 of 6 jobs finished" in out
    reasons = [line for line in out.splitlines() if "failed" in line]
    assert sum("sae.k=100 is larger than sae.n_latents=48" in r for r in reasons) == 2
    assert sum("diverged at step" in r for r in reasons) == 2
    assert not any("l0=" in r for r in reasons)  # of its numbers only those that say why
    assert len(list(Path("runs").glob("*/eval.json"))) == 2


def test_ctrl_c_saves_all_jobs_and_the_command_continues(here: Path, capsys) -> None:  # F68
    with pytest.MonkeyPatch.context() as patch:
        stop_once(patch, 11)
        assert run(*FUSED, *GRID) == 130
    assert "stopped at step 14, saved 4 runs" in capsys.readouterr().err
    assert run("sweep-status", "runs") == 0
    assert "4 interrupted" in capsys.readouterr().out
    assert run(*FUSED, *GRID) == 0
    assert capsys.readouterr().err.count("at step 14 of 30") == 4
    assert run(*[w for w in FUSED if not w.startswith("hydra/")], *GRID, "runs_dir=whole") == 0
    for name, path in made().items():
        same(path, made("whole")[name])


def test_a_sweep_killed_by_sigkill_continues(here: Path) -> None:  # F116
    script = "import sys; from saetrain.cli import main; main(sys.argv[1:])"
    words = [*FUSED, "sae.k=2,4", "tokens=25600", "checkpoint.every_steps=5"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script, *words], env=env)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(Path("runs").glob("*/checkpoints/step_*"))) > 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(Path("runs").glob("*/eval.json"))
    assert run(*words) == 0
    assert run(*[w for w in words if not w.startswith("hydra/")], "runs_dir=whole") == 0
    assert len(made()) == 2
    for name, path in made().items():
        same(path, made("whole")[name])


def test_stacking_is_a_setting(here: Path, capsys) -> None:  # F116
    assert run(*FUSED, "sae.k=2,4", "fused.stack=true") == 0
    assert "2 of 2 encoders in common products" in capsys.readouterr().err


def test_one_sae_a_hook_from_the_command(here: Path, capsys) -> None:  # F43 F50
    assert run("store=store", "hooks=[resid.2,resid.3]", *QUIET) == 0
    out = capsys.readouterr()
    assert "2 of 2 jobs finished" in out.out
    assert "hook=resid.3" in out.out
    assert "2 runs share a stream" in out.err
    assert run("store=store", "hook=resid.3", "runs_dir=single", *QUIET) == 0
    ((name, single),) = made("single").items()
    same(made()[name], single)
    capsys.readouterr()
    assert run("store=store", "layers=[2,3]", "layer_stride=2", *QUIET) == 1
    out = capsys.readouterr()
    assert "layer_stride=2 or layers=[2,3], not both" in out.err
    assert run("store=store", "hook=embed", "layers=[2]", *QUIET) == 1
    out = capsys.readouterr()
    assert out.err.startswith("error: hook=embed: layers and layer_stride need")
    assert out.out == ""  # no table of one job that failed
    assert run("store=store", "hooks=[resid.2,resid.7]", *QUIET) == 1
    out = capsys.readouterr()
    assert "1 of 2 jobs finished" in out.out
    assert "resid.7" in out.out


def test_layers_and_a_sweep_train_together(here: Path, capsys) -> None:  # F43 F116
    assert run(*FUSED, "hooks=all", "sae.k=2,4") == 0
    out = capsys.readouterr()
    assert "4 of 4 jobs finished" in out.out
    assert "4 runs share a stream" in out.err
    assert len(made()) == 4


def test_sweep_status(here: Path, capsys) -> None:
    assert run(*FUSED, "sae.k=4", "optim.lr=1e-3,1e30") == 1
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 9)
        assert run("store=store", "log_every=4", "sae_name=cut", *QUIET) == 130
    capsys.readouterr()
    assert run("sweep-status", "runs") == 0
    out = capsys.readouterr().out
    assert "1 failed, 1 finished, 1 interrupted" in out
    cells = [re.split("  +", line) for line in out.splitlines() if "topk_demo-" in line]
    lines = {row[2]: row for row in cells}
    assert "optim.lr=0.001" in lines["finished"][1]
    assert "optim.lr=1e+30" in lines["failed"][1]
    (finished,) = [p for p in made().values() if (p / EVAL).exists()]
    final = json.loads((finished / EVAL).read_text())
    assert lines["finished"][3:5] == ["30", "30"]
    assert float(lines["finished"][6]) == pytest.approx(final["fve"], abs=1e-4)
    assert float(lines["finished"][7]) == pytest.approx(final["l0"], abs=1e-2)
    assert "diverged" in " ".join(lines["failed"])
    (cut,) = [p for n, p in made().items() if n.startswith("cut")]
    with runs.claimed(cut, fresh=False):
        assert run("sweep-status", "runs") == 0
    out = capsys.readouterr().out
    told = next(re.split("  +", line) for line in out.splitlines() if "cut-" in line)
    assert told[2:5] == ["running", "8", "30"]
    assert float(told[6]) == pytest.approx(rows(cut)[-1]["fve"], abs=1e-3)
    assert run("sweep-status", "nowhere") == 1
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert run("sweep-status") == 1
    assert run("sweep-status", "store") == 0
    assert "no runs below store" in capsys.readouterr().out


def test_plan_tells_memory_and_hours_and_writes_nothing(here: Path, capsys) -> None:  # F116
    before = set(here.rglob("*"))
    assert run("plan", *FUSED, *GRID) == 0
    out = capsys.readouterr().out
    assert "4 runs" in out
    assert "fused: 1 group that" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("topk_demo-")]
    assert len(lines) == 4
    d = 16
    for f in (32, 48):
        p = 2 * f * d + f + d
        adam = f"{8 * p / 1e6:.2f}"
        assert any(adam in line for line in lines), (adam, lines)
    assert all("30" in line for line in lines)
    assert [line[1:3] for line in lines] == [
        [f"sae.n_latents={f}", f"sae.k={k}"] for f in (32, 48) for k in (2, 4)
    ]
    assert all(0 < float(line[-1]) < 1 for line in lines)  # hours of a few milliseconds are not 0
    assert run("plan", "store=store", "hooks=all", *QUIET) == 0
    assert "2 runs" in capsys.readouterr().out
    assert run("plan", "store=nowhere", *QUIET) == 1
    capsys.readouterr()
    assert run("plan", *QUIET) == 1
    assert capsys.readouterr().err == (
        "error: missing: store. Give the path of a store made by actcache, store=PATH\n"
    )
    assert run("plan", *FUSED, "sae.k=4,100") == 1
    assert capsys.readouterr().err.startswith("error: sae.k=100 is larger than")
    assert set(here.rglob("*")) == before
