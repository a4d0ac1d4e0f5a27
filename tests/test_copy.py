"""actcache cp and gc: a copy is checked, continues, keeps its ids; only garbage is removed."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from cache import contexts_of, digests
from stores import make_store

import actcache.store.copy as copying
from actcache.catalog import Catalog
from actcache.cli import main
from actcache.run import run
from actcache.store import (
    DamagedError,
    HookMissingError,
    IdentityError,
    OutOfSpaceError,
    StoreError,
    StoreMissingError,
    open_store,
    verify,
)
from actcache.store.claims import Claims
from actcache.store.collect import find_garbage, remove
from actcache.store.copy import copy_bytes, copy_snapshot


def files(root):
    """{path: bytes} of all of a store but its claims."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and "claims" not in p.parts
    }


def command(*words):
    with pytest.raises(SystemExit) as e:
        main(list(map(str, words)))
    return e.value.code


@pytest.fixture
def small(tmp_path):
    return make_store(tmp_path / "a", hooks={"resid.1": 8, "mlp.0": 4}, segments=(96, 64))


# -- cp --------------------------------------------------------------------------------------------


def test_a_copy_is_the_store(small, tmp_path, capsys):  # F111
    (small.path / "notes.txt").write_text("of the first owner")
    assert command("cp", small.path, tmp_path / "b" / "deep", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    copy = open_store(tmp_path / "b" / "deep")
    whole = files(small.path)
    del whole["notes.txt"]
    assert files(copy.path) == whole
    assert (copy.store_id, copy.token_stream_id) == (small.store_id, small.token_stream_id)
    assert (facts["copied"], facts["kept"]) == (len(whole) - 1, 0)  # and the snapshot record
    assert facts["store_id"] == small.store_id
    assert not [c for c in verify(copy.snapshot()) if c.problem]
    assert str(copy.path) in {e.path for e in Catalog().entries()[0]}
    before = {p: p.stat().st_ino for p in copy.path.rglob("*")}
    assert command("cp", small.path, copy.path, "--json") == 0  # again: nothing is written
    again = json.loads(capsys.readouterr().out)
    assert (again["copied"], again["kept"], again["bytes"]) == (0, facts["copied"], 0)
    assert {p: p.stat().st_ino for p in copy.path.rglob("*")} == before


def test_a_copy_of_a_run_continues_and_keeps_its_canaries(asked, tmp_path):
    first = run(asked(tokens=200))
    copy = copy_snapshot(first.store.snapshot(), tmp_path / "b").store
    assert files(copy.path) == files(first.store.path)
    assert any(k.startswith("canaries/") for k in files(copy.path))
    more, whole = run(asked(store=str(copy.path), tokens=400)), run(asked(tokens=400))
    assert more.computed == more.tokens - first.tokens
    assert digests(more.store) == digests(whole.store)
    assert copy_snapshot(whole.store.snapshot("1"), tmp_path / "b").copied == 0


@pytest.mark.parametrize("after", [0, 1, 2, 7, 15, 22, 29])
def test_killed_it_continues(small, tmp_path, after):  # F111
    """SIGKILL half-way through file number `after`; the rest is copied, the wreck is garbage."""
    target = tmp_path / "b"
    child = os.fork()
    if child == 0:
        left = [after]

        def dying(root, file, original=copying._blocks):
            left[0] -= 1
            for block in original(root, file):
                yield block[: len(block) // 2] if left[0] < 0 else block
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        copying._blocks = dying
        copy_snapshot(small.snapshot(), target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(target.rglob("*.partial"))
    with pytest.raises(StoreMissingError):
        open_store(target).snapshot()
    done = copy_snapshot(small.snapshot(), target)
    assert done.kept == after
    assert not [c for c in verify(done.store.snapshot()) if c.problem]
    remove(find_garbage(target, grace=0))
    assert files(target) == files(small.path)


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
@pytest.mark.parametrize(
    "which", ["acts/resid.1/c/0/0", "tokens/doc/c/0", "vocab.json", "commits/"]
)
def test_damage_is_named_and_not_copied(small, tmp_path, damage, which):  # F107 F111
    snapshot = small.snapshot()
    for segment in snapshot.segments:
        assert segment.commits  # read now: damage to a commit is found by the copy as well
    victim = next(p for p in sorted(small.path.rglob("*")) if which in str(p) and p.is_file())
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    changed = {"flip": bytes(data), "cut": bytes(data[:-1]), "longer": bytes(data) + b"x"}
    victim.unlink()
    if damage != "gone":
        victim.write_bytes(changed[damage])
    with pytest.raises(DamagedError) as e:
        copy_snapshot(snapshot, tmp_path / "b")
    assert str(victim) in str(e.value)
    copied = files(tmp_path / "b")
    assert str(victim.relative_to(small.path)) not in copied
    assert not [k for k in copied if k.startswith("snapshots") or k.endswith(".partial")]


def test_other_places_are_refused(small, tmp_path):  # F111
    snapshot = small.snapshot()
    other = make_store(tmp_path / "other", hooks={"resid.1": 8}, segments=(64,), context=16)
    before = files(other.path)
    with pytest.raises(IdentityError, match=r"is another store.*\n.*packing\.context: the store"):
        copy_snapshot(snapshot, other.path)
    assert files(other.path) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"is not a store; it holds 'thesis\.tex'"):
        copy_snapshot(snapshot, tmp_path / "mine")
    assert files(tmp_path / "mine") == {"thesis.tex": b"precious"}
    for inside in (small.path, small.path / "copy", tmp_path):
        with pytest.raises(StoreError, match="one lies in the other"):
            copy_snapshot(snapshot, inside)
    (tmp_path / "twin").mkdir()
    record = json.loads((small.path / "store.json").read_text())
    record["recorded"]["versions"] = "others"
    (tmp_path / "twin" / "store.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match="made by itself"):
        copy_snapshot(snapshot, tmp_path / "twin")


def test_a_file_with_other_bytes_is_left_alone(small, tmp_path):
    copy = copy_snapshot(small.snapshot(), tmp_path / "b").store
    victim = next(copy.path.rglob("acts/mlp.0/c/0/0"))
    wrong = bytes(len(victim.read_bytes()))
    victim.write_bytes(wrong)
    with pytest.raises(StoreError, match=r"acts/mlp\.0/c/0/0 has other bytes"):
        copy_snapshot(small.snapshot(), copy.path)
    assert victim.read_bytes() == wrong


def test_disk_full_then_space_again(small, tmp_path, monkeypatch):
    import errno

    import actcache.store.publish as publishing

    original, left = os.link, [9]

    def link(src, dst):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(src, dst)

    monkeypatch.setattr(publishing.os, "link", link)
    with pytest.raises(OutOfSpaceError, match="no space left while writing"):
        copy_snapshot(small.snapshot(), tmp_path / "b")
    monkeypatch.undo()
    assert copy_snapshot(small.snapshot(), tmp_path / "b").kept == 9
    assert files(tmp_path / "b") == files(small.path)


def test_some_hooks_only(asked, tmp_path, capsys):
    """Whole commits; a snapshot of its own, since it names fewer of them."""
    run(asked(hooks=("resid.1",), tokens=200))
    full = run(asked(hooks=("mlp.0",), tokens=200)).store
    source = full.snapshot()
    done = copy_snapshot(source, tmp_path / "b", ["blocks.0.hook_mlp_out"])
    assert done.snapshot == str(int(source.name) + 1)
    snapshot = done.store.snapshot()
    assert list(snapshot.hooks) == ["mlp.0"]
    assert snapshot.store_id == source.store_id
    assert not [c for c in verify(snapshot) if c.problem]
    found, expected = contexts_of(snapshot), contexts_of(source)
    assert found.keys() == expected.keys()
    for key, (ids, docs, rows) in found.items():
        assert np.array_equal(ids, expected[key][0])
        assert np.array_equal(docs, expected[key][1])
        assert np.array_equal(rows["mlp.0"], expected[key][2]["mlp.0"])
    sizes = [len(v) for k, v in files(tmp_path / "b").items() if re.match(r"segm|canaries/.*/", k)]
    assert sum(sizes) == copy_bytes(source, ["mlp.0"]) < copy_bytes(source)
    assert not list((tmp_path / "b").rglob("acts/resid.1"))
    again = copy_snapshot(source, tmp_path / "b", ["mlp.0"])
    assert (again.snapshot, again.copied) == (done.snapshot, 0)
    assert command("cp", full.path, tmp_path / "b") == 0  # the rest, later
    assert "snapshot 2" in capsys.readouterr().out
    assert sorted(open_store(tmp_path / "b").snapshot(source.name).hooks) == ["mlp.0", "resid.1"]
    with pytest.raises(HookMissingError, match=r"resid\.7"):
        copy_snapshot(source, tmp_path / "c", ["resid.7"])
    assert not (tmp_path / "c").exists()


def test_cp_says_what_is_wrong_and_what_ctrl_c_left(small, tmp_path, capsys, monkeypatch):
    assert command("cp", tmp_path / "nothing", tmp_path / "b") == 1
    assert "does not exist" in capsys.readouterr().err
    assert command("cp", small.path) == 2

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("actcache.commands.copy_snapshot", interrupted)
    assert command("cp", small.path, tmp_path / "b") == 130
    assert "the same command continues" in capsys.readouterr().err


# -- gc --------------------------------------------------------------------------------------------


def test_gc_removes_what_no_commit_names_and_nothing_else(small, tmp_path, capsys):  # F111
    orphan = small.path / "segments" / "u00009-0000.0123abcd" / "tokens"
    orphan.mkdir(parents=True)
    (orphan / "half").write_bytes(bytes(10))
    mine = [small.path / "NOTES.txt", small.path / "segments" / "u00009-0000.backup"]
    for path in mine:
        path.write_text("mine")
    assert command("gc", small.path, "--json") == 0  # too young
    assert json.loads(capsys.readouterr().out)["removed"] == []
    assert command("gc", small.path, "--older-than", 0, "--dry-run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["removed"], facts["bytes"]) == (["segments/u00009-0000.0123abcd"], 10)
    assert orphan.exists()
    whole = files(small.path)
    assert command("gc", small.path, "--older-than", 0) == 0
    assert "1 removed, 10 B" in capsys.readouterr().out
    del whole["segments/u00009-0000.0123abcd/tokens/half"]
    assert files(small.path) == whole
    assert command("verify", small.path, "--json") == 0
    capsys.readouterr()


def test_gc_waits_for_living_writers(small, capsys):
    with Claims(small.path / "claims", "somebody") as claims:
        assert claims.acquire("u00003")
        assert command("gc", small.path, "--older-than", 5) == 1
        assert "writers are at work on u00003" in capsys.readouterr().err
        assert command("gc", small.path) == 0
    assert command("gc", small.path, "--older-than", 5) == 0
    assert command("gc", small.path, "--older-than", -1) == 2
    shutil.rmtree(small.path)
    assert command("gc", small.path) == 1
    capsys.readouterr()
