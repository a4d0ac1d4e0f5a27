"""What tests of untrusted stores share: a small store, its digests made good, every use of it."""

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from stores import make_store

from actcache.store import DamagedError, HookInfo, open_store, verify
from actcache.store.canaries import canaries, write_canary
from actcache.store.collect import find_garbage
from actcache.store.ids import bytes_digest, digest, store_digest

HOOK = "resid.2"
PEAK = 4 << 20  # bytes that a refusal may allocate; the smallest bait here is 64 times as large
OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)
RECORDS = ("store.json", "vocab.json", "snapshots/1.json", "commits/", "canaries/")


def small_store(path: Path):
    """Two segments of 64 and 32 rows, one hook of 4 channels in 4 and 2 chunks, one canary."""
    store = make_store(path, hooks={HOOK: 4}, segments=(64, 32), dtype="float32", chunk_bytes=256)
    tokens = store.snapshot().segments[1].tokens()
    tokens = tokens.take(np.lexsort((tokens.pos, tokens.ctx)))
    info = HookInfo(
        name=HOOK,
        module="layers.2",
        io="out",
        d=4,
        dtype="float32",
        chunk_rows=16,
        activation_id=digest([store.store_id, HOOK, "float32"]),
    )
    write_canary(
        path,
        store_id=store.store_id,
        segment="u00001-0000",
        contexts=[0],
        tokens=tokens,
        acts=[(info, np.ones((32, 4), np.float32))],
        writer={},
    )
    return open_store(path)


def record_file(root: Path, name: str) -> Path:
    """The file of a record; 'commits/' and 'canaries/' stand for the first in that folder."""
    return min((root / name).glob("*.json")) if name.endswith("/") else root / name


def seal(root: Path) -> None:
    """Make good every digest of a store, as one who means harm would; leaves what is not JSON."""
    store, snapshot = _read(root / "store.json"), _read(root / "snapshots" / "1.json")
    if isinstance(store, dict):
        if isinstance(store.get("files"), dict):
            store["files"]["vocab.json"] = bytes_digest((root / "vocab.json").read_bytes())
        _try(lambda: store.update(token_stream_id=digest(store["token_stream"])))
        _try(lambda: store.update(store_id=store_digest(store["token_stream_id"], store["host"])))
        _write(root / "store.json", store)
    if isinstance(snapshot, dict):
        snapshot["identity_sha256"] = bytes_digest((root / "store.json").read_bytes())
        if isinstance(store, dict):
            snapshot["store_id"] = store.get("store_id")
        _try(lambda: [_seal_entry(root, entry) for entry in snapshot["segments"]])
        _seal_checksum(root / "snapshots" / "1.json", snapshot)
    for file in (root / "canaries").glob("*.json"):
        if isinstance(canary := _read(file), dict):
            _seal_checksum(file, canary)


def _seal_entry(root, entry):
    for name in list(entry["commits"]):
        if (root / "commits" / name).is_file():
            entry["commits"][name] = bytes_digest((root / "commits" / name).read_bytes())


def _seal_checksum(file, record):
    _try(lambda: record.update(checksum=digest(record | {"checksum": ""})))
    _write(file, record)


def _try(act):
    """Seal what can be sealed: the record may have lost any field or hold any value."""
    try:
        act()
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError):
        return


def _read(file):
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _write(file, record):
    file.write_text(json.dumps(record), "utf-8")


def use(root: Path) -> list[str]:
    """Everything a reader does with a store; the problems that verify names."""
    store = open_store(root)
    snapshot = store.snapshot()
    snapshot.vocab()
    for hook in snapshot.hooks:
        snapshot.stats(hook)
        snapshot.stats(hook, special=True)
        snapshot.resolve_hook(hook)
    for segment in snapshot.segments:
        segment.tokens()
        for hook in snapshot.hooks:
            segment.acts(hook).read()
    for canary in canaries(store):
        canary.tokens()
        for hook in canary.hooks:
            canary.acts(hook)
    find_garbage(root, grace=0)
    return [f"{c.key}: {c.problem}" for c in verify(snapshot) if c.problem]


def edit(root, name, act):
    """Change a record with `act(values)`, and make every digest good again."""
    file = record_file(root, name)
    values = json.loads(file.read_text())
    act(values)
    file.write_text(json.dumps(values))
    seal(root)


def put(*path):
    """A change: `put("hooks", 0, "info", "d", 7)` sets the 7 there."""
    *keys, last, value = path

    def act(values):
        for key in keys:
            values = values[key]
        values[last] = value

    act.__name__ = f"{'.'.join(map(str, (*keys, last)))}={str(value)[:40]}"
    return act


def refused(root, match, kind=DamagedError):
    """Using the store fails with `kind`, in these words, with little memory and nothing outside."""
    OPENED.clear()
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=match):
            use(root)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < PEAK
    assert not [path for path in OPENED if "outside" in path or "passwd" in path]
