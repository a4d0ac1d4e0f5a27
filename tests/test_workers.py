"""Several SAEs of a group at once: the same SAEs, whoever steps beside whom."""
# ruff: noqa: F811  fixtures of test_sweep are arguments here

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_sweep import KINDS, SAE, alone, equal_to_single, interrupt_at, store  # noqa: F401
from training import rows, same, settings, weights

from actcache.store.errors import DamagedError
from saetrain import plan, train
from saetrain import workers as teams
from saetrain.errors import ConfigError
from saetrain.evals import pca
from saetrain.interrupt import Interrupted
from saetrain.kept import Kept, Purse
from saetrain.lockstep_job import Job
from saetrain.saes import make_sae
from saetrain.settings import TrainSettings
from saetrain.stream import Stream
from saetrain.sweep import Opener, train_together
from saetrain.trainer import Trainer
from saetrain.workers import MOST, Workers, how_many

CPU = torch.device("cpu")


def made(store: Path, folder: Path, workers: int | None, names=tuple(KINDS)) -> list[TrainSettings]:
    return [settings(store, folder, fused={"workers": workers}, **KINDS[n]) for n in names]


@pytest.fixture
def beside(monkeypatch) -> dict[int, set[str]]:
    """By the thread that took steps: folders of the runs."""
    seen: dict[int, set[str]] = {}
    original = Trainer._train_step

    def train_step(self, batch):
        seen.setdefault(threading.get_ident(), set()).add(self.settings.run_dir.name)
        time.sleep(0.002)  # so that every worker gets something
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    return seen


def test_saes_that_step_at_once_equal_their_single_runs(
    store: Path, alone, tmp_path: Path, beside, capsys
) -> None:  # F116
    """Bit for bit, with different lengths, random prefixes, resampling and bf16 among them."""
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    outcomes = train_together(made(store, tmp_path, 3))
    assert [o.reason for o in outcomes] == [None] * len(KINDS)
    for outcome in outcomes:
        equal_to_single(outcome.settings.run_dir, alone)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    told = capsys.readouterr().err
    assert "3 of 6 runs step at once" in told
    assert "evaluating 4 runs, 3 at once" in told
    mine = beside.pop(threading.get_ident())
    assert {n.split("-")[0] for n in mine} == {"matryoshka", "relu"}  # these draw random numbers
    assert len(beside) == 3
    assert set().union(*beside.values()) == {o.settings.run_dir.name for o in outcomes} - mine


def test_training_and_evaluation_at_once_show_bars(store: Path, tmp_path: Path, capsys) -> None:
    # F126: rate and time left, also where many runs are evaluated beside each other.
    cfg = settings(store, tmp_path, tokens=64 * 8, progress=True, fused={"workers": 2})
    many = [replace(cfg, sae=cfg.sae | {"k": k}) for k in (2, 3, 4)]
    assert all(o.result for o in train_together(many))
    told = capsys.readouterr().err
    for bar in (r"train 3 SAEs: 100%.* 8/8 \[\d\d:\d\d<", r"evaluate: 100%.* 3/3 \[\d\d:\d\d<"):
        assert re.search(bar, told), told


def test_at_sizes_where_operations_are_divided_among_threads(store: Path, tmp_path: Path) -> None:
    # F116: equal to a single run, which has more threads inside its operations.
    threads = torch.get_num_threads()
    wide = {"sae": {"name": "topk", "n_latents": 4096, "k": 8}, "batch_tokens": 512}
    short = {"tokens": 512 * 8, "checkpoint": {"every_steps": None}}
    folders = []
    for workers in (None, 2):
        fused, where = {"workers": workers}, tmp_path / str(workers)
        many = [
            settings(store, where, fused=fused, **wide | short | {"optim": {"lr": lr}})
            for lr in (1e-3, 2e-3)
        ]
        try:
            torch.set_num_threads(4)
            done = [train(one) for one in many] if workers is None else train_together(many)
        finally:
            torch.set_num_threads(threads)
        folders.append(sorted(p.parent for p in where.glob("*/eval.json")))
        assert len(done) == len(folders[-1]) == 2
    for single, fused in zip(*folders, strict=True):
        same(single, fused)


@pytest.mark.parametrize("turn_bytes", [teams.TURN_BYTES, 0])
def test_a_turn_ends_where_something_is_due(
    store: Path, tmp_path: Path, monkeypatch, turn_bytes: int
) -> None:
    monkeypatch.setattr(teams, "TURN_BYTES", turn_bytes)
    turns: dict[str, list[int]] = {}
    original = Job.learn

    def learn(self, batches):
        turns.setdefault(self.settings.run_dir.name, []).append(len(batches))
        original(self, batches)

    monkeypatch.setattr(Job, "learn", learn)
    often = {"log_every": 5, "checkpoint": {"every_steps": 7}}
    many = [
        settings(store, tmp_path, tokens=64 * n, sae=SAE | {"k": k}, **often)
        for n, k in ((20, 2), (17, 3))
    ]
    outcomes = train_together(many)
    assert [o.reason for o in outcomes] == [None, None]
    long, short = (turns[o.settings.run_dir.name] for o in outcomes)
    if turn_bytes:
        assert long == [4, 1, 2, 3, 4, 1, 2, 3]
        assert short == [4, 1, 2, 3, 4, 1, 2]
    else:
        assert (long, short) == ([1] * 20, [1] * 17)


def test_ctrl_c_and_going_on(store: Path, alone, tmp_path: Path) -> None:  # F68
    many = made(store, tmp_path, 2)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 11)
        with pytest.raises(Interrupted, match="stopped at step 12, saved 6 runs"):  # of a turn
            train_together(many)
    for outcome in train_together(many):
        equal_to_single(outcome.settings.run_dir, alone)


def test_a_failing_job_is_dropped_and_the_process_can_be_ended(
    store: Path, alone, tmp_path: Path, monkeypatch, capsys
) -> None:
    many = made(store, tmp_path, 2, ("topk", "wide", "long"))
    original = Trainer._train_step

    def broken(self, batch):
        if self.settings.sae["k"] == 6 and self.step == 5:
            raise RuntimeError("index out of bounds")
        if self.settings.sae["k"] == 2 and self.step == 9:
            raise SystemExit(9)
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", broken)
        with pytest.raises(SystemExit):
            train_together(many)
    told = capsys.readouterr().err
    assert "RuntimeError: index out of bounds" in told
    assert 'raise RuntimeError("index out of bounds")' in told
    assert '"failed"' in (many[1].run_dir / "run.json").read_text()
    for outcome in train_together(many):
        equal_to_single(outcome.settings.run_dir, alone)


def test_stacked_encoders_beside_each_other(store: Path, alone, tmp_path: Path) -> None:
    fused = {"stack": True, "workers": 2}
    many = [settings(store, tmp_path, fused=fused, **KINDS[n]) for n in ("topk", "long", "wide")]
    for outcome in train_together(many):
        single = alone[outcome.settings.run_dir.name]
        mine, theirs = rows(outcome.settings.run_dir), rows(single)
        assert mine[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-3)
        a, b = weights(outcome.settings.run_dir), weights(single)
        assert all(torch.allclose(a[n], b[n], atol=1e-3, rtol=1e-3) for n in a)


def test_evaluations_at_once_read_held_out_rows_and_fit_the_pca_once(
    store: Path, tmp_path: Path, monkeypatch
) -> None:
    fitted, threads, read = [], set[int](), []
    fit, measure, one_pass = pca.fit, Trainer.finish, Stream.one_pass

    def counted(*args):
        fitted.append(threading.current_thread() is threading.main_thread())
        return fit(*args)

    def finish(self, record, *, progress):
        threads.add(threading.get_ident())
        time.sleep(0.05)
        return measure(self, record, progress=progress)

    def passes(self):
        read.append(1)
        return one_pass(self)

    monkeypatch.setattr(pca, "fit", counted)
    monkeypatch.setattr(Trainer, "finish", finish)
    monkeypatch.setattr(Stream, "one_pass", passes)
    outcomes = train_together(made(store, tmp_path, 2, ("topk", "wide", "bf16")))
    assert [o.result.metrics["pca"]["rank"] for o in outcomes] == [4, 6, 3]
    assert fitted == [True]
    assert len(threads) == 2
    assert len(read) == 1


def test_rows_that_are_kept_whole_serve_several_threads(store: Path, tmp_path: Path) -> None:
    stream = Opener().open(settings(store, tmp_path)).source.train
    plain = [b.acts["resid.2"] for b in stream.one_pass()]
    size = sum(4 * x.numel() for x in plain)
    row_bytes = size // stream.n_rows
    purse = Purse(size)
    kept = Kept(stream, purse)
    assert kept.keep_all(row_bytes)
    assert purse.left == 0
    assert kept.keep_all(row_bytes)  # what it has counts as room
    with Workers(3) as workers:
        found: list[int] = []

        def check() -> None:
            got = [b.acts["resid.2"] for b in kept.one_pass()]
            assert len(got) == len(plain)
            assert all(map(torch.equal, got, plain))
            found.append(len(got))

        assert workers.each([check] * 9) == [None] * 9
    assert found == [len(plain)] * 9
    kept.forget()
    assert purse.left == size
    small = Kept(stream, Purse(size - 1))
    assert not small.keep_all(row_bytes)
    assert small._known == []  # nothing was read for it


def test_a_store_whose_held_out_rows_are_damaged(store: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(self):
        raise DamagedError("held-out rows are damaged")

    monkeypatch.setattr(Stream, "one_pass", broken)
    outcomes = train_together(made(store, tmp_path, 2, ("topk", "bf16")))
    assert [o.reason for o in outcomes] == ["held-out rows are damaged"] * 2


# -- random numbers ------------------------------------------------------------------------------


def test_who_draws_random_numbers(store: Path, tmp_path: Path) -> None:
    spaces = Opener().open(settings(store, tmp_path)).source.spaces()

    def draws(**sae) -> bool:
        return make_sae({"n_latents": 32, **sae}, spaces).draws_random

    assert not draws(name="topk", k=4)
    assert not draws(name="matryoshka", k=4)
    assert draws(name="matryoshka", k=4, random_prefixes=3)
    assert draws(name="relu", resample_every=9)
    own = type(make_sae({"name": "topk", "n_latents": 32, "k": 4}, spaces))
    of_a_user = type("Mine", (own,), {"__module__": "my_sae"})
    assert of_a_user.draws_random.fget(make_sae(SAE, spaces)) is False  # the class decides
    sae = make_sae(SAE, spaces)
    sae.__class__ = of_a_user
    assert sae.draws_random


def test_one_that_draws_and_denies_it_is_found_out(
    store: Path, tmp_path: Path, monkeypatch
) -> None:
    original = Trainer._train_step

    def drawing(self, batch):
        if self.step == 3 and self.settings.sae["k"] == 6:
            torch.rand(1)
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", drawing)
    outcomes = train_together(made(store, tmp_path, 2, ("topk", "wide")))
    for outcome in outcomes:
        assert "one of them drew random numbers" in str(outcome.reason)
        assert "fused.workers=1" in str(outcome.reason)


# -- the setting ---------------------------------------------------------------------------------


def test_how_many() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert [how_many(None, n, CPU) for n in (0, 1, 3, 9)] == [1, 1, 3, 4]
        assert [how_many(6, n, CPU) for n in (1, 9)] == [1, 6]
        assert how_many(None, 9, torch.device("cuda")) == 1
        torch.set_num_threads(64)
        assert how_many(None, 99, CPU) == MOST
    finally:
        torch.set_num_threads(threads)


def test_threads_are_shared_out_and_given_back() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        seen = set()
        with Workers(2) as workers:
            both = threading.Barrier(2)

            def task() -> None:
                both.wait(5)
                seen.add((threading.get_ident(), torch.get_num_threads()))

            assert workers.each([task, task]) == [None, None]
            assert torch.get_num_threads() == 6
            torch.mm(torch.ones(300, 300), torch.ones(300, 300))
            workers.each([task, task])  # after work of the caller they have theirs still
        assert len(seen) == 2
        assert {n for _, n in seen} == {3}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_nonsense_is_refused(store: Path, tmp_path: Path, value) -> None:
    with pytest.raises(ConfigError, match=r"fused\.workers"):
        settings(store, tmp_path, fused={"workers": value})


def test_no_effect_is_said(store: Path, tmp_path: Path, capsys) -> None:
    one = replace(settings(store, tmp_path, fused={"workers": 2}), tokens=64 * 2)
    train_together([one])
    assert "fused.workers=2 has no effect: no two runs" in capsys.readouterr().err


def test_the_plan_counts_gradients_of_each_worker(store: Path, tmp_path: Path, capsys) -> None:
    opener = Opener()
    jobs = [opener.open(s) for s in made(store, tmp_path, 2, ("topk", "wide", "long"))]
    pairs = [(j.settings, j.source) for j in jobs]
    each = [plan.memory(*p) for p in pairs]
    one, two = (plan.together(pairs, each, workers=n) for n in (1, 2))
    sizes = sorted(m.gradients for m in each)
    assert (one.gradients, two.gradients) == (sizes[-1], sizes[-1] + sizes[-2])
    assert two.activations == sum(sorted(m.activations for m in each)[-2:])
    assert (one.weights, one.held_out) == (two.weights, two.held_out)
