"""`actcache plan`: what a run will cost, from the model's config.json alone.

The model is built on the meta device: nothing is loaded, no weights need to be there, the data is
not looked at. Disk sizes follow FORMAT.md and come from the encoders of the store itself: exact to
a few digits where the rows of every segment are known, else as good as `text_bytes_per_token`.
Times are arithmetic on assumptions, which are settings (`plan.gpus=8 plan.mfu=0.3`).

Per token, with N matrix weights in use, L blocks run, context T, H heads of h channels, width d:
  forward FLOPs      2 N + 4 L T H h           (Chowdhery et al. 2022, appendix B; no causal saving)
  hours              rows * FLOPs / (gpus * tflops * mfu)
  GPU, replicated    weights + activations of a batch + hook buffers
  GPU, ZeRO-3        weights / gpus + largest gathered module + the same (Rajbhandari et al. 2020)
  sparse SAE step    2 d F FLOPs for F latents; at P FLOP/s it eats P * itemsize / (2 F) bytes a
                     second whatever d is: if the disk is slower, the disk sets the pace
  caching pays if    t_cache + n max(t_sae, t_read)  <  n (t_forward + t_sae)   after n SAE runs,
                     where t_cache is the slowest of forward pass, writing thread and disk
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from actcache.hooks import resolve
from actcache.plan.cost import plan_break_even, plan_notes, plan_time
from actcache.plan.disk import hook_bytes, hook_infos, layout_fields, plan_disk, segment_sizes
from actcache.plan.model import Shape, architecture_of, hook_widths, plan_memory
from actcache.plan.records import Assumptions, Plan, PlanSettings
from actcache.plan.table import table
from actcache.run import CacheSettings
from actcache.store import Layout

__all__ = ["Assumptions", "Plan", "PlanSettings", "hook_bytes", "plan", "table"]


def plan(
    settings: PlanSettings | CacheSettings,
    *,
    assume: Assumptions | None = None,
    segments: Sequence[int] | None = None,
) -> Plan:
    """The plan of `actcache run` with the same settings.

    `assume` replaces `settings.plan`. `segments` are the rows of every segment where they are
    known, such as those of a store; else they follow from `tokens`, rounded up to whole segments.
    Raises HostError, HookError, SettingsError.
    """
    own = settings.plan if isinstance(settings, PlanSettings) else Assumptions()
    a = assume or own
    layout = Layout(context=settings.context, **layout_fields(settings.layout))
    sizes = Counter(segments) if segments is not None else segment_sizes(settings.tokens, layout, a)
    first = segments[0] if segments is not None else max(sizes)
    with architecture_of(settings.host) as host:
        model = host.skeleton()
        points = resolve(settings.hooks, settings.layers, model)
        shape = Shape(model, points, settings.context)
        hooks = hook_infos(points, hook_widths(host, model, points), settings.layout, layout)
    planned, disk = plan_disk(sizes, first, hooks, layout, shape.vocab)
    described = shape.plan(settings.host)
    time = plan_time(disk, described.flops, a)
    memory = plan_memory(settings, shape, described, hooks, a)
    return Plan(
        tokens=settings.tokens,
        model=described,
        hooks=planned,
        disk=disk,
        memory=memory,
        time=time,
        break_even=plan_break_even(disk, hooks, time, a),
        assumptions=a,
        notes=tuple(plan_notes(settings, shape, memory, time, disk)),
    )
