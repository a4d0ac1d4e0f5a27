"""SAEs, metrics and data sources of a user's own: found, used by the commands, refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache import overrides
from own import METRIC, SAE, SOURCE, package
from training import planted_store

import actcache.own_sources as own_sources
import saetrain.evals.own as own_metrics
from actcache.errors import DataError
from actcache.run import run as cache
from actcache.sources import DataSettings, open_source
from actcache.store import FLAG_DOC_START, open_store
from actcache.store.split import doc_key
from saetrain.artefact import load_sae
from saetrain.cli import main
from saetrain.codes import dense
from saetrain.errors import ConfigError, TrainingError
from saetrain.evals.own import make_metrics, results
from saetrain.saes import base, load_all, make_config
from saetrain.stream import Stream

TRAIN = (
    "sae=topk",
    "sae.n_latents=32",
    "sae.k=3",
    "batch_tokens=64",
    "epochs=1",
    "held_out_fraction=0.2",
    "eval.bootstrap=5",
    "eval.pca_tokens=0",
    "progress=false",
)


@pytest.fixture(autouse=True)
def own_names() -> Iterator[None]:
    """Forget what a test registers and imports."""
    load_all()
    registries = (base._REGISTRY, own_metrics._REGISTRY, own_sources._REGISTRY)
    known, modules = [dict(r) for r in registries], set(sys.modules)
    yield
    for registry, before in zip(registries, known, strict=True):
        registry.clear()
        registry.update(before)
    for name in set(sys.modules) - modules:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).is_relative_to("/tmp"):
            del sys.modules[name]


def command(*words: str) -> int:
    try:
        main(list(words))
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0


def in_a_process(folder: Path, module: str, *words: str) -> str:
    """The command in a process that sees the package in `folder`; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def busiest(run_dir: Path, store: Path, hook: str) -> dict[str, float]:
    """The metric `busiest` by hand."""
    stream = Stream(
        open_store(store).snapshot(),
        (hook,),
        batch_tokens=1 << 14,
        split="held_out",
        held_out_fraction=0.2,
    )
    (batch,) = stream.one_pass()
    fires = (dense(load_sae(run_dir / "sae").encode(batch.acts[hook])) > 0).sum(0)
    return {"rows": int(fires.max()), "share": pytest.approx(int(fires.max()) / len(batch))}


def test_an_installed_package_brings_an_sae_a_metric_and_a_source(  # F36, F37
    tmp_path: Path, asked: Any
) -> None:
    """From both command lines, by entry points alone."""
    words = [w for w in overrides(asked()) if not w.startswith(("data", "store"))]
    own = ("data=own", "data.kind=counting", "data.options={upto:60}", "store=s")
    folder = package(tmp_path)
    said = in_a_process(folder, "actcache", *words, *own)
    assert "data.kind=counting: somebodys_source.Counting" in said
    store = open_store(folder / "s").snapshot()
    assert store.store.identity.token_stream["data"] == {
        "kind": "counting",
        "content": {"upto": 60, "version": 1},
        "max_samples": None,
    }
    docs = {int(k) for s in store.segments for k in s.tokens().doc}
    assert docs == {int(doc_key(f"number/{i}")) for i in range(60) if i % 7}
    train = (*TRAIN, "sae.name=half_sae", "+sae.share=0.25", "eval.metrics=[busiest]")
    table = in_a_process(folder, "saetrain", "store=s", "hook=resid.1", "report=false", *train)
    (run_dir,) = (p.parent for p in (folder / "runs").rglob("run.json"))
    scores = json.loads((run_dir / "eval.json").read_text())
    assert scores["metrics"] == {"busiest": busiest(run_dir, folder / "s", "resid.1")}
    assert scores["formulas"]["busiest"] == "max_i n_i"
    assert "busiest/share" in table
    saved = json.loads((run_dir / "sae" / "sae.json").read_text())
    assert saved["source"]["architecture"] == "half_sae"
    assert saved["source"]["sae"]["share"] == 0.25
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["loss/reconstruction"] > 0


# -- metrics ---------------------------------------------------------------------------------------


def test_a_metric_in_a_file_from_the_command_line(  # F37
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    planted_store(store, segments=(1024,))
    (tmp_path / "mine.py").write_text(METRIC)
    words = ("eval.metrics=[busiest]", "metrics_path=[mine.py]")
    every = ("eval.every_steps=3", "wandb.mode=disabled")
    assert command("store=store", *TRAIN, *words, *every) == 0
    (run_dir,) = (p.parent for p in Path("runs").rglob("run.json"))
    want = busiest(run_dir, store, "resid.2")
    assert json.loads((run_dir / "eval.json").read_text())["metrics"] == {"busiest": want}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "eval/busiest/share" in r] == [3, 6, 9]
    page = (run_dir / "report.html").read_text()
    assert "metrics.busiest.share" in page
    assert "mine.py" not in page
    # A metric that was written after the run.
    (tmp_path / "later.py").write_text(METRIC.replace("busiest", "another"))
    later = ("eval.metrics=[another]", "metrics_path=[later.py]")
    capsys.readouterr()
    assert command("evaluate", str(run_dir), *later) == 0
    assert "another/share" in capsys.readouterr().out
    both = json.loads((run_dir / "eval.json").read_text())["metrics"]
    assert both == {"busiest": want, "another": want}


BAD_METRICS = {
    "taken": (METRIC.replace('"busiest"', '"fve"'), r"the name is taken \(built in\)"),
    "no compute": (METRIC.replace("compute", "calculate"), "Busiest does not define compute"),
    "no metric": (METRIC.replace("(Metric)", ""), "not a subclass of saetrain.evals.own.Metric"),
    "arguments": (METRIC.replace("__init__(self", "__init__(self, k"), "must not need arguments"),
    "name": (METRIC.replace('"busiest"', '"Busiest one"'), "expected a name in lower_snake_case"),
    "other": (METRIC.replace('"busiest"', '"busyest"'), "'busiest' .* Did you mean busyest"),
}


@pytest.mark.parametrize("case", BAD_METRICS)
def test_bad_metrics(tmp_path: Path, case: str) -> None:
    code, message = BAD_METRICS[case]
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        make_metrics(["busiest"], [tmp_path / "mine.py"])


def test_metrics_of_one_name_in_two_files_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(METRIC)
    with pytest.raises(ConfigError, match=r"'busiest': mine_\w+\.Busiest: the name is taken"):
        make_metrics(["busiest"], [tmp_path / "a", tmp_path / "b"])


def test_a_bad_metric_ends_the_command_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (("eval.metrics=[busiest]",), "eval.metrics: 'busiest' is not a known metric"),
        (("metrics_path=[nowhere.py]",), "metrics_path: nowhere.py does not exist"),
    ):
        assert command("store=nowhere", *TRAIN, *words) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [("float('nan')", "gave nan"), ("'much'", "gave 'much', expected a number")],
)
def test_a_metric_must_give_finite_numbers(tmp_path: Path, value: str, message: str) -> None:
    code = METRIC[: METRIC.index("        return {")] + f"        return {value}\n"
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(TrainingError, match=f"eval.metrics: busiest {message}"):
        results(make_metrics(["busiest"], [tmp_path / "mine.py"]))


# -- data sources ----------------------------------------------------------------------------------


def own_data(path: Path, **more: Any) -> DataSettings:
    path.write_text(SOURCE)
    return DataSettings(kind="counting", sources_path=(str(path),), **more)


def test_a_source_in_a_file_gives_the_texts_it_was_written_for(  # F37
    tmp_path: Path, asked: Any
) -> None:
    """The same tokens as from parquet; more of them continue the store; nothing computed twice."""
    data = own_data(tmp_path / "mine.py", options={"upto": 50})
    first = cache(asked(data=data, tokens=100))
    assert 100 <= first.tokens < 300
    whole = cache(asked(data=data))
    assert whole.store.identity.store_id == first.store.identity.store_id
    assert whole.tokens == first.tokens + whole.computed
    assert cache(asked(data=data)).computed == 0
    tables = [s.tokens() for s in whole.store.snapshot().segments]
    starts = sum(int(((t.flags & FLAG_DOC_START) > 0).sum()) for t in tables)
    assert starts == sum(1 for i in range(50) if i % 7)
    other = replace(data, options={"upto": 51})
    assert cache(asked(data=other, store=str(tmp_path / "b"))).store.identity.store_id != (
        first.store.identity.store_id
    )


def test_units_of_a_source_are_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_sources, "UNIT_DOCUMENTS", 8)
    source = open_source(own_data(tmp_path / "mine.py", options={"upto": 30}, max_samples=20))
    units = list(source.units(1))
    assert [(u.number, u.first, u.count) for u in units] == [(0, 0, 8), (1, 8, 8), (2, 16, 4)]
    ids = [[d.id for d in source.read(u)] for u in reversed(units)]
    assert sorted(i for some in ids for i in some) == sorted(
        f"number/{i}" for i in range(20) if i % 7
    )
    endless = open_source(own_data(tmp_path / "mine.py", options={"upto": 10}))
    sizes = [len(list(endless.read(u))) for u, _ in zip(endless.units(1), range(3), strict=False)]
    assert sizes == [6, 2, 0]


BAD_SOURCES = {
    "taken": (SOURCE.replace('"counting"', '"hub"'), {}, r"the name is taken \(built in\)"),
    "no content": (SOURCE.replace("content", "contents"), {}, "does not define content"),
    "no source": (SOURCE.replace("(OwnSource)", ""), {}, "not a subclass of actcache.own_sources"),
    "name": (SOURCE.replace('"counting"', '"to count"'), {}, "a name in lower_snake_case"),
    "other": (SOURCE.replace('"counting"', '"countings"'), {}, "Did you mean countings"),
    "options": (SOURCE, {"options": {"up": 3}}, r"data\.options=.*'up'.* takes \(upto: int = 40\)"),
    "empty": (SOURCE.replace('{"upto": self.upto, "version": 1}', "{}"), {}, "gave {}, expected"),
    "no json": (SOURCE.replace('"version": 1', '"v": {1}'), {}, r"content\(\) is not JSON"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources(tmp_path: Path, case: str) -> None:
    code, more, message = BAD_SOURCES[case]
    data = own_data(tmp_path / "mine.py", **more)
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(DataError, match=message):
        open_source(data)


def test_what_is_no_document_is_refused(tmp_path: Path) -> None:
    data = own_data(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text(SOURCE.replace("Document(f", "(f"))
    source = open_source(data)
    with pytest.raises(DataError, match=r"documents\(\) gave .*expected actcache\.sources"):
        list(source.read(next(source.units(1))))


def test_settings_of_sources_that_cannot_work(tmp_path: Path, tiny_parquet: Path) -> None:
    for name, value in (("options", {"a": 1}), ("sources_path", ("x.py",))):
        with pytest.raises(DataError, match=rf"data\.{name} has no effect with data\.kind=parquet"):
            open_source(DataSettings(files=str(tiny_parquet), **{name: value}))
    for path, message in (("no.py", "does not exist"), (".", "has no Python file")):
        with pytest.raises(DataError, match=rf"data\.sources_path: .*{message}"):
            open_source(DataSettings(kind="counting", sources_path=(str(tmp_path / path),)))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="is not a Python file"):
        open_source(DataSettings(kind="counting", sources_path=(str(tmp_path / "a.txt"),)))


# -- SAEs ------------------------------------------------------------------------------------------

BAD_SAES = {
    "not frozen": (SAE.replace("frozen=True, ", ""), "frozen"),
    "no dataclass": (SAE.replace("@dataclass(frozen=True, kw_only=True)", ""), "frozen dataclass"),
    "no SAE": (SAE.replace("(Autoencoder)", ""), "is not a subclass of saetrain.saes.base.SAE"),
    "abstract": (
        SAE.replace("(Autoencoder)", "(SAE)").replace("import register", "import SAE, register"),
        "Half does not define decode, encode, to_inference",
    ),
    "taken": (SAE.replace('"half_sae"', '"gated"'), r"'gated' is taken by saetrain\.saes\.gated"),
}


@pytest.mark.parametrize("case", BAD_SAES)
def test_bad_saes(tmp_path: Path, case: str) -> None:
    code, message = BAD_SAES[case]
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises((ConfigError, TypeError), match=message):
        load_all([tmp_path / "mine.py"])


def test_a_package_of_several_files_is_one_module(tmp_path: Path) -> None:  # F36
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .inner import Half\n")
    (folder / "inner.py").write_text(SAE)
    config = make_config({"name": "half_sae", "n_latents": 9, "activation": "relu"} | L1, [folder])
    assert config.share == 0.5


L1 = {"penalty": {"name": "l1", "coefficient": 0.1}}


def test_a_package_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path)
    (tmp_path / "somebodys_metric.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"package somebodys 1\.0 .*no_such_module.*uninstall"):
        make_metrics(["busiest"])


def test_a_file_that_fails_fails_again(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('not today')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not today"):
            load_all([tmp_path / "mine.py"])
