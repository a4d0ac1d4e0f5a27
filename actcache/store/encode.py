"""One segment as zarr v3 objects, encoded in memory.

Activations are one shard of whole-row inner chunks, each closed by a crc32c; token columns are one
chunk with a crc32c. No compression: inner chunks have one size, so a reader finds them by
arithmetic and decodes nothing. Chunks that hold only zeros are written too: absent means lost.

Metadata comes from zarr-python. Chunks and shards are put together here, with the bytes that
zarr-python would write (a test compares them) for a tenth of the processor time, which a forward
pass on the same cores would have to give. Costs twice a shard in memory beside the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.core.dtype import data_type_registry
from zarr.storage import MemoryStore

from actcache.store.bfloat16 import BFloat16
from actcache.store.int8 import F32, Int8Rows, dequantise
from actcache.store.layout import TOKEN_COLUMNS, TokenTable
from actcache.store.schema import HookInfo
from actcache.store.stats import wide

# zarr-python before 3.2 collects the entry point and never loads it.
data_type_registry.register("bfloat16", BFloat16)
# For whoever opens the array without this package; NAME is that of the array.
_NORM_VALUES = 1 << 17  # values worked on at a time: they stay in the cache
_DECODE = (
    "x = calibration/NAME[0] + calibration/NAME[1] * scales/NAME[:, None] * acts/NAME, in the group"
)


def encode_group(path: str) -> Iterator[tuple[str, bytes]]:
    """The metadata object of a group."""
    yield f"{path}/zarr.json", _group()


def encode_tokens(path: str, tokens: TokenTable) -> Iterator[tuple[str, bytes]]:
    """Objects of the five columns below `path`."""
    for name, dtype in TOKEN_COLUMNS.items():
        column = np.ascontiguousarray(getattr(tokens, name), dtype=dtype)
        array, data = f"{path}/{name}", column.tobytes()
        yield f"{array}/c/0", data + _crc(data)
        yield f"{array}/zarr.json", _array(column.shape, dtype, column.shape, None, ("row",))


def encode_acts(
    path: str, rows: NDArray[Any], info: HookInfo, note: str | None = None
) -> Iterator[tuple[str, bytes]]:
    """Objects of one hook: rows (n, d) in the storage type; `note` becomes an attribute."""
    chunk = (info.chunk_rows, info.d)
    shape = (-(-len(rows) // info.chunk_rows) * info.chunk_rows, info.d)
    array = f"{path}/{info.key}"
    yield f"{array}/c/0/0", shard(rows, info.chunk_rows)
    yield (
        f"{array}/zarr.json",
        _array(rows.shape, rows.dtype, chunk, shape, ("row", "channel"), note),
    )


def encode_int8(folder: str, rows: Int8Rows, info: HookInfo) -> Iterator[tuple[str, bytes]]:
    """Objects of one hook of int8: codes, the scale of each row, mean and std of each channel."""
    yield from encode_acts(f"{folder}/acts", rows.codes, info, _DECODE)
    chunk, array = info.chunk_rows, f"{folder}/scales/{info.key}"
    yield f"{array}/c/0", shard(rows.scale, chunk)
    shards = (-(-len(rows.scale) // chunk) * chunk,)
    yield (
        f"{array}/zarr.json",
        _array(rows.scale.shape, rows.scale.dtype, (chunk,), shards, ("row",)),
    )
    array, values = f"{folder}/calibration/{info.key}", rows.calibration.array
    data = values.tobytes()
    yield f"{array}/c/0/0", data + _crc(data)
    names = ("mean, std", "channel")
    yield f"{array}/zarr.json", _array(values.shape, values.dtype, values.shape, None, names)


def encode_norms(
    folder: str, rows: NDArray[Any] | Int8Rows, info: HookInfo
) -> Iterator[tuple[str, bytes]]:
    """Objects of the lengths of one hook's rows, as readers get them: (n,) float32."""
    array, values = f"{folder}/norms/{info.key}", row_norms(rows)
    data = values.tobytes()
    yield f"{array}/c/0", data + _crc(data)
    yield f"{array}/zarr.json", _array(values.shape, values.dtype, values.shape, None, ("row",))


def row_norms(rows: NDArray[Any] | Int8Rows) -> F32:
    """Euclidean length of each row, (n,) float32."""
    width = (rows.codes if isinstance(rows, Int8Rows) else rows).shape[1]
    n = len(rows.scale if isinstance(rows, Int8Rows) else rows)
    found = np.empty(n, dtype=np.float32)
    step = max(1, _NORM_VALUES // width)
    for some in (slice(i, i + step) for i in range(0, n, step)):
        if isinstance(rows, Int8Rows):
            c = rows.calibration
            x = dequantise(rows.codes[some], rows.scale[some], c.mean, c.std)
        else:
            x = wide(rows[some])
        found[some] = np.sqrt(np.einsum("ij,ij->i", x, x))
    return found


def shard(rows: NDArray[Any], chunk_rows: int) -> bytes:
    """One shard file: inner chunks of `chunk_rows` rows, the last filled up with zeros, each
    closed by its crc32c; then offset and length of each (u64, checksum included), and a crc32c.

    All numbers are little-endian.
    """
    parts: list[bytes | memoryview] = []
    places: list[int] = []
    memory = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    for start in range(0, len(rows), chunk_rows):
        chunk: Any = memory[start : start + chunk_rows].reshape(-1)
        if (short := chunk_rows * memory.shape[1] - len(chunk)) > 0:
            chunk = np.pad(chunk, (0, short))
        size = len(chunk) + 4
        places += [len(places) // 2 * size, size]
        parts += [chunk.data, _crc(chunk)]
    index = np.array(places, dtype="<u8").tobytes()
    return b"".join([*parts, index, _crc(index)])


def _crc(data: bytes | NDArray[np.uint8]) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


@cache
def _group() -> bytes:
    """zarr.json of a group."""
    objects: dict[str, Any] = {}
    zarr.create_group(MemoryStore(store_dict=objects))
    return bytes(objects["zarr.json"].to_bytes())


@lru_cache(maxsize=256)
def _array(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    names: tuple[str, ...],
    note: str | None = None,
) -> bytes:
    """zarr.json of an array, wherever it lies. Made once for segments of equal size: zarr-python's
    event loop would take Python's lock from the forward pass, a dozen times a segment.
    """
    objects: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(store_dict=objects),
        shape=shape,
        dtype=BFloat16() if dtype.name == "bfloat16" else dtype,
        chunks=chunks,
        shards=shards,
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=names,
        attributes=None if note is None else {"decode": note},
        config={"write_empty_chunks": True},
    )
    return bytes(objects["zarr.json"].to_bytes())
