"""What a plan takes and what it answers: assumptions in, sizes, memory, hours and money out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from actcache.data import PackSettings
from actcache.host import HostSettings
from actcache.run import LayoutSettings
from actcache.store import SettingsError


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a config.json cannot tell: `plan.KEY=VALUE` on the command line."""

    gpus: int = 1
    gpus_per_node: int = 8
    gpu_gib: float = 80.0  # memory of one
    gpu_spare: float = 0.1  # share of it left to CUDA, NCCL and fragmentation
    tflops: float = 989.0  # peak of one in host.dtype; H100 SXM, dense bf16 (NVIDIA's data sheet)
    mfu: float = 0.4  # share of the peak that a forward pass or an SAE step reaches
    disk_gb_s: float = 5.0  # one node, to write or to read, in 1e9 bytes
    writer_gb_s: float = 0.2  # one process permutes, sums and checks; measured: bf16, one core
    text_bytes_per_token: float = 4.2  # how many tokens an input unit of layout.unit_bytes holds
    latents: int = 65_536  # of the SAE in the break-even
    gpu_usd_hour: float = 2.5
    disk_usd_tb_month: float = 20.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if isinstance(value, int) else 0
            if not (value >= least and (value > 0 or name == "gpu_spare")):
                expected = "at least 1" if least else "more than 0"
                raise SettingsError(f"plan.{name}: expected {expected}, got {value}")
        for name in ("mfu", "gpu_spare"):
            if getattr(self, name) > 1:
                raise SettingsError(f"plan.{name}: expected a share up to 1")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What `actcache plan` takes: `actcache run` without data and store, and the assumptions."""

    host: HostSettings
    hooks: tuple[str, ...] | str = "resid"
    layers: tuple[int, ...] | None = None
    tokens: int | None = None
    context: int = 128
    pack: PackSettings = field(default_factory=PackSettings)
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    plan: Assumptions = field(default_factory=Assumptions)


@dataclass(frozen=True, kw_only=True)
class HookPlan:
    """One hook on disk."""

    name: str
    d: int
    chunk_rows: int
    chunks: int
    bytes: int  # of its shards


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """The store. `bytes` is the sum of everything below it; sizes in bytes."""

    rows: int
    segments: int
    files: int
    bytes: int
    activations: int
    token_table: int
    array_metadata: int  # zarr.json
    commits: int
    snapshot: int  # one snapshot
    canary: int  # a few contexts in float32
    identity: int  # store.json, vocab.json, calibrations


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The host. Parameters are counts, `weights` bytes in host.dtype, FLOPs are per token."""

    architecture: str
    blocks: int
    blocks_run: int
    parameters: int  # of the whole model with its LM head
    parameters_run: int  # what is loaded: no head, no blocks behind the deepest hook
    parameters_active: int  # matrices that one token passes: no embeddings, chosen experts only
    weights: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes. GPU figures are for one GPU, host figures for one process."""

    gathered: int  # largest module that ZeRO-3 brings together
    activations: int  # of a batch, at the widest point of a block
    hook_buffers: int
    replicated: int
    zero3: int
    replicated_fits: bool
    zero3_fits: bool
    segments_in_flight: int
    segment_buffers: int  # host RAM for them, copies included


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """Rates are per second; bytes in units of 1e9."""

    tokens_per_gpu: float
    hours: float  # of all GPUs computing
    gpu_hours: float
    writer_hours: float  # of one writing thread a GPU at writer_gb_s; beside `hours`, not added
    disk_hours: float  # of every node's disk at disk_gb_s; likewise
    write_gb_per_gpu: float
    write_gb_per_node: float


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """SAE runs on the widest hook, against one forward pass per run."""

    runs: int | None  # from this many on, caching is faster; None: reading is slower than computing
    read_gb: float  # 1e9 bytes/s above which one trainer is not bound by reading
    saes_per_read: float  # SAEs trained side by side that keep a GPU busy at disk_gb_s
    forward_usd: float
    disk_usd_month: float
    runs_a_month: float  # that pay the disk: what a month of it costs, in forward passes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take. `table(plan)` is for people, `to_json` for programs."""

    tokens: int | None
    model: ModelPlan
    hooks: tuple[HookPlan, ...]
    disk: DiskPlan
    memory: MemoryPlan
    time: TimePlan
    break_even: BreakEven
    assumptions: Assumptions
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return asdict(self)
