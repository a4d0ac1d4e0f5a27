"""Several writers of one store share the work, agree on the result, survive each other."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cache import digests
from stores import identity, make_store, token_table

from actcache.run import run
from actcache.store import HookInfo, Layout, SettingsError, open_store, verify
from actcache.store.claims import Claims
from actcache.store.collect import find_garbage, remove
from actcache.store.ids import digest
from actcache.store.layout import VOCAB_JSON
from actcache.store.vocab import encode_vocab
from actcache.store.writer import StoreWriter


@pytest.fixture
def durable(monkeypatch):
    """Calls that make things durable, in order: ("fsync", path) and ("link", from, to)."""
    calls, fsync, link = [], os.fsync, os.link

    def recorded_fsync(fd):
        calls.append(("fsync", Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    def recorded_link(source, target):
        calls.append(("link", Path(source), Path(target)))
        link(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_link)
    return calls


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file it was")
def test_all_of_a_segment_is_durable_before_its_commit(tmp_path, durable):  # F107
    """Contents, their names, and the names of all folders above them, up to the store's."""
    root = tmp_path.resolve() / "s"
    make_store(root, hooks={"resid.2": 8, "mlp.1": 4}, segments=(64, 64), dtype="int8")
    links = {target: (i, source) for i, (_, source, target) in at(durable, "link")}
    synced = [(i, path) for i, (_, path) in at(durable, "fsync")]
    commits = [i for target, (i, _) in links.items() if target.parent.name == "commits"]
    named = [t for t in links if t.is_relative_to(root / "segments")]
    assert (len(commits), len(named)) == (2, 2 * 32)
    for target in named:
        done, source = links[target]
        assert any(path == source and i < done for i, path in synced)
        commit = min(i for i in commits if i > done)
        for folder in (up for up in target.parents if up.is_relative_to(root)):
            assert any(path == folder and done < i < commit for i, path in synced), folder
    folders = Counter(path for _, path in synced if path.parent.is_relative_to(root / "segments"))
    assert {n for path, n in folders.items() if path.is_dir()} == {1}  # not after every file


def at(calls, kind):
    return [(i, call) for i, call in enumerate(calls) if call[0] == kind]


def in_children(*jobs):
    """Run each job in a forked process, all at once; their exit codes."""
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            try:
                job()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]


@pytest.mark.parametrize("n", [2, 3])
def test_writers_at_the_same_time_give_the_store_of_one(asked, tmp_path, n):
    whole = run(asked(store=str(tmp_path / "whole"))).store
    settings = asked()
    assert in_children(*[lambda: run(settings)] * n) == [0] * n
    store = open_store(settings.store)
    last = run(settings)  # finds everything done; its snapshot is the one of a single writer
    assert last.computed == 0
    assert digests(store) == digests(whole)
    assert store.snapshot().stats("resid.1").n == whole.snapshot().stats("resid.1").n
    assert not [c for c in verify(store.snapshot()) if c.problem]
    remove(find_garbage(store.path, grace=0))
    assert len(list((store.path / "segments").iterdir())) == len(store.snapshot().segments)


def test_parts_together_give_the_store_of_one(asked, tmp_path):
    whole = run(asked(store=str(tmp_path / "whole"))).store
    tokens = [run(asked(part=f"{i}/3")).tokens for i in (1, 2, 3)]
    assert tokens == sorted(tokens)
    assert tokens[0] < tokens[-1]
    # The number of writers may change: what is left is done by whoever comes.
    assert run(asked()).computed == 0
    assert digests(open_store(asked().store)) == digests(whole)


def test_the_number_of_writers_may_change_between_runs(asked, tmp_path):
    whole = run(asked(store=str(tmp_path / "whole"))).store
    run(asked(part="2/2"))
    assert run(asked()).computed > 0
    assert digests(open_store(asked().store)) == digests(whole)


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_parts_that_make_no_sense(asked, part):
    with pytest.raises(SettingsError, match="expected i/n"):
        asked(part=part)


def test_a_budget_is_the_same_prefix_for_any_number_of_writers(asked, tmp_path):
    whole = run(asked(store=str(tmp_path / "whole"), tokens=400)).store
    settings = asked(tokens=400)
    assert in_children(*[lambda: run(settings)] * 2) == [0, 0]
    assert digests(run(settings).store) == digests(whole)


# -- claims ----------------------------------------------------------------------------------------


def test_a_claim_is_for_one(tmp_path):
    with Claims(tmp_path, "a") as a, Claims(tmp_path, "b") as b:
        assert a.acquire("u1")
        assert not b.acquire("u1")
        assert b.acquire("u2")
        assert (a.others(), b.others()) == (["u2"], ["u1"])
        a.release("u1")
        assert b.acquire("u1")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_nobody_touches_expires(tmp_path):
    with Claims(tmp_path, "a", lease=0.3) as a:
        assert a.acquire("u1")
        with Claims(tmp_path, "b", lease=0.3) as b:
            time.sleep(0.6)
            assert not b.acquire("u1")  # a is alive and touches it
            a._stop.set()
            time.sleep(0.6)
            assert b.acquire("u1")
            a.release("u1")  # no longer a's to let go
            assert b.others() == []
            assert json.loads((tmp_path / "u1.json").read_text())["owner"] == "b"


def test_a_claim_of_a_dead_process_here_is_taken_over_at_once(tmp_path):
    def claim_and_die():
        Claims(tmp_path, "dead").acquire("u1")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_children(claim_and_die) == [-signal.SIGKILL]
    with Claims(tmp_path, "b") as b:
        assert b.acquire("u1")


def test_ages_do_not_depend_on_the_clock_of_the_writer(tmp_path, monkeypatch):
    """A writer whose clock is a day ahead, or behind, neither steals nor waits for ever."""
    with Claims(tmp_path, "a") as a, Claims(tmp_path, "b") as b:
        assert a.acquire("u1")
        claim = tmp_path / "u1.json"
        claim.write_text(claim.read_text().replace(str(os.getpid()), "1"))
        now = time.time
        for skew in (86_400, -86_400):
            monkeypatch.setattr(time, "time", lambda skew=skew: now() + skew)
            assert not b.acquire("u1")
        past = now() - 1000
        os.utime(claim, (past, past))
        assert b.acquire("u1")


# -- one segment, two writers ----------------------------------------------------------------------


def segment_of(writer, seed=0):
    tokens = token_table(np.random.default_rng(seed), 64, 32, 50, 0, 20)
    x = np.random.default_rng(seed).normal(size=(64, 8)).astype(np.float32)
    info = HookInfo(
        name="resid.0",
        module="layers.0",
        io="out",
        d=8,
        dtype="float32",
        chunk_rows=16,
        activation_id=digest([writer.identity.store_id, "resid.0"]),
    )
    return {"unit": 0, "index": 0, "last_in_unit": True, "tokens": tokens, "acts": [(info, x)]}


def test_two_writers_race_for_one_segment(tmp_path):
    """Both believe it is theirs: one commit, and its digests match the bytes."""
    vocab = encode_vocab([b"x"] * 50)
    layout = Layout(context=32, segment_rows=64, chunk_bytes=512)
    a, b = (
        StoreWriter(tmp_path / "s", identity(layout, vocab), {VOCAB_JSON: vocab}) for _ in range(2)
    )
    first = a.write_segment(**segment_of(a), writer={"who": "a"})
    second = b.write_segment(**segment_of(b), writer={"who": "b"})
    assert second == first
    assert second.writer == {"who": "a"}
    a.snapshot([first.segment])
    snapshot = open_store(tmp_path / "s").snapshot()
    assert not [c for c in verify(snapshot) if c.problem]
    assert [p.name for p in (tmp_path / "s" / "segments").iterdir()] == [
        first.folder.removeprefix("segments/")
    ]


def test_snapshots_of_two_writers_get_numbers_of_their_own(tmp_path):
    vocab = encode_vocab([b"x"] * 50)
    layout = Layout(context=32, segment_rows=64, chunk_bytes=512)
    a = StoreWriter(tmp_path / "s", identity(layout, vocab), {VOCAB_JSON: vocab})
    a.write_segment(**segment_of(a), writer={})
    one = a.snapshot(["u00000-0000"])
    more = segment_of(a, seed=1) | {"unit": 1}
    a.write_segment(**more, writer={})
    b = StoreWriter(tmp_path / "s", identity(layout, vocab), {VOCAB_JSON: vocab})
    names = {a.snapshot(["u00000-0000", "u00001-0000"]).name, b.snapshot(["u00001-0000"]).name}
    assert (one.name, names) == ("1", {"2", "3"})


# -- garbage ---------------------------------------------------------------------------------------


def test_garbage_is_only_ours_and_only_old(asked):
    store = run(asked(tokens=128)).store
    orphan = store.path / "segments" / "u00009-0000.0123abcd" / "tokens"
    orphan.mkdir(parents=True)
    (orphan / "half").write_text("x" * 10)
    foreign = store.path / "segments" / "u00009-0000.backup"
    foreign.mkdir()
    (store.path / "NOTES.txt").write_text("mine")
    assert find_garbage(store.path, grace=3600) == []  # a living writer may be about to commit it
    (found,) = find_garbage(store.path, grace=0)
    assert (found.path, found.bytes) == (orphan.parent, 10)
    remove([found])
    assert foreign.exists()
    assert (store.path / "NOTES.txt").exists()
    assert not [c for c in verify(store.snapshot()) if c.problem]
