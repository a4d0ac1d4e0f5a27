"""The catalog: a second run computes nothing; find says what is there, what differs, what lacks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cache import overrides

from actcache.catalog import Catalog, Entry
from actcache.cli import main
from actcache.data import PackSettings
from actcache.find import find
from actcache.host import HostSettings
from actcache.run import run
from actcache.store import IdentityError, SettingsError, open_store
from actcache.store.ids import short


@pytest.fixture
def mine(asked, tmp_path, monkeypatch):
    """`asked` with a catalog and a home of its own, and no store named."""
    monkeypatch.setenv("ACTCACHE_HOME", str(tmp_path / "home"))
    return lambda **kw: asked(**({"store": None} | kw))


def listed(capsys, *words):
    with pytest.raises(SystemExit) as e:
        main(["ls", "--json", *words])
    assert e.value.code == 0
    return json.loads(capsys.readouterr().out)


def no_model(monkeypatch):
    monkeypatch.setattr("actcache.host.Host.load", lambda *a: pytest.fail("a model was loaded"))


# -- run -------------------------------------------------------------------------------------------


def test_second_identical_run_loads_no_model_and_says_so(mine, tmp_path, monkeypatch):  # F108
    first = run(mine(tokens=200))
    assert first.store.path == tmp_path / "home" / "stores" / short(first.store.store_id)
    no_model(monkeypatch)
    said = []
    second = run(mine(tokens=200), said.append)
    assert (second.store.path, second.computed) == (first.store.path, 0)
    (line,) = [s for s in said if "nothing to compute" in s]
    assert str(first.store.path) in line
    assert f"{first.tokens:,} tokens of resid.1, mlp.0" in line


def test_the_registered_store_is_used_wherever_it_lies(mine, tmp_path, monkeypatch):
    elsewhere = run(mine(store=str(tmp_path / "elsewhere"), tokens=128)).store
    said = []
    more = run(mine(tokens=400, hooks=("resid.1", "mlp.0")), said.append)
    assert more.store.path == elsewhere.path
    assert any("store from the catalog" in s for s in said)
    assert not (tmp_path / "home" / "stores").exists()


def test_a_new_folder_for_known_work_is_made_and_said(mine, tmp_path):
    first = run(mine(store=str(tmp_path / "a"), tokens=128))
    said = []
    second = run(mine(store=str(tmp_path / "b"), tokens=128), said.append)
    assert second.store.path == tmp_path / "b"
    assert second.computed == second.tokens
    (line,) = [s for s in said if "the same work exists already" in s]
    assert f"{tmp_path / 'a'} with {first.tokens:,} tokens of mlp.0, resid.1" in line
    said.clear()
    run(mine(store=str(tmp_path / "b"), tokens=128), said.append)
    assert not [s for s in said if "exists already" in s]


def test_another_layout_or_type_is_not_continued(mine, tmp_path):
    first = run(mine(store=str(tmp_path / "a"), tokens=128))
    other = replace(mine().layout, dtype="bfloat16")
    assert run(mine(layout=other, tokens=128)).store.path != first.store.path
    with pytest.raises(IdentityError, match=r"holds it as float32, you asked for bfloat16"):
        run(mine(store=str(tmp_path / "a"), layout=other))


def test_a_catalog_that_cannot_be_written_is_said(mine, tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    result = run(mine(catalog=str(tmp_path / "file" / "catalog"), tokens=128), said.append)
    assert result.tokens >= 128
    assert any(s.startswith("not registered: ") for s in said)
    with pytest.raises(SettingsError, match="catalog is empty"):
        mine(catalog="")


# -- find ------------------------------------------------------------------------------------------


def test_find_answers_what_a_run_then_does(mine, monkeypatch):  # F108
    """new, fewer tokens, hooks missing, exists: each verdict beside what run computes."""
    answers = []

    def step(**kw):
        found = find(mine(**kw))
        result = run(mine(**kw))
        answers.append(found.verdict)
        return found, result

    found, result = step(tokens=200, hooks=("resid.1",))
    assert (found.store, result.tokens) == (None, result.computed)
    assert str(found.compute[0]) == "200 tokens × resid.1"
    found, more = step(tokens=500, hooks=("resid.1",))
    (missing,) = found.compute
    assert (missing.hooks, missing.tokens) == (("resid.1",), 500 - result.tokens)
    assert more.computed >= missing.tokens  # whole segments
    assert f"exists with fewer tokens: {result.tokens:,} of 500" in str(found)
    found, hook = step(tokens=500, hooks=("resid.1", "mlp.0"))
    (missing,) = found.compute
    assert (missing.hooks, missing.tokens) == (("mlp.0",), 500)
    assert "exists, hooks missing: mlp.0" in str(found)
    no_model(monkeypatch)
    found, again = step(tokens=500, hooks=("resid.1", "mlp.0"))
    assert (found.compute, again.computed) == ((), 0)
    assert answers == ["new", "fewer tokens", "hooks missing", "exists"]
    assert hook.store.path == again.store.path


def test_find_knows_when_all_the_data_is_there(mine):
    run(mine(tokens=200))
    found = find(mine())
    assert (found.verdict, found.compute[0].tokens) == ("fewer tokens", None)
    run(mine())
    assert find(mine()).verdict == "exists"
    (missing,) = find(mine(hooks=("resid.1", "mlp.1"))).compute
    assert (missing.hooks, missing.tokens) == (("mlp.1",), run(mine()).tokens)


def test_find_counts_what_is_committed_not_the_newest_snapshot(mine, monkeypatch):
    """A later run that asked for less made a smaller snapshot; a hook may have more rows."""
    large = run(mine(hooks=("resid.1",), tokens=500))
    small = run(mine(hooks=("mlp.0",), tokens=200))
    assert large.store.snapshot().n_rows == small.tokens < large.tokens
    assert find(mine(hooks=("resid.1",), tokens=500)).verdict == "exists"
    found = find(mine(tokens=700))
    assert [(m.hooks, m.tokens) for m in found.compute] == [
        (("resid.1",), 700 - large.tokens),
        (("mlp.0",), 700 - small.tokens),
    ]
    assert (found.verdict, found.tokens) == ("fewer tokens", small.tokens)
    more = find(mine(hooks=("resid.1", "mlp.1"), tokens=700))
    assert (more.verdict, more.missing_hooks) == ("hooks missing, fewer tokens", ("mlp.1",))
    no_model(monkeypatch)
    assert run(mine(hooks=("resid.1",), tokens=500)).computed == 0


def test_other_work_is_a_field_by_field_diff(mine, tiny_host, tmp_path):  # F108
    run(mine(tokens=128))
    twin = tmp_path / "host"
    shutil.copytree(tiny_host, twin)
    merges = json.loads((twin / "tokenizer.json").read_text())
    merges["model"]["merges"] = merges["model"]["merges"][:-1]
    (twin / "tokenizer.json").write_text(json.dumps(merges))

    def differs(**kw):
        found = find(mine(**kw))
        assert found.verdict == "new"
        (near,) = found.nearest
        return near.differs

    assert differs(context=64) == (
        "token_stream.packing.context: the store has 32, you asked for 64",
        "layout.context: the store has 32, you asked for 64",
    )
    (line,) = differs(host=HostSettings(model=str(twin), batch_tokens=128))  # another tokenizer
    assert line.startswith("token_stream.tokenizer: the store has sha256:")
    (line,) = differs(host=HostSettings(model=str(tiny_host), attention="eager"))
    assert line == "host.attention: the store has sdpa, you asked for eager"
    (line,) = differs(layout=replace(mine().layout, dtype="float16"), hooks=("mlp.0",))
    assert line == "dtype of mlp.0: the store has float32, you asked for float16"
    assert len(differs(pack=PackSettings(separator="none"), context=16)) == 3


def test_find_on_the_command_line(mine, tmp_path, capsys, monkeypatch):
    settings = mine(store=str(tmp_path / "store"))
    words = ["find", *overrides(settings)[1:], "tokens=200", "--catalog", str(tmp_path / "c")]

    def ask():
        monkeypatch.setattr("sys.argv", ["actcache"])
        with pytest.raises(SystemExit) as e:
            main([*words, "--json"])
        return e.value.code, json.loads(capsys.readouterr().out)["verdict"]

    assert ask() == (3, "new")
    assert not (tmp_path / "store").exists()
    run(replace(settings, tokens=200, catalog=str(tmp_path / "c")))
    assert ask() == (0, "exists")


# -- ls, and what the catalog holds ----------------------------------------------------------------


def test_ls_info_verify_and_a_moved_store(mine, tmp_path, capsys):  # F108
    first = run(mine(store=str(tmp_path / "a"), tokens=128)).store
    (row,) = listed(capsys)
    assert (row["path"], row["state"], row["verified"]) == (str(tmp_path / "a"), "ok", None)
    snapshot = first.snapshot()
    assert (row["tokens"], [h["name"] for h in row["hooks"]]) == (
        snapshot.n_rows,
        ["mlp.0", "resid.1"],
    )
    files = [p for p in (first.path / "segments").rglob("*") if p.is_file()]
    assert row["bytes"] == sum(p.stat().st_size for p in files)
    first.path.rename(tmp_path / "b")
    (row,) = listed(capsys)
    assert row["state"] == "missing"
    assert find(mine(tokens=128)).verdict == "new"
    with pytest.raises(SystemExit) as e:
        main(["verify", str(tmp_path / "b"), "--json"])
    assert e.value.code == 0
    capsys.readouterr()
    moved = open_store(tmp_path / "b")
    assert (moved.store_id, moved.token_stream_id) == (first.store_id, first.token_stream_id)
    found = find(mine(tokens=128))
    assert (found.verdict, found.store) == ("exists", str(tmp_path / "b"))
    (row,) = listed(capsys, "--prune")
    assert row["path"] == str(tmp_path / "b")
    assert row["verified"] is not None
    with pytest.raises(SystemExit):
        main(["ls"])
    out = capsys.readouterr().out
    assert short(first.store_id) in out
    assert f"{tmp_path / 'b'}: mlp.0, resid.1" in out


def test_facts_are_read_from_the_store_not_believed(mine, tmp_path, capsys):
    first = run(mine(store=str(tmp_path / "a"), tokens=128, catalog=str(tmp_path / "one")))
    more = run(mine(store=str(tmp_path / "a"), tokens=400, catalog=str(tmp_path / "two")))
    (known,) = Catalog(tmp_path / "one").known()
    assert first.tokens < more.tokens == known.entry.tokens
    shutil.rmtree(tmp_path / "a")
    run(mine(store=str(tmp_path / "a"), tokens=128, context=16, catalog=str(tmp_path / "two")))
    (row,) = listed(capsys, "--catalog", str(tmp_path / "one"))
    assert (row["state"], "another store" in row["problem"]) == ("other", True)


def test_entries_that_are_not_whole_are_named_and_ignored(mine, tmp_path, capsys):
    run(mine(tokens=128))
    catalog = Catalog()
    ((entry,), problems) = catalog.entries()
    assert problems == []
    whole = json.loads((catalog.folder / entry.file).read_text())
    names = [f"{n:064x}.{n:012x}.json" for n in range(4)]
    wrong = [
        "{",
        json.dumps(whole | {"surprise": 1}),
        json.dumps(whole | {"host": {"weights": "x"}}),
        json.dumps(whole),  # under another's name
    ]
    for name, text in zip(names, wrong, strict=True):
        (catalog.folder / name).write_text(text)
    (catalog.folder / "notes.json").write_text("mine")
    found, problems = catalog.entries()
    assert found == [entry]
    assert len(problems) == 4
    for problem, words in zip(
        problems, ("not valid JSON", "surprise", "ids do not follow", "another's name"), strict=True
    ):
        assert words in problem
    with pytest.raises(SystemExit):
        main(["ls", "--json"])
    streams = capsys.readouterr()
    assert len(json.loads(streams.out)) == 1
    assert streams.err.count("is ignored") == 4
    assert find(mine(tokens=128)).verdict == "exists"


def test_the_same_work_at_two_places_is_two_entries(mine, tmp_path):
    run(mine(store=str(tmp_path / "a"), tokens=128))
    run(mine(store=str(tmp_path / "b"), tokens=128))
    run(mine(store=str(tmp_path / "b"), tokens=128))
    entries: list[Entry] = Catalog().entries()[0]
    assert [Path(e.path).name for e in entries] == ["a", "b"]
    assert len({e.store_id for e in entries}) == 1
