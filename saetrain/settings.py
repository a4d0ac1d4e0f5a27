"""Settings of one training run: the same dataclasses for Python and for the command.

`TrainSettings.from_mapping` is the only way from YAML or JSON to settings; it is strict, so a
misspelt key fails before anything is read. `result_key` is the part of the settings that decides
the weights and the numbers: it names the run folder, and a rerun with the same key continues there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from actcache.store.errors import SettingsError
from actcache.store.records import build
from saetrain.errors import ConfigError
from saetrain.hopeless import EarlyStopSettings as EarlyStopSettings
from saetrain.optim_settings import OptimSettings as OptimSettings
from saetrain.optim_settings import ScheduleSettings as ScheduleSettings
from saetrain.presets import label

# Where a run is kept, watched and paid for; none of it reaches the weights or the numbers.
# The store's path may change too: what must not change is its store_id (checked on resume).
NOT_RESULT = (
    "store",
    "stores",  # their labels do: see result_key
    "runs_dir",
    "wandb",
    "log_every",
    "checkpoint",
    "device",
    "fresh",
    "progress",
    "report",
    "saes_path",
    "metrics_path",
    "early_stop",
    "target_l0",
    "hooks",  # each hook's run has `hook`
    "layers",
    "layer_stride",
    "fused",
)
# Of `stream`: how fast, not which rows.
NOT_RESULT_STREAM = ("threads", "direct", "cache_dir", "cache_gb")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Held-out evaluation: always at the end, and every so many steps when asked."""

    tokens: int | None = 1_000_000  # at most so many held-out tokens; None: all
    every_steps: int | None = None
    bootstrap: int = 200  # resamples of contexts behind the standard error
    pca_tokens: int = 200_000  # training rows that the PCA baseline is fitted on; 0: no baseline
    metrics: tuple[str, ...] = ()  # of your own, by name: see saetrain.evals.own

    def __post_init__(self) -> None:
        _positive("eval.tokens", self.tokens)
        _positive("eval.every_steps", self.every_steps)
        for name in ("bootstrap", "pca_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"eval.{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Which rows are read, how they are mixed, and where copies of remote stores are kept."""

    window_rows: int = 65_536  # rows that are shuffled together; two such windows are in memory
    run_chunks: int = 1  # neighbouring chunks read at once: faster on slow disks, mixes less
    shuffle: bool = True  # False: stored order, shuffled within windows only
    skip_special: bool = True  # leave out special tokens of the tokenizer
    modality: Literal["all", "text", "image"] = "all"
    roles: tuple[str, ...] | None = None  # of chats: user, assistant, …; None: all
    max_norm: float | None = None  # leave out rows longer than so many mean lengths; None: none
    threads: int | None = None  # that read; None: 4 at most, 16 for a store at a server
    direct: bool | None = None  # read past the page cache; None: if the memory cannot hold the rows
    cache_dir: str | None = None  # folder for copies of a store at a server; None: no copies
    cache_gb: float = 50.0  # 1e9 bytes that these copies may take

    def __post_init__(self) -> None:
        for name in ("window_rows", "run_chunks", "threads", "cache_gb"):
            _positive(f"stream.{name}", getattr(self, name))
        if self.cache_dir == "":
            raise ConfigError("stream.cache_dir is empty: name a folder, or null for no copies")


@dataclass(frozen=True, kw_only=True)
class LiveSettings:
    """For source=live: what `actcache run` takes, without a store. Names are those of files in
    conf/; a mapping may build on one with `preset: NAME`."""

    host: str | dict[str, Any] | None = None
    data: str | dict[str, Any] | None = None
    tokens: int | None = None  # of the data, special and held-out ones included; None: all there is
    context: int = 128
    pack: dict[str, Any] = field(default_factory=dict)
    layout: str | dict[str, Any] = field(default_factory=dict)  # dtype rounds, segment_rows cuts
    calibration_tokens: int = 1_000_000  # first rows, for mean and variance
    keep_gb: float = 2.0  # of memory, for calibration rows: they need not be captured again
    capture: str = "actcache.live:open_live"  # MODULE:FUNCTION that makes the capture

    def __post_init__(self) -> None:
        for name in ("tokens", "context", "calibration_tokens"):
            _positive(f"live.{name}", getattr(self, name))
        if self.keep_gb < 0:
            raise ConfigError(f"live.keep_gb: expected 0 or more, got {self.keep_gb}")

    def asked(self) -> dict[str, Any]:
        """What the capture is made of."""
        ours = ("calibration_tokens", "keep_gb", "capture")
        return {k: v for k, v in vars(self).items() if k not in ours}


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When to write checkpoints and how many to keep. One is always written at the last step."""

    every_steps: int | None = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        _positive("checkpoint.every_steps", self.every_steps)
        _positive("checkpoint.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Weights & Biases. `online` obeys WANDB_MODE where that is set."""

    mode: Literal["disabled", "online", "offline"] = "disabled"
    project: str = "saetrain"
    entity: str | None = None
    name: str | None = None  # None: the run folder's name


@dataclass(frozen=True, kw_only=True)
class FusedSettings:
    """For several SAEs trained together: a fused sweep, or one SAE per hook."""

    stack: bool = False  # encoders of equal shape and input in one product; equal up to rounding
    workers: int | None = None  # that step at once on a CPU; None: one a thread, at most 8
    memory_gb: float | None = None  # 1e9 bytes for all of it; None: 80 % of what is free

    def __post_init__(self) -> None:
        _positive("fused.memory_gb", self.memory_gb)
        _positive("fused.workers", self.workers)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that one training run depends on."""

    sae: dict[str, Any]  # name=..., and the fields of that architecture's config
    source: Literal["store", "live"] = "store"  # live: captured while training, see `live`
    store: str | None = None  # path of the store; None only where a stream is passed to `train`
    stores: dict[str, str] | None = None  # several instead: label -> path; hooks are LABEL:HOOK
    mix: dict[str, float] | None = None  # label -> weight: mix the rows of `stores`, do not join
    snapshot: str | dict[str, str] | None = None  # None: the newest; of several, label -> name
    hook: str = "resid.2"
    hooks: str | tuple[str, ...] | None = None  # one SAE for each of these; "all" of the store
    layers: tuple[int, ...] | None = None  # instead: of these layers, hooks named like `hook`
    layer_stride: int | None = None  # every so many-th layer, of hooks named like `hook` or of all
    fused: FusedSettings = field(default_factory=FusedSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    batch_tokens: int = 4096
    tokens: int | None = None  # training tokens in all; more than the split has means more epochs
    epochs: int | None = None  # instead of tokens
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay fp32
    grad_acc_steps: int = 1  # equal parts of a batch whose gradients add up to one step
    micro_acc_steps: int = 1  # pieces of each of these, see `saetrain.micro`
    compile: bool = False  # losses through torch.compile; needs a C++ compiler on CPUs
    device: str = "auto"
    held_out_fraction: float = 0.05  # of the documents
    stream: StreamSettings = field(default_factory=StreamSettings)
    live: LiveSettings = field(default_factory=LiveSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    early_stop: EarlyStopSettings = field(default_factory=EarlyStopSettings)
    target_l0: float | None = None  # what a sweeper maximises: FVE at this L0, `outcomes.score`
    wandb: WandbSettings = field(default_factory=WandbSettings)
    runs_dir: str = "runs"
    sae_name: str | None = None  # names the run folder and travels with the SAE
    sae_series: str | None = None  # folder above it
    saes_path: tuple[str, ...] = ()  # files or folders with architectures of your own
    metrics_path: tuple[str, ...] = ()  # likewise, with metrics for eval.metrics
    log_every: int = 50  # steps
    progress: bool = True  # bar on stderr
    report: bool = True  # write report.html at the end
    fresh: bool = False  # start again even if the run folder has a checkpoint or is finished

    def __post_init__(self) -> None:
        if "name" not in self.sae:
            raise ConfigError("missing: sae.name (which architecture; see python -m saetrain.saes)")
        if (self.tokens is None) == (self.epochs is None):
            raise ConfigError(
                f"give exactly one of tokens and epochs, got tokens={self.tokens}, "
                f"epochs={self.epochs}. Set the other to null"
            )
        if self.source == "live" and self.epochs is not None:
            raise ConfigError(
                f"epochs={self.epochs}: how long an epoch is, a live source knows only when the "
                "data has ended. Give tokens=… and epochs=null; more than the data has begins again"
            )
        for name in ("batch_tokens", "tokens", "epochs", "log_every", "target_l0"):
            _positive(name, getattr(self, name))
        for name in ("grad_acc_steps", "micro_acc_steps"):
            _positive(name, getattr(self, name))
        if self.batch_tokens % self.pieces:
            raise ConfigError(
                f"batch_tokens={self.batch_tokens} is what one step sees, and cannot be cut into "
                f"grad_acc_steps x micro_acc_steps = {self.pieces} equal pieces"
            )
        check_stores(self)
        check_hooks(self)
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(
                "held_out_fraction: expected between 0 and 1, both excluded, because every run is "
                f"evaluated on held-out documents; got {self.held_out_fraction}"
            )
        for name in ("sae_name", "sae_series"):
            value = getattr(self, name)
            if value is not None and not _NAME.fullmatch(value):
                raise ConfigError(
                    f"{name}: expected a folder name of letters, digits and _ . = + -, "
                    f"not starting with a dot, got {value!r}"
                )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Settings from nested plain mappings. Unknown keys and wrong types: ConfigError."""
        try:
            return build(cls, values)
        except SettingsError as e:
            raise ConfigError(str(e)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able mapping; `from_mapping` is its inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def result_key(self) -> str:
        """sha256 (hex) of the settings that decide the result. Paths and logging are left out."""
        kept = {k: v for k, v in self.to_dict().items() if k not in NOT_RESULT}
        if self.source == "store":  # cached or captured: the same settings serve both
            kept = {k: v for k, v in kept.items() if k not in ("source", "live")}
        else:
            kept["snapshot"] = None
            kept["live"] = {k: v for k, v in kept["live"].items() if k != "keep_gb"}
        kept["stream"] = {k: v for k, v in kept["stream"].items() if k not in NOT_RESULT_STREAM}
        if self.stores is not None:
            kept["stores"] = list(self.stores)  # the first one gives the order of rows
        canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def several_hooks(self) -> bool:
        """Whether these settings stand for one run a hook, see `saetrain.expand`."""
        return (self.hooks, self.layers, self.layer_stride) != (None, None, None)

    @property
    def pieces(self) -> int:
        """Parts of a batch that are computed one after the other."""
        return self.grad_acc_steps * self.micro_acc_steps

    @property
    def run_name(self) -> str:
        """`{sae_name or architecture-hook}-{8 hex}`."""
        name = self.sae_name or re.sub(r"[^A-Za-z0-9_.-]", "_", f"{label(self.sae)}-{self.hook}")
        return f"{name}-{self.result_key()[:8]}"

    @property
    def run_dir(self) -> Path:
        """`{runs_dir}/[{sae_series}/]{run_name}`."""
        root = Path(self.runs_dir).expanduser()
        return root.joinpath(*([self.sae_series] if self.sae_series else []), self.run_name)


def check_stores(settings: TrainSettings) -> None:
    """ConfigError unless store, stores, mix and snapshot fit each other."""
    stores, mix, snapshot = settings.stores, settings.mix, settings.snapshot
    if stores is not None and settings.store is not None:
        raise ConfigError("give store=PATH or stores={LABEL: PATH, …}, not both")
    if stores is not None and len(stores) < 2:
        raise ConfigError(f"stores: expected two or more, LABEL: PATH each, got {stores}")
    labels = list(stores or ())
    if mix is not None and sorted(mix) != sorted(labels):
        raise ConfigError(
            f"mix: expected a weight for each label of stores ({', '.join(labels) or 'none'}), "
            f"got {', '.join(mix) or 'none'}"
        )
    for name, weight in (mix or {}).items():
        _positive(f"mix.{name}", weight)
    named = snapshot if isinstance(snapshot, dict) else {}
    if isinstance(snapshot, dict) != (stores is not None) and snapshot is not None:
        raise ConfigError(
            f"snapshot: expected {'LABEL: NAME for stores' if stores else 'one name'}, "
            f"got {snapshot!r}"
        )
    if unknown := set(named) - set(labels):
        raise ConfigError(f"snapshot: {sorted(unknown)} are no labels of stores")


def check_hooks(settings: TrainSettings) -> None:
    """ConfigError unless hooks, layers and layer_stride fit each other."""
    hooks, layers, stride = settings.hooks, settings.layers, settings.layer_stride
    if isinstance(hooks, str) and hooks != "all":
        raise ConfigError(f"hooks={hooks}: expected all, or a list as in hooks=[{hooks}]")
    listed = hooks is not None and hooks != "all"
    both = [_as_typed(n, v) for n, v in (("hooks", hooks), ("layers", layers)) if v is not None]
    if len(both) == 2:
        raise ConfigError(f"give hooks or layers, not both, got {both[0]}, {both[1]}")
    if stride is not None and (layers is not None or listed):
        raise ConfigError(
            f"give layer_stride={stride} or {both[0]}, not both: "
            "layer_stride takes every so many-th layer of hooks=all, or of hooks named like `hook`"
        )
    _positive("layer_stride", stride)
    for name, given in (("hooks", hooks if listed else None), ("layers", layers)):
        if given is not None and (not given or len(set(given)) < len(given)):
            raise ConfigError(f"{_as_typed(name, given)}: expected one or more, each once")


def _as_typed(name: str, value: str | tuple[object, ...]) -> str:
    listed = value if isinstance(value, str) else f"[{','.join(map(str, value))}]"
    return f"{name}={listed}"


def _positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"{name}: expected more than 0, got {value}")
