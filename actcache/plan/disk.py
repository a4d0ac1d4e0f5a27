"""Bytes and files of a store that does not exist yet, from the store's own encoders."""

from __future__ import annotations

import base64
import math
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from actcache.capture import versions
from actcache.hooks import HookPoint
from actcache.plan.records import (
    Assumptions,
    DiskPlan,
    HookPlan,
)
from actcache.run import LayoutSettings
from actcache.store import HookInfo, Layout, SettingsError, TokenTable
from actcache.store.calibrations import CalibrationRecord
from actcache.store.canaries import CONTEXTS, MAX_TOKENS, CanaryRecord
from actcache.store.encode import (
    encode_acts,
    encode_group,
    encode_int8,
    encode_norms,
    encode_tokens,
)
from actcache.store.int8 import Calibration, Int8Rows
from actcache.store.layout import (
    CANARIES,
    DTYPES,
    SEGMENTS,
    TOKEN_COLUMNS,
    chunk_rows,
    segment_id,
)
from actcache.store.schema import (
    Commit,
    CommittedHook,
    Quantised,
    SnapshotEntry,
    SnapshotRecord,
    StoredObject,
    dump,
)
from actcache.store.stats import HookStats

_DIGEST = "sha256:" + 64 * "0"
_STORE_JSON = 2_600  # store.json holds identities, whatever the size of the run
_ERROR = Quantised(calibration=_DIGEST, fvu=1e-4 / math.pi, max_relative_error=0.1 / math.pi)
_WRITER = {"versions": versions(), "device": "cuda:0"}  # as long as any
_VOCAB_ENTRY = 11  # bytes of one token in vocab.json


def segment_sizes(tokens: int | None, layout: Layout, a: Assumptions) -> Counter[int]:
    """{rows of a segment: how many}; every input unit ends with a short segment."""
    if tokens is None:
        raise SettingsError("tokens is missing: a plan needs how many, such as tokens=1e9")
    if tokens < 1:
        raise SettingsError(f"tokens: expected at least 1, got {tokens}")
    unit = max(layout.context, round(layout.unit_bytes / a.text_bytes_per_token))
    full, short = divmod(unit, layout.segment_rows)
    units, rest = divmod(tokens, unit)
    some = min(full, -(-rest // layout.segment_rows))
    ends = units + (rest > some * layout.segment_rows)
    return +Counter({layout.segment_rows: units * full + some}) + Counter({short: ends})


def hook_infos(
    points: list[HookPoint], widths: dict[str, int], settings: LayoutSettings, layout: Layout
) -> list[HookInfo]:
    dtype, size = settings.dtype, DTYPES[settings.dtype].itemsize
    return [
        HookInfo(
            **asdict(p),
            d=(d := widths[p.name]),
            dtype=dtype,
            chunk_rows=chunk_rows(d, size, layout.chunk_bytes, layout.segment_rows),
            activation_id=_DIGEST,
            norms=True,
        )
        for p in points
    ]


def hook_bytes(rows: int, info: HookInfo) -> int:
    """Size of one hook's data in a segment of `rows` rows (FORMAT.md, Arrays)."""
    return sum(info.files(rows).values())


def _metadata(rows: int, hooks: list[HookInfo]) -> int:
    """Bytes of the zarr.json of a segment: encoded for one row, then the digits of real shapes."""
    one = TokenTable(*(np.zeros(1, dtype) for dtype in TOKEN_COLUMNS.values()))
    parts = [encode_group(f"x{part}") for part in ("", "/tokens", *_groups(hooks))]
    parts.append(encode_tokens("x/tokens", one))
    more = 2 * len(TOKEN_COLUMNS) * (len(str(rows)) - 1)  # shape and chunk of each column
    for info in hooks:
        row, small = np.zeros((1, info.d), DTYPES[info.dtype]), replace(info, chunk_rows=1)
        shard = -(-rows // info.chunk_rows) * info.chunk_rows
        digits = sum(len(str(n)) - 1 for n in (rows, shard, info.chunk_rows))
        if info.dtype == "int8":
            one_D = np.ones(info.d, np.float32)
            made = Int8Rows(row, np.zeros(1, np.float32), Calibration(one_D, one_D))
            parts.append(encode_int8("x", made, small))
            more += 2 * digits  # the scales are cut at the same rows
        else:
            parts.append(encode_acts("x/acts", row, small))
            more += digits
        if info.norms:
            parts.append(encode_norms("x", row, small))
            more += 2 * (len(str(rows)) - 1)
    return more + sum(len(b) for part in parts for key, b in part if key.endswith(".json"))


def _groups(hooks: list[HookInfo]) -> list[str]:
    """The groups that hold arrays of hooks."""
    arrays = [f"/{key.partition('/')[0]}" for h in hooks for key in h.files(1)]
    return list(dict.fromkeys(["/acts", *arrays]))


def _objects(folder: str, rows: int, hooks: list[HookInfo]) -> tuple[StoredObject, ...]:
    """What a record says of the files of a zarr group."""
    sizes = {f"{folder}{part}/zarr.json": 1000 for part in ("", "/tokens", *_groups(hooks))}
    for name, dtype in TOKEN_COLUMNS.items():
        sizes[f"{folder}/tokens/{name}/zarr.json"] = 1000
        sizes[f"{folder}/tokens/{name}/c/0"] = rows * dtype.itemsize + 4
    for info in hooks:
        for key, size in info.files(rows).items():
            sizes[f"{folder}/{key.partition('/c/')[0]}/zarr.json"] = 1000
            sizes[f"{folder}/{key}"] = size
    return tuple(StoredObject(key=k, bytes=n, sha256=_DIGEST) for k, n in sizes.items())


def _commit(rows: int, hooks: list[HookInfo]) -> Commit:
    """A record of the right size for a segment of `rows` rows, written in one go."""
    folder = f"{SEGMENTS}/{segment_id(0, 0)}.{8 * '0'}"
    stats = [
        HookStats(rows, z := np.zeros(h.d), z, 1e5 * math.pi, math.pi, 0).to_json() for h in hooks
    ]
    return Commit(
        segment=segment_id(0, 0),
        folder=folder,
        unit=0,
        index=0,
        last_in_unit=False,
        rows=rows,
        documents=max(1, rows // 500),
        token_digest=_DIGEST,
        hooks=tuple(
            CommittedHook(info=h, plain=s, all=s, int8=_ERROR if h.dtype == "int8" else None)
            for h, s in zip(hooks, stats, strict=True)
        ),
        objects=_objects(folder, rows, hooks),
        writer=_WRITER,
    )


def _canary(first: int, hooks: list[HookInfo], layout: Layout) -> int:
    """Bytes of the contexts that are stored once more, in float32; `first`: rows of segment 1."""
    full = min(max(1, min(CONTEXTS, MAX_TOKENS // layout.context)), first // layout.context)
    rows, size = full * layout.context or first, DTYPES["float32"].itemsize
    hooks = [
        replace(
            h,
            dtype="float32",
            chunk_rows=chunk_rows(h.d, size, layout.chunk_bytes, rows),
            norms=False,
        )
        for h in hooks
    ]
    folder = f"{CANARIES}/{12 * '0'}.{8 * '0'}"
    record = CanaryRecord(
        store_id=_DIGEST,
        folder=folder,
        segment=segment_id(0, 0),
        contexts=tuple(range(max(1, full))),
        rows=rows,
        token_digest=_DIGEST,
        hooks=tuple(hooks),
        objects=_objects(folder, rows, hooks),
        writer=_WRITER,
    )
    arrays = sum(hook_bytes(rows, h) for h in hooks) + _token_bytes(rows)
    return arrays + _metadata(rows, hooks) + len(dump(record.sealed()))


def _calibration(info: HookInfo) -> int:
    """Bytes of the record that writers agree on before the first segment."""
    values = base64.b64encode(bytes(2 * info.d * 4)).decode()
    return len(
        dump(CalibrationRecord(activation_id=_DIGEST, rows=10**6, values=values, digest=_DIGEST))
    )


def _token_bytes(rows: int) -> int:
    """Size of the token table: one file a column, each closed by a crc32c."""
    return sum(rows * dtype.itemsize + 4 for dtype in TOKEN_COLUMNS.values())


def _snapshot(sizes: Counter[int], commit: Commit, hooks: list[HookInfo]) -> int:
    """Bytes of one snapshot record."""

    def length(*rows: int) -> int:
        entries = [SnapshotEntry(segment=commit.segment, rows=n, commits=named) for n in rows]
        record = SnapshotRecord(
            name="1",
            store_id=_DIGEST,
            rows=sizes.total(),
            hooks=tuple(h.name for h in hooks),
            segments=tuple(entries),
            identity_sha256=_DIGEST,
        )
        return len(dump(record.sealed()))

    named = {commit.file: _DIGEST}
    return length() + sum(many * (length(n, n) - length(n)) for n, many in sizes.items())


def plan_disk(
    sizes: Counter[int], first: int, hooks: list[HookInfo], layout: Layout, vocab: int
) -> tuple[tuple[HookPlan, ...], DiskPlan]:
    planned = tuple(
        HookPlan(
            name=h.name,
            d=h.d,
            chunk_rows=h.chunk_rows,
            chunks=sum(many * -(-n // h.chunk_rows) for n, many in sizes.items()),
            bytes=sum(many * hook_bytes(n, h) for n, many in sizes.items()),
        )
        for h in hooks
    )
    commit = _commit(first, hooks)
    parts = {
        "activations": sum(h.bytes for h in planned),
        "token_table": sum(many * _token_bytes(n) for n, many in sizes.items()),
        "array_metadata": sum(many * _metadata(n, hooks) for n, many in sizes.items()),
        "commits": sum(many * len(dump(_commit(n, hooks))) for n, many in sizes.items()),
        "snapshot": _snapshot(sizes, commit, hooks),
        "canary": _canary(first, hooks, layout),
        "identity": _STORE_JSON + _VOCAB_ENTRY * vocab,
    }
    calibrations = [h for h in hooks if h.dtype == "int8"]
    parts["identity"] += sum(map(_calibration, calibrations))
    disk = DiskPlan(
        rows=sum(n * many for n, many in sizes.items()),
        segments=sizes.total(),
        # The canary is a group too, in float32.
        files=sizes.total() * (len(commit.objects) + 1)
        + (len(_objects("x", 1, [replace(h, dtype="float32", norms=False) for h in hooks])) + 1)
        + (3 + len(calibrations)),
        bytes=sum(parts.values()),
        **parts,
    )
    return planned, disk


def layout_fields(settings: LayoutSettings) -> dict[str, Any]:
    return {k: v for k, v in asdict(settings).items() if k != "dtype"}
