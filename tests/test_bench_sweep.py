"""The sides of bench_sweep at a tiny size: the same SAEs, whoever trains them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import bench_sweep
from pipelines.bench_data import make_data
from pipelines.bench_sweep import QUICK, Scale, Sweep

TINY = replace(QUICK, segments=6, segment_rows=256, latents=(32,), ks=(2, 4))


@pytest.fixture
def side(tiny_host, tmp_path: Path) -> Sweep:
    documents = [(str(i), f"document {i} says {i * i} things of length {i % 7}. " * 4)
                 for i in range(200)]  # fmt: skip
    make_data(tmp_path / "data", documents, Path(tiny_host), TINY.segments * TINY.segment_rows)
    return Sweep(tmp_path, Path(tiny_host), tmp_path / "data", TINY)


def test_all_ways_train_the_same_saes(side: Sweep) -> None:
    fused, one = side.sweep("fused"), side.sweep("sequential")
    assert fused["fves"] == pytest.approx(one["fves"], abs=1e-3)
    assert len(fused["fves"]) == 2
    assert fused["tokens"] == one["tokens"] > 0
    assert side.sweep("stacked")["fves"] == pytest.approx(one["fves"], abs=1e-3)
    for how in ("fused", "sequential"):
        assert sorted(side.commands(how)["fves"]) == pytest.approx(sorted(one["fves"]), abs=1e-3)
    assert list(side.folder.glob("*/runs")) == []  # nothing is left behind


def test_a_command_that_fails_says_why(side: Sweep, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        side._command(tmp_path, ["store=nowhere"])


def test_every_side_has_the_whole_machine_and_must_train_the_same() -> None:
    assert Scale().threads == os.cpu_count()
    bench_sweep._check_equal([0.5, 0.25], [0.5, 0.2500001])
    with pytest.raises(RuntimeError, match="nothing to compare"):
        bench_sweep._check_equal([0.5, 0.25], [0.5, 0.27])


def test_memory_is_that_of_training(side: Sweep) -> None:
    found = side.grow("fused")
    assert found["planned"] > 4 * 2 * 2 * 32 * 32  # weights of two SAEs at least
    assert found["grown"] >= 0


def test_without_sparsify_it_is_skipped_by_name(monkeypatch) -> None:
    monkeypatch.setattr(bench_sweep, "corpus", lambda: [])
    monkeypatch.setattr(bench_sweep, "make_host", lambda *a: None)
    monkeypatch.setattr(bench_sweep, "make_data", lambda *a: None)
    monkeypatch.setattr(bench_sweep, "why_absent", lambda package: f"{package} is not installed")
    speed = {"fused": [1.0], "stacked": [1.25], "sequential": [1.5], "commands": [4.0]}
    monkeypatch.setattr(bench_sweep, "_speed", lambda *a: speed)
    memory = {"fused": [3.0], "sequential": [2.0], "planned": [0.5]}
    monkeypatch.setattr(bench_sweep, "_memory", lambda *a: memory)
    rows = {m.name: m for m in bench_sweep.measures(TINY, lambda line: None)}
    assert rows["vs_sparsify_on_the_fly"].skipped == "eai-sparsify is not installed"
    assert rows["vs_sequential"].value == 1.5
    assert rows["stacked_vs_fused"].value == pytest.approx(0.8)
    assert rows["peak_memory"].value == 1.5
