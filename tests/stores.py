"""Small stores of synthetic rows, written through the real writer, for tests of what reads them."""

from pathlib import Path

import ml_dtypes
import numpy as np

from actcache.store import (
    Calibration,
    HookInfo,
    HookStats,
    Identity,
    Layout,
    TokenTable,
    open_store,
)
from actcache.store.calibrations import publish_calibration
from actcache.store.ids import bytes_digest, digest, store_digest
from actcache.store.layout import DTYPES, FLAG_DOC_START, FLAG_SPECIAL, VOCAB_JSON
from actcache.store.split import doc_key
from actcache.store.vocab import encode_vocab
from actcache.store.writer import StoreWriter


def identity(layout: Layout, vocab: bytes, **host) -> Identity:
    stream = {"data": {"files": []}, "tokenizer": "t", "packing": {"context": layout.context}}
    model = {"weights": "w", "dtype": "float32", **host}
    return Identity(
        token_stream=stream,
        host=model,
        layout=layout,
        token_stream_id=digest(stream),
        store_id=store_digest(digest(stream), model),
        files={VOCAB_JSON: bytes_digest(vocab)},
    )


def token_table(rng, n: int, context: int, n_vocab: int, first_doc: int, doc_len: int):
    """n rows in (ctx, pos) order; documents of doc_len tokens, each ended by token 0 (special)."""
    row = np.arange(n)
    ids = rng.integers(1, n_vocab, n).astype(np.uint32)
    last = row % doc_len == doc_len - 1
    ids[last] = 0
    docs = np.array(
        [doc_key(f"doc-{first_doc + i}") for i in range(n // doc_len + 1)], dtype=np.uint64
    )
    flags = np.where(last, FLAG_SPECIAL, 0) | np.where(row % doc_len == 0, FLAG_DOC_START, 0)
    return TokenTable(
        token_id=ids,
        doc=docs[row // doc_len],
        ctx=(row // context).astype(np.uint32),
        pos=(row % context).astype(np.uint32),
        flags=flags.astype(np.uint8),
    )


def make_store(
    path: Path,
    *,
    hooks: dict[str, int] | None = None,
    segments: tuple[int, ...] = (512, 512, 320),
    context: int = 32,
    dtype: str = "bfloat16",
    chunk_bytes: int = 4096,
    seed: int = 0,
    order: str = "permuted",
    acts=None,
    doc_len: int = 20,
    host: dict | None = None,
    units: tuple[int, ...] | None = None,
    norms: bool = True,
):
    """A store of random rows; `acts(hook, rng, tokens, d)` may supply other activations.

    `host` replaces fields of the host's identity; `units` are the segments that are written, of
    those that `segments` describes. int8 is calibrated on the first of them.
    """
    hooks = hooks or {"resid.2": 16}
    rng = np.random.default_rng(seed)
    words = [b"<eos>", *(f" w{i}".encode() for i in range(1, 50))]
    vocab = encode_vocab(words)
    layout = Layout(
        context=context, segment_rows=max(segments), chunk_bytes=chunk_bytes, order=order
    )
    numpy_type = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    if dtype == "int8":
        numpy_type = np.dtype(np.float32)  # the writer makes codes of it
    ident = identity(layout, vocab, **(host or {}))
    done = []
    writer = StoreWriter(path, ident, {VOCAB_JSON: vocab})
    for i, n in enumerate(segments):
        tokens = token_table(rng, n, context, len(words), 1000 * i, doc_len)
        rows = []
        for name, d in hooks.items():
            make = acts or (lambda hook, rng, t, d: rng.normal(1.0, 2.0, (len(t), d)))
            x = make(name, rng, tokens, d).astype(numpy_type)
            info = HookInfo(
                name=name,
                module=f"layers.{name.split('.')[-1]}",
                io="out",
                d=d,
                dtype=dtype,
                chunk_rows=max(1, chunk_bytes // (d * DTYPES[dtype].itemsize)),
                activation_id=digest([ident.store_id, name, dtype]),
                norms=norms,
            )
            rows.append((info, x))
            if dtype == "int8":
                found = Calibration.of(HookStats.of(x))  # the first one counts
                publish_calibration(path, info.activation_id, found, len(x))
        if units is not None and i not in units:
            continue
        commit = writer.write_segment(
            unit=i, index=0, last_in_unit=True, tokens=tokens, acts=rows, writer={}
        )
        done.append(commit.segment)
    writer.snapshot(done)
    return open_store(path)
