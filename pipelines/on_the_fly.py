"""`SaeTrainer(cfg, tokenized, model).fit()`: SAEs on a model that is in memory, nothing on disk.

The programmatic form of EleutherAI's sae (sparsify): a data set of equally long `input_ids` (see
`actcache.data.chunk_and_tokenize`), a transformers model, and one k-sparse autoencoder for the
residual stream after every chosen layer. Activations are captured while training and mixed in a
window; as many as fit `keep_gb` stay in memory, so that several layers share one pass over the
text. For more, make a store: `python -m pipelines.sae` does both in one command.

    cfg = TrainConfig(SaeConfig(model.config.hidden_size), batch_size=16)
    results = SaeTrainer(cfg, tokenized, model).fit()      # hook -> TrainResult
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import saetrain
from actcache.data import Context
from actcache.errors import DataError
from actcache.hooks import HookPoint, resolve
from actcache.segments import SegmentBuilder
from actcache.store import HookInfo, TokenTable
from actcache.store.ids import digest
from actcache.store.layout import FLAG_DOC_START, permutation
from actcache.store.split import doc_key, held_out
from saetrain.errors import ConfigError
from saetrain.settings import OptimSettings, TrainSettings
from saetrain.stream.capture import Calibration, Wanted
from saetrain.stream.live import LiveStream
from saetrain.trainer import TrainResult

SEGMENT_ROWS = 65_536


@dataclass(frozen=True)
class SaeConfig:
    """One SAE: TopK with unit decoder rows."""

    d_in: int  # width of the residual stream
    expansion_factor: int = 32
    num_latents: int = 0  # 0: expansion_factor * d_in
    k: int = 32

    @property
    def latents(self) -> int:
        return self.num_latents or self.expansion_factor * self.d_in


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Give `layers`, `layer_stride` or neither (all layers)."""

    sae: SaeConfig
    batch_size: int = 8  # sequences of one step
    layers: tuple[int, ...] = ()
    layer_stride: int = 1
    lr: float | None = None  # None: by the number of latents
    auxk_alpha: float = 1 / 32
    epochs: int = 1
    held_out_fraction: float = 0.05  # of the sequences
    keep_gb: float = 2.0  # of activations that stay in memory, 1e9 bytes
    seed: int = 0
    runs_dir: str = "runs"
    run_name: str = "sae"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.layers and self.layer_stride != 1:
            raise ConfigError("give layers or layer_stride, not both")
        for name in ("batch_size", "layer_stride", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class _Segment:
    """Rows of neighbouring sequences, permuted."""

    place: dict[str, int]
    row: NDArray[np.int64]
    tokens: TokenTable
    acts: Mapping[str, NDArray[Any]]


class MemoryCapture:
    """A model in memory over token ids (n, T): what a live stream draws from."""

    def __init__(
        self, model: nn.Module, ids: NDArray[np.int64], points: Sequence[HookPoint], batch: int
    ) -> None:
        """`model` is a base model, without its head; `batch` sequences make a forward pass."""
        self._ids, self._points = ids, list(points)
        self.names = {p.name: p.name for p in points}
        self.context = ids.shape[1]
        self._model, self._batch = model, batch
        self._kept: dict[int, _Segment] = {}
        self._turn = threading.Lock()

    @cached_property
    def _builder(self) -> SegmentBuilder:
        parameter = next(self._model.parameters())
        return SegmentBuilder(
            self._model,
            self._points,
            device=parameter.device,
            batch_contexts=self._batch,
            dtype="float32",
            cross_documents=True,
        )

    @cached_property
    def hooks(self) -> dict[str, HookInfo]:
        """Width of each hook, from a forward pass."""
        widths = self._builder.widths()
        return {
            p.name: HookInfo(
                **asdict(p),
                d=widths[p.name],
                dtype="float32",
                chunk_rows=min(SEGMENT_ROWS, 1 << 10),
                activation_id=digest([self.ids(), p.name]),
            )
            for p in self._points
        }

    def ids(self) -> dict[str, Any]:
        """What names the activations: the token ids and the shape of the model."""
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, Any]:
        config: Any = getattr(self._model, "config", None)
        shape = None if config is None else config.to_diff_dict()
        stream = digest(np.ascontiguousarray(self._ids).tobytes().hex())
        return {"token_stream_id": stream, "model": digest(str(shape)), "in_memory": True}

    def segments(
        self,
        start: Mapping[str, int] | None = None,
        wanted: Wanted | None = None,
        stop: threading.Event | None = None,
        keep_bytes: int = 0,
    ) -> Iterator[_Segment]:
        """Segments from `start` on; what fits `keep_bytes` stays in memory for the next walk."""
        each = max(1, SEGMENT_ROWS // self.context)
        first = 0 if start is None else int(start["number"])
        for number in range(first, -(-len(self._ids) // each)):
            with self._turn:
                if stop is not None and stop.is_set():
                    return
                found = self._kept.get(number) or self._capture(number, each)
                held = sum(x.nbytes for s in self._kept.values() for x in s.acts.values())
                if held + sum(x.nbytes for x in found.acts.values()) <= keep_bytes:
                    self._kept[number] = found
            yield found

    def _capture(self, number: int, each: int) -> _Segment:
        first = number * each
        contexts = [
            Context(row.astype(np.uint32), np.full(len(row), key_of(i), np.uint64), _flags(row))
            for i, row in enumerate(self._ids[first : first + each], first)
        ]
        tokens, acts = self._builder.build(contexts, lambda _: None)
        order = permutation(f"memory-{number}", len(tokens))
        rows = {name: x[order] for name, x in acts.items()}
        return _Segment({"number": number}, np.arange(len(order)), tokens.take(order), rows)


def key_of(sequence: int) -> int:
    """The document key of a sequence: its number, hashed."""
    return doc_key(f"sequence {sequence}")


def _flags(row: NDArray[np.int64]) -> NDArray[np.uint8]:
    flags = np.zeros(len(row), np.uint8)
    flags[0] = FLAG_DOC_START
    return flags


class SaeTrainer:
    """One SAE a layer, trained one after the other from the same activations."""

    def __init__(self, cfg: TrainConfig, dataset: Any, model: nn.Module) -> None:
        """`dataset` is a datasets.Dataset with `input_ids`, or an array (n, T) of token ids.

        Raises ConfigError if the SAE's width is not the model's, or the data too small.
        """
        self.cfg, self.ids = cfg, _token_ids(dataset)
        base = getattr(model, "base_model", model)
        layers = cfg.layers or None
        points = resolve("resid", layers, base)[:: cfg.layer_stride]
        self.capture = MemoryCapture(base.eval(), self.ids, points, cfg.batch_size)
        for name, info in self.capture.hooks.items():
            if info.d != cfg.sae.d_in:
                raise ConfigError(f"SaeConfig({cfg.sae.d_in}): {name} has width {info.d}")
        keys = np.array([key_of(i) for i in range(len(self.ids))], dtype=np.uint64)
        trained = int((~held_out(keys, cfg.held_out_fraction)).sum()) * self.ids.shape[1]
        self.tokens = trained * cfg.epochs
        batch = cfg.batch_size * self.ids.shape[1]
        if trained < batch or trained == self.ids.size:
            raise ConfigError(
                f"{len(self.ids)} sequences: too few for batches of {cfg.batch_size} beside "
                f"{cfg.held_out_fraction:.0%} held out"
            )

    def fit(self) -> dict[str, TrainResult]:
        """Train, evaluate and save all of them; hook -> result."""
        keep = int(self.cfg.keep_gb * 1e9)
        shared = Calibration(self.capture, self.ids.size, special=False, keep_bytes=keep)
        return {hook: self._train(hook, shared) for hook in self.capture.names}

    def _train(self, hook: str, calibration: Calibration) -> TrainResult:
        cfg, batch = self.cfg, self.cfg.batch_size * self.ids.shape[1]

        def stream(split: Any) -> LiveStream:
            return LiveStream(
                self.capture,
                (hook,),
                calibration,
                batch_tokens=batch,
                seed=cfg.seed,
                split=split,
                held_out_fraction=cfg.held_out_fraction,
            )

        sae = {"name": "topk", "n_latents": cfg.sae.latents, "k": cfg.sae.k}
        settings = TrainSettings(
            sae=sae | {"auxk_alpha": cfg.auxk_alpha},
            hook=hook,
            batch_tokens=batch,
            tokens=self.tokens,
            seed=cfg.seed,
            optim=OptimSettings() if cfg.lr is None else OptimSettings(lr=cfg.lr),
            held_out_fraction=cfg.held_out_fraction,
            runs_dir=cfg.runs_dir,
            sae_name=hook,
            sae_series=cfg.run_name,
            report=False,
            progress=cfg.progress,
        )
        return saetrain.train(settings, stream=stream("train"), held_out=stream("held_out"))


def _token_ids(dataset: Any) -> NDArray[np.int64]:
    """(n, T) from what the user has. DataError if the sequences are not equally long."""
    rows = dataset["input_ids"] if hasattr(dataset, "column_names") else dataset
    if isinstance(rows, torch.Tensor):
        rows = rows.cpu().numpy()
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise DataError(
            "expected input_ids of one length, as chunk_and_tokenize makes them; "
            + (f"got lengths {min(lengths)} to {max(lengths)}" if lengths else "there are none")
        )
    return np.asarray(rows, dtype=np.int64)
