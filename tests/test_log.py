"""metrics.jsonl, wandb on, off and absent, the progress bar, the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from saetrain.errors import ConfigError
from saetrain.log import METRICS, JsonlLog, Logger, read_metrics, table
from saetrain.settings import WandbSettings


class StubWandb:
    """Records what it is asked to do."""

    def __init__(self) -> None:
        self.inits: list[dict] = []
        self.rows: list[tuple[int, dict]] = []
        self.finished = 0

    def init(self, **kwargs):
        self.inits.append(kwargs)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, data: dict, step: int) -> None:
        self.rows.append((step, data))

    def _finish(self) -> None:
        self.finished += 1


def logger(folder: Path, wandb: WandbSettings, *, start: int = 0, progress: bool = False) -> Logger:
    folder.mkdir(exist_ok=True)
    return Logger(
        folder, wandb, {"a": 1}, start_step=start, n_steps=10, batch_tokens=4, progress=progress
    )


def test_rows_are_on_disk_as_soon_as_written(tmp_path: Path) -> None:  # F126
    log = JsonlLog(tmp_path / METRICS)
    log.write({"step": 1, "loss": 0.5})
    assert read_metrics(tmp_path / METRICS) == [{"step": 1, "loss": 0.5}]
    log.close()


def test_a_resumed_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    rows = [{"step": s, "loss": 1 / s} for s in (10, 20, 30)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 40, "lo')
    log = JsonlLog(path, keep_to_step=20)
    log.write({"step": 30, "loss": 9.0})
    log.close()
    assert read_metrics(path) == [*rows[:2], {"step": 30, "loss": 9.0}]


def test_nan_is_never_written(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / METRICS)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"step": 1, "loss": float("nan")})
    log.close()


def test_wandb_gets_the_same_rows_under_the_same_steps(tmp_path: Path, monkeypatch) -> None:
    # F14, F34, F66
    stub = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    settings = WandbSettings(mode="offline", project="p", entity="e", name="mine")
    with logger(tmp_path / "run", settings) as log:
        log.row({"step": 5, "loss": 2.0, "fve": 0.1})
        log.row({"step": 10, "loss": 1.0, "fve": 0.2})
        log.final({"eval/fve": 0.3})
    with logger(tmp_path / "run", WandbSettings(mode="online"), start=5) as log:
        log.row({"step": 10, "loss": 1.0})
    first, second = stub.inits
    assert {k: first[k] for k in ("project", "entity", "name", "mode", "config")} == {
        "project": "p",
        "entity": "e",
        "name": "mine",
        "mode": "offline",
        "config": {"a": 1},
    }
    assert (second["name"], second["mode"]) == ("run", None)  # None: WANDB_MODE decides
    assert first["id"] == second["id"]
    assert stub.rows == [
        (5, {"loss": 2.0, "fve": 0.1}),
        (10, {"loss": 1.0, "fve": 0.2}),
        (10, {"eval/fve": 0.3}),
        (10, {"loss": 1.0}),
    ]
    assert stub.finished == 2
    assert [r["step"] for r in read_metrics(tmp_path / "run" / METRICS)] == [5, 10]


def test_wandb_off_needs_no_wandb(tmp_path: Path, monkeypatch) -> None:  # F14, F34, F66
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    with logger(tmp_path / "run", WandbSettings()) as log:
        log.row({"step": 5, "loss": 2.0})
        log.final({"eval/fve": 0.3})
    assert len(read_metrics(tmp_path / "run" / METRICS)) == 1


def test_wandb_asked_for_and_absent_says_what_to_do(tmp_path: Path, monkeypatch) -> None:  # F14
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install wandb.*wandb.mode=disabled"):
        logger(tmp_path / "run", WandbSettings(mode="online"))


def test_the_bar_shows_rate_and_time_left(tmp_path: Path, capfd) -> None:  # F126
    with logger(tmp_path / "run", WandbSettings(), start=4, progress=True) as log:
        for _ in range(5):
            log.advance()
        log._bar.refresh()
        log.row({"step": 9, "loss": 0.123456, "fve": 0.5, "l0": 3.0, "dead": 0.0})
        log.advance()
        log.training_done()
    shown = capfd.readouterr().err.replace("\r", "\n").splitlines()
    middle = next(line for line in shown if "36.0/40.0" in line)
    assert "train run" in middle
    assert "tok/s" in middle
    assert "<00:0" in middle  # elapsed<left
    assert "40.0/40.0" in shown[-1]
    assert "loss=0.1235, fve=0.5, l0=3, dead=0" in shown[-1]


def test_no_bar_when_switched_off(tmp_path: Path, capfd) -> None:
    with logger(tmp_path / "run", WandbSettings()) as log:
        log.advance()
    assert capfd.readouterr().err == ""


def test_table_aligns_words_left_and_numbers_right() -> None:
    rows = [{"run": "a", "n": 1_000, "x": 0.123456}, {"run": "long", "n": None, "x": 12345.6}]
    assert table(rows).splitlines() == [
        "run       n       x",
        "-------------------",
        "a     1,000  0.1235",
        "long      -  12,346",
    ]
    assert table([]) == ""
