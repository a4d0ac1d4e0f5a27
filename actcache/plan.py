"""`actcache plan`: what a run will cost, from the model's config.json alone.

Above 400 lines: a third are the records of the answer, the rest is one section per question.

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

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import nn

from actcache import host as hosts
from actcache.capture import versions
from actcache.data import PackSettings
from actcache.demo import demo_paths
from actcache.errors import HookError, HostError
from actcache.fill import WRITES
from actcache.hooks import Capture, HookPoint, block_list, deepest_block, resolve
from actcache.host import Host, HostSettings
from actcache.run import CacheSettings, LayoutSettings
from actcache.store import HookInfo, Layout, SettingsError, TokenTable
from actcache.store.canaries import CONTEXTS, MAX_TOKENS, CanaryRecord
from actcache.store.encode import encode_acts, encode_group, encode_tokens
from actcache.store.layout import (
    CANARIES,
    DTYPES,
    SEGMENTS,
    TOKEN_COLUMNS,
    chunk_rows,
    segment_id,
)
from actcache.store.schema import (
    MAX_JSON_BYTES,
    Commit,
    CommittedHook,
    SnapshotEntry,
    SnapshotRecord,
    StoredObject,
    dump,
)
from actcache.store.stats import HookStats

_DIGEST = "sha256:" + 64 * "0"
_STORE_JSON = 2_600  # store.json holds identities, whatever the size of the run
_WRITER = {"versions": versions(), "device": "cuda:0"}  # as long as any
_VOCAB_ENTRY = 11  # bytes of one token in vocab.json
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


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
    writer_gb_s: float = 0.1  # one process permutes, sums and checks; measured: bf16, one core
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
    identity: int  # store.json and vocab.json


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
    layout = Layout(context=settings.context, **_without_dtype(settings.layout))
    sizes = Counter(segments) if segments is not None else _sizes(settings.tokens, layout, a)
    first = segments[0] if segments is not None else max(sizes)
    with _architecture(settings.host) as host:
        model = host.skeleton()
        points = resolve(settings.hooks, settings.layers, model)
        shape = _Shape(model, points, settings.context)
        hooks = _infos(points, _widths(host, model, points), settings.layout, layout)
    planned, disk = _disk(sizes, first, hooks, layout, shape.vocab)
    described = shape.plan(settings.host.dtype)
    time = _time(disk, described.flops, a)
    memory = _memory(settings, shape, described, hooks, a)
    return Plan(
        tokens=settings.tokens,
        model=described,
        hooks=planned,
        disk=disk,
        memory=memory,
        time=time,
        break_even=_break_even(disk, hooks, time, a),
        assumptions=a,
        notes=tuple(_notes(settings, shape, memory, time, disk)),
    )


# -- disk ------------------------------------------------------------------------------------------


def _sizes(tokens: int | None, layout: Layout, a: Assumptions) -> Counter[int]:
    """{rows of a segment: how many}; every input unit ends with a short segment."""
    if tokens is None:
        raise SettingsError("tokens is missing: a plan needs how many, such as tokens=1e9")
    if tokens < 1:
        raise SettingsError(f"tokens: expected at least 1, got {tokens}")
    unit = max(layout.context, round(layout.unit_bytes / a.text_bytes_per_token))
    full, short = divmod(unit, layout.segment_rows)
    units, rest = divmod(tokens, unit)
    some = min(full, -(-rest // layout.segment_rows))
    ends = units + (rest > some * layout.segment_rows)
    return +Counter({layout.segment_rows: units * full + some}) + Counter({short: ends})


def _infos(
    points: list[HookPoint], widths: dict[str, int], settings: LayoutSettings, layout: Layout
) -> list[HookInfo]:
    dtype, size = settings.dtype, DTYPES[settings.dtype].itemsize
    return [
        HookInfo(
            **asdict(p),
            d=(d := widths[p.name]),
            dtype=dtype,
            chunk_rows=chunk_rows(d, size, layout.chunk_bytes, layout.segment_rows),
            activation_id=_DIGEST,
        )
        for p in points
    ]


def shard_bytes(rows: int, info: HookInfo) -> int:
    """Size of one hook's file in a segment of `rows` rows (FORMAT.md, Arrays)."""
    chunks = -(-rows // info.chunk_rows)
    return chunks * (info.chunk_rows * info.d * DTYPES[info.dtype].itemsize + 4) + 16 * chunks + 4


def _metadata(rows: int, hooks: list[HookInfo]) -> int:
    """Bytes of the zarr.json of a segment: encoded for one row, then the digits of real shapes."""
    one = TokenTable(*(np.zeros(1, dtype) for dtype in TOKEN_COLUMNS.values()))
    parts = [encode_group("x"), encode_group("x/tokens"), encode_group("x/acts")]
    parts.append(encode_tokens("x/tokens", one))
    more = 2 * len(TOKEN_COLUMNS) * (len(str(rows)) - 1)  # shape and chunk of each column
    for info in hooks:
        row = np.zeros((1, info.d), DTYPES[info.dtype])
        parts.append(encode_acts("x/acts", row, replace(info, chunk_rows=1)))
        shard = -(-rows // info.chunk_rows) * info.chunk_rows
        more += sum(len(str(n)) - 1 for n in (rows, shard, info.chunk_rows))
    return more + sum(len(b) for part in parts for key, b in part if key.endswith(".json"))


def _objects(folder: str, rows: int, hooks: list[HookInfo]) -> tuple[StoredObject, ...]:
    """What a record says of the files of a zarr group."""
    sizes = {f"{folder}{part}/zarr.json": 1000 for part in ("", "/tokens", "/acts")}
    for name, dtype in TOKEN_COLUMNS.items():
        sizes[f"{folder}/tokens/{name}/zarr.json"] = 1000
        sizes[f"{folder}/tokens/{name}/c/0"] = rows * dtype.itemsize + 4
    for info in hooks:
        sizes[f"{folder}/acts/{info.key}/zarr.json"] = 1000
        sizes[f"{folder}/acts/{info.key}/c/0/0"] = shard_bytes(rows, info)
    return tuple(StoredObject(key=k, bytes=n, sha256=_DIGEST) for k, n in sizes.items())


def _commit(rows: int, hooks: list[HookInfo]) -> Commit:
    """A record of the right size for a segment of `rows` rows, written in one go."""
    folder = f"{SEGMENTS}/{segment_id(0, 0)}.{8 * '0'}"
    stats = [
        HookStats(rows, z := np.zeros(h.d), z, 1e5 * math.pi, math.pi, 0).to_json() for h in hooks
    ]
    return Commit(
        segment=segment_id(0, 0),
        folder=folder,
        unit=0,
        index=0,
        last_in_unit=False,
        rows=rows,
        documents=max(1, rows // 500),
        token_digest=_DIGEST,
        hooks=tuple(
            CommittedHook(info=h, plain=s, all=s) for h, s in zip(hooks, stats, strict=True)
        ),
        objects=_objects(folder, rows, hooks),
        writer=_WRITER,
    )


def _canary(first: int, hooks: list[HookInfo], layout: Layout) -> int:
    """Bytes of the contexts that are stored once more, in float32; `first`: rows of segment 1."""
    full = min(max(1, min(CONTEXTS, MAX_TOKENS // layout.context)), first // layout.context)
    rows, size = full * layout.context or first, DTYPES["float32"].itemsize
    hooks = [
        replace(h, dtype="float32", chunk_rows=chunk_rows(h.d, size, layout.chunk_bytes, rows))
        for h in hooks
    ]
    folder = f"{CANARIES}/{12 * '0'}.{8 * '0'}"
    record = CanaryRecord(
        store_id=_DIGEST,
        folder=folder,
        segment=segment_id(0, 0),
        contexts=tuple(range(max(1, full))),
        rows=rows,
        token_digest=_DIGEST,
        hooks=tuple(hooks),
        objects=_objects(folder, rows, hooks),
        writer=_WRITER,
    )
    arrays = sum(shard_bytes(rows, h) for h in hooks) + _token_bytes(rows)
    return arrays + _metadata(rows, hooks) + len(dump(record.sealed()))


def _token_bytes(rows: int) -> int:
    """Size of the token table: one file a column, each closed by a crc32c."""
    return sum(rows * dtype.itemsize + 4 for dtype in TOKEN_COLUMNS.values())


def _snapshot(sizes: Counter[int], commit: Commit, hooks: list[HookInfo]) -> int:
    """Bytes of one snapshot record."""

    def length(*rows: int) -> int:
        entries = [SnapshotEntry(segment=commit.segment, rows=n, commits=named) for n in rows]
        record = SnapshotRecord(
            name="1",
            store_id=_DIGEST,
            rows=sizes.total(),
            hooks=tuple(h.name for h in hooks),
            segments=tuple(entries),
            identity_sha256=_DIGEST,
        )
        return len(dump(record.sealed()))

    named = {commit.file: _DIGEST}
    return length() + sum(many * (length(n, n) - length(n)) for n, many in sizes.items())


def _disk(
    sizes: Counter[int], first: int, hooks: list[HookInfo], layout: Layout, vocab: int
) -> tuple[tuple[HookPlan, ...], DiskPlan]:
    planned = tuple(
        HookPlan(
            name=h.name,
            d=h.d,
            chunk_rows=h.chunk_rows,
            chunks=sum(many * -(-n // h.chunk_rows) for n, many in sizes.items()),
            bytes=sum(many * shard_bytes(n, h) for n, many in sizes.items()),
        )
        for h in hooks
    )
    commit = _commit(first, hooks)
    parts = {
        "activations": sum(h.bytes for h in planned),
        "token_table": sum(many * _token_bytes(n) for n, many in sizes.items()),
        "array_metadata": sum(many * _metadata(n, hooks) for n, many in sizes.items()),
        "commits": sum(many * len(dump(_commit(n, hooks))) for n, many in sizes.items()),
        "snapshot": _snapshot(sizes, commit, hooks),
        "canary": _canary(first, hooks, layout),
        "identity": _STORE_JSON + _VOCAB_ENTRY * vocab,
    }
    disk = DiskPlan(
        rows=sum(n * many for n, many in sizes.items()),
        segments=sizes.total(),
        files=(sizes.total() + 1) * (len(commit.objects) + 1) + 3,  # the canary is a group too
        bytes=sum(parts.values()),
        **parts,
    )
    return planned, disk


# -- the model -------------------------------------------------------------------------------------


@contextmanager
def _architecture(settings: HostSettings) -> Iterator[Host]:
    """The host, from its config.json alone.

    `Host` wants a tokenizer too, which a plan has no use for; one without tokens stands in.
    """
    source = _config_folder(settings)
    with TemporaryDirectory() as folder:
        for file in (source / "config.json", *source.glob("*.py")):
            shutil.copy(file, folder)
        Tokenizer(models.BPE()).save(f"{folder}/tokenizer.json")
        kind = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        Path(folder, "tokenizer_config.json").write_text(kind)
        try:
            yield Host(replace(settings, model=folder))
        except HostError as e:
            raise HostError(str(e).replace(folder, settings.model)) from e


def _config_folder(settings: HostSettings) -> Path:
    """A folder with the host's config.json, which alone is fetched of a hub repository."""
    name = settings.model
    folder = Path(name).expanduser()
    if name == "demo" and not folder.is_dir():
        folder = demo_paths().host
        if not folder.is_dir():
            raise HostError("host=demo is not made yet: the first actcache run with it does that")
    elif not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise HostError(f"host.model={name}: there is no such folder")
    elif not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            only = ["config.json", "*.py"]
            found = snapshot_download(name, revision=settings.revision, allow_patterns=only)
        except (OSError, ValueError) as e:
            first = str(e).strip().split("\n")[0]
            raise HostError(
                f"host.model={name}: its config.json cannot be fetched: {first} Without the hub, "
                "put config.json into a folder and plan with host.model=FOLDER"
            ) from e
        folder = Path(found)
    if not (folder / "config.json").is_file():
        raise HostError(f"host.model={name}: {folder} has no config.json")
    return folder


def _widths(host: Host, model: nn.Module, points: list[HookPoint]) -> dict[str, int]:
    """d of every hook, from a forward pass over two tokens that have no values."""
    ids_BT = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta")
    model.to(torch.bfloat16)  # grouped expert kernels take nothing else
    try:
        with Capture(model, points) as capture:
            hosts.forward(model, ids_BT, mask, None)
            found = capture.take()
    except (RuntimeError, NotImplementedError) as e:
        first = str(e).strip().split("\n")[0]
        raise HostError(
            f"host.model={host.settings.model}: its code does not run without weights: {first}"
        ) from e
    for name, x in found.items():
        if x.shape[:2] != ids_BT.shape:
            raise HookError(
                f"hook {name!r} has shape {tuple(x.shape)} for {tuple(ids_BT.shape)} tokens: "
                "it does not carry one vector per token"
            )
    return {name: x.shape[-1] for name, x in found.items()}


class _Shape:
    """Parameters of a model on the meta device, and which of them run."""

    def __init__(self, model: nn.Module, points: list[HookPoint], context: int) -> None:
        config: Any = model.config
        self.text = config.get_text_config()
        self.architecture, self.context = str(config.model_type), context
        self.vocab, self.d = int(self.text.vocab_size), int(self.text.hidden_size)
        tied = getattr(config, "tie_word_embeddings", None)
        tied = getattr(self.text, "tie_word_embeddings", True) if tied is None else tied
        self.head = 0 if tied else self.vocab * self.d
        self._read_blocks(model, points)
        self.k_of_experts = _experts(self.text)
        self.everything = sum(p.numel() for p in model.parameters())
        self.run = {n: p for n, p in model.named_parameters() if not self._behind(n)}
        skipped = {
            id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        self.matrices = {
            n: p
            for n, p in self.run.items()
            if p.ndim > 1 and id(p) not in skipped and n.startswith(self.prefix)
        }
        self.gathered = max(self._gathered(model))

    def _read_blocks(self, model: nn.Module, points: list[HookPoint]) -> None:
        """Where the blocks are; what lies beside the text model (vision) sees no text."""
        deepest = deepest_block(points, model)
        try:
            self.path, blocks = block_list(model)
        except HookError:  # a model without such a list runs whole
            self.path, self.blocks = "", int(getattr(self.text, "num_hidden_layers", 0))
        else:
            self.blocks = len(blocks)
        self.blocks_run = self.blocks if deepest is None else deepest + 1
        self.prefix = self.path.rpartition(".")[0]

    def _behind(self, name: str) -> bool:
        found = re.match(rf"{re.escape(self.path)}\.(\d+)\.", name) if self.path else None
        return found is not None and int(found[1]) >= self.blocks_run

    def _gathered(self, model: nn.Module) -> Iterator[int]:
        """Parameters of each block, and of each module outside of them by itself."""
        inside = f"{self.path}." if self.path else "\0"
        for name, module in model.named_modules():
            if self.path and name == f"{self.path}.0":
                yield from (sum(p.numel() for p in b.parameters()) for b in block_list(model)[1])
            if not name.startswith(inside):
                yield sum(p.numel() for p in module.parameters(recurse=False))

    def _used(self, name: str, p: torch.Tensor) -> float:
        expert = re.search(r"(^|\.)experts\.", name) and self.k_of_experts
        return p.numel() * expert[0] / expert[1] if expert else p.numel()

    @property
    def heads(self) -> tuple[int, int]:
        """Channels of all heads' queries, and of their values."""
        n = int(self.text.num_attention_heads)
        h = int(getattr(self.text, "head_dim", None) or self.d // n)
        return n * int(getattr(self.text, "qk_head_dim", h)), n * int(
            getattr(self.text, "v_head_dim", h)
        )

    @property
    def mlp(self) -> int:
        """Width of the hidden layer that one token sees in an MLP."""
        wide = getattr(self.text, "intermediate_size", None) or getattr(self.text, "n_inner", None)
        if self.k_of_experts is None:
            return int(wide or 4 * self.d)
        one = getattr(self.text, "moe_intermediate_size", None) or wide
        return max(self.k_of_experts[0] * int(one or 0), int(wide or 0))

    def plan(self, dtype: str) -> ModelPlan:
        run = sum(p.numel() for p in self.run.values())
        active = round(sum(self._used(n, p) for n, p in self.matrices.items()))
        return ModelPlan(
            architecture=self.architecture,
            blocks=self.blocks,
            blocks_run=self.blocks_run,
            parameters=self.everything + self.head,
            parameters_run=run,
            parameters_active=active,
            weights=run * hosts.DTYPES[dtype].itemsize,
            flops=2 * active + 2 * self.blocks_run * self.context * sum(self.heads),
        )


def _experts(text: Any) -> tuple[int, int] | None:
    """(experts that a token uses, experts of a layer), if the config says both."""
    used = getattr(text, "num_experts_per_tok", None)
    of = next((n for k in _EXPERTS if (n := getattr(text, k, None))), None)
    return (int(used), int(of)) if used and of else None


def _memory(
    settings: PlanSettings | CacheSettings,
    shape: _Shape,
    model: ModelPlan,
    hooks: list[HookInfo],
    a: Assumptions,
) -> MemoryPlan:
    """GPU: the widest point of a block is four tensors as wide as the MLP, or queries, keys and
    values beside their rotated and repeated copies, above the residual stream. Host: the segments
    in flight, the permuted copy of one, and twice the shard that is being encoded.

    Against measurement: 0.95 to 1.7 times the tensors that are alive at once in GPT-2, GPT-NeoX,
    Llama, Gemma 3, Qwen3-MoE and Mixtral; 1.0 to 1.15 times the growth of a process on the CPU.
    """
    T, size = settings.context, hosts.DTYPES[settings.host.dtype].itemsize
    contexts = max(1, settings.host.batch_tokens // T)
    chosen = shape.k_of_experts[0] if shape.k_of_experts else 0
    widest = (4 + 2 * chosen) * shape.d + max(4 * shape.mlp, 8 * max(shape.heads))
    activations = contexts * T * (widest * size + T)  # and a mask of bytes
    if settings.host.attention == "eager":
        activations += contexts * shape.text.num_attention_heads * T * T * (size + 4)
    widths = [h.d for h in hooks]
    stored = DTYPES[settings.layout.dtype].itemsize
    buffers = contexts * T * (2 * sum(widths) * size + max(widths) * stored)
    gathered = shape.gathered * size
    replicated = model.weights + activations + buffers
    zero3 = -(-model.weights // a.gpus) + gathered + activations + buffers
    room = a.gpu_gib * 2**30 * (1 - a.gpu_spare)
    row, flying = settings.layout.segment_rows * stored, WRITES + 1
    return MemoryPlan(
        gathered=gathered,
        activations=activations,
        hook_buffers=buffers,
        replicated=replicated,
        zero3=zero3,
        replicated_fits=replicated <= room,
        zero3_fits=zero3 <= room,
        segments_in_flight=flying,
        segment_buffers=row * ((flying + 1) * sum(widths) + 2 * max(widths)),
    )


# -- time and money --------------------------------------------------------------------------------


def _time(disk: DiskPlan, flops: int, a: Assumptions) -> TimePlan:
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


def _break_even(disk: DiskPlan, hooks: list[HookInfo], time: TimePlan, a: Assumptions) -> BreakEven:
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


def _notes(
    settings: PlanSettings | CacheSettings,
    shape: _Shape,
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


# -- for people ------------------------------------------------------------------------------------

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
        size={k: _size(v) for k, v in asdict(p.disk).items()},
        gflop=p.model.flops / 1e9,
        hooks="\n".join(
            f"  {h.name:<12}d {h.d}, {h.chunks:,} chunks of {h.chunk_rows} rows, {_size(h.bytes)}"
            for h in p.hooks
        ),
        replicated=fits[p.memory.replicated_fits],
        zero3=fits[p.memory.zero3_fits],
        runs="never: reading is slower than computing, for SAEs"
        if runs is None
        else f"caching is faster from {runs} SAE runs on,",
    )
    return "\n".join([text, *(f"note          {note}" for note in p.notes)])


def _size(n: float) -> str:
    """Bytes in units of 1000, as disks are sold."""
    units = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
    power = min(len(units) - 1, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:,.3g} {units[power]}"


def _without_dtype(settings: LayoutSettings) -> dict[str, Any]:
    return {k: v for k, v in asdict(settings).items() if k != "dtype"}
