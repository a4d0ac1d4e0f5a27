"""The command `actcache`. The only module here that imports Hydra: what takes settings (run, plan,
find, add-hooks, verify --canary) is composed here, the rest is in commands.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from actcache import commands
from actcache.errors import ActcacheError
from actcache.store.records import build, did_you_mean, keys_at

USAGE = """\
actcache: cache the activations of a language model, once, for every SAE

  actcache run host=HOST data=DATA [store=PATH] [key=value …]
      cache activations; the same command continues an interrupted run
      actcache run host=demo data=pydocs hooks=resid layers=[1,2,3] tokens=500_000 store=stores/demo
      actcache run --help     all keys and the known hosts and data sets
  actcache plan host=HOST hooks=HOOKS tokens=N [plan.gpus=8 …] [--json]
      disk, memory, hours and break-even of such a run, from the model's config.json alone
  actcache find host=HOST data=DATA [key=value …] [--catalog PATH] [--json]
      whether a store holds this work, what a run would compute, how others differ;
      exit status 3 if anything is left to compute
  actcache add-hooks STORE host=HOST hooks=HOOKS [layers=[…]] [--json]
      further hooks of the tokens in a store; needs no data
  actcache ls [--catalog PATH] [--prune] [--json]
      the stores that this machine knows
  actcache info STORE [--snapshot N] [--json]
      identity, hooks, tokens, bytes, statistics
  actcache verify STORE [--snapshot N] [--json]
      check every byte against its digest
  actcache verify STORE --canary host=HOST [host.dtype=…] [--json]
      compare the activations kept for a few contexts with what your own model gives;
      exit status 1 if they differ by more than rounding does
  actcache cp SOURCE TARGET [--snapshot N] [--hooks A,B] [--json]
      copy a store, every byte checked; the same command continues an interrupted copy
  actcache requantise STORE TARGET [dtype=int8] [--snapshot N] [--hooks A,B] [--json]
      the rows in a smaller type, in a store of their own, with the error measured; needs no model
  actcache gc STORE [--older-than SECONDS] [--dry-run] [--json]
      remove what dead writers left, nothing else

STORE, SOURCE and TARGET are folders, s3://bucket/prefix, or, to read, http(s)://…
"""
INTERRUPTED = 130
TO_COMPUTE = 3
SHOWN = {"host": "demo", "data": "pydocs"}  # in --help, where neither is chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script.

    Exits with 0, 1 (error), 2 (usage), 3 (find: something is left to compute) or 130 (Ctrl-C).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    known: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "plan": _plan,
        "find": _find,
        "add-hooks": _add_hooks,
        "ls": commands.ls,
        "info": commands.info,
        "verify": _verify,
        "cp": commands.cp,
        "requantise": commands.requantise,
        "gc": commands.gc,
    }
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        sys.exit(0 if args else 2)
    if args[0] not in known:
        print(f"error: unknown command {args[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(known[args[0]](args[1:]))
    except ActcacheError as e:
        _complain(e)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted before anything was committed", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _complain(error: ActcacheError) -> None:
    """Print an error, once for all ranks of a launch."""
    from actcache import ranks

    if ranks.speaks_for_all(error):
        print(f"error: {error}", file=sys.stderr)


# -- run -------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """conf/ inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return next(p for p in (here / "conf", here.parent / "conf") if p.is_dir())


def _run(args: list[str]) -> int:
    return _compose("run", args, _cache)


def _compose(
    command: str,
    args: list[str],
    act: Callable[[dict[str, Any]], int],
    unused: Collection[str] = (),
) -> int:
    """Compose conf/cache.yaml with `args` and exit with `act(values)`; `unused` may be missing."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="cache")
    def task(cfg: DictConfig) -> None:
        try:
            keys = sorted(OmegaConf.missing_keys(cfg))
            missing = [k for k in keys if k.split(".")[0] not in unused]
            if missing:
                raise ActcacheError(f"missing: {', '.join(f'{k}=…' for k in missing)}")
            values: Any = OmegaConf.to_container(cfg, resolve=True)
            sys.exit(act({k: v for k, v in values.items() if k not in unused}))
        except ActcacheError as e:
            # SystemExit passes through Hydra, which would print anything else with a traceback.
            _complain(e)
            sys.exit(1)

    if {"-h", "--help"} & set(args):  # needs a host and data to show all keys
        chosen = {a.split("=")[0] for a in args}
        args = [*args, *(f"{k}={v}" for k, v in SHOWN.items() if k not in chosen)]
    sys.argv = [f"actcache {command}", *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, we print
    try:
        task()
    except HydraException as e:
        raise ActcacheError(_explain(str(e))) from None
    return 0


def _explain(message: str) -> str:
    """Hydra's message, without advice to append keys and without the places it looked in."""
    from actcache.run import CacheSettings

    wrong = re.match(r"Could not override '([^']+)'", message)
    if wrong:
        *parents, key = wrong[1].split(".")
        known = keys_at(CacheSettings, parents)
        return f"unknown key {wrong[1]!r}.{did_you_mean(key, known)} Known: {', '.join(known)}"
    lines = message.strip().split("\nConfig search path:")[0].splitlines()
    return "\n".join(line for line in lines if not line.startswith("To append to your"))


def _cache(values: dict[str, Any]) -> int:
    from actcache.ranks import is_first
    from actcache.run import CacheSettings, run

    result = run(build(CacheSettings, values), say=print)
    if not is_first():
        return INTERRUPTED if result.interrupted else 0
    if not result.computed and not result.interrupted:
        return 0  # `run` has said so
    rate = f", {result.computed / result.seconds:,.0f} tok/s" if result.computed else ""
    print(
        f"{result.store.path}: snapshot {result.snapshot} holds {result.tokens:,} tokens; "
        f"{result.computed:,} computed now in {result.seconds:.0f} s{rate}"
    )
    if result.interrupted:
        print("interrupted: all that is committed is kept; the same command continues")
        return INTERRUPTED
    return 0


# -- plan ------------------------------------------------------------------------------------------


def _plan(args: list[str]) -> int:
    from hydra.core.config_store import ConfigStore

    from actcache.plan import Assumptions, PlanSettings, plan, table
    from actcache.run import CacheSettings

    def act(values: dict[str, Any]) -> int:
        found = plan(build(PlanSettings, values))
        print(json.dumps(found.to_json(), indent=1) if as_json else table(found))
        return 0

    as_json = "--json" in args
    words = [a for a in args if a != "--json"]
    # Keys and defaults of plan.* are those of the dataclass; only this command has them.
    ConfigStore.instance().store(group="plan", name="default", node=vars(Assumptions()))
    if not any(a.startswith("data=") for a in words):
        words.append("data=pydocs")  # not looked at
    unused = {f.name for f in fields(CacheSettings)} - {f.name for f in fields(PlanSettings)}
    return _compose("plan", ["+plan=default", *words], act, unused)


# -- find and add-hooks ----------------------------------------------------------------------------


def _find(args: list[str]) -> int:
    from actcache.find import find
    from actcache.run import CacheSettings

    def act(values: dict[str, Any]) -> int:
        found = find(build(CacheSettings, values), _say(as_json))
        print(json.dumps(found.to_json(), indent=1) if as_json else found)
        return TO_COMPUTE if found.compute else 0

    words, as_json = _options(args)
    return _compose("find", words, act)


def _add_hooks(args: list[str]) -> int:
    from actcache.add_hooks import AddHooksSettings, add_hooks
    from actcache.ranks import is_first

    def act(values: dict[str, Any]) -> int:
        layout = values.pop("layout")
        if typed("layout") - {"layout.dtype"}:
            raise ActcacheError("layout: the store has one already; only layout.dtype may be given")
        values["dtype"] = layout["dtype"] if typed("layout") else None
        result = add_hooks(build(AddHooksSettings, values), _say(as_json))
        if is_first():
            print(json.dumps(result.to_json(), indent=1) if as_json else result)
        return INTERRUPTED if result.interrupted else 0

    def typed(group: str) -> set[str]:
        keys = {w.lstrip("+~").split("=")[0] for w in words}
        return {k for k in keys if k.split(".")[0] == group}

    words, as_json = _options(args)
    if words and "=" not in words[0] and not words[0].startswith("-"):
        words[0] = f"store={_quoted(words[0])}"
    for name in ("data", "tokens", "context", "pack", "part"):
        if typed(name):
            raise ActcacheError(f"{name} has no effect here: tokens and contexts are the store's")
    unused = ("data", "tokens", "context", "pack", "part")
    return _compose("add-hooks", [*words, "data=pydocs"], act, unused)


# -- verify ----------------------------------------------------------------------------------------


def _verify(args: list[str]) -> int:
    return _canary(args) if "--canary" in args else commands.verify(args)


def _canary(args: list[str]) -> int:
    from actcache.canary import check, table
    from actcache.host import HostSettings
    from actcache.run import CacheSettings, resolved_host

    def act(values: dict[str, Any]) -> int:
        host = resolved_host(build(HostSettings, values["host"]), not as_json, _say(as_json))
        results = check(store[0], host)
        rows = [asdict(r) | {"ok": r.ok} for r in results]
        print(json.dumps(rows, indent=1) if as_json else table(results))
        return 0 if all(r.ok for r in results) else 1

    words, as_json = _options([a for a in args if a != "--canary"])
    store = [w for w in words if "=" not in w and not w.startswith("-")]
    hosts = [w for w in words if w.lstrip("+~").split("=")[0].split(".")[0] == "host"]
    if len(store) != 1 or len(store) + len(hosts) != len(words):
        raise ActcacheError(
            "expected: actcache verify STORE --canary host=HOST, and no other settings than host.*"
        )
    unused = {f.name for f in fields(CacheSettings)} - {"host"}
    return _compose("verify", [*hosts, "data=pydocs"], act, unused)


def _options(args: list[str]) -> tuple[list[str], bool]:
    """`--catalog PATH` as the setting it stands for, and whether `--json` was there."""
    words = [a for a in args if a != "--json"]
    if "--catalog" in words:
        at = words.index("--catalog")
        words[at : at + 2] = [f"catalog={_quoted(p)}" for p in words[at + 1 : at + 2]]
    return words, "--json" in args


def _say(as_json: bool) -> Callable[[str], None]:
    """Facts go beside JSON, not into it."""
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout)


def _quoted(text: str) -> str:
    """A path as one value of Hydra's grammar."""
    escaped = text.replace('"', '\\"')
    return f'"{escaped}"'
