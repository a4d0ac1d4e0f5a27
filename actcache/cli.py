"""The command `actcache`: run, plan, info, verify. The only module here that imports Hydra."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from actcache import commands
from actcache.errors import ActcacheError
from actcache.store.records import build

USAGE = """\
actcache: cache the activations of a language model, once, for every SAE

  actcache run host=HOST data=DATA store=PATH [key=value …]
      cache activations; the same command continues an interrupted run
      actcache run host=demo data=pydocs hooks=resid layers=[1,2,3] tokens=500_000 store=stores/demo
      actcache run --help     all keys and the known hosts and data sets
  actcache plan host=HOST hooks=HOOKS tokens=N [plan.gpus=8 …] [--json]
      disk, memory, hours and break-even of such a run, from the model's config.json alone
  actcache info STORE [--snapshot N] [--json]
      identity, hooks, tokens, bytes, statistics
  actcache verify STORE [--snapshot N] [--json]
      check every byte against its digest
"""
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Exits with 0, 1 (error), 2 (usage) or 130 (Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    known: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "plan": _plan,
        "info": commands.info,
        "verify": commands.verify,
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
    return _compose("run", args, _cache)


def _compose(
    command: str,
    args: list[str],
    act: Callable[[dict[str, Any]], int],
    unused: Collection[str] = (),
) -> int:
    """Compose conf/cache.yaml with `args` and exit with `act(values)`; `unused` may be missing."""
    import hydra
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
            print(f"error: {e}", file=sys.stderr)
            sys.exit(1)

    sys.argv = [f"actcache {command}", *args]
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
