"""Where documents come from: parquet files, a data set streamed with `datasets`, or a source of the
user's own (`actcache.own_sources`).

A source is a deterministic list of input units. A unit is what one writer turns into segments; it
never depends on who runs it, so a run that was interrupted, or that had other writers, continues
with the same contexts. Parquet units are runs of row groups of one file; streamed units are runs
of rows.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from actcache.columns import Columns, Document, find_columns, find_text_columns
from actcache.errors import DataError
from actcache.store.ids import file_digest

__all__ = ["Columns", "DataSettings", "Document", "Source", "Unit", "find_text_columns"]

KINDS = ("parquet", "hub", "pydocs")
STREAM_ROWS = 2048  # rows of a streamed unit
_DATA_SUFFIXES = {".parquet", ".json", ".jsonl", ".csv", ".txt", ".arrow", ".gz", ".zst"}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which documents to read. `conf/data/*.yaml` are examples."""

    kind: str = "parquet"  # one of KINDS, or a source of your own: actcache.own_sources
    files: tuple[str, ...] | str = ()  # parquet: files, folders or globs
    dataset: str | None = None  # hub: repository id or local folder
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str | None = None  # a column, or several joined: "instruction+output"
    messages_column: str | None = None  # chats: a list of {role, content}
    images_column: str | None = None  # bytes of the images that the messages show
    chat_template: str | None = None  # file with a Jinja template; None: the host's own
    id_column: str | None = None  # names a document; without it the text itself does
    max_samples: int | None = None  # documents to read at most
    sources_path: tuple[str, ...] = ()  # files or folders with sources of your own
    options: dict[str, Any] | None = None  # what your own source takes


@dataclass(frozen=True)
class Unit:
    """A run of rows that one writer turns into segments."""

    number: int
    file: int  # index into the source's files; 0 for a stream
    first: int  # first row group, or first row of a stream
    count: int  # row groups, or rows
    bytes: int = 0  # uncompressed, to judge how much is left; 0: unknown
    max_rows: int | None = None  # read no further than this many rows

    def __str__(self) -> str:
        return f"unit {self.number} (file {self.file}, from {self.first}, {self.count} long)"


class Source(Protocol):
    """Deterministic documents in units."""

    @property
    def columns(self) -> Columns:
        """What a document is made of."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Content, not location; part of token_stream_id."""

    @property
    def notes(self) -> Sequence[str]:
        """What was found out and should be said aloud."""

    def units(self, unit_bytes: int) -> Iterator[Unit]:
        """Units in file order; a stream yields units until one is empty."""

    def read(self, unit: Unit) -> Iterator[Document]:
        """Documents of a unit; empty and null ones are left out. DataError for a broken one."""


def open_source(settings: DataSettings) -> Source:
    """The source that `settings` describe. Raises DataError."""
    if settings.max_samples is not None and settings.max_samples < 1:
        raise DataError(f"data.max_samples: expected at least 1, got {settings.max_samples}")
    if settings.kind not in KINDS:
        from actcache.own_sources import open_own  # it reads this module

        return open_own(settings)
    for name in ("sources_path", "options"):
        if getattr(settings, name):
            raise DataError(
                f"data.{name} has no effect with data.kind={settings.kind}, which is built in: "
                "choose your own source with data=own data.kind=NAME, or leave it out"
            )
    if settings.kind == "hub":
        return StreamedSource(settings)
    return ParquetSource(settings)


def _columns(schema: pa.Schema, settings: DataSettings) -> Columns:
    return find_columns(
        schema,
        text=settings.text_column,
        messages=settings.messages_column,
        images=settings.images_column,
        id=settings.id_column,
    )


# -- parquet ---------------------------------------------------------------------------------------


class ParquetSource:
    """Documents from local parquet files, read by row groups."""

    def __init__(self, settings: DataSettings) -> None:
        """Opens every footer. Raises DataError for missing, empty, unreadable or textless files."""
        self._files = expand(settings.files)
        self._meta = [_footer(f) for f in self._files]
        schema = pq.read_schema(self._files[0])
        for file in self._files[1:]:
            if not set(schema.names) <= set(pq.read_schema(file).names):
                raise DataError(f"{file} has other columns than {self._files[0]}")
        if not sum(m.num_rows for m in self._meta):
            raise DataError(f"{self._files[0]}: the parquet data has no rows")
        self.columns = _columns(schema, settings)
        self._max = settings.max_samples
        self.notes: Sequence[str] = (self.columns.note,)
        self.identity: Mapping[str, Any] = {
            "kind": "parquet",
            "files": [{"bytes": f.stat().st_size, "sha256": file_digest(f)} for f in self._files],
            **self.columns.identity,
            "max_samples": self._max,
        }

    def units(self, unit_bytes: int) -> Iterator[Unit]:
        """Consecutive row groups of one file until they hold `unit_bytes` of uncompressed data."""
        number, left = 0, self._max
        for f, meta in enumerate(self._meta):
            first = size = rows = 0
            for group in range(meta.num_row_groups):
                size += meta.row_group(group).total_byte_size
                rows += meta.row_group(group).num_rows
                if size < unit_bytes and group + 1 < meta.num_row_groups:
                    continue
                if left is not None and left <= 0:
                    return
                limit = None if left is None else min(rows, left)
                yield Unit(number, f, first, group + 1 - first, size, limit)
                left = None if left is None else left - rows
                number, first, size, rows = number + 1, group + 1, 0, 0

    def read(self, unit: Unit) -> Iterator[Document]:
        left = unit.max_rows
        at_once = 256 if self.columns.images is None else 16
        with pq.ParquetFile(self._files[unit.file]) as file:
            groups = range(unit.first, unit.first + unit.count)
            names = list(dict.fromkeys(self.columns.names))
            for batch in file.iter_batches(at_once, row_groups=list(groups), columns=names):
                rows = batch.to_pylist()
                rows = rows if left is None else rows[:left]
                left = None if left is None else left - len(rows)
                yield from (d for d in map(self.columns.document, rows) if d is not None)


def expand(patterns: Sequence[str] | str) -> list[Path]:
    """Files named by paths, folders (their *.parquet) and globs, in sorted order per pattern."""
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            some = sorted(path.rglob("*.parquet"))
        else:
            some = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        if not some:
            raise DataError(f"data.files={pattern}: no parquet file there")
        found += some
    if not found:
        raise DataError("data.files is empty: name parquet files, a folder or a glob")
    return found


def _footer(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(f"{file} is not a readable parquet file: {e}") from None


# -- streamed --------------------------------------------------------------------------------------


class StreamedSource:
    """Rows of a Hugging Face data set, streamed in order; nothing is downloaded beforehand."""

    def __init__(self, settings: DataSettings) -> None:
        """Opens the stream. Raises DataError if the data set cannot be reached or has no text."""
        if settings.dataset is None:
            raise DataError("data=hub needs data.dataset=NAME (a repository id or a local folder)")
        self._settings = settings
        stream = self._stream()
        first = next(iter(stream), None)
        if first is None:
            raise DataError(f"data.dataset={settings.dataset}: split {settings.split} has no rows")
        known = stream.features  # without them, the first row tells
        schema = pa.Table.from_pylist([first]).schema if known is None else known.arrow_schema
        self.columns = _columns(schema, settings)
        self.notes: Sequence[str] = (self.columns.note,)
        self.identity: Mapping[str, Any] = {
            "kind": "hub",
            "dataset": _content_of(settings),
            "subset": settings.subset,
            "split": settings.split,
            **self.columns.identity,
            "max_samples": settings.max_samples,
        }

    def units(self, unit_bytes: int) -> Iterator[Unit]:
        """Runs of STREAM_ROWS rows; how many there are is known only at the end."""
        limit = self._settings.max_samples
        number = 0
        while limit is None or number * STREAM_ROWS < limit:
            first = number * STREAM_ROWS
            count = STREAM_ROWS if limit is None else min(STREAM_ROWS, limit - first)
            yield Unit(number, 0, first, count)
            number += 1

    def read(self, unit: Unit) -> Iterator[Document]:
        rows = self._stream().skip(unit.first).take(unit.count)
        yield from (d for d in map(self.columns.document, rows) if d is not None)

    def _stream(self) -> Any:
        import datasets

        s = self._settings
        assert s.dataset is not None  # __init__
        try:
            stream = datasets.load_dataset(
                s.dataset, s.subset, split=s.split, revision=s.revision, streaming=True
            )
            return stream if s.images_column is None else stream.decode(False)  # images stay bytes
        except (OSError, ValueError, RuntimeError) as e:
            raise DataError(f"data.dataset={s.dataset} cannot be opened: {e}") from e


def _content_of(settings: DataSettings) -> dict[str, Any]:
    """What names the data: file digests of a local folder, the commit of a repository."""
    folder = Path(str(settings.dataset)).expanduser()
    if folder.is_dir():
        files = sorted(p for p in folder.rglob("*") if p.suffix in _DATA_SUFFIXES)
        return {"files": [{"bytes": p.stat().st_size, "sha256": file_digest(p)} for p in files]}
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(str(settings.dataset), revision=settings.revision)
    return {"repository": settings.dataset, "commit": info.sha}
