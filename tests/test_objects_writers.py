"""Several writers of a store in an object store, and writers that die.  # F110"""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from buckets import whole
from cache import digests, overrides
from stores import identity, token_table

from actcache.cli import main
from actcache.run import run
from actcache.store import (
    HookInfo,
    Layout,
    files,
    open_store,
)
from actcache.store.claims import Claims
from actcache.store.collect import find_garbage, remove
from actcache.store.ids import digest
from actcache.store.layout import VOCAB_JSON
from actcache.store.places import each, place
from actcache.store.vocab import encode_vocab
from actcache.store.writer import StoreWriter

TOKENS = 128


pytestmark = pytest.mark.usefixtures("s3")


# -- several writers -------------------------------------------------------------------------------


def writers(url, n):
    """Writers of one new store."""
    vocab = encode_vocab([b"x"] * 50)
    layout = Layout(context=32, segment_rows=64, chunk_bytes=512)
    return [StoreWriter(url, identity(layout, vocab), {VOCAB_JSON: vocab}) for _ in range(n)]


def segment_of(writer):
    tokens = token_table(np.random.default_rng(0), 64, 32, 50, 0, 20)
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
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


def test_two_writers_race_for_one_segment(small_store, s3, tmp_path):
    """Both believe it is theirs: one commit, whose objects are those that are left."""
    url = f"s3://lab/{tmp_path.name}/race"
    a, b = writers(url, 2)
    gate, commits = threading.Barrier(2), []

    def write(writer):
        gate.wait()
        commits.append(writer.write_segment(**segment_of(writer), writer={"who": str(writer)}))

    threads = [threading.Thread(target=write, args=(w,)) for w in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert commits[0] == commits[1]
    a.snapshot([commits[0].segment])
    store = open_store(url)
    assert whole(store)
    assert (store.path / "segments").names() == [commits[0].folder.removeprefix("segments/")]


def test_a_commit_whose_answer_is_lost_is_ours(s3, tmp_path):
    (writer,) = writers(f"s3://lab/{tmp_path.name}/lost", 1)
    s3.spoil("lost", "PUT .*/commits/", 1)
    commit = writer.write_segment(**segment_of(writer), writer={})
    assert s3.quiet() == {"lost": 1}
    assert (writer.path / commit.folder / "zarr.json").exists()


def test_claims_are_leases_by_the_clock_of_the_bucket(s3, tmp_path):
    folder = place(f"s3://lab/{tmp_path.name}/claims")
    with Claims(folder, "a", lease=2.0) as a, Claims(folder, "b", lease=2.0) as b:
        assert a.acquire("u1")
        assert not b.acquire("u1")
        assert b.others() == ["u1"]
        time.sleep(3.1)
        assert not b.acquire("u1")  # a is alive and touches it
        a._stop.set()
        time.sleep(3.1)
        assert b.acquire("u1")
        a.release("u1")  # no longer a's to let go
        assert a.others() == ["u1"]
    assert folder.names() == []


def test_claims_of_the_dead_are_taken_over_at_once_and_by_one(s3, tmp_path):
    folder = place(f"s3://lab/{tmp_path.name}/claims")
    dead = Claims(folder, "dead")
    dead._mine = dead._mine.replace(str(os.getpid()).encode(), b"999999999")
    assert dead._create(folder / "u1.json")
    before = dead._mine
    rivals = [Claims(folder, name) for name in "abcd"]
    got = each(folder, lambda rival: rival.acquire("u1"), rivals)
    for rival in rivals:
        rival._stop.set()
    assert sum(got) == 1
    assert not files.swap(folder / "u1.json", before, b"mine")


def killed(settings, moment):
    """A run in a process of its own, dead by SIGKILL at its `moment`-th put; its exit status."""
    script = (
        "import os, signal, sys\n"
        "from actcache.cli import main\n"
        "from actcache.store.s3 import S3\n"
        "put, left = S3.create, [int(sys.argv.pop(1))]\n"
        "def create(self, key, data):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    put(self, key, data)\n"
        "S3.create = create\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, str(moment), *overrides(settings)]
    return subprocess.run(command, capture_output=True, timeout=120).returncode


def test_kill_9_then_the_same_command_gives_the_same_store(asked, s3, tmp_path):  # F106
    expected = digests(run(asked(tokens=2 * TOKENS)).store)
    settings = asked(store=f"s3://lab/{tmp_path.name}/killed", tokens=2 * TOKENS)
    assert [killed(settings, moment) for moment in (30,)] == [-signal.SIGKILL]
    result = run(settings)
    assert digests(result.store) == expected
    garbage = find_garbage(result.store.path, grace=0)
    assert garbage  # the first writer's folder
    assert find_garbage(result.store.path) == []  # too young to be sure
    assert remove(garbage) > 0
    assert whole(open_store(str(settings.store)))
    named = {c.folder for s in result.store.snapshot().segments for c in s.commits}
    assert {f"segments/{n}" for n in (result.store.path / "segments").names()} == named
    with pytest.raises(SystemExit) as e:
        main(["gc", str(settings.store), "--json"])
    assert e.value.code == 0
