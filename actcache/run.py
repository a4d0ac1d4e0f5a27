"""`actcache run`: text in, a store out.

Units of input are visited in a keyed random order, so that a store that is stopped early is a fair
sample; each unit becomes segments, each segment is committed when it is whole. Whatever is
committed is never computed again: running the same settings continues, a larger `tokens` appends,
further hooks are added to the same rows.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from actcache.data import Context, Packing, PackSettings, contexts, resolve_packing
from actcache.demo import demo_paths, ensure_demo
from actcache.demo.corpus import build_corpus
from actcache.errors import DataError
from actcache.hooks import HookPoint, resolve
from actcache.host import Host, HostSettings
from actcache.segments import SegmentBuilder
from actcache.sources import DataSettings, Source, Unit, open_source
from actcache.store import HookInfo, Identity, Layout, SettingsError, Store, open_store
from actcache.store.ids import bytes_digest, digest, store_digest
from actcache.store.layout import DTYPES, VOCAB_JSON, Order, chunk_rows, segment_id
from actcache.store.vocab import encode_vocab
from actcache.store.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """How rows are stored. Fixed when the store is made; see FORMAT.md."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    segment_rows: int = 131_072
    chunk_bytes: int = 1 << 20
    unit_bytes: int = 8 << 20
    order: Order = "permuted"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Everything `actcache run` takes; the command builds exactly this."""

    host: HostSettings
    data: DataSettings
    store: str  # folder of the store
    hooks: tuple[str, ...] | str = "resid"
    layers: tuple[int, ...] | None = None  # for hooks without a layer; None: all
    tokens: int | None = None  # rows wanted, rounded up to whole segments; None: all the data
    context: int = 128
    pack: PackSettings = field(default_factory=PackSettings)
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.store:
            raise SettingsError("store is empty: name a folder, such as store=stores/demo")
        if self.tokens is not None and self.tokens < 1:
            raise SettingsError(f"tokens: expected at least 1, got {self.tokens}")


@dataclass(frozen=True, kw_only=True)
class CacheResult:
    """What a run did."""

    store: Store
    snapshot: str
    tokens: int  # rows in the snapshot
    computed: int  # rows that went through the host in this run
    seconds: float
    interrupted: bool = False


def run(settings: CacheSettings, say: Callable[[str], None] = lambda _: None) -> CacheResult:
    """Fill the store at `settings.store`; `say` gets one line per fact worth knowing.

    Raises ActcacheError subclasses in the user's words. KeyboardInterrupt is caught: what is
    committed is frozen in a snapshot and `interrupted` is set.
    """
    started = time.perf_counter()
    settings = _resolved(settings, say)
    source = open_source(settings.data)
    host = Host(settings.host)
    job = _Job(settings, source, host, say)
    with StoreWriter(Path(settings.store), job.identity, {VOCAB_JSON: job.vocab}) as writer:
        interrupted = job.fill(writer)
        if not job.segments:
            if interrupted:
                raise KeyboardInterrupt
            raise DataError("the data gave no tokens: every document is empty")
        record = writer.snapshot(job.segments)
    return CacheResult(
        store=open_store(settings.store),
        snapshot=record.name,
        tokens=record.rows,
        computed=job.computed,
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
    )


class _Job:
    """One call of `run`: what was asked for, and how far it got."""

    def __init__(
        self, settings: CacheSettings, source: Source, host: Host, say: Callable[[str], None]
    ) -> None:
        self.settings, self.source, self.host, self.say = settings, source, host, say
        self.points = resolve(settings.hooks, settings.layers, skeleton := host.skeleton())
        self.packing = resolve_packing(settings.pack, host.tokenizer, settings.context)
        self.vocab = encode_vocab(host.vocab())
        self.identity = _identity(settings, source, host, self.packing, self.vocab, skeleton)
        self.segments: list[str] = []  # committed and within the budget, in plan order
        self.rows = self.computed = 0
        self._builder: SegmentBuilder | None = None
        self._infos: list[HookInfo] = []
        for note in (*source.notes, f"hooks: {', '.join(p.name for p in self.points)}"):
            say(note)

    def fill(self, writer: StoreWriter) -> bool:
        """Commit segments until the budget or the data ends; True if interrupted by Ctrl-C."""
        budget = self.settings.tokens
        found = sum(c[0].rows for c in writer.commits.values())
        if found:
            self.say(f"continuing: {found:,} tokens are committed already")
        bar = tqdm(
            total=budget,
            unit="tok",
            unit_scale=True,
            desc="caching",
            disable=not self.settings.progress,
        )
        try:
            with bar:
                for unit in self._plan():
                    if not self._fill_unit(writer, unit, bar) or self._enough():
                        break
        except KeyboardInterrupt:
            return True
        if budget is not None and not self._enough():
            self.say(f"the data ended at {self.rows:,} tokens, before tokens={budget:,}")
        return False

    def _enough(self) -> bool:
        return self.settings.tokens is not None and self.rows >= self.settings.tokens

    def _plan(self) -> Iterator[Unit]:
        """Parquet units in keyed random order; a stream's units as they come."""
        units = self.source.units(self.settings.layout.unit_bytes)
        if self.source.identity["kind"] != "parquet":
            return units
        key = self.identity.token_stream_id
        return iter(sorted(units, key=lambda unit: digest([key, unit.number])))

    def _fill_unit(self, writer: StoreWriter, unit: Unit, bar: Any) -> bool:
        """Commit the segments of a unit; False if the unit has no documents (end of a stream)."""
        if self._skip_whole(writer, unit, bar):
            return True
        per_segment = self.identity.layout.segment_rows // self.packing.context
        stream = contexts(self.source.read(unit), self.host.tokenizer, self.packing)
        chunk = list(islice(stream, per_segment))
        some = bool(chunk)
        index = 0
        while chunk and not self._enough():
            following = list(islice(stream, per_segment))
            self._fill_segment(writer, unit, index, chunk, not following, bar)
            chunk, index = following, index + 1
        return some or self.source.identity["kind"] == "parquet"

    def _skip_whole(self, writer: StoreWriter, unit: Unit, bar: Any) -> bool:
        """Take over a unit that is committed from first to last segment, without reading it."""
        mine = sorted(
            (c[0] for c in writer.commits.values() if c[0].unit == unit.number),
            key=lambda c: c.index,
        )
        whole = mine and mine[-1].last_in_unit and len(mine) == mine[-1].index + 1
        if not whole or not all(writer.has(c.segment, self._ids()) for c in mine):
            return False
        for commit in mine:
            if not self._enough():
                self._take(commit.segment, commit.rows, bar)
        return True

    def _fill_segment(
        self,
        writer: StoreWriter,
        unit: Unit,
        index: int,
        chunk: list[Context],
        last: bool,
        bar: Any,
    ) -> None:
        segment = segment_id(unit.number, index)
        rows = sum(map(len, chunk))
        if writer.has(segment, self._ids()):
            self._take(segment, rows, bar)
            return
        tokens, acts = self._loaded().build(chunk, bar.update)
        writer.write_segment(
            unit=unit.number,
            index=index,
            last_in_unit=last,
            tokens=tokens,
            acts=[(info, acts[info.name]) for info in self._infos],
            writer={"versions": _versions(), "device": str(self.host.device)},
        )
        self.computed += rows
        self._take(segment, rows, None)

    def _take(self, segment: str, rows: int, bar: Any) -> None:
        self.segments.append(segment)
        self.rows += rows
        if bar is not None:
            bar.update(rows)

    # -- hooks and host ---------------------------------------------------------------------------

    def _ids(self) -> set[str]:
        return {self._activation_id(p) for p in self.points}

    def _activation_id(self, point: HookPoint) -> str:
        """Identity of one hook's rows: the store, the tensor, the storage type."""
        place = {"module": point.module, "io": point.io, "index": point.index}
        return digest(
            {
                "store_id": self.identity.store_id,
                "hook": place,
                "dtype": self.settings.layout.dtype,
            }
        )

    def _loaded(self) -> SegmentBuilder:
        """The host, loaded when the first segment really needs it."""
        if self._builder is None:
            self.say(f"loading {self.settings.host.model}")
            self._builder = SegmentBuilder(
                self.host.load(self.points),
                self.points,
                device=self.host.device,
                batch_contexts=max(1, self.settings.host.batch_tokens // self.packing.context),
                dtype=self.settings.layout.dtype,
                cross_documents=self.packing.attend_across_documents,
            )
            widths = self._builder.widths()
            self._infos = [self._info(p, widths[p.name]) for p in self.points]
        return self._builder

    def _info(self, point: HookPoint, d: int) -> HookInfo:
        dtype = self.settings.layout.dtype
        layout = self.identity.layout
        size = DTYPES[dtype].itemsize
        return HookInfo(
            **asdict(point),
            d=d,
            dtype=dtype,
            chunk_rows=chunk_rows(d, size, layout.chunk_bytes, layout.segment_rows),
            activation_id=self._activation_id(point),
        )


def _identity(
    settings: CacheSettings,
    source: Source,
    host: Host,
    packing: Packing,
    vocab: bytes,
    skeleton: Any,
) -> Identity:
    stream = {
        "data": dict(source.identity),
        "tokenizer": host.tokenizer_identity,
        "packing": packing.identity(),
    }
    stream_id = digest(stream)
    model = host.identity | {"order": settings.layout.order}
    options = {k: v for k, v in asdict(settings.layout).items() if k != "dtype"}
    return Identity(
        token_stream=stream,
        host=model,
        layout=Layout(context=settings.context, **options),
        token_stream_id=stream_id,
        store_id=store_digest(stream_id, model),
        files={VOCAB_JSON: bytes_digest(vocab)},
        recorded={
            "versions": _versions(),
            "base_model_prefix": str(getattr(skeleton, "base_model_prefix", "")),
            "special_token_ids": sorted(packing.special),
        },
    )


def _resolved(settings: CacheSettings, say: Callable[[str], None]) -> CacheSettings:
    """`data.kind=pydocs` and `host.model=demo` stand for what is made on this machine, once."""
    if settings.host.model == "demo" and not Path("demo").is_dir():
        host = ensure_demo(progress=settings.progress).host
        settings = replace(settings, host=replace(settings.host, model=str(host)))
        say(f"host=demo: {host}")
    if settings.data.kind == "pydocs":
        corpus = build_corpus(demo_paths().corpus.parent, settings.progress)
        data = replace(
            settings.data, kind="parquet", files=str(corpus), id_column="id", text_column="text"
        )
        settings = replace(settings, data=data)
        say(f"data=pydocs: {corpus}")
    return settings


def _versions() -> dict[str, str]:
    packages = ("actcache-saetrain", "torch", "transformers", "zarr", "numpy")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}
