"""What a run needs: memory from its settings, hours from a few real steps.

Memory of an SAE with P parameters and N buffer bytes, in fp32, B tokens a batch, F latents:
  weights       4 P + N
  optimizer     the moments that it keeps, 8 P for Adam; 4 P more for an average (ema_decay)
  gradients     8 P: the gradient, and a second one while terms are summed; of one SAE a worker
  activations   4 B F x 2 where codes are sparse, x 8 where they are dense, of one piece of a batch
                that is cut up (grad_acc_steps, micro_acc_steps); likewise
  stream        two windows of rows as stored, and a batch in fp32
  held out      rows kept between evaluations, of a group only
P comes from the architecture itself, built without memory (torch's meta device). What Python and
its libraries take is not in it. Bias: an estimate; the benchmark prints what was measured beside.

Hours: `probe` times training steps on random rows of the right shape; reading, evaluation and the
report are not in it, and a machine that is busy now is taken for a slow one.

Shapes: B tokens, F latents.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saetrain.dictionary import Dictionary
from saetrain.runs import Source
from saetrain.saes import make_sae
from saetrain.saes.base import SAE
from saetrain.settings import TrainSettings
from saetrain.stream import Batch
from saetrain.stream.sequences import SequenceBatch, SequenceStream
from saetrain.trainer import Trainer
from saetrain.workers import turn_length

WARM_UP, MOST = 5, 25  # steps of `probe` that do not count, and that do at most
PATIENCE = 20.0  # seconds after which either of them are enough
KEPT = 2**30  # bytes of held-out rows that a group keeps at most
_SIZES = {"bfloat16": 2, "float16": 2, "int8": 1}  # bytes a channel as stored; others 4
_STATES = {"signum": 4, "muon": 4, "adam8bit": 2, "schedulefree": 8}  # bytes a parameter; others 8


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one run."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    stream: int
    held_out: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory(settings: TrainSettings, source: Source) -> Memory:
    """Of a single run with resolved `settings`. ConfigError for SAEs that cannot be made."""
    sae = _hollow(settings, source)
    parameters = sum(p.numel() for p in sae.parameters())
    buffers = sum(b.numel() * b.element_size() for b in sae.buffers())
    sparse = isinstance(sae, Dictionary) and sae.activation.sparse
    moments = _STATES.get(settings.optim.name, 8) + 4 * (settings.optim.ema_decay is not None)
    piece = settings.batch_tokens // settings.pieces
    return Memory(
        weights=4 * parameters + buffers,
        optimizer=moments * parameters,
        gradients=8 * parameters,
        activations=4 * piece * sae.n_latents * (2 if sparse else 8),
        stream=stream_bytes(settings, source, tuple(source.spaces())),
    )


def together(
    many: Sequence[tuple[TrainSettings, Source]],
    each: Sequence[Memory],
    *,
    stack: bool = False,
    workers: int = 1,
) -> Memory:
    """Of jobs in lockstep: all weights and moments, the rest of `workers` jobs at a time."""
    settings, source = many[0]
    hooks = tuple(dict.fromkeys(h for _, s in many for h in s.spaces()))
    at_once = nlargest(len(each) if stack else workers, (m.activations for m in each))
    return Memory(
        weights=sum(m.weights for m in each),
        optimizer=sum(m.optimizer for m in each),
        gradients=sum(nlargest(workers, (m.gradients for m in each))),
        activations=sum(at_once),
        stream=stream_bytes(settings, source, hooks) + _turn_bytes(settings, source, hooks),
        held_out=held_out_bytes(many),
    )


def split(
    many: Sequence[tuple[TrainSettings, Source]],
    each: Sequence[Memory],
    limit: int,
    *,
    stack: bool = False,
    workers: int = 1,
) -> list[list[int]]:
    """Numbers of jobs, in groups whose `together` stays below `limit` bytes; in order, first fit.

    A job that needs more by itself has a group of its own: nothing could be gained by refusing it.
    """
    groups: list[list[int]] = []
    for i in range(len(many)):
        for group in groups:
            trial = [*group, i]
            them = [many[j] for j in trial], [each[j] for j in trial]
            needed = together(*them, stack=stack, workers=workers)
            if needed.total <= limit:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def held_out_bytes(many: Sequence[tuple[TrainSettings, Source]]) -> int:
    """Rows that evaluation keeps, once for jobs that read the same ones. Unknown: the most."""
    sizes: dict[int, int] = {}
    for settings, source in many:
        rows = source.held_out.n_rows
        rows = min((n for n in (rows, settings.eval.tokens) if n is not None), default=KEPT)
        width = sum(space.d for space in source.spaces().values())
        sizes[id(source)] = max(sizes.get(id(source), 0), 4 * rows * width)
    return min(KEPT, max(sizes.values()))


def stream_bytes(settings: TrainSettings, source: Source, hooks: tuple[str, ...]) -> int:
    """Two windows as stored, as far as there are rows for them, and a batch in fp32."""
    snapshot, total = source.snapshot, 0
    rows = min(2 * settings.stream.window_rows, source.train.n_rows or 1 << 62)
    for hook in hooks:
        known = snapshot.hooks.get(hook) if snapshot is not None else None
        d = known.d if known is not None else source.train.space(hook).d
        size = _SIZES.get(known.dtype, 4) if known is not None else 4
        total += d * (rows * size + 4 * settings.batch_tokens)
    return total


def _turn_bytes(settings: TrainSettings, source: Source, hooks: tuple[str, ...]) -> int:
    """The batches of a turn of jobs in lockstep beyond the first one."""
    batch = 4 * settings.batch_tokens * sum(source.train.space(h).d for h in hooks)
    return batch * (turn_length(batch) - 1)


def free_bytes(device: torch.device) -> int:
    """Memory that nothing uses now, on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    with suppress(OSError):  # Linux counts caches that it would give back
        lines = dict(s.split(":") for s in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit in ("memory.max", "memory.high"):  # a container may have less
        with suppress(OSError, ValueError):
            most = int((Path("/sys/fs/cgroup") / limit).read_text())
            used = int((Path("/sys/fs/cgroup") / "memory.current").read_text())
            free = min(free, max(0, most - used))
    return free


def limit_bytes(settings: TrainSettings, device: torch.device) -> int:
    """What a group may take: `fused.memory_gb`, or 80 % of what is free."""
    asked = settings.fused.memory_gb
    return int(0.8 * free_bytes(device)) if asked is None else int(asked * 1e9)


def gb(size: float) -> str:
    """Bytes as text, in 1e9."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _hollow(settings: TrainSettings, source: Source) -> SAE:
    """The SAE without its memory, where its class allows that."""
    spaces = source.spaces()
    meta = {h: replace(s, mean=s.mean.to("meta")) for h, s in spaces.items()}
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        return make_sae(settings.sae, meta, settings.saes_path)
    return make_sae(settings.sae, spaces, settings.saes_path)


def probe(
    settings: TrainSettings,
    source: Source,
    device: torch.device,
    *,
    least: int = 3,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of a training step, the median of steps after those that warm up.

    Needs the memory of the run. The rows are random, with the mean and length of the store's. The
    first `WARM_UP` steps do not count: memory comes page by page from the system, kernels are
    chosen, threads start. Then steps for about `seconds`, `least` of them at least and `MOST` at
    most. Where steps are so long that this would take more than `PATIENCE`, twice, there are fewer:
    one of each kind at least.
    """
    trainer = Trainer(settings, source, device)
    batch = _random_batch(settings, source, device)

    def step() -> float:
        trainer.step = min(trainer.step, trainer.n_steps - 1)  # a short run has no step beyond
        begun = clock()
        trainer._train_step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - begun

    warm, took = [step()], list[float]()
    while len(warm) < WARM_UP and sum(warm) < PATIENCE:
        warm.append(step())
    while (
        not took
        or (sum(took) < PATIENCE and len(took) < least)
        or (sum(took) < seconds and len(took) < MOST)
    ):
        took.append(step())
    return statistics.median(took)


def _random_batch(settings: TrainSettings, source: Source, device: torch.device) -> Batch:
    """Rows, or whole contexts, in which every position counts."""
    n, acts = settings.batch_tokens, dict[str, torch.Tensor]()
    length = source.train.length if isinstance(source.train, SequenceStream) else None
    shape: tuple[int, ...] = (n,) if length is None else (n // length, length)
    for hook, space in source.spaces().items():
        noise = torch.randn(n, space.d) * (space.variance / space.d) ** 0.5
        rows = (space.mean + noise).to(device)
        acts[hook] = rows.view(*shape, space.d)
    empty = np.zeros(shape[0], np.int32)
    if length is None:
        return Batch(acts, _no_table, empty, 0, 0)
    counts = torch.ones(n, dtype=torch.bool, device=device).view(shape)
    return SequenceBatch(acts, _no_table, empty, 0, 0, empty.astype(np.int64), counts, counts)


def _no_table() -> Any:
    raise AssertionError("random rows have no tokens")
