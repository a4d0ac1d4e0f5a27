"""The demo corpus: what it holds, that it is the same everywhere, and how it is written."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow.parquet as pq
import pytest

from actcache.demo import corpus
from actcache.demo.corpus import Document, build_corpus, corpus_report
from actcache.errors import ActcacheError
from actcache.store.split import doc_key, held_out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"), progress=False)


@pytest.fixture(scope="module")
def rows(built: Path) -> dict[str, dict[str, str]]:
    return {r["id"]: r for r in pq.read_table(built).to_pylist()}


def test_size_columns_and_report(built: Path, rows: dict[str, dict[str, str]]) -> None:
    file = pq.ParquetFile(built)
    assert file.schema_arrow.names == ["id", "source", "text"]
    assert file.num_row_groups > 2
    assert len(rows) == file.metadata.num_rows  # ids are unique
    characters = sum(len(r["text"]) for r in rows.values())
    assert 1_500_000 < characters < 4_000_000
    report = corpus_report(built)
    assert (report.documents, report.characters) == (len(rows), characters)
    assert {r["source"] for r in rows.values()} == {"pydoc_data.topics", "docstring"}


def test_documents_are_the_interpreters_own_words(rows: dict[str, dict[str, str]]) -> None:
    assert json.loads.__doc__ is not None
    loads = rows["json.loads"]["text"]
    assert loads.startswith("json.loads(s, *, cls=None")
    for line in json.loads.__doc__.split("\n"):
        assert line.strip() in loads
    # A class with its methods is one document, of Python and of C code alike.
    assert "raw_decode(self, s, idx=0)" in rows["json.decoder.JSONDecoder"]["text"]
    assert str(str.partition.__doc__) in rows["builtins.str"]["text"]
    assert rows["topics/assert"]["text"].strip() in topics["assert"]


def test_no_text_twice(rows: dict[str, dict[str, str]]) -> None:
    assert len({r["text"] for r in rows.values()}) == len(rows)
    # "compound" quotes "with", "for", … in full; each paragraph is kept once.
    homes: dict[str, set[str]] = {}
    for row in rows.values():
        if row["source"] == "pydoc_data.topics":
            for paragraph in re.split(r"\n\s*\n", row["text"]):
                homes.setdefault(" ".join(paragraph.split()), set()).add(row["id"])
    assert len(homes) > 1000
    assert {p: ids for p, ids in homes.items() if len(ids) > 1} == {}


def test_nothing_names_this_machine(rows: dict[str, dict[str, str]]) -> None:
    for row in rows.values():
        assert sys.prefix not in row["text"]
        assert sys.base_prefix + "/" not in row["text"]
        assert not re.search(r" at 0x[0-9a-f]{6,}", row["text"]), row["id"]


def test_any_prefix_is_a_fair_sample(rows: dict[str, dict[str, str]]) -> None:
    """Topics among the first n documents stay within 4 sigma of the hypergeometric mean."""
    topic = np.array([r["source"] == "pydoc_data.topics" for r in rows.values()])
    p, size = topic.mean(), len(topic)
    for n in (size // 8, size // 4, size // 2):
        sigma = (n * p * (1 - p) * (size - n) / (size - 1)) ** 0.5
        assert abs(topic[:n].sum() - n * p) < 4 * sigma


def test_split_holds_out_about_five_percent(rows: dict[str, dict[str, str]]) -> None:
    keys = np.array([doc_key(i) for i in rows], dtype=np.uint64)
    share = held_out(keys, 0.05).mean()
    sigma = (0.05 * 0.95 / len(rows)) ** 0.5
    assert abs(share - 0.05) < 4 * sigma


def test_equal_bytes_from_another_process(tmp_path: Path) -> None:
    """With another hash seed and other modules imported before; in processes of their own, since
    libraries that other tests have loaded here replace parts of the standard library."""
    code = (
        "{}import sys, pathlib\n"
        "from actcache.demo.corpus import build_corpus\n"
        "print(build_corpus(pathlib.Path(sys.argv[1]), progress=False))\n"
    )
    odd = {"PYTHONHASHSEED": "77", "LANG": "C", "COLUMNS": "40"}
    found = []
    for name, more, first in (("plain", {}, ""), ("odd", odd, "import json, logging.config\n")):
        result = subprocess.run(
            [sys.executable, "-c", code.format(first), str(tmp_path / name)],
            env={**os.environ, **more},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        found.append(_digest(Path(result.stdout.strip())))
    assert found[0] == found[1]


def test_never_rebuilt_if_present(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(progress: bool) -> list[Document]:
        raise AssertionError("rebuilt")

    monkeypatch.setattr(corpus, "documents", refuse)
    before = built.stat().st_mtime_ns
    assert build_corpus(built.parent) == built
    assert built.stat().st_mtime_ns == before


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(table: object, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"PAR1 half")
        raise OSError("no space left")

    monkeypatch.setattr(corpus, "documents", lambda progress: [])
    monkeypatch.setattr("pyarrow.parquet.write_table", half)
    with pytest.raises(OSError, match="no space left"):
        build_corpus(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stripped_interpreter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_docstrings", lambda progress: {})
    monkeypatch.setattr(corpus, "_topics", dict)
    with pytest.raises(ActcacheError, match="data=parquet"):
        corpus.documents(progress=False)


def test_source_entries_against_a_hand_made_module() -> None:
    source = '''
"""Module words."""
try:
    import nothing
except ImportError:
    class A(Base):
        def plain(self): pass
        def m(self, x=1):
            """Does   m.

            More.
            """
if True:
    async def f(a, *, b): "Says f."
else:
    def g(): "Says g."
def again(): "Says f."
'''
    entries = dict(corpus._source_entries(corpus._Pages(), "mod", ast.parse(source)))
    assert entries == {
        "mod": "module mod\n\nModule words.",
        "mod.A": "class mod.A(Base)\n\nm(self, x=1)\n\nDoes   m.\n\nMore.",
        "mod.f": "mod.f(a, *, b)\n\nSays f.",
        "mod.g": "mod.g()\n\nSays g.",
        "mod.again": "",  # said before
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
