"""int8 on several ranks and in an object store: what one process writes into a folder."""  # F112

from dataclasses import replace

import pytest
from buckets import same, whole
from cache import SMALL, digests
from launch import launch

from actcache import calibrate
from actcache.requantise import requantise
from actcache.run import run
from actcache.store import open_store

INT8 = replace(SMALL, dtype="int8")


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_ranks_calibrate_once_and_fill_the_store_of_one(asked, tmp_path, monkeypatch, sharding):
    alone = run(asked(layout=INT8, store=str(tmp_path / "alone"))).store
    host = replace(asked().host, sharding=sharding, rank_timeout=30.0)
    measured, measure = [], calibrate._measure

    def counting(*args):
        measured.append(1)
        return measure(*args)

    monkeypatch.setattr(calibrate, "_measure", counting)

    def job(rank):
        run(asked(layout=INT8, host=host))
        return len(measured)

    a, b = launch(job, 2, tmp_path)
    assert (a.code, b.code) == (0, 0), a.err + b.err
    assert a.result + b.result == 1
    assert digests(open_store(asked().store)) == digests(alone)


@pytest.mark.usefixtures("s3")
def test_int8_in_a_bucket(asked, tmp_path):
    local = run(asked(tokens=128, layout=INT8)).store
    there = asked(
        tokens=128,
        layout=INT8,
        store=f"s3://lab/{tmp_path.name}/int8",
        catalog=str(tmp_path / "catalog"),
    )
    store = run(there).store
    assert same(store, local)
    assert whole(store)
    bf16 = run(
        asked(tokens=128, store=f"s3://lab/{tmp_path.name}/f32", catalog=there.catalog)
    ).store
    made = requantise(bf16.snapshot(), f"s3://lab/{tmp_path.name}/made").store
    assert same(made, local)
    assert whole(made)
