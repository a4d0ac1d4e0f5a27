"""kill -9 at random moments, one and two writers: rerun, the store is that of a quiet run.

Half of the moments are a random time into the run, half a random number of published objects (dying
half-way through writing the next), so that short steps are hit as often as long ones.
"""

import os
import random
import signal
import time
from collections import Counter

import pytest
from cache import digests

import actcache.capture
import actcache.store.calibrations
import actcache.store.canaries
import actcache.store.claims
import actcache.store.writer
from actcache.run import run
from actcache.store import open_store, verify
from actcache.store.canaries import canaries, canary_files
from actcache.store.collect import find_garbage, remove
from actcache.store.publish import publish
from actcache.store.reader import commit_files, read_record
from actcache.store.schema import Commit

PUBLISHERS = (
    actcache.store.writer,
    actcache.store.calibrations,
    actcache.store.canaries,
    actcache.store.claims,
)


def start(settings, dies_after=None):
    """A forked writer; with `dies_after` it kills itself in the middle of that object."""
    child = os.fork()
    if child:
        return child
    left = [dies_after]

    def dying(path, data, *more):
        if left[0] == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / f".{path.name}.half.partial").write_bytes(bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        publish(path, data, *more)

    code = 1
    try:
        if dies_after is not None:
            for module in PUBLISHERS:
                module.publish = dying
        run(settings)
        code = 0
    finally:
        os._exit(code)


def round_of(settings, rng, writers, seconds, objects):
    """Some writers at once, each killed at a moment of its own; how each ended."""
    by_count = rng.random() < 0.5
    children = [
        start(settings, rng.randrange(objects // writers) if by_count else None)
        for _ in range(writers)
    ]
    if not by_count:
        begin = time.monotonic()
        moments = [rng.uniform(0.02, seconds) for _ in children]
        for moment, child in sorted(zip(moments, children, strict=True)):
            time.sleep(max(0.0, begin + moment - time.monotonic()))
            os.kill(child, signal.SIGKILL)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(ends) <= {0, -signal.SIGKILL}
    return ends


def files_named(store):
    """Every file that records of the store vouch for, and the records.

    Two writers may commit segments beyond the budget, which no snapshot names but a commit does.
    """
    keys = {"store.json", "vocab.json", *(f"snapshots/{n}.json" for n in store.snapshot_names())}
    files = commit_files(store.path)
    records = [read_record(Commit, store.path, file) for file in files]
    keys |= {str(f.relative_to(store.path)) for f in (*files, *canary_files(store.path))}
    return keys | {
        o.key for r in (*records, *(c.record for c in canaries(store))) for o in r.objects
    }


def canary_digests(store):
    return [[o.sha256 for o in c.record.objects] for c in canaries(store)]


def kill_until(asked, tmp_path, kills, seed):
    """Stores killed up to four times each and then finished, until there were `kills` kills."""
    rng = random.Random(seed)
    begin = time.monotonic()
    whole = run(asked(store=str(tmp_path / "whole"))).store
    seconds, objects = time.monotonic() - begin, len(files_named(whole))
    seen, garbage = Counter(), 0
    while seen["kills"] < kills:
        settings = asked(store=str(tmp_path / f"store-{seen['stores']}"))
        writers = 1 + seen["stores"] % 2
        for _ in range(rng.randint(1, 4)):
            ends = round_of(settings, rng, writers, seconds, objects)
            died = ends.count(-signal.SIGKILL)
            seen["kills"] += died
            seen[f"by {writers}"] += died
        result = run(settings)
        seen["stores"] += 1
        seen["continued"] += result.computed < result.tokens
        store = open_store(settings.store)
        assert digests(store) == digests(whole)
        assert canary_digests(store) == canary_digests(whole) or not result.computed
        garbage += remove(find_garbage(store.path, grace=0))
        assert not [c for c in verify(store.snapshot()) if c.problem]
        files = {str(p.relative_to(store.path)) for p in store.path.rglob("*") if p.is_file()}
        assert files == files_named(store)
        assert run(settings).computed == 0
    return seen, garbage, time.monotonic() - begin


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(actcache.capture, "POLL", 0.02)


def report(seen, garbage, seconds):
    print(
        f"\n{seen['kills']} kills (one writer {seen['by 1']}, two writers {seen['by 2']}) of "
        f"{seen['stores']} stores, {seen['continued']} continued with committed segments, "
        f"{garbage:,} bytes collected, {seconds:.0f} s"
    )


def test_killed_at_random_moments(asked, tmp_path, quick):  # F106
    seen, garbage, seconds = kill_until(lambda **kw: asked(tokens=256, **kw), tmp_path, 8, seed=0)
    report(seen, garbage, seconds)
    assert seen["by 1"] > 0
    assert seen["by 2"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_100_random_moments(asked, tmp_path, quick):  # F106
    seen, garbage, seconds = kill_until(asked, tmp_path, 100, seed=1)
    report(seen, garbage, seconds)
    assert seen["continued"] > 0
    assert garbage > 0
