"""Where documents come from: parquet files, or a data set streamed with `datasets`.

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
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from actcache.errors import DataError
from actcache.store.ids import file_digest
from actcache.store.records import did_you_mean

STREAM_ROWS = 2048  # rows of a streamed unit
_DATA_SUFFIXES = {".parquet", ".json", ".jsonl", ".csv", ".txt", ".arrow", ".gz", ".zst"}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which documents to read. `conf/data/*.yaml` are examples."""

    kind: Literal["parquet", "hub", "pydocs"] = "parquet"
    files: tuple[str, ...] | str = ()  # parquet: files, folders or globs
    dataset: str | None = None  # hub: repository id or local folder
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str | None = None  # a column, or several joined: "instruction+output"
    id_column: str | None = None  # names a document; without it the text itself does
    max_samples: int | None = None  # documents to read at most


@dataclass(frozen=True)
class Document:
    """One text and the id that its held-out side and its key follow from."""

    id: str
    text: str


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
    def identity(self) -> Mapping[str, Any]:
        """Content, not location; part of token_stream_id."""

    @property
    def notes(self) -> Sequence[str]:
        """What was found out and should be said aloud."""

    def units(self, unit_bytes: int) -> Iterator[Unit]:
        """Units in file order; a stream yields units until one is empty."""

    def read(self, unit: Unit) -> Iterator[Document]:
        """Documents of a unit; empty and null texts are left out."""


def open_source(settings: DataSettings) -> Source:
    """The source that `settings` describe. Raises DataError."""
    if settings.max_samples is not None and settings.max_samples < 1:
        raise DataError(f"data.max_samples: expected at least 1, got {settings.max_samples}")
    if settings.kind == "hub":
        return StreamedSource(settings)
    return ParquetSource(settings)


# -- columns ---------------------------------------------------------------------------------------


def find_text_columns(schema: pa.Schema, asked: str | None) -> tuple[tuple[str, ...], str]:
    """Columns that make up the text, and a sentence saying why these.

    Order: the one asked for; text; content; instruction + output; the first string column.
    Raises DataError listing the columns if none fits.
    """
    strings = [f.name for f in schema if _is_string(f.type)]
    listing = ", ".join(f"{f.name} ({f.type})" for f in schema) or "no columns"
    if asked is not None:
        columns = tuple(asked.split("+"))
        for column in columns:
            if column not in strings:
                raise DataError(
                    f"data.text_column={asked}: no text column {column!r}."
                    f"{did_you_mean(column, strings)} The file has: {listing}"
                )
        return columns, f"text column: {asked}"
    for columns in (("text",), ("content",), ("instruction", "output")):
        if set(columns) <= set(strings):
            return columns, f"text column: {'+'.join(columns)} (found by name)"
    if strings:
        return (strings[0],), (
            f"text column: {strings[0]} (the first column of strings; choose with data.text_column)"
        )
    raise DataError(f"the data has no column of text; it has: {listing}")


def _is_string(t: pa.DataType) -> bool:
    return bool(pa.types.is_string(t) or pa.types.is_large_string(t))


def _check_id_column(schema: pa.Schema, name: str | None) -> str | None:
    if name is not None and name not in schema.names:
        raise DataError(
            f"data.id_column={name}: no such column.{did_you_mean(name, schema.names)} "
            f"The file has: {', '.join(schema.names)}"
        )
    return name


def _document(row: Mapping[str, Any], columns: Sequence[str], id_column: str | None) -> Document:
    text = "\n".join(str(row[c]) for c in columns if row[c])
    return Document(text if id_column is None else str(row[id_column]), text)


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
        self._columns, note = find_text_columns(schema, settings.text_column)
        self._id_column = _check_id_column(schema, settings.id_column)
        self._max = settings.max_samples
        self.notes: Sequence[str] = (note,)
        self.identity: Mapping[str, Any] = {
            "kind": "parquet",
            "files": [{"bytes": f.stat().st_size, "sha256": file_digest(f)} for f in self._files],
            "text_columns": list(self._columns),
            "id_column": self._id_column,
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
        columns = [*self._columns, *([self._id_column] if self._id_column else [])]
        left = unit.max_rows
        with pq.ParquetFile(self._files[unit.file]) as file:
            groups = range(unit.first, unit.first + unit.count)
            for batch in file.iter_batches(256, row_groups=list(groups), columns=columns):
                rows = batch.to_pylist()
                rows = rows if left is None else rows[:left]
                left = None if left is None else left - len(rows)
                for row in rows:
                    if any(row[c] for c in self._columns):
                        yield _document(row, self._columns, self._id_column)


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
        first = next(iter(self._stream()), None)
        if first is None:
            raise DataError(f"data.dataset={settings.dataset}: split {settings.split} has no rows")
        schema = pa.Table.from_pylist([first]).schema
        self._columns, note = find_text_columns(schema, settings.text_column)
        self._id_column = _check_id_column(schema, settings.id_column)
        self.notes: Sequence[str] = (note,)
        self.identity: Mapping[str, Any] = {
            "kind": "hub",
            "dataset": _content_of(settings),
            "subset": settings.subset,
            "split": settings.split,
            "text_columns": list(self._columns),
            "id_column": self._id_column,
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
        for row in self._stream().skip(unit.first).take(unit.count):
            if any(row[c] for c in self._columns):
                yield _document(row, self._columns, self._id_column)

    def _stream(self) -> Any:
        import datasets

        s = self._settings
        assert s.dataset is not None  # __init__
        try:
            return datasets.load_dataset(
                s.dataset, s.subset, split=s.split, revision=s.revision, streaming=True
            )
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
