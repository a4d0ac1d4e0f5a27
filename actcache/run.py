"""`actcache run`: text in, a store out.

Units of input are visited in a keyed random order, so that a store that is stopped early is a fair
sample; each unit becomes segments, each segment is committed when it is whole. Whatever is
committed is never computed again: running the same settings continues, a larger `tokens` appends,
further hooks are added to the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from actcache import ranks, sharded
from actcache.capture import LazyCapture, activation_id, versions
from actcache.catalog import Catalog, Entry, continues, home
from actcache.chat import resolve_chat
from actcache.data import Packing, PackSettings, resolve_packing
from actcache.demo import demo_paths, ensure_demo
from actcache.demo.corpus import build_corpus
from actcache.errors import DataError
from actcache.fill import Filler, parse_part
from actcache.hooks import HookPoint, resolve
from actcache.host import Host, HostSettings
from actcache.sources import DataSettings, Source, open_source
from actcache.store import Identity, Layout, SettingsError, Snapshot, Store, StoreError, open_store
from actcache.store.ids import bytes_digest, digest, short, store_digest
from actcache.store.layout import STORE_JSON, VOCAB_JSON, Order, StorageType
from actcache.store.places import Location, address, place
from actcache.store.vocab import encode_vocab
from actcache.store.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """How rows are stored. Fixed when the store is made; see FORMAT.md."""

    dtype: StorageType = "bfloat16"
    segment_rows: int = 131_072
    chunk_bytes: int = 1 << 20
    unit_bytes: int = 8 << 20
    order: Order = "permuted"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Everything `actcache run` takes; the command builds exactly this."""

    host: HostSettings
    data: DataSettings
    store: str | None = None  # folder of the store; None: the catalog's, or a new one beside it
    hooks: tuple[str, ...] | str = "resid"
    layers: tuple[int, ...] | None = None  # for hooks without a layer; None: all
    tokens: int | None = None  # rows wanted, rounded up to whole segments; None: all the data
    context: int = 128
    pack: PackSettings = field(default_factory=PackSettings)
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    part: str | None = None  # "3/16": only every 16th unit, from the 3rd; None: whatever is free
    catalog: str | None = None  # folder of the catalog; None: $ACTCACHE_HOME/catalog
    progress: bool = True

    def __post_init__(self) -> None:
        if self.store == "":
            raise SettingsError(
                "store is empty: name a folder, such as store=stores/demo, or leave it out"
            )
        if self.catalog == "":
            raise SettingsError("catalog is empty: name a folder, or leave it out")
        if self.tokens is not None and self.tokens < 1:
            raise SettingsError(f"tokens: expected at least 1, got {self.tokens}")
        if self.part is not None:
            parse_part(self.part)


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
    """Fill the store that `settings` name; `say` gets one line per fact worth knowing.

    Without `settings.store` the store that the catalog knows for exactly this work is continued,
    or a new one is made at $ACTCACHE_HOME/stores/<short id>.

    Of several ranks (torchrun, accelerate launch) each fills segments of its own, and all return
    the same result but for `seconds`; `say` and bars are rank 0's.

    Raises ActcacheError subclasses in the user's words; on the ranks that did not fail first,
    OtherRankFailedError. KeyboardInterrupt is caught: what is committed is frozen in a snapshot and
    `interrupted` is set.
    """
    sharded.check_launch(settings.host.sharding)
    with ranks.joined(settings.host.rank_timeout) as group:
        shown = settings.progress and group.first
        return _run(replace(settings, progress=shown), group.say(say), group)


def _run(settings: CacheSettings, say: Callable[[str], None], group: ranks.Ranks) -> CacheResult:
    started = time.perf_counter()
    work = prepare(group.one_by_one(lambda: _resolved(settings, say)), say)
    group.refuse_different("work to do", work.plain_identity())
    path = place(group.from_first("where the store is", lambda: str(_place(work, say))))
    writer = group.one_by_one(lambda: _writer(path, work, group))
    capture = LazyCapture(
        work.host, work.points, work.packing, work.identity, settings.layout.dtype, say
    )
    capture.refuse_other_types(writer)
    filler = Filler(work.settings, work.source, work.packing, writer, capture, say)
    interrupted = filler.fill()
    group.add("computed", filler.computed)
    group.meet("come to the end of the run")
    computed = group.add("computed", 0)
    writer.refresh()
    segments = filler.wanted()
    if not segments:
        if interrupted:
            raise KeyboardInterrupt
        raise DataError("the data gave no tokens: every document is empty")
    if group.first:
        writer.snapshot(segments)
    group.meet("take the snapshot")
    store = open_store(path)
    record = store.snapshot().record
    if not computed and not interrupted:
        names = ", ".join(p.name for p in work.points)
        say(f"nothing to compute: {path} holds {record.rows:,} tokens of {names}; no model loaded")
    if group.first:
        register(store.snapshot(), settings.catalog, say)
    return CacheResult(
        store=store,
        snapshot=record.name,
        tokens=record.rows,
        computed=computed,
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
    )


def register(
    snapshot: Snapshot, catalog: str | Path | None, say: Callable[[str], None]
) -> Entry | None:
    """Enter a store into the catalog; a catalog that cannot be written is said, not raised."""
    try:
        return Catalog(catalog).register(snapshot)
    except StoreError as e:
        say(f"not registered: {e}")
        return None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What settings ask for, with every identity known and no weight in memory."""

    settings: CacheSettings  # `demo` and `pydocs` replaced by paths
    source: Source
    host: Host
    points: list[HookPoint]
    packing: Packing
    vocab: bytes
    identity: Identity

    @property
    def hook_ids(self) -> dict[str, str]:
        """Identity of the rows of each hook, by name."""
        dtype = self.settings.layout.dtype
        return {p.name: activation_id(self.identity.store_id, p, dtype) for p in self.points}

    def plain_identity(self) -> dict[str, Any]:
        """All that must be equal on every rank, as JSON."""
        found = self.identity
        layout = asdict(found.layout)
        return {"token_stream": found.token_stream, "host": found.host, "layout": layout}


def prepare(settings: CacheSettings, say: Callable[[str], None] = lambda _: None) -> Work:
    """Find out what `settings` mean: data, host, hooks and their identities.

    Reads the digests of the data and of the weights, loads no model. Raises as `run` does.
    """
    settings = _resolved(settings, say)
    source = open_source(settings.data)
    host = Host(settings.host)
    host.check_context(settings.context)
    skeleton = host.skeleton()
    points = resolve(settings.hooks, settings.layers, skeleton)
    packing, notes = _packing(settings, source, host)
    host.check_packing(packing.attend_across_documents, skeleton)
    vocab = encode_vocab(host.vocab())
    for note in (*source.notes, *host.notes, *notes, f"hooks: {', '.join(p.name for p in points)}"):
        say(note)
    return Work(
        settings=settings,
        source=source,
        host=host,
        points=points,
        packing=packing,
        vocab=vocab,
        identity=_identity(settings, source, host, packing, vocab, skeleton),
    )


def _packing(settings: CacheSettings, source: Source, host: Host) -> tuple[Packing, list[str]]:
    """How documents become contexts, and what should be said about it."""
    if source.columns.messages is not None:
        return resolve_chat(settings.pack, source.columns, settings.data, host, settings.context)
    notes = []
    if settings.data.chat_template is not None:
        notes.append("data.chat_template has no effect on plain text; name data.messages_column")
    if settings.pack.long_chat != "cut":
        notes.append("pack.long_chat has no effect on plain text, which is packed")
    return resolve_packing(settings.pack, host.tokenizer, settings.context), notes


def _writer(path: Location, work: Work, group: ranks.Ranks) -> StoreWriter:
    """Rank 0 makes the store, the others must find it."""
    if not group.first and not (path / STORE_JSON).exists():
        raise StoreError(
            f"rank {group.rank} does not see the store that rank 0 made at {path}: it must lie on "
            "a file system that all machines share"
        )
    return StoreWriter(path, work.identity, {VOCAB_JSON: work.vocab})


def _place(work: Work, say: Callable[[str], None]) -> Location:
    """The folder or prefix to fill: the one asked for, the one in the catalog, or a new one."""
    asked = work.settings.store
    catalog = Catalog(work.settings.catalog)
    known = catalog.same_work(work.identity)
    if asked is not None:
        path = place(asked)
        others = [k.entry for k in known if k.entry.path != address(path)]
        if others and not (path / STORE_JSON).exists():
            say(
                f"the same work exists already: {_held(others[0])}. store={asked} is made all the "
                "same, as you asked; leave store out to use what exists"
            )
        return path
    for entry in (k.entry for k in known):
        if continues(entry, work.identity, work.hook_ids):
            say(f"store from the catalog: {_held(entry)}")
            return place(entry.path)
    path = home() / "stores" / short(work.identity.store_id)
    say(f"store: {path}")
    return path


def _held(entry: Entry) -> str:
    hooks = ", ".join(h.name for h in entry.hooks)
    return f"{entry.path} with {entry.tokens:,} tokens of {hooks}"


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
            "versions": versions(),
            "base_model_prefix": str(getattr(skeleton, "base_model_prefix", "")),
            "special_token_ids": sorted(packing.special),
        },
    )


def _resolved(settings: CacheSettings, say: Callable[[str], None]) -> CacheSettings:
    """`data.kind=pydocs` and `host.model=demo` stand for what is made on this machine, once."""
    host = resolved_host(settings.host, settings.progress, say)
    settings = replace(settings, host=host)
    if settings.data.kind == "pydocs":
        corpus = build_corpus(demo_paths().corpus.parent, settings.progress)
        data = replace(
            settings.data, kind="parquet", files=str(corpus), id_column="id", text_column="text"
        )
        settings = replace(settings, data=data)
        say(f"data=pydocs: {corpus}")
    return settings


def resolved_host(
    settings: HostSettings, progress: bool, say: Callable[[str], None]
) -> HostSettings:
    """`host.model=demo` stands for the small model made on this machine, once."""
    if settings.model != "demo" or Path("demo").is_dir():
        return settings
    folder = ensure_demo(progress=progress).host
    say(f"host=demo: {folder}")
    return replace(settings, model=str(folder))
