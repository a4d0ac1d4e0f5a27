"""`actcache find`: does this work exist already, and what would a run compute?

Answers from identities alone, nothing is loaded and nothing is written. A registered store that
holds the same token stream and host is compared by hooks and tokens; of the others the nearest are
shown with a field-by-field diff.

Cost: the digests of data and weights, as at the start of a run, and one small JSON per store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from actcache.catalog import Catalog, Entry, continues, entry_of
from actcache.run import CacheSettings, Work, prepare
from actcache.store import open_store
from actcache.store.ids import diff
from actcache.store.layout import STORE_JSON

Verdict = Literal["exists", "hooks missing", "fewer tokens", "hooks missing, fewer tokens", "new"]
NEAREST = 3  # other stores to show


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Rows that a run would compute."""

    hooks: tuple[str, ...]
    tokens: int | None  # None: unknown, as many as the data gives

    def __str__(self) -> str:
        rows = "all tokens of the data" if self.tokens is None else f"{self.tokens:,} tokens"
        return f"{rows} × {', '.join(self.hooks)}"


@dataclass(frozen=True, kw_only=True)
class Near:
    """A registered store that holds other work, and in what."""

    path: str
    tokens: int
    hooks: tuple[str, ...]
    differs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The answer. `compute` is empty if everything is there."""

    verdict: Verdict
    store: str | None  # what a run without store= would continue
    tokens: int  # rows of that store
    asked: int | None  # rows asked for; None: all the data
    missing_hooks: tuple[str, ...]
    compute: tuple[Missing, ...]
    nearest: tuple[Near, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def find(settings: CacheSettings, say: Callable[[str], None] = lambda _: None) -> Found:
    """Ask the catalog for the work that `settings` describe. Raises as `run` does."""
    work = prepare(settings, say)
    catalog = Catalog(settings.catalog)
    for problem in catalog.entries()[1]:
        say(problem)
    known = [k.entry for k in catalog.known() if k.state == "ok"]
    asked = known if settings.store is None else _at(Path(settings.store).expanduser())
    same = [e for e in asked if continues(e, work.identity, work.hook_ids)]
    best = max(same, key=lambda e: e.tokens, default=None)
    others = {e.path: e for e in (*known, *asked) if best is None or e.path != best.path}
    return _compare(work, best, _nearest(work, list(others.values())))


def _at(path: Path) -> list[Entry]:
    """The store at `path`, registered or not, or nothing."""
    if not (path / STORE_JSON).exists():
        return []
    return [entry_of(open_store(path).snapshot())]


def _compare(work: Work, entry: Entry | None, nearest: tuple[Near, ...]) -> Found:
    asked, names = work.settings.tokens, tuple(p.name for p in work.points)
    held = {h.name for h in entry.hooks} if entry else set()
    missing = tuple(n for n in names if n not in held)
    left = _tokens_left(work, entry)
    rows = entry.tokens if entry else 0
    compute = []
    if entry is None:
        compute.append(Missing(hooks=names, tokens=asked))
    else:
        if missing and rows:
            compute.append(Missing(hooks=missing, tokens=min(rows, asked or rows)))
        if left != 0:
            compute.append(Missing(hooks=names, tokens=left))
    return Found(
        verdict=_verdict(entry is None, bool(missing), left != 0),
        store=entry.path if entry else None,
        tokens=rows,
        asked=asked,
        missing_hooks=missing,
        compute=tuple(compute),
        nearest=nearest,
    )


def _verdict(new: bool, hooks: bool, tokens: bool) -> Verdict:
    if new:
        return "new"
    if hooks:
        return "hooks missing, fewer tokens" if tokens else "hooks missing"
    return "fewer tokens" if tokens else "exists"


def _tokens_left(work: Work, entry: Entry | None) -> int | None:
    """Rows the store lacks; None if it lacks an unknown number, 0 if it lacks none."""
    if entry is None or work.settings.tokens is not None:
        return max(0, (work.settings.tokens or 0) - entry.tokens) if entry else None
    if work.source.identity["kind"] != "parquet":
        return None  # the end of a stream is only known by reading it
    commits = [s.commits[0] for s in open_store(entry.path).snapshot().segments]
    done = {c.unit for c in commits if c.last_in_unit}
    units = {u.number for u in work.source.units(work.identity.layout.unit_bytes)}
    return 0 if units <= done else None


def _nearest(work: Work, others: list[Entry]) -> tuple[Near, ...]:
    """Stores that share data, tokenizer or weights with the work, fewest differences first."""
    asked = work.identity
    near = [
        Near(
            path=entry.path,
            tokens=entry.tokens,
            hooks=tuple(h.name for h in entry.hooks),
            differs=tuple(_differences(work, entry)),
        )
        for entry in others
        if entry.token_stream.get("data") == asked.token_stream["data"]
        or entry.token_stream.get("tokenizer") == asked.token_stream["tokenizer"]
        or entry.host.get("weights") == asked.host["weights"]
    ]
    return tuple(sorted(near, key=lambda n: (len(n.differs), n.path))[:NEAREST])


def _differences(work: Work, entry: Entry) -> list[str]:
    asked = work.identity
    held = {h.name: h.dtype for h in entry.hooks}
    types = {p.name: work.settings.layout.dtype for p in work.points if p.name in held}
    return [
        *diff(entry.token_stream, asked.token_stream, "token_stream."),
        *diff(entry.host, asked.host, "host."),
        *diff(vars(entry.layout), vars(asked.layout), "layout."),
        *diff({name: held[name] for name in types}, types, "dtype of "),
    ]


def _lines(found: Found) -> list[str]:
    lines = []
    wanted = "all the data" if found.asked is None else f"{found.asked:,}"
    if found.store is None:
        lines.append("new: no registered store holds this work")
    elif not found.compute:
        lines.append(f"exists: {found.store}, {found.tokens:,} tokens")
    else:
        if found.missing_hooks:
            lines.append(f"exists, hooks missing: {', '.join(found.missing_hooks)}")
        if "fewer tokens" in found.verdict:
            lines.append(f"exists with fewer tokens: {found.tokens:,} of {wanted}")
        lines.append(f"store: {found.store}")
    lines += [f"to compute: {missing}" for missing in found.compute]
    for near in found.nearest:
        lines.append(f"nearest: {near.path}, {near.tokens:,} tokens of {', '.join(near.hooks)}")
        lines += [f"  {line}" for line in near.differs or ("the same work",)]
    return lines
