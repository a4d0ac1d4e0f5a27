"""The demo corpus: the interpreter's own documentation as one parquet file, made offline.

Language-reference topics come from `pydoc_data.topics`; docstrings of Python modules are read from
their source with `ast`, so no module is run; only compiled modules are imported. A class with its
methods is one document, a long function is one, a module's page holds its docstring and its short
functions. Topics that quote each other keep each paragraph once, in the shortest topic that has it,
so that held-out documents are not repeated in the training ones.

Cost: about 3 s, 2.3 M characters for CPython 3.11. Equal bytes for equal Python and pyarrow: rows
are ordered by a hash of their id (any prefix is a fair sample) and nothing names time or place.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import platform
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from actcache.errors import ActcacheError

FILE_NAME = "pydocs.parquet"
ROW_GROUP = 512  # documents
OWN_PAGE = 300  # characters from which a function or a class is a document of its own
SHORTEST = 120  # characters of a document worth keeping
# Jokes, programs rather than libraries, and what answers an import with output.
SKIPPED = {"antigravity", "this", "idlelib", "turtledemo", "test", "pydoc_data", "readline"}
SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.string())])
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One row: `id` such as "topics/assert" or "json.JSONDecoder"."""

    id: str
    source: str  # "pydoc_data.topics" or "docstring"
    text: str


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """What a corpus file says of itself in its footer."""

    documents: int
    characters: int
    python: str


def build_corpus(folder: Path, progress: bool = True) -> Path:
    """Write `folder`/pydocs.parquet (columns id, source, text) unless it is there; its path.

    Raises ActcacheError where the interpreter has been stripped of its documentation.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, documents(progress))
    return path


def corpus_report(path: Path) -> CorpusReport:
    """Documents, characters and Python version, from the footer of a corpus file."""
    about = pq.read_schema(path).metadata
    return CorpusReport(
        documents=int(about[b"documents"]),
        characters=int(about[b"characters"]),
        python=about[b"python"].decode(),
    )


def documents(progress: bool = True) -> list[Document]:
    """Every document, ordered by a hash of its id."""
    found = [Document(id=k, source="pydoc_data.topics", text=v) for k, v in _topics().items()]
    pages = _docstrings(progress)
    found += [Document(id=k, source="docstring", text=v) for k, v in pages.items()]
    if sum(len(d.text) for d in found) < 200_000:
        raise ActcacheError(
            f"data=pydocs: this Python ({sys.executable}) carries almost no docstrings; "
            "use one that is not stripped and not run with -OO, or data=parquet"
        )
    return sorted(found, key=lambda d: hashlib.sha256(d.id.encode()).digest())


def _write(path: Path, rows: list[Document]) -> None:
    about = {
        "documents": str(len(rows)),
        "characters": str(sum(len(d.text) for d in rows)),
        "python": platform.python_version(),
    }
    columns = [[d.id for d in rows], [d.source for d in rows], [d.text for d in rows]]
    table = pa.table(columns, schema=SCHEMA.with_metadata(about))
    # A name of its own per process: two builders never write into one file.
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, part, row_group_size=ROW_GROUP, compression="zstd")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# -- topics ---------------------------------------------------------------------------------------


def _topics() -> dict[str, str]:
    """ "topics/NAME" -> text; a paragraph stays in the shortest topic that has it."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda n: (len(topics[n]), n)):
        paragraphs = re.split(r"\n\s*\n", topics[name].strip("\n"))
        fresh = [p for p in paragraphs if " ".join(p.split()) not in seen]
        seen.update(" ".join(p.split()) for p in paragraphs)
        text = "\n\n".join(fresh)
        if len(text) >= SHORTEST:
            kept[f"topics/{name}"] = text
    return kept


# -- docstrings -----------------------------------------------------------------------------------


@dataclass
class _Pages:
    """Collects documents; a docstring that was seen before is not taken again."""

    texts: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def entry(self, heading: str, doc: object) -> str:
        """ "heading + docstring", or "" where there is nothing new."""
        text = inspect.cleandoc(doc).rstrip() if isinstance(doc, str) else ""
        if not text or text in self.seen:
            return ""
        self.seen.add(text)
        return f"{heading}\n\n{_ADDRESS.sub('', text)}"

    def add(self, module: str, entries: Iterable[tuple[str, str]]) -> None:
        """File (id, text) entries: long ones by themselves, the rest on the module's page."""
        page = []
        for key, text in entries:
            if len(text) >= OWN_PAGE and key != module:
                self.texts.setdefault(key, text)
            elif text:
                page.append(text)
        if sum(map(len, page)) >= SHORTEST:
            self.texts.setdefault(module, "\n\n\n".join(page))


def _docstrings(progress: bool) -> dict[str, str]:
    names = sorted(sys.stdlib_module_names - SKIPPED)
    pages = _Pages()
    for name in tqdm(names, desc="reading docstrings", unit="module", disable=not progress):
        files = list(_source_files(name))
        for module, file in files:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes in old library code
                tree = ast.parse(file.read_bytes())
            pages.add(module, _source_entries(pages, module, tree))
        if not files:
            _add_compiled(pages, name)
    return pages.texts


def _source_files(name: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of a standard-library module and of its submodules, tests left out."""
    lib = Path(sysconfig.get_path("stdlib"))
    single = lib / f"{name}.py"
    for file in [single] if single.exists() else sorted((lib / name).rglob("*.py")):
        parts = file.relative_to(lib).with_suffix("").parts
        if not {"test", "tests", "__main__"} & set(parts):
            yield ".".join(p for p in parts if p != "__init__"), file


def _source_entries(pages: _Pages, module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    yield module, pages.entry(f"module {module}", ast.get_docstring(tree))
    for node in _definitions(tree.body):
        key = f"{module}.{node.name}"
        yield key, "\n\n".join(_source_texts(pages, node, f"{module}."))


def _source_texts(pages: _Pages, node: ast.stmt, prefix: str = "") -> Iterator[str]:
    """Texts of a function, or of a class followed by its members."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(b) for b in node.bases)
        heading = f"class {prefix}{node.name}({bases})"
        texts = [pages.entry(heading, ast.get_docstring(node))]
        for member in _definitions(node.body):
            texts += _source_texts(pages, member)
        if any(texts):
            yield from filter(None, texts if texts[0] else [heading, *texts[1:]])
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        heading = f"{prefix}{node.name}({ast.unparse(node.args)})"
        yield from filter(None, [pages.entry(heading, ast.get_docstring(node))])


def _definitions(
    body: Iterable[ast.stmt],
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions of a body, also those under `if`, `try` and `with`."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "handlers", "orelse", "finalbody"):
                inner: list[ast.AST] = getattr(node, part, [])
                for item in inner:
                    handler = isinstance(item, ast.ExceptHandler)
                    yield from _definitions(item.body if handler else [item])  # type: ignore


# -- compiled modules -----------------------------------------------------------------------------


def _add_compiled(pages: _Pages, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated modules
        try:
            module = importlib.import_module(name)
        except ImportError:
            return  # of another platform, or not built
    pages.add(name, _compiled_entries(pages, module))


def _compiled_entries(pages: _Pages, module: types.ModuleType) -> Iterator[tuple[str, str]]:
    name = module.__name__
    yield name, pages.entry(f"module {name}", module.__doc__)
    for _, item in sorted(vars(module).items()):
        if not isinstance(item, (type, types.BuiltinFunctionType)):
            continue
        home = item.__module__ or name
        if home.split(".")[0] not in sys.stdlib_module_names:
            continue  # put there by somebody else
        key = f"{home}.{item.__qualname__}"
        texts = _class_texts(pages, item, key) if isinstance(item, type) else [_about(pages, item)]
        yield key, "\n\n".join(filter(None, texts))


def _class_texts(pages: _Pages, cls: type, key: str) -> list[str]:
    heading = f"class {key}"
    # Slot wrappers say the same of every type ("Return repr(self).").
    members = [
        _about(pages, member)
        for _, member in sorted(vars(cls).items())
        if isinstance(
            member,
            (types.MethodDescriptorType, types.BuiltinFunctionType, types.GetSetDescriptorType),
        )
    ]
    own = pages.entry(heading, cls.__doc__)
    return [own or heading, *members] if own or any(members) else []


def _about(pages: _Pages, item: object) -> str:
    signature = getattr(item, "__text_signature__", None) or ""
    name = getattr(item, "__name__", "")
    return pages.entry(f"{name}{signature.replace('$', '')}", getattr(item, "__doc__", None))
