"""Many runs in one process: those that share a stream are trained together, each batch read once.

`train_together(many)` does what `train` would do for each, with the same folders and numbers: takes
settings of several hooks apart, leaves finished runs alone, finds out which runs have the same
batches (store, snapshot, rows that count, batch size, seed), splits them into groups that fit in
memory, prints that plan, and trains group after group (`saetrain.lockstep`). A run that fails is
dropped with its reason. Called again after a kill, it continues where each run was.

Runs with different seeds or batch sizes see other batches and make groups of their own. A live
source is shared by runs that read the same hooks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from actcache.store.errors import ActcacheError
from saetrain import checkpoint as ckpt
from saetrain import plan, runs
from saetrain.errors import ConfigError, SaetrainError
from saetrain.expand import expand
from saetrain.kept import Kept, Purse
from saetrain.lockstep import Lockstep
from saetrain.lockstep_job import Job
from saetrain.log import say, table
from saetrain.runs import BatchStream, Source
from saetrain.saes import make_config, sae_class
from saetrain.settings import TrainSettings
from saetrain.trainer import TrainResult, finished
from saetrain.workers import how_many

# Settings that say which batches there are, and on what device.
_STREAM = ("source", "live", "batch_tokens", "seed", "held_out_fraction", "stream", "device")
_STORE = ("source", "store", "stores", "mix", "snapshot")
_TAKEN = (
    "{} is the folder of another job of this sweep, which differs in its store only. Give each "
    "store a folder of its own, such as 'runs_dir=runs/${{store}}'"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one run: `result`, or the `reason` why there is none."""

    settings: TrainSettings
    result: TrainResult | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """One run before it is trained."""

    settings: TrainSettings  # resolved
    source: Source
    device: torch.device


def train_together(many: Sequence[TrainSettings]) -> list[Outcome]:
    """Train all of them; outcomes in the order of `many`, settings of several hooks taken apart.

    Raises Interrupted on Ctrl-C, once every run is saved; everything else that goes wrong is the
    reason of an outcome.
    """
    opener, found = Opener(), list[Outcome | Opened]()
    for item in _each(many):
        found.append(item if isinstance(item, Outcome) else _opened(opener, item))
    found = _each_folder_once(found)
    done: dict[str, Outcome] = {}
    jobs: list[tuple[Opened, Job]] = []
    for opened in {str(o.settings.run_dir): o for o in found if isinstance(o, Opened)}.values():
        job = _job(opened)
        if isinstance(job, Job):
            jobs.append((opened, job))
        else:
            done[str(opened.settings.run_dir)] = job
    for group in grouped([opened for opened, _ in jobs]):
        together = [jobs[i][1] for i in group]
        _train_group(together, jobs[group[0]][0].device)
        done |= {str(j.settings.run_dir): _outcome(j) for j in together}
    return [j if isinstance(j, Outcome) else done[str(j.settings.run_dir)] for j in found]


def _each_folder_once(found: Sequence[Outcome | Opened]) -> list[Outcome | Opened]:
    """Equal runs share a folder, and are trained once; other rows in the same folder are refused.

    The store's path is no part of a folder's name, so that stores may move.
    """
    first: dict[str, Opened] = {}
    kept: list[Outcome | Opened] = []
    for job in found:
        if isinstance(job, Outcome):
            kept.append(job)
            continue
        other = first.setdefault(str(job.settings.run_dir), job)
        if other is not job and _rows(other.source) != _rows(job.source):
            kept.append(_dropped(job.settings, ConfigError(_TAKEN.format(job.settings.run_dir))))
            continue
        if other is not job:
            say(f"{job.settings.run_dir.name} is asked for twice and trained once")
        kept.append(other)
    return kept


def _rows(source: Source) -> Any:
    """What tells stores apart wherever they lie; those of one identity may differ in length."""
    return source.ids(), source.train.n_rows


def _each(many: Sequence[TrainSettings]) -> Iterator[TrainSettings | Outcome]:
    """Settings of one run each; an outcome where they cannot be taken apart."""
    for settings in many:
        try:
            yield from expand(settings)
        except (SaetrainError, ActcacheError) as e:
            yield _dropped(settings, e)


def _opened(opener: Opener, settings: TrainSettings) -> Opened | Outcome:
    try:
        return opener.open(settings)
    except (SaetrainError, ActcacheError) as e:
        return _dropped(settings, e)


def _dropped(settings: TrainSettings, error: Exception) -> Outcome:
    say(f"dropped {settings.run_name}: {error}")
    return Outcome(settings=settings, reason=str(error))


class Opener:
    """Opens runs; stores and streams that several of them read are opened once."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._purse = Purse(plan.KEPT)

    def open(self, settings: TrainSettings) -> Opened:
        """Resolved settings and a source. Raises what `train` would for them."""
        device = runs.resolve_device(settings.device)
        if settings.source == "live":
            return self._live(settings, device)
        make_config(settings.sae, settings.saes_path)  # a misspelt sae key fails before any reading
        cache = (settings.stream.cache_dir, settings.stream.cache_gb)
        where = _key(_part(settings, _STORE), cache)
        newest = self._once(where, lambda: runs.open_snapshot(settings))
        settings = runs.resolve(settings, newest)
        snapshot = runs.recorded_snapshot(settings, newest)
        snapshot = self._once(_key(where, snapshot.name), lambda: snapshot)
        hooks = make_config(settings.sae, settings.saes_path).hooks(settings.hook)
        unit = sae_class(settings.sae, settings.saes_path).unit
        what = _key(where, snapshot.name, _part(settings, _STREAM), hooks, unit)
        source = self._once(what, lambda: self._kept(runs.open_source(settings, snapshot, device)))
        return Opened(settings=settings, source=source, device=device)

    def _live(self, settings: TrainSettings, device: torch.device) -> Opened:
        """Hooks are resolved by the capture, so equal names are needed to share one."""
        config = make_config(settings.sae, settings.saes_path)
        fields = {name: getattr(config, name) for name in config.HOOK_FIELDS}
        hooks = config.hooks(settings.hook)
        key = _key(_part(settings, _STREAM), settings.hook, fields, hooks)

        def make() -> tuple[TrainSettings, Source]:
            resolved, source = runs.sources(settings, None, None, device)
            return resolved, self._kept(source)

        first, source = self._once(key, make)
        named = {name: first.sae[name] for name in fields if name in first.sae}
        settings = replace(settings, hook=first.hook, sae=settings.sae | named)
        return Opened(settings=settings, source=source, device=device)

    def _kept(self, source: Source) -> Source:
        return replace(source, held_out=Kept(source.held_out, self._purse))

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def grouped(jobs: Sequence[Opened]) -> list[list[int]]:
    """Numbers of jobs that train in lockstep, as many together as memory allows; says so."""
    shared: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        shared.setdefault(_shares(job), []).append(i)
    found: list[list[int]] = []
    for numbers in shared.values():
        parts = _fitting([jobs[i] for i in numbers])
        found += [[numbers[j] for j in part] for part in parts]
    return found


def _fitting(jobs: Sequence[Opened]) -> list[list[int]]:
    """Groups of jobs on one stream, with the plan printed where there are several jobs."""
    first = jobs[0]
    many = [(j.settings, j.source) for j in jobs]
    each = [_memory_of(j) for j in jobs]
    stack = first.settings.fused.stack
    limit = plan.limit_bytes(first.settings, first.device)
    workers = how_many(first.settings.fused.workers, len(jobs), first.device)
    groups = plan.split(many, each, limit, stack=stack, workers=workers)
    if len(jobs) == 1:
        return groups
    say(f"{len(jobs)} runs share a stream; {plan.gb(limit)} for them, groups: {len(groups)}")
    rows = []
    for group in groups:
        them = [many[i] for i in group], [each[i] for i in group]
        memory = plan.together(*them, stack=stack, workers=workers)
        parts = {k: plan.gb(v) for k, v in asdict(memory).items()}
        rows.append({"runs": len(group), "memory": plan.gb(memory.total), **parts})
        if memory.total > limit:
            name = jobs[group[0]].settings.run_name
            say(f"warning: {name} needs {plan.gb(memory.total)}, more than that; trying it alone")
    say(table(rows))
    return groups


def _memory_of(job: Opened) -> plan.Memory:
    """Its memory; of settings that cannot be trained none, the reason comes when it starts."""
    try:
        return plan.memory(job.settings, job.source)
    except (SaetrainError, ActcacheError):
        return plan.Memory(weights=0, optimizer=0, gradients=0, activations=0, stream=0)


def _shares(job: Opened) -> str:
    """Equal for jobs whose streams give the same rows in the same order."""
    settings, source = job.settings, job.source
    snapshot = source.snapshot
    hooks: Any = None
    if snapshot is None or settings.stream.max_norm is not None:
        hooks = (source.hooks_in, source.hooks_out)  # which rows there are depends on them
    unit = sae_class(settings.sae, settings.saes_path).unit
    named = None if snapshot is None else (snapshot.store_id, snapshot.name)
    where = _part(settings, ("store", "stores", "mix"))
    fused = asdict(settings.fused)
    own = (_order(source.train), hooks, unit, named, fused)
    return _key(where, _part(settings, _STREAM), own)


def _order(stream: BatchStream) -> list[str]:
    """Digests of what is shuffled: hooks of another width are read in other units."""
    streams = getattr(stream, "streams", [stream])
    units = [getattr(s, "_per_unit", None) for s in streams]
    return [hashlib.sha256(u.tobytes()).hexdigest() for u in units if u is not None]


def _train_group(jobs: Sequence[Job], device: torch.device) -> None:
    """Each ends with a result or a reason."""
    with ckpt.own_generator(jobs[0].settings.seed, device):
        Lockstep(jobs, _common(jobs, device), device).run()


def _outcome(job: Job) -> Outcome:
    return Outcome(settings=job.settings, result=job.result, reason=job.reason)


def _job(opened: Opened) -> Job | Outcome:
    """What is to be done for a run; an outcome if it is finished, or cannot begin."""
    settings, source = opened.settings, opened.source
    try:
        record = runs.describe(settings, source)
        known = runs.earlier(settings.run_dir, record, fresh=settings.fresh)
        if known.get("status") == "finished":
            return Outcome(settings=settings, result=finished(settings, source))
    except (SaetrainError, ActcacheError) as e:
        return _dropped(settings, e)
    return Job(settings=settings, source=source, record=record)


def _common(jobs: Sequence[Job], device: torch.device) -> BatchStream:
    """A stream of all hooks: that of a job, where it has them all."""
    hooks = tuple(dict.fromkeys(h for job in jobs for h in job.hooks))
    for job in jobs:
        if set(job.hooks) == set(hooks):
            return job.source.train
    settings, snapshot = jobs[0].settings, jobs[0].source.snapshot
    assert snapshot is not None  # `_shares` keeps other sources apart by hooks
    stream = runs.open_stream(settings, snapshot, hooks, "train", device)
    assert _order(stream) == _order(jobs[0].source.train)
    return stream


def _part(settings: TrainSettings, names: Sequence[str]) -> Mapping[str, Any]:
    values = settings.to_dict()
    return {name: values[name] for name in names}


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
