"""The subcommands that need no settings: ls, info, verify, cp, requantise, gc.

Each prints a table, or JSON with --json. info, verify, cp and requantise also enter the store into
the catalog.

A function here takes the words behind the subcommand and returns the exit status; errors are
ActcacheErrors, which cli.py prints.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm

from actcache.catalog import Catalog, Known
from actcache.store import Snapshot, Store, StoreError, open_store
from actcache.store import verify as check_store
from actcache.store.claims import Claims
from actcache.store.collect import GRACE, find_garbage, remove
from actcache.store.copy import copy_bytes, copy_snapshot
from actcache.store.ids import short
from actcache.store.int8 import Error
from actcache.store.layout import CLAIMS
from actcache.store.places import Location, relative

INTERRUPTED = 130
CATALOG = "folder or s3:// prefix of the catalog; $ACTCACHE_HOME/catalog by default"


def _parser(command: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"actcache {command}", description=about)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _store_parser(command: str, about: str) -> argparse.ArgumentParser:
    parser = _parser(command, about)
    parser.add_argument("store", help="folder of the store, s3://bucket/prefix, or http(s)://…")
    parser.add_argument("--snapshot", help="number of a snapshot; the newest by default")
    parser.add_argument("--catalog", help=CATALOG)
    return parser


def _open(options: argparse.Namespace) -> Snapshot:
    return open_store(options.store).snapshot(options.snapshot)


def _register(store: Store, catalog: str | None, verified: str | None = None) -> None:
    """Enter a store into the catalog; one that cannot be written is said, the command goes on."""
    try:
        Catalog(catalog).register(store.snapshot(), verified)
    except StoreError as e:
        print(f"not registered: {e}", file=sys.stderr)


def _print(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value, indent=1) if as_json else text)


# -- ls --------------------------------------------------------------------------------------------


def ls(args: list[str]) -> int:
    parser = _parser("ls", "The stores that this machine knows.")
    parser.add_argument("--catalog", help=CATALOG)
    parser.add_argument("--prune", action="store_true", help="forget the stores that are missing")
    options = parser.parse_args(args)
    catalog = Catalog(options.catalog)
    known = catalog.known()
    if options.prune:
        for gone in (k for k in known if k.state in ("missing", "other")):
            catalog.forget(gone.entry)
        known = [k for k in known if k.state not in ("missing", "other")]
    for problem in catalog.entries()[1]:
        print(problem, file=sys.stderr)
    _print([_row(k) for k in known], options.json, _listing(known, catalog))
    return 0


def _row(known: Known) -> dict[str, Any]:
    return asdict(known.entry) | {"state": known.state, "problem": known.problem}


def _listing(known: list[Known], catalog: Catalog) -> str:
    if not known:
        return f"no stores are registered in {catalog.folder}"
    lines = [
        f"{'id':<14}{'state':<12}{'tokens':>16}{'size':>11}  {'host':<22}{'verified':<12}"
        "path: hooks"
    ]
    for k in known:
        e = k.entry
        host = f"{e.host.get('architecture', '?')} {short(str(e.host.get('weights', '?')))[:8]}"
        lines.append(
            f"{short(e.store_id):<14}{k.state:<12}{e.tokens:>16,}{_bytes(e.bytes):>11}  {host:<22}"
            f"{(e.verified or 'never')[:10]:<12}{e.path}: {', '.join(h.name for h in e.hooks)}"
        )
        if k.problem:
            lines.append(f"{'':<14}{k.problem}")
    return "\n".join(lines)


# -- info ------------------------------------------------------------------------------------------


def info(args: list[str]) -> int:
    options = _store_parser("info", "Identity, hooks, tokens, bytes, statistics.").parse_args(args)
    snapshot = _open(options)
    facts = describe(snapshot)
    _register(snapshot.store, options.catalog)
    _print(facts, options.json, _table(facts))
    return 0


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """What `actcache info` prints, as plain values."""
    commits = [c for s in snapshot.segments for c in s.commits]
    hooks = {}
    for name, info in snapshot.hooks.items():
        stats = snapshot.stats(name)
        hooks[name] = {
            "module": info.module,
            "io": info.io,
            "d": info.d,
            "dtype": info.dtype,
            "activation_id": info.activation_id,
            "bytes": sum(o.bytes for c in commits for o in c.objects if f"/{info.key}/" in o.key),
            "storage_error": asdict(error) if (error := snapshot.storage_error(name)) else None,
            "mean_norm": stats.mean_norm,
            "total_variance": stats.variance,
            "max_abs": stats.max_abs,
            "rows_without_special": stats.n,
        }
    identity = snapshot.store.identity
    return {
        "store": str(snapshot.store.path),
        "store_id": snapshot.store_id,
        "token_stream_id": snapshot.token_stream_id,
        "host": identity.host,
        "token_stream": identity.token_stream,
        "layout": vars(identity.layout),
        "snapshot": snapshot.name,
        "snapshots": snapshot.store.snapshot_names(),
        "segments": len(snapshot.segments),
        "tokens": snapshot.n_rows,
        "documents": sum(s.commits[0].documents for s in snapshot.segments),
        "bytes": sum(o.bytes for c in commits for o in c.objects),
        "hooks": hooks,
        "recorded": identity.recorded,
    }


def _table(facts: dict[str, Any]) -> str:
    host, layout = facts["host"], facts["layout"]
    packing = facts["token_stream"]["packing"]
    lines = [
        f"store          {facts['store']}",
        f"store id       {short(facts['store_id'])}",
        f"token stream   {short(facts['token_stream_id'])}",
        f"host           {host['architecture']}, {host['dtype']}, {host['attention']}, "
        f"weights {short(host['weights'])}",
        f"tokens         {facts['tokens']:,} of {facts['documents']:,} documents, contexts of "
        f"{packing['context']}",
        f"snapshot       {facts['snapshot']} (of {', '.join(facts['snapshots'])}), "
        f"{facts['segments']} segments of up to {layout['segment_rows']:,} rows, {layout['order']}",
        f"size           {_bytes(facts['bytes'])}",
        "",
        f"{'hook':<24}{'d':>6}  {'dtype':<10}{'size':>10}"
        f"{'E|x|':>10}{'variance':>11}{'max|x|':>10}",
    ]
    for name, hook in facts["hooks"].items():
        lines.append(
            f"{name:<24}{hook['d']:>6}  {hook['dtype']:<10}{_bytes(hook['bytes']):>10}"
            f"{hook['mean_norm']:>10.4g}{hook['total_variance']:>11.4g}{hook['max_abs']:>10.4g}"
        )
    lines += [
        f"{name}: int8, {Error(**hook['storage_error'])}"
        for name, hook in facts["hooks"].items()
        if hook["storage_error"]
    ]
    return "\n".join(lines)


def _bytes(n: int) -> str:
    size, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


# -- verify ----------------------------------------------------------------------------------------


def verify(args: list[str]) -> int:
    options = _store_parser("verify", "Check every byte against its digest.").parse_args(args)
    snapshot = _open(options)
    report = _check(snapshot, options.json)
    if not report["problems"]:
        newest = snapshot.name == snapshot.store.snapshot_names()[-1]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        _register(snapshot.store, options.catalog, now if newest else None)
    _print(report, options.json, _verdict(report))
    return 1 if report["problems"] else 0


def _check(snapshot: Snapshot, quiet: bool) -> dict[str, Any]:
    total = sum(o.bytes for s in snapshot.segments for c in s.commits for o in c.objects)
    checked, problems = 0, []
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=quiet) as bar:
        for check in check_store(snapshot):
            checked += 1
            bar.update(check.bytes)
            if check.problem:
                problems.append({"object": check.key, "problem": check.problem})
    return {"objects": checked, "bytes": total, "problems": problems}


def _verdict(report: dict[str, Any]) -> str:
    problems = report["problems"]
    verdict = f"{len(problems)} damaged" if problems else "all whole"
    lines = [f"{p['object']}: {p['problem']}" for p in problems]
    lines.append(f"{report['objects']:,} objects, {_bytes(report['bytes'])}: {verdict}")
    return "\n".join(lines)


# -- cp --------------------------------------------------------------------------------------------


def cp(args: list[str]) -> int:
    about = "Copy a store, every byte checked; the same command continues an interrupted copy."
    parser = _store_parser("cp", about)
    parser.add_argument("target", help="folder of the copy, or s3://bucket/prefix")
    parser.add_argument("--hooks", help="only the commits that hold these: resid.1,mlp.0")
    options = parser.parse_args(args)
    snapshot = _open(options)
    hooks = None if options.hooks is None else [h for h in options.hooks.split(",") if h]
    total = copy_bytes(snapshot, hooks)
    try:
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="copying", disable=options.json
        ) as bar:
            done = copy_snapshot(snapshot, options.target, hooks, bar.update)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return INTERRUPTED
    _register(done.store, options.catalog)
    copy = done.store.snapshot(done.snapshot)
    facts = {
        "store": str(done.store.path),
        "store_id": done.store.store_id,
        "snapshot": done.snapshot,
        "tokens": copy.n_rows,
        "hooks": sorted(copy.hooks),
        "copied": done.copied,
        "kept": done.kept,
        "bytes": done.bytes,
    }
    text = (
        f"{done.store.path}: snapshot {done.snapshot}, {copy.n_rows:,} tokens of "
        f"{', '.join(sorted(copy.hooks))}; {done.copied:,} files copied ({_bytes(done.bytes)}), "
        f"{done.kept:,} were there"
    )
    _print(facts, options.json, text)
    return 0


# -- requantise ------------------------------------------------------------------------------------


def requantise(args: list[str]) -> int:
    from actcache.requantise import requantise as make

    about = "The rows of a store in a smaller type, in a store of their own; no model is needed."
    parser = _store_parser("requantise", about)
    parser.add_argument("target", help="folder of the new store; the same command continues it")
    parser.add_argument("dtype", nargs="?", default="dtype=int8", help="dtype=int8 by default")
    parser.add_argument("--hooks", help="only these: resid.1,mlp.0")
    options = parser.parse_intermixed_args(args)
    key, _, dtype = options.dtype.partition("=")
    if key != "dtype":
        parser.error(f"expected dtype=TYPE behind the two stores, got {options.dtype!r}")
    source = _open(options)
    hooks = None if options.hooks is None else [h for h in options.hooks.split(",") if h]
    bar = tqdm(
        total=source.n_rows, unit="tok", unit_scale=True, desc=f"to {dtype}", disable=options.json
    )
    try:
        with bar:
            done = make(source, options.target, dtype, hooks, bar.update)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return INTERRUPTED
    _register(done.store, options.catalog)
    made = done.store.snapshot(done.snapshot)
    errors = {h: e for h in done.hooks if (e := made.storage_error(h))}
    facts = {
        "store": str(done.store.path),
        "store_id": done.store.store_id,
        "snapshot": done.snapshot,
        "tokens": made.n_rows,
        "hooks": {h: made.hooks[h].dtype for h in done.hooks},
        "written": done.written,
        "kept": done.kept,
        "storage_error": {h: asdict(e) for h, e in errors.items()},
    }
    lines = [f"{h}: {e}" for h, e in errors.items()]
    lines.append(
        f"{done.store.path}: snapshot {done.snapshot}, {made.n_rows:,} tokens of "
        f"{', '.join(done.hooks)}; {done.written:,} written as {dtype}, {done.kept:,} were there"
    )
    _print(facts, options.json, "\n".join(lines))
    return 0


# -- gc --------------------------------------------------------------------------------------------


def gc(args: list[str]) -> int:
    parser = _parser("gc", "Remove what dead writers left in a store: what no commit names.")
    parser.add_argument("store", help="folder of the store, or s3://bucket/prefix")
    parser.add_argument(
        "--older-than",
        type=float,
        default=GRACE,
        metavar="SECONDS",
        help=f"leave what changed since; {GRACE:.0f} by default",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    options = parser.parse_args(args)
    if not options.older_than >= 0:
        parser.error(f"--older-than: expected 0 or more seconds, got {options.older_than}")
    root = open_store(options.store).path
    _refuse_workers(root, options.older_than)
    garbage = find_garbage(root, options.older_than)
    freed = sum(g.bytes for g in garbage) if options.dry_run else remove(garbage)
    names = [relative(root, g.path) for g in garbage]
    facts = {"store": str(root), "removed": names, "bytes": freed, "dry_run": options.dry_run}
    did = "would be removed" if options.dry_run else "removed"
    text = "\n".join([*names, f"{len(names):,} {did}, {_bytes(freed)}"])
    _print(facts, options.json, text)
    return 0


def _refuse_workers(root: Location, grace: float) -> None:
    """A living writer's unfinished folder looks like garbage until it commits."""
    busy = Claims(root / CLAIMS, "gc").others()
    if busy and grace < GRACE:
        raise StoreError(
            f"{root}: writers are at work on {', '.join(busy[:3])}; wait for them, or leave out "
            f"--older-than (which then is {GRACE:.0f})"
        )
