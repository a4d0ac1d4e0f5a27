"""Runs over several stores from the command line: joined, mixed, resumed, evaluated, refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
from commands import read, rows_of
from fakes import planted
from stores import make_store
from test_train_cli import QUIET, run
from training import interrupted, same, settings

from actcache.store import HookMissingError, open_store
from actcache.store.split import held_out
from saetrain import train
from saetrain.errors import ConfigError, TrainingError
from saetrain.runs import open_snapshot

D = 16


def features(hook, rng, tokens, d, *, model):
    """Planted features of the segment's documents; `rng` is left alone, so tokens stay equal."""
    return planted(len(tokens), d, seed=int(tokens.doc[0] % 1000)) * (1 + model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """base, chat (the same tokens, another model, context order), short (two of three segments)
    and wide (another width)."""
    path = tmp_path_factory.mktemp("several")
    make = functools.partial(make_store, hooks={"resid.2": D}, segments=(1024, 512, 512))
    for model, (name, kw) in enumerate(
        {
            "base": {},
            "chat": {"order": "context", "dtype": "float32"},
            "short": {"units": (0, 1)},
            "wide": {"hooks": {"resid.2": D + 8}},
        }.items()
    ):
        acts = functools.partial(features, model=model)
        make(path / name, **({"acts": acts, "host": {"weights": name}} | kw))
    return path


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return folder


JOINED = "stores={{base: {0}/base, chat: {0}/chat}}"
MIXED = ("stores={{base: {0}/base, chat: {0}/chat}}", "mix={{base: 0.75, chat: 0.25}}")


def only_run() -> Path:
    (found,) = (p.parent for p in Path("runs").rglob("run.json"))
    return found


def test_joined_stores_train_from_the_command_line(here, capsys):  # F67
    words = (JOINED.format(here), "hook=chat:resid.2", *QUIET, "report=true")
    assert run(*words) == 0
    folder = only_run()
    record = read(folder / "run.json")
    ids = {name: open_store(here / name).store_id for name in ("base", "chat")}
    assert record["store_id"] == ids
    assert record["snapshot"] == {"base": "1", "chat": "1"}
    chat = open_store(here / "chat").snapshot()
    assert record["activation_ids"] == {"chat:resid.2": chat.hooks["resid.2"].activation_id}
    assert read(folder / "eval.json")["fve"] > 0.5
    page = (folder / "report.html").read_text()
    assert str(here) not in page  # no path of this machine
    assert "chat:resid.2" in page
    assert run(*words) == 0
    assert "is finished" in capsys.readouterr().err


def test_mixed_stores_train_from_the_command_line(here, capsys):  # F67
    words = (*(w.format(here) for w in MIXED), *QUIET, "report=true")
    assert run(*words) == 0
    said = capsys.readouterr().err
    assert "mix: base and chat come from other hosts: weights is base and chat" in said
    assert "report: features are shown on store base, of the largest weight" in said
    folder = only_run()
    record = read(folder / "run.json")
    assert set(record["store_id"]) == {"base", "chat"}
    assert set(record["activation_ids"]) == {"base", "chat"}
    assert read(folder / "eval.json")["fve"] > 0.5
    assert (folder / "report.html").exists()
    snapshots = {name: open_store(here / name).snapshot() for name in ("base", "chat")}
    held = sum(
        int((held_out(s.column("doc"), 0.2) & ((s.column("flags") & 1) == 0)).sum())
        for snapshot in snapshots.values()
        for s in snapshot.segments
    )
    assert read(folder / "eval.json")["tokens"] == held
    assert rows_of(folder)


def test_a_run_over_several_stores_is_evaluated_again_where_they_are_now(here, tmp_path):
    words = [w.format(here) for w in MIXED]
    assert run(*words, *QUIET) == 0
    folder = only_run()
    before = read(folder / "eval.json")
    shutil.copytree(here / "base", tmp_path / "moved")
    (folder / "config.json").write_text(
        json.dumps(
            read(folder / "config.json") | {"stores": {"base": "gone", "chat": str(here / "chat")}}
        )
    )
    assert run("evaluate", str(folder)) == 1
    assert run("evaluate", str(folder), "stores.base=moved") == 0
    after = read(folder / "eval.json")
    assert {k: before[k] for k in ("fve", "l0", "tokens")} == {
        k: after[k] for k in ("fve", "l0", "tokens")
    }


@pytest.mark.parametrize("mix", [None, {"base": 0.6, "chat": 0.4}])
def test_an_interrupted_run_over_several_stores_ends_with_equal_weights(here, tmp_path, mix):
    def cfg(name):
        stores = {k: str(here / k) for k in ("base", "chat")}
        hook = "resid.2" if mix else "base:resid.2"
        return settings(None, tmp_path / name, stores=stores, mix=mix, hook=hook)

    whole = train(cfg("a"))
    interrupted(cfg("b"), 11)
    rest = train(cfg("b"))
    assert 0 < rest.trained_steps < 30
    same(whole.run_dir, rest.run_dir)


def test_what_is_left_out_of_a_join_is_said(here, capsys):
    stores = {k: str(here / k) for k in ("base", "short")}
    joined = open_snapshot(settings(None, Path("runs"), stores=stores, hook="base:resid.2"))
    assert len(joined.segments) == 2
    said = capsys.readouterr().err
    assert "Segments left out, other stores have no equal ones: 1 of base (u00002-0000" in said


def test_a_run_key_depends_on_labels_and_weights_not_on_paths(here):
    def key(**kw):
        return settings(None, Path("runs"), **kw).result_key()

    a, b = {"x": "1", "y": "2"}, {"x": "3", "y": "4"}
    assert key(stores=a) == key(stores=b)
    assert key(stores=a) != key(stores={"y": "1", "x": "2"})
    assert key(stores=a) != key(stores=a, mix={"x": 1.0, "y": 1.0})
    assert key(stores=a, mix={"x": 1.0, "y": 2.0}) != key(stores=a, mix={"x": 2.0, "y": 2.0})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"store": "a", "stores": {"a": "1", "b": "2"}}, "give store=PATH or stores="),
        ({"stores": {"a": "1"}}, "stores: expected two or more"),
        ({"mix": {"a": 1.0}}, r"each label of stores \(none\), got a"),
        ({"stores": {"a": "1", "b": "2"}, "mix": {"a": 1.0}}, r"stores \(a, b\), got a"),
        ({"stores": {"a": "1", "b": "2"}, "mix": {"a": 1.0, "b": -1.0}}, "mix.b: expected more"),
        ({"stores": {"a": "1", "b": "2"}, "snapshot": "3"}, "expected LABEL: NAME for stores"),
        ({"store": "a", "snapshot": {"a": "3"}}, "snapshot: expected one name, got"),
        ({"stores": {"a": "1", "b": "2"}, "snapshot": {"c": "3"}}, r"\['c'\] are no labels"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        settings(values.pop("store", None), Path("runs"), **values)


def test_stores_that_do_not_fit_are_refused_in_the_users_words(here):
    def stores(*names):
        return {k: str(here / k) for k in names}

    weights = {"base": 0.5, "wide": 0.5}
    with pytest.raises(ConfigError, match=r"hook resid\.2 has 16 channels in base and 24 in wide"):
        train(settings(None, Path("runs"), stores=stores("base", "wide"), mix=weights))
    with pytest.raises(HookMissingError, match=r"several stores are joined.*such as base:resid"):
        train(settings(None, Path("runs"), stores=stores("base", "wide"), hook="resid.2"))
    assert not Path("runs").exists()


def test_a_finished_run_on_other_stores_is_not_taken_for_this_one(here, tmp_path):
    cfg = functools.partial(settings, None, tmp_path / "runs", hook="a:resid.2", sae_name="s")
    train(cfg(stores={"a": str(here / "base"), "b": str(here / "chat")}))
    with pytest.raises(TrainingError, match="trained on something else: store_id"):
        train(cfg(stores={"a": str(here / "chat"), "b": str(here / "base")}))
