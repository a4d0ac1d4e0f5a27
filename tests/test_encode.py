"""Shards and token columns: the same bytes as zarr-python's own encoder writes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from actcache.store.bfloat16 import BFloat16
from actcache.store.encode import encode_acts, encode_group, encode_tokens
from actcache.store.layout import DTYPES, TOKEN_COLUMNS, TokenTable


def by_zarr(key: str, data: Any, chunks: Any, shards: Any, names: Any) -> dict[str, bytes]:
    """Objects of one array, encoded by zarr-python from end to end."""
    objects: dict[str, Any] = {}
    array = zarr.create_array(
        MemoryStore(store_dict=objects),
        name=key,
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
    return {k: objects[k].to_bytes() for k in sorted(objects) if k.startswith(f"{key}/")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "chunk_rows"), [(1, 3, 1), (7, 5, 7), (21, 4, 5), (64, 2, 3)])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_shard_is_what_zarr_writes(
    n: int, d: int, chunk_rows: int, dtype: str, zeros: bool
) -> None:
    rng = np.random.default_rng(n)
    rows = (rng.standard_normal((n, d)) * (not zeros)).astype(DTYPES[dtype])
    rows = np.asfortranarray(rows) if n == 21 else rows
    info: Any = SimpleNamespace(key="resid.0", chunk_rows=chunk_rows, d=d)
    shard = (-(-n // chunk_rows) * chunk_rows, d)
    wanted = by_zarr("acts/resid.0", rows, (chunk_rows, d), shard, ("row", "channel"))
    found = list(encode_acts("acts", rows, info))
    assert [key for key, _ in found] == list(wanted)  # objects come in this order, too
    assert dict(found) == wanted


def test_a_group_is_what_zarr_writes_and_metadata_is_made_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects: dict[str, Any] = {}
    zarr.create_group(MemoryStore(store_dict=objects), path="a/b")
    key = "a/b/zarr.json"
    assert list(encode_group("a/b")) == [(key, objects[key].to_bytes())]
    rows, info = np.zeros((6, 2), np.float32), SimpleNamespace(key="h", chunk_rows=4, d=2)
    first: Any = list(encode_acts("x", rows, info))  # type: ignore[arg-type]
    monkeypatch.setattr(zarr, "create_array", lambda *_, **__: pytest.fail("made again"))
    again: Any = list(encode_acts("y", rows + 1, info))  # type: ignore[arg-type]
    assert again[1] == ("y/h/zarr.json", first[1][1])
    assert again[0][1] != first[0][1]


def test_token_columns_are_what_zarr_writes() -> None:
    rng = np.random.default_rng(0)
    columns = {k: rng.integers(0, 250, 37).astype(t) for k, t in TOKEN_COLUMNS.items()}
    wanted: dict[str, bytes] = {}
    for name, column in columns.items():
        wanted |= by_zarr(f"x/{name}", column, column.shape, None, ("row",))
    found = list(encode_tokens("x", TokenTable(**columns)))
    assert [key for key, _ in found] == list(wanted)
    assert dict(found) == wanted
