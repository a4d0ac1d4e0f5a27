"""A run's folder and its sources: what it is trained on, where it is kept, whether it may go on.

run.json names the store, the hook, the package versions and the git commit, and no path or host.
A rerun with the same settings lands in the same folder; it continues only on the same store, and
on the snapshot that it began with even if the store has grown since.
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, cast

import torch

import saetrain
from actcache.store import Store, open_store
from actcache.store.cached import through
from actcache.store.local_cache import LocalCache
from actcache.store.places import IN_FLIGHT, Remote
from saetrain.errors import ConfigError, TrainingError
from saetrain.evals.own import make_metrics
from saetrain.log import say
from saetrain.saes import make_config, sae_class
from saetrain.saes.base import HookSpace
from saetrain.settings import TrainSettings
from saetrain.several import Readable, activation_ids, at, open_several, parts, stream_over
from saetrain.stream import Batch, Split, Stream
from saetrain.units import unit_of

RUN, CONFIG, LOCK = "run.json", "config.json", ".lock"
_PACKAGES = ("actcache-saetrain", "torch", "numpy", "safetensors", "zarr", "hydra-core", "wandb")
_FIXED = ("store_id", "token_stream_id", "snapshot", "live", "hooks", "result_key")


class BatchStream(Protocol):
    """What the trainer needs of a stream; `saetrain.stream.Stream` is one."""

    @property
    def n_rows(self) -> int | None: ...  # of an epoch; None: a live source does not know it yet
    @property
    def batches_per_epoch(self) -> int | None: ...  # None likewise
    def space(self, hook: str) -> HookSpace: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def one_pass(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """Training and held-out batches of the hooks that an SAE reads and reconstructs."""

    train: BatchStream
    held_out: BatchStream
    hooks_in: tuple[str, ...]
    hooks_out: tuple[str, ...]
    start: dict[str, Any]  # state of `train` before its first batch
    snapshot: Readable | None  # None: the batches do not come from a store
    live: dict[str, Any] | None = None  # ids of what is captured, of a live source
    # What runs on the same rows need not compute again, such as the PCA beside them; by its inputs.
    memo: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def hook_in(self) -> str:
        """The first input hook, the only one of most architectures."""
        return self.hooks_in[0]

    @property
    def hook_out(self) -> str:
        return self.hooks_out[0]

    def spaces(self) -> dict[str, HookSpace]:
        """Of all hooks, input hooks first, in the architecture's order."""
        return {h: self.train.space(h) for h in dict.fromkeys((*self.hooks_in, *self.hooks_out))}

    def ids(self) -> dict[str, Any]:
        """Store, token stream, snapshot and activation ids, of several stores by label.

        Empty without a store.
        """
        snap = self.snapshot
        if snap is None:
            return {} if self.live is None else {"live": self.live}
        return {
            "store_id": snap.store_id,
            "token_stream_id": snap.token_stream_id,
            "snapshot": snap.name,
            "activation_ids": activation_ids(snap, self.spaces()),
        }


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}, but torch sees no CUDA device; use device=auto")
    return device


def open_snapshot(settings: TrainSettings) -> Readable:
    """What to train on: the snapshot named, or the newest; of several stores, see `several`."""
    if settings.stores is not None:
        return open_several(settings, lambda path: _open(path, settings))
    if settings.store is None:
        raise ConfigError("missing: store. Give the path of a store made by actcache, store=PATH")
    assert not isinstance(settings.snapshot, dict)  # TrainSettings
    return _open(settings.store, settings).snapshot(settings.snapshot)


def _open(path: str, settings: TrainSettings) -> Store:
    store = open_store(path)
    if settings.stream.cache_dir is not None:
        if not isinstance(store.path, Remote):
            say(f"stream.cache_dir has no effect: {path} is a folder, not at a server")
        else:
            size = int(settings.stream.cache_gb * 1e9)
            store = through(store, LocalCache(settings.stream.cache_dir, size))
    return store


def resolve(settings: TrainSettings, snapshot: Readable) -> TrainSettings:
    """Settings with hooks by their stored names. HookMissingError lists the hooks there are."""
    return renamed(settings, snapshot.resolve_hook)


def renamed(settings: TrainSettings, stored: Callable[[str], str]) -> TrainSettings:
    """Settings with every hook by its `stored` name."""
    config = make_config(settings.sae, settings.saes_path)
    sae = dict(settings.sae)
    for name in config.HOOK_FIELDS:
        value = getattr(config, name)
        if isinstance(value, str):
            sae[name] = stored(value)
        elif value is not None:
            sae[name] = [stored(hook) for hook in value]
    if not config.NAMES_INPUTS:
        return replace(settings, hook=stored(settings.hook), sae=sae)
    first = make_config(sae, settings.saes_path).hooks(settings.hook)[0]
    listed = getattr(config, "hooks_in", None)  # else `hook` says of which kind they are
    if listed and settings.hook not in (TrainSettings.hook, first[0]):
        say(f"hook={settings.hook} has no effect: sae.name={sae['name']} reads {', '.join(first)}")
    return replace(settings, hook=first[0], sae=sae)  # names the run


def open_source(settings: TrainSettings, snapshot: Readable, device: torch.device) -> Source:
    """Streams over `snapshot` for resolved settings."""
    hooks_in, hooks_out = make_config(settings.sae, settings.saes_path).hooks(settings.hook)
    hooks = tuple(dict.fromkeys((*hooks_in, *hooks_out)))

    train = open_stream(settings, snapshot, hooks, "train", device)
    held_out = open_stream(settings, snapshot, hooks, "held_out", device)
    if held_out.n_rows == 0:  # found out now rather than after training
        raise ConfigError(
            f"held_out_fraction={settings.held_out_fraction}: none of the store's documents is "
            "held out, so the SAE could not be evaluated; raise it, or cache more documents"
        )
    return Source(
        train=train,
        held_out=held_out,
        hooks_in=hooks_in,
        hooks_out=hooks_out,
        start=train.state_dict(),
        snapshot=snapshot,
    )


def open_stream(
    settings: TrainSettings,
    snapshot: Readable,
    hooks: tuple[str, ...],
    split: Split,
    device: torch.device,
) -> BatchStream:
    """The stream of a run over `snapshot`, of these stored hooks."""
    stream = stream_over(
        snapshot,
        hooks,
        unit=sae_class(settings.sae, settings.saes_path).unit,
        batch_tokens=settings.batch_tokens,
        seed=settings.seed,
        split=split,
        held_out_fraction=settings.held_out_fraction,
        device=device,
        **stream_options(settings, snapshot),
    )
    return cast(BatchStream, stream)


def stream_options(settings: TrainSettings, snapshot: Readable) -> dict[str, Any]:
    """`stream: …` as keyword arguments of a Stream over `snapshot`."""
    options = dict(vars(settings.stream))
    remote = any(isinstance(s.store.path, Remote) for s in parts(snapshot))
    if options["threads"] is None and remote:
        options["threads"] = IN_FLIGHT  # they wait for a server, not for a processor
    return {k: v for k, v in options.items() if k not in ("cache_dir", "cache_gb")}


def sources(
    settings: TrainSettings,
    stream: BatchStream | None,
    held_out: BatchStream | None,
    device: torch.device,
) -> tuple[TrainSettings, Source]:
    """Resolved settings and what to read: the store, or the streams the caller brings."""
    make_config(settings.sae, settings.saes_path)  # a misspelt sae key fails before any reading
    make_metrics(settings.eval.metrics, settings.metrics_path)
    if (stream is None) != (held_out is None):
        raise ConfigError("train: give both stream and held_out, or neither")
    if stream is None or held_out is None:
        if settings.source == "live":
            from saetrain.live import open_live  # it makes a Source, so not at the top

            settings, source = open_live(settings, device)
            _check_unit(settings, source.train)
            return settings, source
        newest = open_snapshot(settings)
        settings = resolve(settings, newest)
        return settings, open_source(settings, recorded_snapshot(settings, newest), device)
    _check_unit(settings, stream)
    snapshot = stream.snapshot if isinstance(stream, Stream) else None
    if snapshot is not None:
        settings = resolve(settings, snapshot)
    hooks_in, hooks_out = make_config(settings.sae, settings.saes_path).hooks(settings.hook)
    source = Source(
        train=stream,
        held_out=held_out,
        hooks_in=hooks_in,
        hooks_out=hooks_out,
        start=stream.state_dict(),
        snapshot=snapshot,
    )
    return settings, source


def _check_unit(settings: TrainSettings, stream: BatchStream) -> None:
    """ConfigError unless the stream gives what the architecture reads: rows, or whole contexts."""
    name, unit = settings.sae["name"], sae_class(settings.sae, settings.saes_path).unit
    if unit == unit_of(stream):
        return
    if unit == "token":
        raise ConfigError(
            f"sae.name={name} reads single rows, and this stream gives whole contexts. Give "
            "saetrain.stream.Stream"
        )
    if settings.source == "live":
        raise ConfigError(
            f"sae.name={name} reads whole contexts, and source=live mixes single rows. Cache the "
            "activations first (actcache run) and train from the store, source=store"
        )
    order = stream.snapshot.store.identity.layout.order if isinstance(stream, Stream) else None
    of = f" of a store of order={order}" if order else ""
    raise ConfigError(
        f"sae.name={name} reads whole contexts, and this stream gives single, shuffled rows{of}. "
        "Give saetrain.stream.SequenceStream, which puts contexts together, sorting their rows "
        "where a store has them permuted"
    )


def recorded_snapshot(settings: TrainSettings, newest: Readable) -> Readable:
    """The snapshot that an earlier start of this run used, if any; else `newest`."""
    known = read_json(settings.run_dir / RUN)
    if settings.fresh or settings.snapshot is not None or not known.get("snapshot"):
        return newest
    if known.get("store_id") != newest.store_id:
        return newest  # `earlier` refuses, with both ids
    return at(newest, known["snapshot"])


def earlier(run_dir: Path, record: Mapping[str, Any], *, fresh: bool) -> dict[str, Any]:
    """The record of an earlier start of this run, {} if there is none or `fresh` drops it.

    TrainingError if the folder holds other things, or a run on another store.
    """
    known = read_json(run_dir / RUN)
    others = [p.name for p in run_dir.glob("*") if p.name != LOCK] if run_dir.is_dir() else []
    if not known and others:
        raise TrainingError(
            f"{run_dir} is in the way: it has no {RUN}, but {', '.join(sorted(others)[:5])}"
        )
    if fresh:
        return {}
    wrong = [
        f"{key}: {known.get(key)} then, {record.get(key)} now"
        for key in _FIXED
        if known and known.get(key) != record.get(key)
    ]
    if wrong:
        raise TrainingError(
            f"{run_dir} was trained on something else: {'; '.join(wrong)}. Give another sae_name "
            "or runs_dir, or replace that run with fresh=true"
        )
    return known


@contextmanager
def claimed(run_dir: Path, *, fresh: bool) -> Iterator[None]:
    """Hold the run folder for this process alone; `fresh` empties it first.

    TrainingError if another process on this machine is training it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"another process is training {run_dir}") from None
        for path in run_dir.iterdir() if fresh else ():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def describe(settings: TrainSettings, source: Source) -> dict[str, Any]:
    """The content of run.json that is known before training."""
    return {
        "sae_name": settings.sae_name,
        "sae_series": settings.sae_series,
        "architecture": settings.sae["name"],
        "hooks": {"in": _one(source.hooks_in), "out": _one(source.hooks_out)},
        **source.ids(),
        "seed": settings.seed,
        "result_key": settings.result_key(),
        "versions": {"python": platform.python_version(), **_versions()},
        "git_commit": git_commit(),
    }


def _one(hooks: tuple[str, ...]) -> str | list[str]:
    """The hook's name, or the list of several."""
    return hooks[0] if len(hooks) == 1 else list(hooks)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file. TrainingError if it is malformed."""
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("expected an object")
    except ValueError as e:
        raise TrainingError(f"{path} is damaged: {e}. fresh=true trains again") from None
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` in one step. NaN and infinity are refused."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


@cache
def git_commit() -> str | None:
    """Commit of the checkout that saetrain runs from, `-dirty` if changed; None if installed.

    As it is at the first question: later changes are not in the code that this process runs.
    """
    root = Path(saetrain.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or a tree it will not read: the versions still say enough
    return done.stdout.strip()


@cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
