"""Data sources of users' own: a class under `@register_source("NAME")`, chosen by `data.kind=NAME`.

It is found in a file or package that data.sources_path names, or in an installed package by the
entry point group `actcache.sources`. It gives texts by number, the same each time, so that many
writers, an interruption or a larger token budget meet the same units; and it says what names its
content, because that becomes part of every store's identity.

Cost: a unit is a run of UNIT_DOCUMENTS texts, and `documents(first)` is called for each.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, TypeVar

from actcache.columns import Columns, Document
from actcache.errors import DataError
from actcache.sources import KINDS, DataSettings, Unit
from actcache.store import plugins
from actcache.store.ids import canonical_json
from actcache.store.records import did_you_mean

ENTRY_POINTS = "actcache.sources"
UNIT_DOCUMENTS = 2048


class OwnSource(ABC):
    """Base class. `__init__` takes what users write under `data.options`, as keywords."""

    kind: ClassVar[str]

    @abstractmethod
    def content(self) -> Mapping[str, Any]:
        """What names the data: a digest, a version, a commit; JSON, without paths or host names.

        Other texts must give another content, or two stores would be taken for one.
        """

    @abstractmethod
    def documents(self, first: int) -> Iterator[Document]:
        """Documents number `first`, `first` + 1, …, to the end of the data; the same each time.

        A `Document` has an id, from which its side of the held-out split follows, and a text.
        """


class OwnUnits:
    """An `OwnSource` as the rest of actcache sees sources."""

    def __init__(self, source: OwnSource, settings: DataSettings) -> None:
        """DataError if what the source says of its content cannot be an identity."""
        self._source, self._max = source, settings.max_samples
        self.columns = Columns(text=("text",), id="id")
        self.notes: Sequence[str] = (f"data.kind={source.kind}: {plugins.where_of(type(source))}",)
        self.identity: Mapping[str, Any] = {
            "kind": source.kind,
            "content": _content(source),
            "max_samples": self._max,
        }

    def units(self, unit_bytes: int) -> Iterator[Unit]:
        """Runs of UNIT_DOCUMENTS documents; how many there are is known only at the end."""
        first = 0
        while self._max is None or first < self._max:
            left = UNIT_DOCUMENTS if self._max is None else self._max - first
            yield Unit(first // UNIT_DOCUMENTS, 0, first, min(UNIT_DOCUMENTS, left))
            first += UNIT_DOCUMENTS

    def read(self, unit: Unit) -> Iterator[Document]:
        """Documents of a unit that have a text. DataError for anything else than a Document."""
        for document in islice(self._source.documents(unit.first), unit.count):
            if not isinstance(document, Document) or not isinstance(document.text, str):
                raise DataError(
                    f"data.kind={self._source.kind}: documents() gave {document!r:.80}, expected "
                    "actcache.sources.Document(id, text)"
                )
            if document.text:
                yield document


_REGISTRY: dict[str, type[OwnSource]] = {}
S = TypeVar("S", bound=type[OwnSource])


def register_source(name: str) -> Callable[[S], S]:
    """Class decorator: make a source known as `data.kind=NAME`.

    DataError if the name is taken or no lower_snake_case, or if the class lacks the contract.
    """

    def add(cls: S) -> S:
        if wrong := plugins.check_class("data source", name, cls, OwnSource, _REGISTRY, KINDS):
            raise DataError(wrong)
        cls.kind = name
        _REGISTRY[name] = cls
        return cls

    return add


def open_own(settings: DataSettings) -> OwnUnits:
    """The source that `settings.kind` names. DataError if there is none, or for wrong options."""
    plugins.load(ENTRY_POINTS, settings.sources_path, "data.sources_path", DataError)
    if settings.kind not in _REGISTRY:
        known = sorted((*KINDS, *_REGISTRY))
        raise DataError(
            f"data.kind={settings.kind!r} is not known.{did_you_mean(settings.kind, known)} "
            f"Known: {', '.join(known)}. Your own: name its file in data.sources_path=[FILE.py]"
        )
    cls, options = _REGISTRY[settings.kind], dict(settings.options or {})
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as e:
        raise DataError(
            f"data.options={options}: {e}; data.kind={settings.kind} takes {inspect.signature(cls)}"
        ) from None
    return OwnUnits(cls(**options), settings)


def _content(source: OwnSource) -> Mapping[str, Any]:
    found = source.content()
    try:
        canonical_json(found)
    except (TypeError, ValueError) as e:
        raise DataError(f"data.kind={source.kind}: content() is not JSON: {e}") from None
    if not isinstance(found, Mapping) or not found:
        raise DataError(
            f"data.kind={source.kind}: content() gave {found!r}, expected what names the data, "
            'such as {"version": 3}'
        )
    return dict(found)
