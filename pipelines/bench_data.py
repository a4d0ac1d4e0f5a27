"""Hosts and documents for the benchmarks, made on this machine: no download.

Weights are random, since speed does not depend on them; text is the demo corpus, since the speed of
tokenizers does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actcache.demo import demo_paths
from actcache.demo.corpus import build_corpus
from actcache.demo.train_host import END_OF_TEXT, train_tokenizer
from actcache.host import Host, HostSettings, new_causal_lm, save_host
from actcache.store import HookInfo, Identity, Layout, TokenTable
from actcache.store.ids import bytes_digest, digest, store_digest
from actcache.store.layout import DTYPES, VOCAB_JSON, chunk_rows
from actcache.store.vocab import encode_vocab
from actcache.store.writer import StoreWriter


class StoreScale(Protocol):
    """Size of a store of one hook."""

    @property
    def d(self) -> int: ...
    @property
    def segments(self) -> int: ...
    @property
    def segment_rows(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...


class HostScale(Protocol):
    """Size of a host: width, blocks, heads, token ids, and half the longest context."""

    @property
    def d(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def context(self) -> int: ...


def corpus() -> list[tuple[str, str]]:
    """(id, text) of the demo corpus, which is built at the first call on a machine."""
    file = build_corpus(demo_paths().corpus.parent, progress=False)
    columns = pq.read_table(file, columns=["id", "text"]).to_pydict()
    return list(zip(columns["id"], columns["text"], strict=True))


def make_host(folder: Path, texts: Sequence[str], scale: HostScale) -> None:
    """A Hugging Face folder: random GPT-NeoX of the scale, byte-level BPE of the texts."""
    tokenizer = train_tokenizer(texts, scale.vocab, progress=False)
    config = {
        "model_type": "gpt_neox",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": scale.d,
        "intermediate_size": 4 * scale.d,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "max_position_embeddings": 2 * scale.context,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    save_host(new_causal_lm(config, seed=0), tokenizer, folder, **special)


def make_data(folder: Path, documents: Sequence[tuple[str, str]], host: Path, tokens: int) -> None:
    """A folder with one parquet file: as many (id, text) as give `tokens` tokens, no more."""
    tokenizer = Host(HostSettings(model=str(host))).tokenizer
    table: dict[str, list[str]] = {"id": [], "text": []}
    have = 0
    for key, text in documents:
        table["id"].append(key)
        table["text"].append(text)
        have += len(tokenizer(text, verbose=False).input_ids) + 1  # and its separator
        if have > tokens:
            break
    if have <= tokens:
        raise ValueError(f"the documents give {have:,} tokens, {tokens:,} are needed")
    folder.mkdir()
    pq.write_table(pa.table(table), folder / "train.parquet")


def make_store(folder: Path, scale: StoreScale, hook: str = "resid.2") -> None:
    """A store of random bfloat16 rows, written by the real writer, with no host behind it."""
    vocab = encode_vocab([b"a"])
    layout = Layout(
        context=scale.context, segment_rows=scale.segment_rows, chunk_bytes=scale.chunk_bytes
    )
    stream, host = {"data": "random"}, {"weights": "none"}
    identity = Identity(
        token_stream=stream,
        host=host,
        layout=layout,
        token_stream_id=digest(stream),
        store_id=store_digest(digest(stream), host),
        files={VOCAB_JSON: bytes_digest(vocab)},
    )
    writer = StoreWriter(folder, identity, {VOCAB_JSON: vocab})
    info = HookInfo(
        name=hook,
        module="layers.2",
        io="out",
        d=scale.d,
        dtype="bfloat16",
        chunk_rows=chunk_rows(scale.d, 2, scale.chunk_bytes, scale.segment_rows),
        activation_id=digest([identity.store_id, hook]),
    )
    rng = np.random.default_rng(0)
    done = []
    for unit in range(scale.segments):
        row = np.arange(scale.segment_rows)
        tokens = TokenTable(
            token_id=np.zeros(len(row), np.uint32),
            doc=(row // scale.context + unit * len(row)).astype(np.uint64),
            ctx=(row // scale.context).astype(np.uint32),
            pos=(row % scale.context).astype(np.uint32),
            flags=np.zeros(len(row), np.uint8),
        )
        acts = rng.standard_normal((len(row), scale.d), dtype=np.float32)
        rows = acts.astype(DTYPES["bfloat16"])
        commit = writer.write_segment(
            unit=unit, index=0, last_in_unit=True, tokens=tokens, acts=[(info, rows)], writer={}
        )
        done.append(commit.segment)
    writer.snapshot(done)
