"""What the one-command front ends share: cache, then train and evaluate one SAE per hook.

A front end is a frozen dataclass. Each of its fields names the settings it stands for by dotted
path, `cache.…` in `actcache.run.CacheSettings` or `train.…` in `saetrain.TrainSettings`. The same
table turns what the user typed into settings, and an error about a setting into the user's words.
What the store holds already is not computed again, and finished runs are not trained again.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from actcache.errors import ActcacheError
from actcache.families import block_list
from actcache.hooks import resolve
from actcache.host import Host, HostSettings
from actcache.run import CacheSettings, run
from actcache.store import Store
from actcache.store.ids import digest
from actcache.store.records import build
from saetrain.errors import ConfigError, SaetrainError
from saetrain.evals.run import summary
from saetrain.log import say, table
from saetrain.runs import resolve_device
from saetrain.saes import make_config
from saetrain.saes.sae import AutoencoderConfig
from saetrain.settings import TrainSettings
from saetrain.trainer import TrainResult, train

Values = dict[str, Any]  # dotted path -> value, such as "train.sae.k": 32
Say = Callable[[str], None]

STREAM_TOKENS = 10_000_000  # of a streamed data set, unless told otherwise: it may have no end
LONGEST = 2048  # tokens of a context by default
SEGMENT_ROWS = 131_072


_HOMES: dict[str, Any] = {
    "cache": CacheSettings,
    "train": TrainSettings,
    "train.sae": AutoencoderConfig,
}


def option(to: str, help: str, default: Any = ..., unset: str = "none") -> Any:
    """A field for the settings `to` (paths separated by spaces), with their default unless given.

    `default=MISSING` makes it required. `unset` says what a default of None means.
    """
    paths = tuple(to.split())
    if default is ...:
        default = default_of(paths[0])
    return field(default=default, metadata={"to": paths, "help": help, "unset": unset})


def default_of(path: str) -> Any:
    """The default of the setting at a dotted path."""
    parent, name = path.rsplit(".", 1)
    return next(f.default for f in fields(home_of(parent)) if f.name == name)


def home_of(path: str) -> Any:
    """The dataclass at a dotted path, such as "train.optim"; for "train.sae" that of the SAE."""
    if path in _HOMES:
        return _HOMES[path]
    parent, name = path.rsplit(".", 1)
    return get_type_hints(home_of(parent))[name]


def values_of(config: Any) -> Values:
    """Dotted path -> value, for every field of a front end that stands for settings."""
    return {
        path: getattr(config, f.name) for f in fields(config) for path in f.metadata.get("to", ())
    }


def words_of(cls: type, shown: Callable[[str], str]) -> dict[str, str]:
    """Setting, as library messages spell it -> what the user types for it."""
    return {
        path.split(".", 1)[1]: shown(f.name)
        for f in fields(cls)
        for path in f.metadata.get("to", ())
    }


def in_words(message: str, words: Mapping[str, str]) -> str:
    """`message` with settings as the user types them.

    Names without a dot, such as `store`, are words of their own: only `store=` and `store:` count.
    """
    names = sorted(words, key=len, reverse=True)
    parts = [re.escape(n) + (r"(?!\w|\.\w)" if "." in n else r"(?==|: )") for n in names]
    pattern = re.compile(rf"(?<![\w./-])(?:{'|'.join(parts)})") if parts else re.compile(r"(?!)")
    return pattern.sub(lambda found: words[found[0]], message)


def guarded(work: Callable[[Say], object], words: Mapping[str, str]) -> int:
    """Exit status of `work`: 0, 1 after an error, told in the user's words, 130 after Ctrl-C."""
    try:
        work(lambda message: say(in_words(message, words)))
    except (ActcacheError, SaetrainError) as e:
        print(f"error: {in_words(str(e), words)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        print(f"interrupted: {e or 'run the same command again to continue'}", file=sys.stderr)
        return 130
    return 0


# -- from words to settings ------------------------------------------------------------------------


def open_host(values: Values) -> Host:
    """Config and tokenizer of the model; its weights are not read."""
    return Host(build(HostSettings, nested(values)["cache"]["host"], "host"))


def n_layers(host: Host) -> int:
    return len(block_list(host.skeleton())[1])


def is_local(data: str) -> bool:
    """Whether `data` names files here: something that exists, a glob, or spelled like a path."""
    path_like = data.startswith((".", "/", "~")) or data.endswith(".parquet")
    return path_like or any(c in data for c in "*?[") or Path(data).expanduser().exists()


def data_values(data: str, split: str) -> Values:
    """Local parquet (file, folder, glob), or else a data set of the hub, streamed."""
    if not is_local(data):
        return {"cache.data.kind": "hub", "cache.data.dataset": data}
    if split != "train":
        raise ConfigError(
            f"data.split={split} has no effect on local parquet files: name the split's own files"
        )
    return {"cache.data.kind": "parquet", "cache.data.files": data}


def settings_of(values: Values, host: Host, say: Say) -> tuple[CacheSettings, TrainSettings]:
    """Both stages' settings. `train.batch_tokens` counts sequences here: it is times the context.

    Fills in, and says, what was left open: context, segment size, end of a stream, store folder.
    """
    values = dict(values)
    context = values["cache.context"] = _context(values.get("cache.context"), host, say)
    values["train.batch_tokens"] *= context
    if values.get("cache.layout.segment_rows") is None:
        values["cache.layout.segment_rows"] = max(1, SEGMENT_ROWS // context) * context
    endless = values["cache.data.kind"] == "hub" and values.get("cache.data.max_samples") is None
    if endless and values.get("cache.tokens") is None:
        values["cache.tokens"] = STREAM_TOKENS
        say(f"tokens={STREAM_TOKENS:,} of the stream are cached, as no end was given")
    store = values.get("cache.store")
    tree = nested(values | {"cache.store": store or "unnamed"})
    trained = TrainSettings.from_mapping(tree["train"])
    cached = build(CacheSettings, tree["cache"])
    if not store:
        cached = replace(cached, store=str(_own_store(cached, Path(trained.runs_dir))))
    say(f"store={cached.store}")
    return cached, trained


def nested(values: Values) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _context(asked: int | None, host: Host, say: Say) -> int:
    """Tokens of a context, at most what the model has positions for."""
    most = getattr(host.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        chosen = min(LONGEST, most or LONGEST)
        say(f"context={chosen} by default (the model has {most or 'any number of'} positions)")
        return chosen
    if most is not None and asked > most:
        raise ConfigError(f"context={asked} is more than the {most} positions of the model")
    return asked


def _own_store(cached: CacheSettings, runs_dir: Path) -> Path:
    """A folder that follows from all that the store's rows depend on."""
    facts = asdict(cached)
    for name in ("store", "hooks", "layers", "tokens", "catalog", "progress"):
        del facts[name]
    for name in ("device", "batch_tokens"):
        del facts["host"][name]
    data = str(cached.data.dataset or cached.data.files)
    names = [re.sub(r"\W+", "-", Path(n).name).strip("-") for n in (cached.host.model, data)]
    key = digest(facts).removeprefix("sha256:")[:8]
    return runs_dir.expanduser() / "stores" / "-".join([*names, key])


# -- the work --------------------------------------------------------------------------------------


def cache_then_train(
    cached: CacheSettings, trained: TrainSettings, host: Host, say: Say
) -> list[TrainResult]:
    """Fill the store, then train and evaluate one SAE per hook, one after the other.

    What can be refused is refused before the model runs. Raises what the two stages raise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes (torchrun) are not in this version yet; start one")
    resolve_device(trained.device)
    make_config(trained.sae)
    hooks = [p.name for p in resolve(cached.hooks, cached.layers, host.skeleton())]
    result = run(cached, say)
    say(f"{result.tokens:,} tokens in the store, {result.computed:,} of them computed now")
    if result.interrupted:
        raise KeyboardInterrupt("what is committed is kept; the same command continues")
    done = []
    for hook in hooks:
        snapshot = _oldest_equal(result.store, result.snapshot, hook)
        done.append(train(replace(trained, store=cached.store, snapshot=snapshot, hook=hook)))
    if len(done) > 1:
        print(table([summary(r.run_dir, r.metrics) for r in done]))
    return done


def _oldest_equal(store: Store, name: str, hook: str) -> str:
    """The first snapshot with the rows of snapshot `name`: equal commands find their run again,
    though hooks have been added to the store since."""

    def rows(snapshot: str) -> Sequence[str]:
        return [s.id for s in store.snapshot(snapshot).segments]

    return next(
        n
        for n in store.snapshot_names()
        if hook in store.snapshot(n).hooks and rows(n) == rows(name)
    )
