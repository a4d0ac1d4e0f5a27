"""The host as the filler needs it: loaded when the first segment really needs it, never before.

Identities of hooks follow from settings alone, so a run that finds everything committed ends
without reading a weight.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from typing import Any

from numpy.typing import NDArray

from actcache import ranks
from actcache.data import Packing
from actcache.families import runner
from actcache.hooks import HookPoint
from actcache.host import Host
from actcache.lockstep import Lockstep
from actcache.segments import SegmentBuilder
from actcache.store import HookInfo, Identity, IdentityError, TokenTable
from actcache.store.ids import activation_digest
from actcache.store.layout import DTYPES, chunk_rows
from actcache.store.writer import StoreWriter

POLL = 1.0  # seconds between looks at units that others hold


class LazyCapture:
    """A host with hook points, and what the store records of them."""

    def __init__(
        self,
        host: Host,
        points: Sequence[HookPoint],
        packing: Packing,
        identity: Identity,
        dtype: str,
        say: Callable[[str], None],
    ) -> None:
        """`dtype` is the storage type of all hooks; int8 rows wait in the host's type."""
        self._host, self._points, self._packing = host, list(points), packing
        self._identity, self._dtype, self._say = identity, dtype, say
        self.tokenizer = host.tokenizer
        sharded = host.settings.sharding != "none"
        self._lockstep = Lockstep(ranks.current()) if sharded else None
        # Rows computed while calibrating, by segment, until the segment is written.
        self.kept: dict[str, tuple[TokenTable, dict[str, NDArray[Any]]]] = {}

    @property
    def dtype(self) -> str:
        """The storage type."""
        return self._dtype

    @cached_property
    def builder(self) -> SegmentBuilder:
        """Loads the model, at the first access."""
        if self._lockstep:
            self._lockstep.enter()
        self._say(f"loading {self._host.settings.model}")
        model = self._host.load(self._points)
        if self._lockstep:
            runner(model).register_forward_pre_hook(self._lockstep.enter, prepend=True)
        return SegmentBuilder(
            model,
            self._points,
            device=self._host.device,
            batch_contexts=max(1, self._host.settings.batch_tokens // self._packing.context),
            dtype=self._host.settings.dtype if self._dtype == "int8" else self._dtype,
            cross_documents=self._packing.attend_across_documents,
            spare=self._packing.spare(self.tokenizer) if self._lockstep else None,
        )

    def again(self, busy: bool, tick: Callable[[], object]) -> bool:
        """Whether to look again for units: they are free, or `busy`, held by others.

        Waits a moment. Ranks that share the host serve the others' forward passes meanwhile, and
        all end together; `tick()` is called as time goes by. KeyboardInterrupt if one has ended.
        """
        tick()
        if self._lockstep:
            busy = self._lockstep.serve(not busy, lambda: self._serve(tick))
        else:
            ranks.current().heed()
        if busy:
            time.sleep(POLL)
        return busy

    def _serve(self, tick: Callable[[], object]) -> None:
        """This rank's part in what others do: loading the host, or a pass over two tokens."""
        if "builder" in self.__dict__:
            self.builder.dummy()
        else:
            _ = self.builder
        tick()

    def interruptible(self) -> AbstractContextManager[None]:
        """Where Ctrl-C counts once, and ends ranks that share the host at the same forward pass."""
        return (self._lockstep or ranks.current()).interruptible()

    @cached_property
    def infos(self) -> list[HookInfo]:
        """What the store records of each hook; widths come from a probe of the loaded model."""
        widths = self.builder.widths()
        layout, size = self._identity.layout, DTYPES[self._dtype].itemsize
        return [
            HookInfo(
                **asdict(point),
                d=widths[point.name],
                dtype=self._dtype,
                chunk_rows=chunk_rows(
                    widths[point.name], size, layout.chunk_bytes, layout.segment_rows
                ),
                activation_id=activation_id(self._identity.store_id, point, self._dtype),
                norms=True,
            )
            for point in self._points
        ]

    @property
    def activation_ids(self) -> set[str]:
        return set(self.ids.values())

    @property
    def ids(self) -> dict[str, str]:
        """Identity of each hook's rows, by name."""
        store = self._identity.store_id
        return {p.name: activation_id(store, p, self._dtype) for p in self._points}

    def refuse_other_types(self, writer: StoreWriter) -> None:
        """IdentityError if the store holds one of the hooks in another storage type."""
        ids = self.ids
        for hook in (h.info for cs in writer.commits.values() for c in cs for h in c.hooks):
            if ids.get(hook.name, hook.activation_id) != hook.activation_id:
                raise IdentityError(
                    f"hook {hook.name}: {writer.path} holds it as {hook.dtype}, you asked for "
                    f"{self._dtype}. A store keeps one type per hook: use "
                    f"layout.dtype={hook.dtype}, or another folder with store=PATH"
                )

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """Who wrote a segment; in no id. Finding the versions takes 15 ms."""
        return {"versions": versions(), "device": str(self._host.device)}


def activation_id(store_id: str, point: HookPoint, dtype: str) -> str:
    """Identity of one hook's rows: the store, the tensor, the storage type."""
    return activation_digest(store_id, point.module, point.io, point.index, dtype)


def versions() -> dict[str, str]:
    """Versions of what computes and writes activations."""
    packages = ("actcache-saetrain", "torch", "transformers", "zarr", "numpy")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}
