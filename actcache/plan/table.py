"""A plan as text for people."""

from __future__ import annotations

import math
from dataclasses import asdict

from actcache.plan.records import (
    Plan,
)

_TABLE = """\
host          {p.model.architecture}, {p.model.parameters:,} parameters
runs          {p.model.blocks_run} of {p.model.blocks} blocks, {p.model.parameters_run:,} \
parameters ({gib[weights]}), {gflop:,.3g} GFLOP a token
rows          {p.disk.rows:,} in {p.disk.segments:,} segments, {p.disk.files:,} files
{hooks}
disk          {size[bytes]}: activations {size[activations]}, token table {size[token_table]}, \
commits {size[commits]}, zarr.json {size[array_metadata]}, canary {size[canary]}, one snapshot \
{size[snapshot]}
GPU memory    replicated {gib[replicated]} ({replicated}), \
ZeRO-3 over {a.gpus} {gib[zero3]} ({zero3}), \
of {a.gpu_gib:g} GiB less {a.gpu_spare:.0%}
              of it batch {gib[activations]}, hooks {gib[hook_buffers]}; \
ZeRO-3 gathers {gib[gathered]}
host memory   {gib[segment_buffers]} a process for {p.memory.segments_in_flight} segments in flight
time          {p.time.hours:,.3g} h on {a.gpus} GPUs, {p.time.tokens_per_gpu:,.0f} tokens/s \
each, at {a.mfu:.0%} of {a.tflops:g} TFLOP/s
writing       {p.time.write_gb_per_gpu:,.3g} GB/s a GPU, {p.time.write_gb_per_node:,.3g} GB/s a \
node; assumed: a thread can {a.writer_gb_s:g}, a node's disk {a.disk_gb_s:g}
break-even    {runs} of {a.latents:,} latents; one reads up to \
{p.break_even.read_gb:,.3g} GB/s, {p.break_even.saes_per_read:,.2g} at once keep a GPU busy
money         ${p.break_even.forward_usd:,.2f} a forward pass, \
${p.break_even.disk_usd_month:,.2f} a month on disk, \
which {p.break_even.runs_a_month:,.3g} SAE runs a month pay"""


def table(p: Plan) -> str:
    """The plan as text."""
    fits = {True: "fits", False: "does not fit"}
    memory = asdict(p.memory) | {"weights": p.model.weights}
    runs = p.break_even.runs
    text = _TABLE.format(
        p=p,
        a=p.assumptions,
        gib={k: f"{v / 2**30:,.2f} GiB" for k, v in memory.items()},
        size={k: human_bytes(v) for k, v in asdict(p.disk).items()},
        gflop=p.model.flops / 1e9,
        hooks="\n".join(
            f"  {h.name:<12}d {h.d}, {h.chunks:,} chunks of {h.chunk_rows} rows, "
            f"{human_bytes(h.bytes)}"
            for h in p.hooks
        ),
        replicated=fits[p.memory.replicated_fits],
        zero3=fits[p.memory.zero3_fits],
        runs="never: reading is slower than computing, for SAEs"
        if runs is None
        else f"caching is faster from {runs} SAE runs on,",
    )
    return "\n".join([text, *(f"note          {note}" for note in p.notes)])


def human_bytes(n: float) -> str:
    """Bytes in units of 1000, as disks are sold."""
    units = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
    power = min(len(units) - 1, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:,.3g} {units[power]}"
