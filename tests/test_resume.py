"""Same seed, same run; interrupted anywhere and continued, same run; damage is skipped aloud."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from training import interrupted, planted_store, rows, same, settings

from actcache.store import open_store
from actcache.store.layout import VOCAB_JSON
from actcache.store.writer import StoreWriter
from saetrain import train
from saetrain.log import METRICS
from saetrain.trainer import Trainer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_store(tmp_path_factory.mktemp("store") / "store").path


def test_the_same_seed_gives_the_same_log(store: Path, tmp_path: Path) -> None:  # F18
    torch.manual_seed(1)
    a = train(settings(store, tmp_path / "a")).run_dir
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = train(settings(store, tmp_path / "b")).run_dir
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator was used"
    same(a, b)
    other = train(settings(store, tmp_path / "a", seed=1)).run_dir
    assert rows(other) != rows(a)


@pytest.mark.parametrize("name", ["topk", "relu", "batchtopk", "p_anneal", "matryoshka"])
def test_interrupted_anywhere_and_continued_is_the_same_run(
    store: Path, tmp_path: Path, name: str
) -> None:
    sae = {"name": name, "n_latents": 48, "dead_after_tokens": 300}
    sae |= {"k": 4} if name in ("topk", "batchtopk", "matryoshka") else {}
    sae |= {"random_prefixes": 3, "resample_every": 4} if name == "matryoshka" else {}
    whole = train(settings(store, tmp_path / "whole", sae=sae)).run_dir
    cfg = settings(store, tmp_path / "cut", sae=sae)
    for step in (1, 10, 23, 30):  # on no log or checkpoint boundary; the last one after all steps
        interrupted(cfg, step)
    assert train(cfg).trained_steps == 0
    same(whole, cfg.run_dir)
    metrics = [json.loads((d / "eval.json").read_text()) for d in (whole, cfg.run_dir)]
    for each in metrics:
        del each["seconds"]
    assert metrics[0] == metrics[1]


def test_killed_after_a_checkpoint_repeats_the_lost_steps(store: Path, tmp_path: Path) -> None:
    whole = train(settings(store, tmp_path / "whole")).run_dir
    cfg = settings(store, tmp_path / "cut")
    original = Trainer._train_step

    def killed(self, batch):
        if self.step == 19:
            raise MemoryError
        original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", killed)
        with pytest.raises(MemoryError):
            train(cfg)
    assert [r["step"] for r in rows(cfg.run_dir)] == [4, 8, 12, 16]
    assert train(cfg).trained_steps == 30 - 14
    same(whole, cfg.run_dir)


def test_a_damaged_checkpoint_is_skipped_aloud(store: Path, tmp_path: Path, capsys) -> None:
    whole = train(settings(store, tmp_path / "whole")).run_dir
    cfg = settings(store, tmp_path / "cut")
    interrupted(cfg, 16)
    folder = cfg.run_dir / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step_14", "step_16"]
    file = folder / "step_16" / "optim.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (folder / ".tmp-step_21-1").mkdir()
    capsys.readouterr()
    assert train(cfg).trained_steps == 16
    said = capsys.readouterr().err
    assert "skipping damaged checkpoint" in said
    assert "step_16: optim.safetensors does not match" in said
    assert "being written when the run stopped" in said
    assert "continuing" in said
    assert "at step 14 of 30" in said
    same(whole, cfg.run_dir)


@pytest.mark.parametrize("how", ["no state", "cut", "no file"])
def test_half_a_checkpoint_is_never_used(store: Path, tmp_path: Path, how: str) -> None:
    cfg = settings(store, tmp_path / "cut", checkpoint={"every_steps": None})
    interrupted(cfg, 16)
    folder = cfg.run_dir / "checkpoints" / "step_16"
    if how == "no state":
        (folder / "state.json").unlink()
    elif how == "cut":
        (folder / "state.json").write_text('{"format": 1')
    else:
        (folder / "sae.safetensors").unlink()
    assert train(cfg).trained_steps == 30


def test_a_finished_run_says_so_and_fresh_trains_again(store: Path, tmp_path: Path, capsys) -> None:
    cfg = settings(store, tmp_path)
    first = train(cfg)
    before = (first.run_dir / METRICS).read_text()
    capsys.readouterr()
    again = train(cfg)
    assert again.trained_steps == 0
    assert again.metrics == first.metrics
    out = capsys.readouterr()
    assert "is finished; fresh=true" in out.err
    assert out.out == first.table() + "\n"
    assert (first.run_dir / METRICS).read_text() == before
    fresh = train(dataclasses.replace(cfg, fresh=True))
    assert fresh.trained_steps == 30
    assert (first.run_dir / METRICS).read_text() != before  # other timings


def grow(path: Path) -> None:
    """One more segment, a copy of the first, and a second snapshot with it."""
    store = open_store(path)
    first = store.snapshot().segments[0]
    info, vocab = first.hooks["resid.2"], (path / VOCAB_JSON).read_bytes()
    writer = StoreWriter(path, store.identity, {VOCAB_JSON: vocab})
    commit = writer.write_segment(
        unit=99,
        index=0,
        last_in_unit=True,
        tokens=first.tokens(),
        acts=[(info, first.acts("resid.2").read())],
        writer={},
    )
    writer.snapshot([*(s.id for s in store.snapshot().segments), commit.segment])


def test_a_run_stays_on_its_snapshot_while_the_store_grows(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    whole = train(settings(copy, tmp_path / "whole")).run_dir
    cfg = settings(copy, tmp_path / "cut")
    interrupted(cfg, 16)
    grow(copy)
    assert open_store(copy).snapshot().n_rows == 2560 + 1024
    train(cfg)
    same(whole, cfg.run_dir)
    train(dataclasses.replace(cfg, fresh=True))
    assert json.loads((cfg.run_dir / "run.json").read_text())["snapshot"] == "2"
    assert rows(cfg.run_dir) != rows(whole)
