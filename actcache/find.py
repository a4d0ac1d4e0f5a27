"""`actcache find`: does this work exist already, and what would a run compute?

Answers from identities alone, nothing is loaded and nothing is written. A registered store that
holds the same token stream and host is compared by hooks and tokens; of the others the nearest are
shown with a field-by-field diff.

Cost: the digests of data and weights, as at the start of a run, and one small JSON per store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from actcache.catalog import Catalog, Entry, continues, entry_of
from actcache.run import CacheSettings, Work, prepare
from actcache.store import Snapshot, Store, open_store
from actcache.store.ids import diff
from actcache.store.layout import STORE_JSON
from actcache.store.places import Location, place

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
    tokens: int  # rows it has of the hooks asked for, of the hook with fewest; 0 if it has none
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
    asked = known if settings.store is None else _at(place(settings.store))
    same = [e for e in asked if continues(e, work.identity, work.hook_ids)]
    best = max(same, key=lambda e: e.tokens, default=None)
    others = {e.path: e for e in (*known, *asked) if best is None or e.path != best.path}
    return _compare(work, best, _nearest(work, list(others.values())))


def _at(path: Location) -> list[Entry]:
    """The store at `path`, registered or not, or nothing."""
    if not (path / STORE_JSON).exists():
        return []
    return [entry_of(open_store(path).snapshot())]


def _compare(work: Work, entry: Entry | None, nearest: tuple[Near, ...]) -> Found:
    names = tuple(p.name for p in work.points)
    rows, total = dict.fromkeys(names, 0), work.settings.tokens
    if entry is not None:
        held = _largest(open_store(entry.path), names)
        rows |= {name: s.n_rows for name, s in held.items()}
        if total is None:
            total = max((s.n_rows for s in held.values() if _whole(work, s)), default=None)
    left = {n: None if total is None else total - rows[n] for n in names}
    left = {n: many for n, many in left.items() if many is None or many > 0}
    missing = tuple(n for n in names if not rows[n])
    amounts = sorted(set(left.values()), key=lambda many: (many is None, many))
    return Found(
        verdict=_verdict(entry is None, bool(missing), bool(left.keys() - set(missing))),
        store=entry.path if entry else None,
        tokens=min((n for n in rows.values() if n), default=0),
        asked=work.settings.tokens,
        missing_hooks=missing,
        compute=tuple(
            Missing(hooks=tuple(n for n in left if left[n] == many), tokens=many)
            for many in amounts
        ),
        nearest=nearest,
    )


def _verdict(new: bool, hooks: bool, tokens: bool) -> Verdict:
    if new:
        return "new"
    if hooks:
        return "hooks missing, fewer tokens" if tokens else "hooks missing"
    return "fewer tokens" if tokens else "exists"


def _largest(store: Store, hooks: Sequence[str]) -> dict[str, Snapshot]:
    """For each hook that is there: the snapshot that has most rows of it, not always the newest."""
    found: dict[str, Snapshot] = {}
    for snapshot in map(store.snapshot, store.snapshot_names()):
        for hook in set(hooks) & set(snapshot.record.hooks):
            if hook not in found or snapshot.n_rows > found[hook].n_rows:
                found[hook] = snapshot
    return found


def _whole(work: Work, snapshot: Snapshot) -> bool:
    """Whether a snapshot holds all the data; the end of a stream is only known by reading it."""
    if work.source.identity["kind"] != "parquet":
        return False
    done = {s.commits[0].unit for s in snapshot.segments if s.commits[0].last_in_unit}
    return {u.number for u in work.source.units(work.identity.layout.unit_bytes)} <= done


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
