"""Curves and histograms of a run as PNG files, from its log alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from training import planted_store, settings

from saetrain import train
from saetrain.cli import main

PNG = b"\x89PNG\r\n\x1a\n"


# F35: PNG files from a log without network; the store is gone by then.
def test_a_finished_run_has_curves_and_histogram(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    store = planted_store(tmp_path / "store", segments=(1024,)).path
    run_dir = train(settings(store, tmp_path / "runs", wandb={"mode": "disabled"})).run_dir
    store.rename(tmp_path / "gone")
    capsys.readouterr()
    main(["plots", str(run_dir)])
    names = ["loss", "fve", "l0", "dead_latents", "density"]
    files = [run_dir / "plots" / f"{name}.png" for name in names]
    assert capsys.readouterr().out == "".join(f"wrote {file}\n" for file in files)
    for file in files:
        assert file.read_bytes().startswith(PNG)
        pixels = np.asarray(image.open(file).convert("RGB")).reshape(-1, 3)
        coloured = np.ptp(pixels.astype(int), axis=1) > 40
        assert coloured.mean() > 1e-3, f"{file.name} shows no line"


def test_a_run_that_is_going_on_has_curves(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"step": s, "tokens": 64 * s, "loss": 1 / s, "fve": 0.1} for s in (1, 2, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    main(["plots", str(tmp_path)])
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["fve.png", "loss.png"]


def test_what_is_missing_is_named(tmp_path: Path, capsys, monkeypatch) -> None:
    with pytest.raises(SystemExit):
        main(["plots", str(tmp_path)])
    assert "has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        main(["plots", str(tmp_path)])
    assert "pip install matplotlib" in capsys.readouterr().err
