"""Fused sweeps: each SAE equals its own single run, whatever happens to the others."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from training import interrupted, planted_store, rows, same, settings, weights

from saetrain import train
from saetrain.errors import TrainingError
from saetrain.evals.run import EVAL
from saetrain.interrupt import Interrupted
from saetrain.kept import Kept, Purse
from saetrain.settings import TrainSettings
from saetrain.stream import Stream
from saetrain.sweep import Opener, grouped, train_together
from saetrain.trainer import Trainer

SAE = {"name": "topk", "n_latents": 48, "k": 4, "dead_after_tokens": 300}
KINDS = {
    "topk": {"sae": SAE},
    "wide": {"sae": SAE | {"n_latents": 96, "k": 6}, "optim": {"lr": 1e-3}},
    "long": {"sae": SAE | {"k": 2}, "tokens": 64 * 41, "log_every": 5},
    # Draws random prefixes at every step: its generator must be its own.
    "matryoshka": {
        "sae": SAE | {"name": "matryoshka", "random_prefixes": 3},
        "checkpoint": {"every_steps": 4},
    },
    "relu": {
        "sae": {"name": "relu", "n_latents": 32, "resample_every": 9},
        "eval": {"every_steps": 9},
    },
    "bf16": {"sae": SAE | {"k": 3}, "precision": "bf16"},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "store"
    planted_store(path, hooks=("resid.2", "resid.3"))
    return path


def all_kinds(store: Path, folder: Path) -> list[TrainSettings]:
    return [settings(store, folder, **changes) for changes in KINDS.values()]


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Single runs of everything, by the name of their folder."""
    folder = tmp_path_factory.mktemp("alone")
    done = [train(cfg).run_dir for cfg in all_kinds(store, folder)]
    return {path.name: path for path in done}


def equal_to_single(run_dir: Path, alone: dict[str, Path]) -> None:
    """Weights, metric rows and evaluation, bit for bit."""
    single = alone[run_dir.name]
    same(run_dir, single)
    a, b = (json.loads((d / EVAL).read_text()) for d in (run_dir, single))
    assert {k: v for k, v in a.items() if k != "seconds"} == {
        k: v for k, v in b.items() if k != "seconds"
    }
    a, b = (json.loads((d / "run.json").read_text()) for d in (run_dir, single))
    assert a == b


# -- equal to single runs ------------------------------------------------------------------------


def test_each_sae_equals_its_single_run(
    store: Path, alone, tmp_path: Path, monkeypatch
) -> None:  # F116
    read: list[int] = []
    original = Stream.slices

    def slices(self, *args):
        for batch in original(self, *args):
            read.append(batch.step)
            yield batch

    monkeypatch.setattr(Stream, "slices", slices)
    before = torch.get_rng_state()
    outcomes = train_together(all_kinds(store, tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    assert [o.reason for o in outcomes] == [None] * len(KINDS)
    for outcome in outcomes:
        equal_to_single(outcome.settings.run_dir, alone)
    # One pass of the longest job over the data for all of them, and one to fit one PCA.
    assert read[:41] == list(range(41))
    assert read[41:] == list(range(len(read) - 41))


def test_a_killed_sweep_continues_and_finished_jobs_stay_untouched(  # F68, F116
    store: Path, alone, tmp_path: Path, monkeypatch
) -> None:
    many = all_kinds(store, tmp_path)
    finished = train(many[1]).run_dir
    stamp = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    original = Trainer._train_step

    def killed(self, batch):
        if self.step == 18 and self.settings.sae["name"] == "relu":
            raise SystemExit(9)  # as if the process ended: nothing is saved
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", killed)
        with pytest.raises(SystemExit):
            train_together(many)
    kept = {p.name for p in tmp_path.glob("*/checkpoints/step_*")}
    assert {"step_14", "step_16"} <= kept  # jobs stand at different steps
    with monkeypatch.context() as patch:
        interrupt_at(patch, 21)
        with pytest.raises(Interrupted, match=r"stopped at step 21, saved 5 runs.*same command"):
            train_together(many)
    outcomes = train_together(many)
    for outcome in outcomes:
        equal_to_single(outcome.settings.run_dir, alone)
    assert [o.result.trained_steps for o in outcomes] == [9, 0, 20, 9, 9, 9]
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == stamp


def interrupt_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer._train_step

    def train_step(self, batch):
        if self.step + 1 == step and self.settings.sae["name"] == "relu":
            signal.raise_signal(signal.SIGINT)
        original(self, batch)

    patch.setattr(Trainer, "_train_step", train_step)


def test_a_single_run_and_a_sweep_continue_each_other(store: Path, alone, tmp_path: Path) -> None:
    many = all_kinds(store, tmp_path)[:3]
    interrupted(many[2], 12)
    for outcome in train_together(many):
        equal_to_single(outcome.settings.run_dir, alone)


# -- what goes wrong -----------------------------------------------------------------------------


def test_failing_jobs_are_dropped_with_their_reason(  # F116
    store: Path, alone, tmp_path: Path, capsys, monkeypatch
) -> None:
    good = all_kinds(store, tmp_path)[:1]
    bad = [
        settings(store, tmp_path, sae=SAE | {"k": 100}),
        settings(store, tmp_path, hook="resid.9"),
        settings(store, tmp_path, optim={"lr": 1e30}),
        settings(store, tmp_path, sae=SAE | {"k": 7}),
        settings(store, tmp_path, hooks=("resid.2", "resid.8")),
    ]
    original = Trainer._train_step

    def broken(self, batch):
        if self.settings.sae.get("k") == 7 and self.step == 5:
            raise RuntimeError("index out of bounds")
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", broken)
    outcomes = train_together([*bad, *good])
    reasons = [o.reason for o in outcomes]
    assert len(reasons) == 7
    assert "sae.k=100" in reasons[0]
    assert "resid.9" in reasons[1]
    assert "diverged at step" in reasons[2]
    assert "Lower optim.lr" in reasons[2]
    assert reasons[3] == "RuntimeError: index out of bounds"
    assert reasons[4] is None
    assert "resid.8" in reasons[5]
    assert reasons[6] is None
    equal_to_single(outcomes[6].settings.run_dir, alone)
    assert 'raise RuntimeError("index out of bounds")' in capsys.readouterr().err
    record = json.loads((outcomes[3].settings.run_dir / "run.json").read_text())
    assert (record["status"], record["reason"]) == ("failed", reasons[3])
    # The next call tries again.
    monkeypatch.setattr(Trainer, "_train_step", original)
    again = train_together([bad[3]])[0]
    assert again.result is not None
    assert again.result.metrics["fve"] > 0


def test_damage_in_the_store_ends_every_job_that_reads_it(store: Path, tmp_path: Path) -> None:
    mine = tmp_path / "store"
    shutil.copytree(store, mine)
    for shard in mine.glob("segments/*/acts/resid.2/c/0/0"):
        data = bytearray(shard.read_bytes())
        data[40] ^= 1
        shard.write_bytes(data)
    many = [settings(mine, tmp_path / "runs", sae=SAE | {"k": k}) for k in (2, 3)]
    outcomes = train_together(many)
    assert all("bytes on disk are damaged" in str(o.reason) for o in outcomes)
    assert not list((tmp_path / "runs").glob("*/sae"))


def test_a_folder_in_use_is_left_alone(store: Path, tmp_path: Path) -> None:
    from saetrain import runs

    cfg = settings(store, tmp_path)
    with runs.claimed(cfg.run_dir, fresh=False):
        outcome = train_together([cfg])[0]
    assert "another process is training" in str(outcome.reason)
    assert not (cfg.run_dir / "run.json").exists()


# -- groups --------------------------------------------------------------------------------------


def groups(*many: TrainSettings) -> list[list[int]]:
    opener = Opener()
    return grouped([opener.open(cfg) for cfg in many])


def test_what_shares_a_stream(store: Path, tmp_path: Path, capsys) -> None:
    def made(**changes) -> TrainSettings:
        return settings(store, tmp_path, **changes)

    same_rows = [made(), made(tokens=64 * 9), made(hook="resid.3"), made(precision="bf16")]
    assert groups(*same_rows) == [[0, 1, 2, 3]]
    assert "4 runs share a stream" in capsys.readouterr().err
    for other in ({"seed": 1}, {"batch_tokens": 32}, {"held_out_fraction": 0.3}):
        assert groups(made(), made(**other)) == [[0], [1]], other
    norms = {"stream": {"max_norm": 9.0}}  # which rows are short enough depends on the hook
    assert groups(made(**norms), made(hook="resid.3", **norms)) == [[0], [1]]


def test_memory_splits_groups(store: Path, tmp_path: Path, alone, capsys) -> None:
    many = all_kinds(store, tmp_path)[:3]
    small = {"fused": {"memory_gb": 0.02}}
    tight = [TrainSettings.from_mapping(cfg.to_dict() | small) for cfg in many]
    assert groups(*many) == [[0, 1, 2]]
    capsys.readouterr()
    found = groups(*tight)
    told = capsys.readouterr().err
    assert sorted(i for g in found for i in g) == [0, 1, 2]
    assert "held_out" in told
    assert f"groups: {len(found)}" in told


def test_the_same_run_twice_is_trained_once(store: Path, tmp_path: Path, capsys) -> None:
    cfg = settings(store, tmp_path, tokens=64 * 4)
    a, b = train_together([cfg, dataclasses.replace(cfg, log_every=2)])
    assert a.result is b.result is not None
    assert "asked for twice" in capsys.readouterr().err


def test_two_stores_cannot_share_a_folder(store: Path, tmp_path: Path) -> None:
    """Their path is not in a folder's name: the second must not get the result of the first."""
    planted_store(tmp_path / "other", segments=(512,))
    shutil.copytree(store, tmp_path / "moved")
    many = [
        settings(path, tmp_path / "runs", tokens=64 * 4)
        for path in (store, tmp_path / "other", tmp_path / "moved")
    ]
    a, b, c = train_together(many)
    assert a.result is c.result is not None  # the same store in another place
    assert b.result is None
    assert "'runs_dir=runs/${store}'" in str(b.reason)


def test_finished_jobs_take_no_place_in_a_group(store: Path, tmp_path: Path, capsys) -> None:
    def made(k: int) -> TrainSettings:
        changes = {"sae": SAE | {"k": k}, "tokens": 64 * 4}
        return settings(store, tmp_path, **changes, fused={"memory_gb": 1e-4})

    train(made(3))
    capsys.readouterr()
    outcomes = train_together([made(2), made(3), made(4)])
    assert [o.result.trained_steps for o in outcomes] == [4, 0, 4]
    told = capsys.readouterr().err
    assert "2 runs share a stream" in told
    names = [o.settings.run_name for o in outcomes]
    assert f"warning: {names[0]} needs" in told  # each alone is more than 0.1 MB
    assert f"warning: {names[2]} needs" in told
    assert train_together([made(2), made(3), made(4)])[2].result.trained_steps == 0
    assert "share a stream" not in capsys.readouterr().err


def test_what_all_jobs_would_say_is_said_once(store: Path, tmp_path: Path, capsys) -> None:
    sae = SAE | {"dead_after_tokens": 10_000}
    many = [settings(store, tmp_path, sae=sae | {"k": k}, tokens=64 * 4) for k in (2, 3)]
    train_together(many)
    assert capsys.readouterr().err.count("sae.dead_after_tokens=10,000 has no effect") == 1


def test_settings_of_a_group_have_no_effect_alone(store: Path, tmp_path: Path, capsys) -> None:
    cfg = settings(store, tmp_path, tokens=64 * 2, fused={"stack": True, "workers": 2})
    train(cfg)
    told = capsys.readouterr().err
    assert "fused.stack=True has no effect: this SAE is trained alone" in told
    assert "fused.workers=2 has no effect" in told
    assert "fused.memory_gb" not in told


def test_kept_rows_are_read_once_and_errors_are_not_lost(store: Path, tmp_path: Path) -> None:
    source = Opener().open(settings(store, tmp_path)).source
    plain = [b.acts["resid.2"] for b in source.train.one_pass()]

    class Counting:
        n, broken = 0, False

        def one_pass(self):
            for batch in source.train.one_pass():
                if self.broken and self.n > 3:
                    raise TrainingError("disk")
                self.n += 1
                yield batch

    for room, reads in ((1 << 30, len(plain)), (5000, 2 * len(plain) + 5)):
        inner, purse = Counting(), Purse(room)
        kept = Kept(inner, purse)  # type: ignore[arg-type]
        for _ in range(2):
            got = [b.acts["resid.2"] for b in kept.one_pass()]
            assert all(map(torch.equal, got, plain))
            assert len(got) == len(plain)
        assert inner.n <= reads
        kept.forget()
        assert purse.left == room
    inner = Counting()
    inner.broken = True
    kept = Kept(inner, Purse(1 << 30))  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(TrainingError, match="disk"):
            list(kept.one_pass())


# -- one product for several encoders ------------------------------------------------------------


def test_stacked_encoders_equal_single_runs_within_rounding(
    store: Path, alone, tmp_path: Path, capsys
) -> None:  # F116
    names = ("topk", "long", "wide", "relu", "bf16")
    many = [settings(store, tmp_path, fused={"stack": True}, **KINDS[name]) for name in names]
    for outcome in train_together(many):
        run_dir = outcome.settings.run_dir
        single = alone[run_dir.name]
        for mine, theirs in zip(rows(run_dir), rows(single), strict=True):
            assert mine["step"] == theirs["step"]
            if "loss" in mine:
                assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        a, b = weights(run_dir), weights(single)
        close = [torch.allclose(a[n], b[n], atol=1e-3, rtol=1e-3) for n in a]
        assert all(close)
        shared = outcome.settings.sae.get("k") in (4, 2)
        assert torch.equal(a["W_enc"], b["W_enc"]) != shared
    assert "2 of 5 encoders in common products" in capsys.readouterr().err


def test_each_job_has_a_wandb_run_of_its_own(store: Path, tmp_path: Path, monkeypatch) -> None:
    # F116
    class Run:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.open = True

        def log(self, data, step) -> None:
            assert self.open
            self.steps.append(step)

        def finish(self) -> None:
            self.open = False

    made: list[tuple[dict, Run]] = []

    class Stub:
        @staticmethod
        def init(**kw) -> Run:
            made.append((kw, Run()))
            return made[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", Stub)
    both = [
        settings(store, tmp_path, sae=SAE | {"k": k}, wandb={"mode": "offline"}, tokens=64 * t)
        for k, t in ((2, 8), (3, 12))
    ]
    train_together(both)
    assert {kw["reinit"] for kw, _ in made} == {"create_new"}  # several open in one process
    assert len({kw["id"] for kw, _ in made}) == len({kw["dir"] for kw, _ in made}) == 2
    assert [run.steps for _, run in made] == [[4, 8, 8], [4, 8, 12, 12]]
    assert not any(run.open for _, run in made)
