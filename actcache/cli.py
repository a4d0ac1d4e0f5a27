"""The command `actcache`: run, info, verify. The only module of this package that imports Hydra."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from actcache.errors import ActcacheError
from actcache.store import Snapshot, open_store, verify
from actcache.store.ids import short
from actcache.store.records import build

USAGE = """\
actcache: cache the activations of a language model, once, for every SAE

  actcache run host=HOST data=DATA store=PATH [key=value …]
      cache activations; the same command continues an interrupted run
      actcache run host=demo data=pydocs hooks=resid layers=[1,2,3] tokens=500_000 store=stores/demo
      actcache run --help     all keys and the known hosts and data sets
  actcache info STORE [--snapshot N] [--json]
      identity, hooks, tokens, bytes, statistics
  actcache verify STORE [--snapshot N] [--json]
      check every byte against its digest
"""
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Exits with 0, 1 (error), 2 (usage) or 130 (Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "info": _info,
        "verify": _verify,
    }
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        sys.exit(0 if args else 2)
    if args[0] not in commands:
        print(f"error: unknown command {args[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(commands[args[0]](args[1:]))
    except ActcacheError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted before anything was committed", file=sys.stderr)
        sys.exit(INTERRUPTED)


# -- run -------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """conf/ inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return next(p for p in (here / "conf", here.parent / "conf") if p.is_dir())


def _run(args: list[str]) -> int:
    import hydra
    from omegaconf import DictConfig, OmegaConf

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="cache")
    def task(cfg: DictConfig) -> None:
        try:
            missing = sorted(OmegaConf.missing_keys(cfg))
            if missing:
                raise ActcacheError(f"missing: {', '.join(f'{k}=…' for k in missing)}")
            values: Any = OmegaConf.to_container(cfg, resolve=True)
            sys.exit(_cache(values))
        except ActcacheError as e:
            # SystemExit passes through Hydra, which would print anything else with a traceback.
            print(f"error: {e}", file=sys.stderr)
            sys.exit(1)

    sys.argv = ["actcache run", *args]
    task()
    return 0


def _cache(values: dict[str, Any]) -> int:
    from actcache.run import CacheSettings, run

    result = run(build(CacheSettings, values), say=print)
    rate = f", {result.computed / result.seconds:,.0f} tok/s" if result.computed else ""
    print(
        f"{result.store.path}: snapshot {result.snapshot} holds {result.tokens:,} tokens; "
        f"{result.computed:,} computed now in {result.seconds:.0f} s{rate}"
    )
    if result.interrupted:
        print("interrupted: all that is committed is kept; the same command continues")
        return INTERRUPTED
    return 0


# -- info and verify -------------------------------------------------------------------------------


def _open(args: list[str], command: str) -> tuple[Snapshot, bool]:
    parser = argparse.ArgumentParser(prog=f"actcache {command}")
    parser.add_argument("store", help="folder of the store")
    parser.add_argument("--snapshot", help="number of a snapshot; the newest by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(args)
    return open_store(options.store).snapshot(options.snapshot), options.json


def _info(args: list[str]) -> int:
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


def _verify(args: list[str]) -> int:
    snapshot, as_json = _open(args, "verify")
    total = sum(o.bytes for s in snapshot.segments for c in s.commits for o in c.objects)
    checked, problems = 0, []
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=as_json) as bar:
        for check in verify(snapshot):
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
