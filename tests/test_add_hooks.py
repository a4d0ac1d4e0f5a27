"""actcache add-hooks: from the token table alone, the bits that capturing at once would give."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from cache import SMALL, contexts_of, digests

import actcache.segments
from actcache.add_hooks import AddHooksSettings, add_hooks
from actcache.catalog import Catalog
from actcache.cli import main
from actcache.data import PackSettings
from actcache.errors import HookError
from actcache.host import HostSettings
from actcache.run import LayoutSettings, run
from actcache.store import DamagedError, IdentityError, SettingsError, open_store, verify
from actcache.store.collect import find_garbage, remove


def acts(store):
    return {k: v for k, v in digests(store).items() if "/acts/" in k[1]}


@pytest.fixture
def adding(asked):
    """Settings that add mlp.0 to the store of `asked`."""

    def make(**kw):
        base = {"store": asked().store, "host": asked().host, "hooks": ("mlp.0",)}
        return AddHooksSettings(**(base | {"progress": False} | kw))

    return make


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"pack": PackSettings(attend_across_documents=False)},
        {"pack": PackSettings(bos="context")},
        {"layout": replace(SMALL, dtype="bfloat16", segment_rows=96, order="context")},
    ],
    ids=["plain", "documents apart", "bos", "context order"],
)
def test_equal_to_capturing_at_once(asked, adding, tmp_path, monkeypatch, kw):  # F109
    kw = kw | {"tokens": 250}
    at_once = run(asked(store=str(tmp_path / "once"), **kw)).store
    first = run(asked(hooks=("resid.1",), **kw))
    monkeypatch.setattr("actcache.run.open_source", lambda *a: pytest.fail("data was opened"))
    said = []
    added = add_hooks(adding(), said.append)
    assert (added.tokens, added.computed) == (first.tokens, first.tokens)
    assert added.hooks == ("mlp.0", "resid.1")
    assert acts(added.store) == acts(at_once)
    mine, whole = contexts_of(added.store.snapshot()), contexts_of(at_once.snapshot())
    assert all((mine[k][2]["mlp.0"] == whole[k][2]["mlp.0"]).all() for k in whole)
    assert not [c for c in verify(added.store.snapshot()) if c.problem]
    assert open_store(first.store.path).snapshot("1").record == first.store.snapshot("1").record
    assert Catalog().entries()[0]


def test_again_loads_no_model_and_run_sees_the_hooks(asked, adding, monkeypatch):
    run(asked(hooks=("resid.1",), tokens=300))
    added = add_hooks(adding())
    monkeypatch.setattr("actcache.host.Host.load", lambda *a: pytest.fail("a model was loaded"))
    again = add_hooks(adding())
    assert (again.computed, again.snapshot) == (0, added.snapshot)
    assert "nothing to compute" in str(again)
    assert run(asked(tokens=300)).computed == 0


def test_a_store_cut_by_its_budget_still_grows(asked, adding, tmp_path):  # F109
    """The last segment of a unit that a budget cut is not taken for the unit's end."""
    unit = LayoutSettings(dtype="float32", segment_rows=64, chunk_bytes=2048, unit_bytes=1 << 20)
    run(asked(hooks=("resid.1",), layout=unit, tokens=100))
    add_hooks(adding())
    grown = run(asked(layout=unit))
    whole = run(asked(layout=unit, store=str(tmp_path / "whole")))
    assert grown.tokens == whole.tokens > 128
    assert acts(grown.store) == acts(whole.store)


def test_interrupted_it_continues(asked, adding, tmp_path, monkeypatch):  # F109
    run(asked(hooks=("resid.1",), tokens=300))
    original, calls = actcache.segments.SegmentBuilder.build, []

    def interrupting(self, contexts, advance):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, contexts, advance)

    monkeypatch.setattr(actcache.segments.SegmentBuilder, "build", interrupting)
    stopped = add_hooks(adding())
    monkeypatch.undo()
    assert stopped.interrupted
    assert (stopped.snapshot, stopped.hooks) == ("1", ("resid.1",))
    done = add_hooks(adding())
    assert done.computed == done.tokens - stopped.computed
    assert acts(done.store) == acts(run(asked(store=str(tmp_path / "once"), tokens=300)).store)


def test_processes_share_the_work(asked, adding, tmp_path):
    store = run(asked(hooks=("resid.1",), tokens=500)).store
    children = []
    for n in "ab":
        child = os.fork()
        if child == 0:
            try:
                (tmp_path / n).write_text(str(add_hooks(adding()).computed))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(c, 0)[1] for c in children] == [0, 0]
    snapshot = store.snapshot()
    computed = [int((tmp_path / n).read_text()) for n in "ab"]
    assert sum(computed) == snapshot.n_rows
    assert min(computed) > 0
    assert sorted(snapshot.hooks) == ["mlp.0", "resid.1"]
    assert not [c for c in verify(snapshot) if c.problem]
    remove(find_garbage(store.path, grace=0))
    folders = {p.name for p in (store.path / "segments").iterdir()}
    assert len(folders) == 2 * len(snapshot.segments)


def test_a_store_that_grows_meanwhile(asked, adding, monkeypatch):
    """Another run appends while hooks are added: the new segments get them too."""
    run(asked(hooks=("resid.1",), tokens=200))
    original, grown = actcache.segments.SegmentBuilder.build, []

    def growing(self, contexts, advance):
        if not grown:
            grown.append(1)
            grown.append(run(asked(hooks=("resid.1",), tokens=500)).tokens)
        return original(self, contexts, advance)

    monkeypatch.setattr(actcache.segments.SegmentBuilder, "build", growing)
    added = add_hooks(adding())
    assert added.tokens == grown[1] >= 500
    assert added.hooks == ("mlp.0", "resid.1")


# -- refusals --------------------------------------------------------------------------------------


def test_another_host_is_a_diff(asked, adding, tiny_host):  # F109
    run(asked(hooks=("resid.1",), tokens=128))
    other = HostSettings(model=str(tiny_host), dtype="bfloat16", attention="eager")
    with pytest.raises(IdentityError) as e:
        add_hooks(adding(host=other))
    for line in (
        "host.dtype: the store has float32, you asked for bfloat16",
        "host.attention: the store has sdpa, you asked for eager",
    ):
        assert line in str(e.value)


def test_wrong_words(asked, adding):
    run(asked(hooks=("resid.1",), tokens=128))
    with pytest.raises(HookError, match="has 3 blocks"):
        add_hooks(adding(hooks=("resid.9",)))
    with pytest.raises(IdentityError, match=r"resid\.1: .* holds it as float32, you asked for bf"):
        add_hooks(adding(hooks=("resid.1",), dtype="bfloat16"))
    with pytest.raises(SettingsError, match="name the store"):
        adding(store=None)
    both = add_hooks(adding(dtype="bfloat16"))
    with pytest.raises(SettingsError, match="stored as bfloat16 and float32"):
        add_hooks(adding(hooks=("mlp.1",)))
    assert both.store.snapshot().hooks["mlp.0"].dtype == "bfloat16"


def test_damaged_tokens_are_not_replayed(asked, adding):
    store = run(asked(hooks=("resid.1",), tokens=128)).store
    segment = store.snapshot().segments[0]
    (segment.path / "tokens" / "token_id" / "c" / "0").write_bytes(b"\0" * 10)
    with pytest.raises(DamagedError, match=segment.id):
        add_hooks(adding())
    assert sorted(store.snapshot().hooks) == ["resid.1"]


def test_on_the_command_line(asked, capsys, monkeypatch, tmp_path):  # F109
    settings = asked(hooks=("resid.1",), tokens=200, store=str(tmp_path / "my store"))
    result = run(settings)
    shutil.copytree(result.store.path, tmp_path / "copy")

    def command(*words):
        monkeypatch.setattr("sys.argv", ["actcache"])
        host = ["host=local", f"host.model={settings.host.model}", "host.batch_tokens=128"]
        with pytest.raises(SystemExit) as e:
            main(["add-hooks", str(result.store.path), *host, "progress=false", *words])
        return e.value.code, capsys.readouterr()

    code, streams = command("hooks=mlp", "layers=[0,2]", "--json")
    assert code == 0, streams.err
    facts = json.loads(streams.out)
    assert facts["hooks"] == ["mlp.0", "mlp.2", "resid.1"]
    assert (facts["computed"], facts["tokens"]) == (result.tokens, result.tokens)
    assert open_store(result.store.path).snapshot().hooks["mlp.2"].dtype == "float32"
    code, streams = command("hooks=mlp", "layers=[0,2]")
    assert (code, "nothing to compute" in streams.out) == (0, True)
    for words, message in (
        (["tokens=5"], "tokens has no effect here"),
        (["layout.segment_rows=64"], "only layout.dtype may be given"),
        (["hooks=[resid.9]"], "has 3 blocks"),
    ):
        code, streams = command(*words)
        assert code == 1
        assert message in streams.err
