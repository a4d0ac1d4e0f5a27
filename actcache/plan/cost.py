"""Hours, bandwidth and break-even against recomputing, and what should be said aloud."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from actcache.plan.model import Shape
from actcache.plan.records import (
    Assumptions,
    BreakEven,
    DiskPlan,
    MemoryPlan,
    PlanSettings,
    TimePlan,
)
from actcache.run import CacheSettings
from actcache.store import HookInfo
from actcache.store.layout import (
    DTYPES,
)
from actcache.store.schema import (
    MAX_JSON_BYTES,
)


def plan_time(disk: DiskPlan, flops: int, a: Assumptions) -> TimePlan:
    rate = a.tflops * 1e12 * a.mfu / flops
    gpu_hours = disk.rows / rate / 3600
    per_gpu = rate * disk.bytes / disk.rows / 1e9
    nodes = -(-a.gpus // a.gpus_per_node)
    return TimePlan(
        tokens_per_gpu=rate,
        hours=gpu_hours / a.gpus,
        gpu_hours=gpu_hours,
        writer_hours=disk.bytes / (a.gpus * a.writer_gb_s * 1e9) / 3600,
        disk_hours=disk.bytes / (nodes * a.disk_gb_s * 1e9) / 3600,
        write_gb_per_gpu=per_gpu,
        write_gb_per_node=per_gpu * min(a.gpus, a.gpus_per_node),
    )


def plan_break_even(
    disk: DiskPlan, hooks: list[HookInfo], time: TimePlan, a: Assumptions
) -> BreakEven:
    """Seconds of one GPU and token; a run reads one hook at the rate of a node's disk."""
    d, size = max((h.d, DTYPES[h.dtype].itemsize) for h in hooks)
    speed, disk_rate = a.tflops * 1e12 * a.mfu, a.disk_gb_s * 1e9
    forward, sae, read = 1 / time.tokens_per_gpu, 2 * d * a.latents / speed, d * size / disk_rate
    slowest = max(time.hours, time.writer_hours, time.disk_hours)
    cache = forward * slowest / time.hours
    saved = forward + sae - max(sae, read)
    demand = speed * size / (2 * a.latents)
    usd, month = time.gpu_hours * a.gpu_usd_hour, disk.bytes / 1e12 * a.disk_usd_tb_month
    return BreakEven(
        runs=math.floor(cache / saved) + 1 if saved > 0 else None,
        read_gb=demand / 1e9,
        saes_per_read=max(1.0, demand / disk_rate),
        forward_usd=usd,
        disk_usd_month=month,
        runs_a_month=month / usd,
    )


def plan_notes(
    settings: PlanSettings | CacheSettings,
    shape: Shape,
    memory: MemoryPlan,
    time: TimePlan,
    disk: DiskPlan,
) -> Iterator[str]:
    """What a reader of the figures should not miss."""
    if settings.host.dtype == "float32":
        yield "host.dtype=float32: plan.tflops should be the float32 peak of the device"
    if shape.k_of_experts is None and any(re.search(r"(^|\.)experts\.", n) for n in shape.run):
        yield "the config does not say how many experts a token uses: all are counted"
    if not (memory.replicated_fits or memory.zero3_fits):
        yield "the host fits neither replicated nor under ZeRO-3: more GPUs, or fewer batch_tokens"
    slow = {"disk": time.disk_hours, "writer": time.writer_hours}
    name = max(slow, key=slow.__getitem__)
    if slow[name] > time.hours:
        yield f"the {name} sets the pace: {slow[name]:,.3g} h at plan.{name}_gb_s"
    if disk.snapshot > MAX_JSON_BYTES:
        yield "a snapshot is larger than a record may be: several stores, or longer segments"
