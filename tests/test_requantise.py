"""`actcache requantise`: another type without the host; equal to what a run would have stored."""
# F112

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cache import SMALL, contexts_of, digests
from numpy.testing import assert_array_equal
from stores import make_store
from test_kill import PUBLISHERS

from actcache.add_hooks import AddHooksSettings, add_hooks
from actcache.canary import check
from actcache.catalog import Catalog
from actcache.commands import requantise as command
from actcache.host import HostSettings
from actcache.requantise import _Work, requantise
from actcache.run import CacheSettings, run
from actcache.sources import DataSettings
from actcache.store import (
    DamagedError,
    IdentityError,
    SettingsError,
    StoreError,
    open_store,
    verify,
)
from actcache.store.collect import find_garbage, remove
from actcache.store.publish import publish


@pytest.fixture(scope="module")
def source(tiny_host, tiny_parquet, tmp_path_factory):
    """A float32 store of `actcache run`, its folder renamed by nobody."""
    settings = CacheSettings(
        host=HostSettings(model=str(tiny_host), batch_tokens=128),
        data=DataSettings(files=str(tiny_parquet), id_column="id"),
        store=str(tmp_path_factory.mktemp("source") / "store"),
        hooks=("resid.1", "mlp.0"),
        context=32,
        layout=SMALL,
        progress=False,
    )
    return settings, run(settings).store


def test_it_is_the_store_that_a_run_in_int8_makes(source, tmp_path):
    settings, store = source
    done = requantise(store.snapshot(), tmp_path / "q")
    layout = replace(SMALL, dtype="int8")
    same = run(replace(settings, store=str(tmp_path / "run"), layout=layout)).store
    assert digests(done.store) == digests(same)  # byte for byte: float32 loses nothing on the way
    mine, theirs = done.store.snapshot(), same.snapshot()
    assert mine.hooks == theirs.hooks  # activation ids too
    assert mine.store_id == theirs.store_id == store.store_id
    assert done.written == mine.n_rows
    assert done.kept == 0
    assert not [c for c in verify(mine) if c.problem]


def test_rows_are_the_sources_within_the_recorded_error(source, tmp_path):
    snapshot = source[1].snapshot()
    made = requantise(snapshot, tmp_path / "q").store.snapshot()
    found, wanted = contexts_of(made), contexts_of(snapshot)
    for key, (ids, docs, acts) in wanted.items():
        assert_array_equal(found[key][0], ids)
        assert_array_equal(found[key][1], docs)
        for hook, x in acts.items():
            step = np.linalg.norm(found[key][2][hook] - x, axis=1)
            centred = np.linalg.norm(x - made.segments[0].acts(hook).mean, axis=1)
            assert (step <= made.storage_error(hook).max_relative_error * centred * 1.001).all()
    for a, b in zip(snapshot.segments, made.segments, strict=True):
        assert a.commits[0].token_digest == b.commits[0].token_digest  # in the same order
        origin = b.commits[0].writer["requantised_from"]["resid.1"]
        assert origin == {
            "dtype": "float32",
            "activation_id": a.hooks["resid.1"].activation_id,
        }
        assert b.commits[0].writer["written_by"] == a.commits[0].writer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(source, tmp_path, dtype):
    snapshot = source[1].snapshot()
    made = requantise(snapshot, tmp_path / "q", dtype, hooks=["blocks.1.hook_resid_post"]).store
    assert {h: i.dtype for h, i in made.snapshot().hooks.items()} == {"resid.1": dtype}
    numpy_type = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    for a, b in zip(snapshot.segments, made.snapshot().segments, strict=True):
        assert_array_equal(
            b.acts("resid.1").read().view(np.uint16),
            a.acts("resid.1").read().astype(numpy_type).view(np.uint16),
        )


def test_from_bfloat16_in_context_order(tmp_path):
    store = make_store(tmp_path / "s", order="context", hooks={"resid.2": 16, "mlp.1": 24})
    made = requantise(store.snapshot(), tmp_path / "q").store.snapshot()
    for a, b in zip(store.snapshot().segments, made.segments, strict=True):
        assert_array_equal(a.tokens().ctx, b.tokens().ctx)
        for hook in made.hooks:
            x, back = a.acts(hook).read().astype(np.float32), b.acts(hook).read()
            assert np.abs(x - back).max() < 0.05
    stats = store.snapshot().stats("resid.2")  # the calibration is that of plain rows
    np.testing.assert_allclose(made.segments[0].acts("resid.2").mean, stats.mean, rtol=1e-6)


def test_the_canary_comes_along_and_the_store_grows_and_gains_hooks(source, tmp_path, monkeypatch):
    settings, _ = source
    some = run(replace(settings, tokens=100, hooks=("resid.1",), store=str(tmp_path / "s"))).store
    made = requantise(some.snapshot(), tmp_path / "q").store
    [result] = check(made.path, settings.host)
    assert result.ok
    assert result.hook == "resid.1"
    layout = replace(SMALL, dtype="int8")
    grown = run(replace(settings, hooks=("resid.1",), store=str(made.path), layout=layout))
    assert grown.computed > 0
    assert len(grown.store.snapshot().segments) > len(some.snapshot().segments)
    more = add_hooks(AddHooksSettings(host=settings.host, store=str(made.path), hooks=("mlp.0",)))
    assert {i.dtype for i in more.store.snapshot().hooks.values()} == {"int8"}
    assert not [c for c in verify(more.store.snapshot()) if c.problem]


# -- interruptions ---------------------------------------------------------------------------------


def dying(settings, target, objects):
    """A forked `requantise` that kills itself in the middle of object number `objects`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [objects]

    def half(path, data, *more):
        if left[0] == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / f".{path.name}.half.partial").write_bytes(bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        publish(path, data, *more)

    try:
        for module in PUBLISHERS:
            module.publish = half
        requantise(settings, target)
    finally:
        os._exit(1)


def test_kill_9_anywhere_and_the_same_call_continues(tmp_path):
    source = make_store(tmp_path / "s", segments=(96, 96, 64)).snapshot()
    wanted = digests(requantise(source, tmp_path / "quiet").store)
    n_objects = len(wanted) + 2 + 1 + 2 * 3 + 1  # root files, calibration, claims and commits, ...
    resumed = 0
    for objects in range(0, n_objects, 5):
        target = tmp_path / f"q{objects}"
        assert dying(source, target, objects) == -signal.SIGKILL
        done = requantise(source, target)
        resumed += done.kept > 0
        assert digests(done.store) == wanted
        remove(find_garbage(done.store.path, 0))
        assert not [p for p in target.rglob("*") if p.name.endswith(".partial")]
        folders = {s.commits[0].folder for s in done.store.snapshot().segments}
        assert {f"segments/{p.name}" for p in (target / "segments").iterdir()} == folders
    assert resumed > 2
    assert requantise(source, tmp_path / "quiet").kept == source.n_rows  # nothing left to do


def test_two_processes_share_the_work(tmp_path):
    source = make_store(tmp_path / "s", segments=(128,) * 12)
    words = [sys.executable, "-m", "actcache", "requantise", str(source.path), str(tmp_path / "q")]
    words += ["--json", "--catalog", str(tmp_path / "catalog")]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    facts = [json.loads(p.communicate(timeout=60)[0]) for p in both]
    assert [p.returncode for p in both] == [0, 0]
    written = [f["written"] for f in facts]
    assert sum(written) == source.snapshot().n_rows  # no segment twice
    alone = requantise(source.snapshot(), tmp_path / "alone").store
    assert digests(open_store(tmp_path / "q")) == digests(alone)


# -- bad input -------------------------------------------------------------------------------------


def test_types_that_are_not_smaller_are_refused(tmp_path):
    source = make_store(tmp_path / "s").snapshot()
    for dtype in ("bfloat16", "float32", "float16"):
        with pytest.raises(SettingsError, match=rf"dtype={dtype}: .* is bfloat16, and only a sma"):
            requantise(source, tmp_path / "q", dtype)
    with pytest.raises(SettingsError, match=r"dtype=int4: expected one of bfloat16.*int8"):
        requantise(source, tmp_path / "q", "int4")
    with pytest.raises(SettingsError, match="there is no hook"):
        requantise(source, tmp_path / "q", hooks=[])
    made = requantise(source, tmp_path / "q").store.snapshot()
    with pytest.raises(SettingsError, match="is int8, and only a smaller"):
        requantise(made, tmp_path / "again")


def test_targets_that_hold_something_else_are_refused(tmp_path):
    source = make_store(tmp_path / "s").snapshot()
    with pytest.raises(StoreError, match="one lies in the other"):
        requantise(source, tmp_path / "s" / "q")
    other = make_store(tmp_path / "other", context=16)
    with pytest.raises(IdentityError, match=r"layout.context: the store has 16, you asked for 32"):
        requantise(source, other.path)
    copy = shutil.copytree(tmp_path / "s", tmp_path / "copy")
    with pytest.raises(IdentityError, match=r"hook resid.2: .* holds it as bfloat16, you asked"):
        requantise(source, copy)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and is not a store"):
        requantise(source, tmp_path / "full")


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    def acts(hook, rng, tokens, d):
        return rng.normal(size=(len(tokens), d)) * 1e5

    source = make_store(tmp_path / "s", dtype="float32", acts=acts).snapshot()
    with pytest.raises(StoreError, match=r"resid.2, segment u00000-0000: float16 cannot hold all"):
        requantise(source, tmp_path / "q", "float16")
    assert requantise(source, tmp_path / "b", "bfloat16").written == source.n_rows


def test_damage_in_the_source_makes_no_segment(tmp_path):
    store = make_store(tmp_path / "s")
    path = store.snapshot().segments[1].acts("resid.2").path
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"u00001-0000, hook resid\.2, chunk 0: checksum"):
        requantise(store.snapshot(), tmp_path / "q")
    commits = sorted(p.name for p in (tmp_path / "q" / "commits").iterdir())
    assert [c.split(".")[0] for c in commits] == ["u00000-0000"]


# -- the command -----------------------------------------------------------------------------------


def test_the_command_registers_and_says_the_error(tmp_path, capsys):
    store = make_store(tmp_path / "s")
    words = [str(store.path), str(tmp_path / "q"), "--catalog", str(tmp_path / "catalog")]
    assert command(words) == 0
    said = capsys.readouterr().out
    assert "resid.2: storage loses" in said
    assert "1,344 written as int8, 0 were there" in said
    [known] = Catalog(tmp_path / "catalog").known()
    assert known.entry.hooks[0].dtype == "int8"
    assert command([*words, "dtype=int8", "--hooks", "resid.2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] == facts["tokens"] == 1344
    error = open_store(tmp_path / "q").snapshot().storage_error("resid.2")
    assert facts["storage_error"]["resid.2"] == vars(error)
    with pytest.raises(SystemExit):
        command([*words, "type=int8"])
    assert "expected dtype=TYPE behind the two stores" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_committed(tmp_path, capsys, monkeypatch):
    store = make_store(tmp_path / "s")
    write = _Work._write

    def stopped(self, segment):
        if self.written:
            raise KeyboardInterrupt
        write(self, segment)

    monkeypatch.setattr(_Work, "_write", stopped)
    words = [str(store.path), str(tmp_path / "q"), "--catalog", str(tmp_path / "catalog")]
    assert command(words) == 130
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    assert command([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] == 512
    assert facts["written"] == 1344 - 512
