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
from typing import Any, Literal

from actcache.capture import LazyCapture, versions
from actcache.data import Packing, PackSettings, resolve_packing
from actcache.demo import demo_paths, ensure_demo
from actcache.demo.corpus import build_corpus
from actcache.errors import DataError
from actcache.fill import Filler, parse_part
from actcache.hooks import resolve
from actcache.host import Host, HostSettings
from actcache.sources import DataSettings, Source, open_source
from actcache.store import Identity, Layout, SettingsError, Store, open_store
from actcache.store.ids import bytes_digest, digest, store_digest
from actcache.store.layout import VOCAB_JSON, Order
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
    part: str | None = None  # "3/16": only every 16th unit, from the 3rd; None: whatever is free
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.store:
            raise SettingsError("store is empty: name a folder, such as store=stores/demo")
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
    """Fill the store at `settings.store`; `say` gets one line per fact worth knowing.

    Raises ActcacheError subclasses in the user's words. KeyboardInterrupt is caught: what is
    committed is frozen in a snapshot and `interrupted` is set.
    """
    started = time.perf_counter()
    settings = _resolved(settings, say)
    source = open_source(settings.data)
    host = Host(settings.host)
    host.check_context(settings.context)
    skeleton = host.skeleton()
    points = resolve(settings.hooks, settings.layers, skeleton)
    packing = resolve_packing(settings.pack, host.tokenizer, settings.context)
    vocab = encode_vocab(host.vocab())
    identity = _identity(settings, source, host, packing, vocab, skeleton)
    for note in (*source.notes, f"hooks: {', '.join(p.name for p in points)}"):
        say(note)
    writer = StoreWriter(Path(settings.store), identity, {VOCAB_JSON: vocab})
    capture = LazyCapture(host, points, packing, identity, settings.layout.dtype, say)
    filler = Filler(settings, source, packing, writer, capture, say)
    interrupted = filler.fill()
    segments = filler.wanted()
    if not segments:
        if interrupted:
            raise KeyboardInterrupt
        raise DataError("the data gave no tokens: every document is empty")
    record = writer.snapshot(segments)
    return CacheResult(
        store=open_store(settings.store),
        snapshot=record.name,
        tokens=record.rows,
        computed=filler.computed,
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
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
            "versions": versions(),
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
