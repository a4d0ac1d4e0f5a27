"""One segment as zarr v3 objects, encoded by zarr-python into memory.

Activations are one shard of whole-row inner chunks, each closed by a crc32c; token columns are one
chunk with a crc32c. No compression: inner chunks have one size, so a reader finds them by
arithmetic and decodes nothing. Chunks that hold only zeros are written too: absent means lost.
Costs about twice the array in memory while a shard is encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.core.dtype import data_type_registry
from zarr.storage import MemoryStore

from actcache.store.bfloat16 import BFloat16
from actcache.store.layout import TOKEN_COLUMNS, TokenTable
from actcache.store.schema import HookInfo

# zarr-python before 3.2 collects the entry point and never loads it.
data_type_registry.register("bfloat16", BFloat16)


def encode_group(path: str) -> Iterator[tuple[str, bytes]]:
    """The metadata object of a group."""
    objects: dict[str, Any] = {}
    zarr.create_group(MemoryStore(store_dict=objects), path=path)
    yield f"{path}/zarr.json", objects[f"{path}/zarr.json"].to_bytes()


def encode_tokens(path: str, tokens: TokenTable) -> Iterator[tuple[str, bytes]]:
    """Objects of the five columns below `path`."""
    for name, dtype in TOKEN_COLUMNS.items():
        column = np.ascontiguousarray(getattr(tokens, name), dtype=dtype)
        yield from _encode(f"{path}/{name}", column, (len(column),), None, ("row",))


def encode_acts(path: str, rows: NDArray[Any], info: HookInfo) -> Iterator[tuple[str, bytes]]:
    """Objects of one hook: rows (n, d) in the storage type."""
    chunk = (info.chunk_rows, info.d)
    shard = (-(-len(rows) // info.chunk_rows) * info.chunk_rows, info.d)
    yield from _encode(f"{path}/{info.key}", rows, chunk, shard, ("row", "channel"))


def _encode(
    path: str,
    data: NDArray[Any],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    names: tuple[str, ...],
) -> Iterator[tuple[str, bytes]]:
    objects: dict[str, Any] = {}
    array = zarr.create_array(
        MemoryStore(store_dict=objects),
        name=path,
        shape=data.shape,
        dtype=BFloat16() if data.dtype.name == "bfloat16" else data.dtype,
        chunks=chunks,
        shards=shards,
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=names,
        config={"write_empty_chunks": True},
    )
    array[...] = data
    for key in sorted(k for k in objects if k.startswith(f"{path}/")):
        yield key, objects.pop(key).to_bytes()
