"""The subcommands that need no settings: info, verify. Each prints a table, or JSON with --json.

A function here takes the words behind the subcommand and returns the exit status; errors are
ActcacheErrors, which cli.py prints.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from tqdm import tqdm

from actcache.store import Snapshot, open_store
from actcache.store import verify as check_store
from actcache.store.ids import short


def _open(args: list[str], command: str) -> tuple[Snapshot, bool]:
    parser = argparse.ArgumentParser(prog=f"actcache {command}")
    parser.add_argument("store", help="folder of the store")
    parser.add_argument("--snapshot", help="number of a snapshot; the newest by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(args)
    return open_store(options.store).snapshot(options.snapshot), options.json


def info(args: list[str]) -> int:
    snapshot, as_json = _open(args, "info")
    facts = describe(snapshot)
    print(json.dumps(facts, indent=1) if as_json else _table(facts))
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
            "bytes": sum(
                o.bytes for c in commits for o in c.objects if f"/acts/{info.key}/" in o.key
            ),
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
    return "\n".join(lines)


def _bytes(n: int) -> str:
    size, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def verify(args: list[str]) -> int:
    snapshot, as_json = _open(args, "verify")
    total = sum(o.bytes for s in snapshot.segments for c in s.commits for o in c.objects)
    checked, problems = 0, []
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=as_json) as bar:
        for check in check_store(snapshot):
            checked += 1
            bar.update(check.bytes)
            if check.problem:
                problems.append({"object": check.key, "problem": check.problem})
    if as_json:
        print(json.dumps({"objects": checked, "bytes": total, "problems": problems}, indent=1))
    else:
        for problem in problems:
            print(f"{problem['object']}: {problem['problem']}")
        verdict = f"{len(problems)} damaged" if problems else "all whole"
        print(f"{checked:,} objects, {_bytes(total)}: {verdict}")
    return 1 if problems else 0
