"""Several ranks fill one store: equal to the one-process store, none hangs, all end together."""

import io
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache import contexts_of, overrides
from launch import launch
from torch.distributed import HashStore
from tqdm import tqdm

from actcache import cli, sharded
from actcache.add_hooks import AddHooksSettings, add_hooks
from actcache.errors import OtherRankFailedError, RankError
from actcache.ranks import Ranks
from actcache.run import run
from actcache.store import IdentityError, OutOfSpaceError, SettingsError, open_store, verify
from actcache.store.writer import StoreWriter

# Absolute, activations of order 1 in float32. Gathered weights are the same bits; what may differ
# is the order of sums where a batch is another one, and none is.
TOLERANCE = 1e-5


def sharing(settings, sharding, timeout=30.0):
    return replace(settings, host=replace(settings.host, sharding=sharding, rank_timeout=timeout))


def assert_same_rows(snapshot, expected, tolerance=TOLERANCE):
    mine, theirs = contexts_of(snapshot), contexts_of(expected)
    assert list(mine) == list(theirs)
    for key, (ids, docs, acts) in theirs.items():
        np.testing.assert_array_equal(mine[key][0], ids)
        np.testing.assert_array_equal(mine[key][1], docs)
        assert mine[key][2].keys() == acts.keys()
        for hook, rows in acts.items():
            np.testing.assert_allclose(mine[key][2][hook], rows, rtol=0, atol=tolerance)


def share_of(model):
    """Parts of the weights that this rank holds, and the names of its parameters."""
    own = whole = 0
    for p in model.parameters():
        if hasattr(p, "ds_tensor"):
            own, whole = own + p.ds_tensor.numel(), whole + p.ds_numel
        else:
            own, whole = own + p.to_local().numel(), whole + p.numel()
    return own / whole, [name for name, _ in model.named_parameters()]


def loads(monkeypatch):
    """Record `share_of` each model that is loaded in slices."""
    found, load = [], sharded.load

    def recording(*args):
        model = load(*args)
        found.append(share_of(model))
        return model

    monkeypatch.setattr(sharded, "load", recording)
    return found


# -- the store of one process ----------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["none", "zero3", "fsdp2"])
def test_two_ranks_fill_the_store_of_one(asked, tmp_path, monkeypatch, sharding):  # F103
    """Units of unequal length; then one unit only, so that a rank has nothing; then more hooks."""
    settings = asked()
    few = replace(settings.data, files=str(Path(str(settings.data.files)) / "a.parquet"))
    layout = replace(settings.layout, unit_bytes=1 << 20)
    one_unit = asked(store=str(tmp_path / "unit"), data=few, layout=layout)
    whole = run(asked(store=str(tmp_path / "whole"))).store
    alone = run(replace(one_unit, store=str(tmp_path / "alone"))).store
    hosts = loads(monkeypatch)

    def job(rank):
        said = []
        first = run(sharing(settings, sharding), said.append)
        second = run(sharing(one_unit, sharding))
        host = sharing(settings, sharding).host
        more = AddHooksSettings(host=host, store=settings.store, hooks=("attn.1",), progress=False)
        added = add_hooks(more)
        return first.computed, second.computed, added.computed, said, hosts

    a, b = launch(job, 2, tmp_path)
    assert (a.code, b.code) == (0, 0), a.err + b.err
    rows, fewer = whole.snapshot().n_rows, alone.snapshot().n_rows
    assert a.result[:3] == b.result[:3] == (rows, fewer, rows)
    assert any("loading" in line for line in a.result[3])
    assert b.result[3] == []
    for end in (a, b) if sharding != "none" else ():
        for share, names in end.result[4]:
            assert 0.4 < share < 0.6
            assert not [n for n in names if "layers.2" in n]  # above the deepest hook
        assert len(end.result[4]) == 3
    assert_same_rows(open_store(one_unit.store).snapshot(), alone.snapshot())
    every = asked(store=str(tmp_path / "every"), hooks=("resid.1", "mlp.0", "attn.1"))
    assert_same_rows(open_store(settings.store).snapshot(), run(every).store.snapshot())
    assert not [c for c in verify(open_store(settings.store).snapshot()) if c.problem]


def test_an_interrupted_run_continues_with_another_number_of_ranks(
    asked, tmp_path, monkeypatch
):  # F103
    """Ctrl-C on one of two ranks ends both at the same pass; three take up what is left."""
    settings = sharing(asked(), "fsdp2")
    whole = run(asked(store=str(tmp_path / "whole"))).store.snapshot()
    write, done = StoreWriter.write_segment, []

    def interrupted(self, **kw):
        done.append(write(self, **kw))
        if len(done) == 2:
            for _ in range(2):  # the terminal's and torchrun's
                os.kill(os.getpid(), signal.SIGINT)
        return done[-1]

    def stopped(rank):
        if rank == 1:
            monkeypatch.setattr(StoreWriter, "write_segment", interrupted)
        result = run(settings)
        return result.interrupted, result.tokens

    a, b = launch(stopped, 2, tmp_path)
    assert a.result == b.result, a.err + b.err
    assert a.result[0]
    kept = sum(
        c[0].rows
        for c in StoreWriter(
            Path(str(settings.store)), open_store(settings.store).identity, {}
        ).commits.values()
    )
    assert 0 < kept < whole.n_rows
    ends = launch(lambda rank: run(settings).computed, 3, tmp_path)
    assert [e.result for e in ends] == [whole.n_rows - kept] * 3, ends[0].err
    assert_same_rows(open_store(settings.store).snapshot(), whole)


# -- ending together -------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_a_rank_that_fails_ends_all_and_says_why_once(asked, tmp_path, monkeypatch, sharding):
    settings = asked()  # F103
    write, done = StoreWriter.write_segment, []

    def full(self, **kw):
        if done:
            raise OutOfSpaceError("the disk of this machine is full")
        done.append(write(self, **kw))
        return done[-1]

    def job(rank):
        if rank == 1:
            monkeypatch.setattr(StoreWriter, "write_segment", full)
        more = [f"host.sharding={sharding}", "host.rank_timeout=30"]
        cli.main([*overrides(settings), *more])

    started = time.monotonic()
    ends = launch(job, 2, tmp_path)
    assert time.monotonic() - started < 25
    assert [e.code for e in ends] == [1, 1]
    assert ends[1].err.count("error: the disk of this machine is full") == 1
    assert "error" not in ends[0].err
    writer = StoreWriter(Path(str(settings.store)), open_store(settings.store).identity, {})
    assert len(writer.commits) >= 1
    whole = run(asked(store=str(tmp_path / "whole"))).store
    run(asked())  # what was committed is kept and counts
    assert_same_rows(open_store(settings.store).snapshot(), whole.snapshot())


def test_an_error_of_all_ranks_is_said_once(asked, tmp_path):
    """Before the ranks meet (an unknown key) and after (a hook that is not there)."""
    settings = asked()

    def job(rank):
        for wrong in (["tokenz=3"], ["hooks=[resid.9]"]):
            with pytest.raises(SystemExit) as e:
                cli.main([*overrides(settings), *wrong])
            assert e.value.code == 1

    ends = launch(job, 2, tmp_path)
    assert [e.code for e in ends] == [0, 0], ends[1].err
    printed = ends[0].err + ends[1].err
    assert printed.count("error: unknown key 'tokenz'") == 1
    assert printed.count("error: hook 'resid.9'") == 1


def test_a_rank_that_never_comes(asked, tmp_path):  # F103
    """Bounded waiting, in words of the setting, whichever rank is missing."""
    settings = sharing(asked(), "zero3", timeout=1.0)
    (end,) = launch(lambda rank: run(settings), 2, tmp_path, only=[0])
    assert isinstance(end.result, RankError)
    assert "host.rank_timeout=1: rank 1 of 2 did not come within 1 s" in str(end.result)
    (end,) = launch(lambda rank: run(settings), 2, tmp_path, only=[1])
    assert isinstance(end.result, RankError)
    assert "rank 1 of 2 cannot reach rank 0" in str(end.result)
    assert "host.rank_timeout=1 s" in str(end.result)


def test_a_rank_that_stops_answering(asked, tmp_path, monkeypatch):
    settings = sharing(asked(), "fsdp2", timeout=2.0)

    def job(rank):
        if rank == 1:
            monkeypatch.setattr(StoreWriter, "write_segment", lambda *_, **__: time.sleep(20))
        run(settings)

    a, b = launch(job, 2, tmp_path)
    assert isinstance(a.result, RankError)
    assert "within host.rank_timeout=2 s" in str(a.result)
    assert b.code != 0


def test_a_rank_with_other_work_is_refused(asked, tmp_path):
    def job(rank):
        run(sharing(asked(context=32 >> rank), "none", timeout=20.0))

    a, b = launch(job, 2, tmp_path)
    assert isinstance(a.result, OtherRankFailedError)
    assert isinstance(b.result, IdentityError)
    assert "rank 1 has other work to do than rank 0" in str(b.result)
    assert "layout.context: rank 0 has 32, rank 1 has 16" in str(b.result)


# -- what a launch may ask for ---------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])
def test_slices_need_ranks(asked, sharding):
    with pytest.raises(SettingsError, match=f"host.sharding={sharding} .*alone.*torchrun"):
        run(sharing(asked(), sharding))


@pytest.mark.parametrize(
    ("environment", "fits"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "none"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp2"),
    ],
)
def test_the_launcher_and_the_setting_agree(monkeypatch, environment, fits):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    sharded.check_launch(fits)
    if fits != "none":
        with pytest.raises(
            SettingsError, match=f"host.sharding=none does not: say host.sharding={fits}"
        ):
            sharded.check_launch("none")


def test_progress_is_the_sum_of_all_ranks():
    store = HashStore()
    bars = [tqdm(total=100, file=io.StringIO()) for _ in range(2)]
    first, second = (Ranks(r, 2, store, 1.0).counting(bars[r], 10) for r in range(2))
    first(5)
    second(7)
    first(0)
    assert bars[0].n == 10 + 5 + 7
    for bar in bars:
        bar.close()
