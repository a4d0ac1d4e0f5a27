"""Training end to end on small stores: run folders, numbers, variants, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeStream, planted
from training import D, interrupted, planted_store, rows, settings, weights

from actcache.store import HookMissingError, StoreMissingError
from saetrain import load_sae, runs, train
from saetrain.errors import ConfigError, TrainingError
from saetrain.optim import schedule_factor
from saetrain.settings import TrainSettings
from saetrain.stream import Stream


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_store(tmp_path_factory.mktemp("store") / "store").path


# -- what a run is ------------------------------------------------------------------------------


def test_a_run_folder_has_everything(store: Path, tmp_path: Path, capsys) -> None:  # F68
    cfg = settings(store, tmp_path, sae_name="mine", sae_series="demo")
    result = train(cfg)
    folder = result.run_dir
    assert folder.parent == tmp_path / "demo"
    assert folder.name.startswith("mine-")
    assert len(folder.name) == len("mine-") + 8
    assert TrainSettings.from_mapping(json.loads((folder / "config.json").read_text())) == cfg
    record = json.loads((folder / "run.json").read_text())
    snap = runs.open_snapshot(cfg)
    assert record["status"] == "finished"
    assert (record["sae_name"], record["sae_series"]) == ("mine", "demo")
    assert record["store_id"] == snap.store_id
    assert record["token_stream_id"] == snap.token_stream_id
    assert record["activation_ids"] == {"resid.2": snap.hooks["resid.2"].activation_id}
    assert record["hooks"] == {"in": "resid.2", "out": "resid.2"}
    assert record["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in (folder / "run.json").read_text()
    sae = load_sae(folder / "sae")
    assert sae.source["sae_name"] == "mine"
    assert sae.source["store_id"] == snap.store_id
    assert json.loads((folder / "eval.json").read_text()) == result.metrics
    table = capsys.readouterr().out
    assert table == result.table() + "\n"
    assert all(w in table for w in ("FVE", "MSE", "L0", "PCA FVE", "seconds"))
    assert f"dead@{result.metrics['tokens']}" in table


def test_it_learns_and_the_numbers_are_those_of_the_saved_sae(store: Path, tmp_path: Path) -> None:
    cfg = settings(store, tmp_path, tokens=64 * 300)
    metrics = train(cfg).metrics
    assert metrics["fve"] > 0.8
    assert metrics["fve"] > metrics["pca"]["fve"] + 0.2
    assert metrics["pca"]["rank"] == 4
    # By hand: every held-out, non-special row through the saved SAE.
    sae = load_sae(cfg.run_dir / "sae")
    snap = runs.open_snapshot(cfg)
    held = Stream(snap, ("resid.2",), split="held_out", held_out_fraction=0.2, batch_tokens=64)
    x = torch.cat([b.acts["resid.2"] for b in held.one_pass()])
    y = sae(x)["sae_out"]
    fve = 1 - (x - y).square().sum() / (x - x.mean(0)).square().sum()
    assert metrics["fve"] == pytest.approx(float(fve), abs=1e-5)
    assert metrics["tokens"] == len(x) == held.n_rows


def test_whole_batches_only(store: Path, tmp_path: Path) -> None:  # F65
    result = train(settings(store, tmp_path, tokens=64 * 10 + 63))
    assert result.trained_steps == result.metrics["steps"] == 10
    assert result.metrics["train_tokens"] == 640
    cfg = settings(store, tmp_path, tokens=None, epochs=2)
    per_epoch = Stream(
        runs.open_snapshot(cfg), ("resid.2",), batch_tokens=64, held_out_fraction=0.2
    ).batches_per_epoch
    assert train(cfg).trained_steps == 2 * per_epoch


def test_rows_follow_the_closed_forms(store: Path, tmp_path: Path) -> None:
    cfg = settings(store, tmp_path)
    found = rows(train(cfg).run_dir)
    assert [r["step"] for r in found] == [4, 8, 12, 16, 20, 24, 28, 30]
    for row in found:
        factor = schedule_factor(row["step"] - 1, 30, cfg.schedule)
        assert row["lr"] == pytest.approx(3e-3 * factor)
        assert row["tokens"] == 64 * row["step"]
        assert row["fve"] == 1 - row["fvu"]
        assert row["loss"] == pytest.approx(row["loss/reconstruction"] + row["loss/auxk"])
        assert 0 < row["l0"] <= 4
    # The first row cannot count anything dead: 300 silent tokens have not gone by.
    assert found[0]["dead"] == 0


def test_python_and_records_give_the_same_settings(store: Path, tmp_path: Path) -> None:
    cfg = settings(store, tmp_path, saes_path=[], wandb={"project": "p"})
    assert TrainSettings.from_mapping(cfg.to_dict()) == cfg
    assert cfg.optim.betas == (0.9, 0.999)


def test_the_folder_is_named_by_what_decides_the_result(store: Path, tmp_path: Path) -> None:
    base = settings(store, tmp_path)
    same_result = [
        {"store": "elsewhere"},
        {"log_every": 9},
        {"wandb": {"mode": "offline"}},
        {"device": "cpu"},
        {"checkpoint": {"every_steps": None}},
        {"fresh": True},
    ]
    for change in same_result:
        assert settings(**({"store": store, "runs_dir": tmp_path} | change)).run_dir == base.run_dir
    for change in ({"seed": 1}, {"precision": "bf16"}, {"tokens": 6400}, {"optim": {"lr": 1e-4}}):
        assert settings(store, tmp_path, **change).run_dir != base.run_dir


# -- variants -----------------------------------------------------------------------------------


def test_bf16_trains_close_to_fp32(store: Path, tmp_path: Path) -> None:
    full = train(settings(store, tmp_path, tokens=64 * 150)).metrics
    half = train(settings(store, tmp_path, tokens=64 * 150, precision="bf16"))
    assert half.metrics["fve"] == pytest.approx(full["fve"], abs=0.03)
    assert half.metrics["fve"] != full["fve"]
    assert {w.dtype for w in weights(half.run_dir).values()} == {torch.float32}


def test_evaluation_on_the_way_changes_nothing_else(store: Path, tmp_path: Path) -> None:
    plain = train(settings(store, tmp_path)).run_dir
    cfg = settings(store, tmp_path, eval={"every_steps": 10})
    watched = train(cfg)
    found = rows(watched.run_dir)
    on_the_way = [r for r in found if "eval/fve" in r]
    assert [r["step"] for r in on_the_way] == [10, 20]
    assert on_the_way[0]["eval/fve"] < on_the_way[1]["eval/fve"] < watched.metrics["fve"]
    assert [r for r in found if "eval/fve" not in r] == rows(plain)
    assert all(torch.equal(w, weights(plain)[n]) for n, w in weights(watched.run_dir).items())


def test_any_stream_with_the_interface_will_do(tmp_path: Path) -> None:
    cfg = settings(None, tmp_path, tokens=64 * 200)
    x, held = planted(3000, D, seed=1), planted(500, D, seed=2)
    result = train(cfg, stream=FakeStream(x, 64), held_out=FakeStream(held, 64))
    y = load_sae(result.run_dir / "sae")(torch.from_numpy(held).float())["sae_out"].numpy()
    fve = 1 - np.square(held - y).sum() / np.square(held - held.mean(0)).sum()
    assert result.metrics["fve"] == pytest.approx(fve, abs=1e-4)
    assert fve > 0.7
    with pytest.raises(ConfigError, match="both stream and held_out"):
        train(cfg, stream=FakeStream(x, 64))
    with pytest.raises(ConfigError, match=r"batches of 32 tokens.*batch_tokens=64"):
        train(settings(None, tmp_path), stream=FakeStream(x, 32), held_out=FakeStream(held, 64))


def test_the_report_is_written_for_the_run(store: Path, tmp_path: Path) -> None:
    cfg = settings(store, tmp_path, report=True)
    page = train(cfg).run_dir / "report.html"
    assert page.stat().st_size > 1000
    page.unlink()
    assert train(cfg).trained_steps == 0
    assert page.exists()


def test_init_from_data_comes_once_and_before_the_first_step(
    store: Path, tmp_path: Path, monkeypatch
) -> None:
    from saetrain.saes.sae import Autoencoder

    calls: list[int] = []
    monkeypatch.setattr(
        Autoencoder, "init_from_data", lambda self, acts: calls.append(len(acts["resid.2"]))
    )
    cfg = settings(store, tmp_path)
    interrupted(cfg, 3)
    train(cfg)
    assert calls == [64]


# -- refusals -----------------------------------------------------------------------------------


def test_divergence_names_the_step_and_saves_nothing(store: Path, tmp_path: Path) -> None:
    cfg = settings(store, tmp_path, optim={"lr": 1e30}, log_every=30, checkpoint={"every_steps": 5})
    message = r"diverged at step [1-5]: loss=.*loss/reconstruction=.*Lower optim.lr"
    with pytest.raises(TrainingError, match=message):
        train(cfg)
    assert not list(cfg.run_dir.glob("checkpoints/step_*"))
    assert not (cfg.run_dir / "sae").exists()
    assert rows(cfg.run_dir) == []


def test_another_store_is_refused_with_both_ids(store: Path, tmp_path: Path) -> None:
    cfg = settings(store, tmp_path)
    train(cfg)
    path = cfg.run_dir / "run.json"
    record = json.loads(path.read_text())
    mine = record["store_id"]
    path.write_text(json.dumps(record | {"store_id": "sha256:other"}))
    with pytest.raises(TrainingError, match=rf"store_id: sha256:other then, {mine} now.*fresh"):
        train(cfg)
    assert train(dataclasses.replace(cfg, fresh=True)).trained_steps == 30


def test_a_folder_of_other_things_is_left_alone(store: Path, tmp_path: Path) -> None:
    cfg = settings(store, tmp_path, fresh=True)
    cfg.run_dir.mkdir(parents=True)
    (cfg.run_dir / "thesis.tex").write_text("important")
    with pytest.raises(TrainingError, match=r"in the way.*thesis.tex"):
        train(cfg)
    assert (cfg.run_dir / "thesis.tex").exists()


def test_two_processes_do_not_share_a_folder(store: Path, tmp_path: Path) -> None:
    cfg = settings(store, tmp_path)
    with (
        runs.claimed(cfg.run_dir, fresh=False),
        pytest.raises(TrainingError, match="another process is training"),
    ):
        train(cfg)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": 5, "epochs": 1}, ConfigError, "tokens=5, epochs=1"),
        ({"tokens": None}, ConfigError, "exactly one of tokens and epochs"),
        ({"tokens": 63}, ConfigError, "tokens=63 is less than one batch of 64"),
        ({"batch_tokens": 4096, "tokens": 1e6}, ConfigError, "batch_tokens=4,096 is more than"),
        ({"hook": "resid.16"}, HookMissingError, "It has: resid.2"),
        ({"store": "/nowhere/store"}, StoreMissingError, "does not exist"),
        ({"store": None}, ConfigError, "store=PATH"),
        ({"sae": {"name": "topk", "n_latents": 8, "k": 9}}, ConfigError, "k=9 .*n_latents=8"),
        ({"sae": {"name": "topk", "n_latents": 8, "kk": 9}}, ConfigError, "'sae.kk'"),
        ({"sae": {"n_latents": 8}}, ConfigError, "sae.name"),
        ({"sae": {"name": "topc", "n_latents": 8}}, ConfigError, "Did you mean topk"),
        ({"optim": {"lrr": 1}}, ConfigError, "'optim.lrr'. Did you mean lr"),
        ({"precision": "fp16"}, ConfigError, "precision"),
        ({"held_out_fraction": 0.0}, ConfigError, "held_out_fraction"),
        ({"sae_name": "../up"}, ConfigError, "sae_name"),
        ({"device": "tpu9"}, ConfigError, "device"),
        ({"log_every": 0}, ConfigError, "log_every"),
        ({"snapshot": "77"}, StoreMissingError, "no snapshot '77'"),
    ],
)
def test_bad_settings_are_refused_before_any_file(
    store: Path, tmp_path: Path, changes: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        train(settings(**({"store": store, "runs_dir": tmp_path / "runs"} | changes)))
    assert not (tmp_path / "runs").exists()


def test_dead_after_tokens_without_effect_is_said(store: Path, tmp_path: Path, capsys) -> None:
    sae = {"name": "topk", "n_latents": 48, "k": 4, "dead_after_tokens": 10_000}
    train(settings(store, tmp_path, sae=sae))
    assert "sae.dead_after_tokens=10,000 has no effect" in capsys.readouterr().err


def test_nothing_held_out_is_said_before_training(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of the store's documents is held out"):
        train(settings(store, tmp_path, held_out_fraction=1e-9))
    assert not list(tmp_path.rglob("metrics.jsonl"))
