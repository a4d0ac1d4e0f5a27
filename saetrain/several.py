"""Runs that read several stores: joined row by row, or mixed by weight.

`stores: {base: PATH, chat: PATH}` joins (hooks `base:resid.2`, `chat:resid.2`); with
`mix: {base: 0.7, chat: 0.3}` rows of all are mixed instead, under one hook name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actcache.store import HookInfo, Segment, Snapshot, Store
from actcache.store.ids import leaves
from saetrain.errors import ConfigError
from saetrain.log import say
from saetrain.settings import TrainSettings
from saetrain.stream import JoinedSnapshot, Mix, SequenceStream, Stream, join
from saetrain.units import Unit


@dataclass(frozen=True)
class MixedSnapshot:
    """Snapshots to be mixed. What shows single contexts, such as a report, reads the heaviest."""

    snapshots: dict[str, Snapshot]
    weights: dict[str, float]

    @property
    def heaviest(self) -> str:
        """The label of the largest weight; the first of equal ones."""
        return max(self.weights, key=lambda label: self.weights[label])

    @property
    def main(self) -> Snapshot:
        return self.snapshots[self.heaviest]

    @property
    def store(self) -> Store:
        return self.main.store

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.main.segments

    @property
    def hooks(self) -> Mapping[str, HookInfo]:
        return self.main.hooks

    @property
    def store_id(self) -> dict[str, str]:
        """The id of each store by its label; `name` and `token_stream_id` likewise."""
        return {label: s.store_id for label, s in self.snapshots.items()}

    @property
    def name(self) -> dict[str, str]:
        return {label: s.name for label, s in self.snapshots.items()}

    @property
    def token_stream_id(self) -> dict[str, str]:
        return {label: s.token_stream_id for label, s in self.snapshots.items()}

    def resolve_hook(self, name: str) -> str:
        """The stored name of a hook, the same in all stores. HookMissingError, ConfigError."""
        found = {label: s.resolve_hook(name) for label, s in self.snapshots.items()}
        if len(set(found.values())) > 1:
            raise ConfigError(f"mix: hook {name!r} has other names in the stores: {found}")
        return next(iter(found.values()))

    def vocab(self) -> list[bytes]:
        return self.main.vocab()


Readable = Snapshot | JoinedSnapshot | MixedSnapshot


def open_several(settings: TrainSettings, opened: Callable[[str], Store]) -> Readable:
    """The snapshots of `settings.stores`, the newest or those named, joined or to be mixed.

    Says which segments a join leaves out, and in what the hosts of a mix differ.
    """
    assert settings.stores is not None
    names = settings.snapshot if isinstance(settings.snapshot, dict) else {}
    found = {k: opened(path).snapshot(names.get(k)) for k, path in settings.stores.items()}
    return _together(found, settings.mix)


def _together(found: dict[str, Snapshot], mix: Mapping[str, float] | None) -> Readable:
    if mix is None:
        joined = join(found)
        if joined.left_out_text():
            say(f"warning: {joined.left_out_text()}")
        return joined
    (first, lead), *others = found.items()
    for label, other in others:
        hosts = lead.store.identity.host, other.store.identity.host
        differ = [f"{k} is {a} and {b}" for k, a, b in leaves(*hosts)]
        if differ:
            say(f"warning: mix: {first} and {label} come from other hosts: {'; '.join(differ)}")
    return MixedSnapshot(found, {label: mix[label] for label in found})


def at(snapshot: Readable, name: Any) -> Readable:
    """The same stores at the snapshot (several: label -> snapshot) called `name`."""
    if isinstance(snapshot, Snapshot):
        return snapshot.store.snapshot(name)
    found = {label: s.store.snapshot(name[label]) for label, s in snapshot.snapshots.items()}
    return _together(found, snapshot.weights if isinstance(snapshot, MixedSnapshot) else None)


def parts(snapshot: Readable) -> list[Snapshot]:
    """The snapshots of single stores."""
    return [snapshot] if isinstance(snapshot, Snapshot) else list(snapshot.snapshots.values())


def activation_ids(snapshot: Readable, hooks: Mapping[str, Any]) -> dict[str, Any]:
    """Ids by hook; of a mix by store and hook."""
    if isinstance(snapshot, MixedSnapshot):
        return {label: activation_ids(s, hooks) for label, s in snapshot.snapshots.items()}
    return {h: snapshot.hooks[h].activation_id for h in hooks}


def stream_over(
    snapshot: Readable, hooks: tuple[str, ...], *, unit: Unit = "token", **options: Any
) -> Stream | Mix:
    """A stream, or a mix of one per store. `options` are those of `Stream`.

    ConfigError where whole contexts (`unit = "sequence"`) cannot be had.
    """
    if unit == "sequence":
        return _contexts(snapshot, hooks, options.pop("batch_tokens"), options)
    if not isinstance(snapshot, MixedSnapshot):
        return Stream(snapshot, hooks, **options)
    streams = [
        (Stream(s, hooks, **options), snapshot.weights[k]) for k, s in snapshot.snapshots.items()
    ]
    return Mix(streams, names=list(snapshot.snapshots))


def _contexts(
    snapshot: Readable, hooks: tuple[str, ...], batch_tokens: int, options: Mapping[str, Any]
) -> SequenceStream:
    """Whole contexts, `batch_tokens` positions at once."""
    if isinstance(snapshot, MixedSnapshot):
        raise ConfigError(
            "mix: this SAE reads whole contexts, and stores are mixed row by row. Give one store"
        )
    context = int(snapshot.context)
    sequences, rest = divmod(batch_tokens, context)
    if rest or not sequences:
        raise ConfigError(
            f"batch_tokens={batch_tokens:,}: this SAE reads whole contexts, which are {context} "
            f"tokens long in this store; give a multiple, such as "
            f"batch_tokens={max(1, sequences) * context}"
        )
    return SequenceStream(snapshot, hooks, batch_sequences=sequences, **options)
