"""Contexts through the host into the rows of one segment.

Contexts run in batches, padded on the right to equal length; only real tokens become rows, in
(ctx, pos) order. Values that are not finite stop the run, naming the context that caused them.

Shapes: B contexts in a batch, T tokens of the longest, d width of a hook, n rows of the segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actcache.data import Context
from actcache.errors import HookError, NonFiniteError
from actcache.hooks import Capture, HookPoint
from actcache.host import forward
from actcache.inputs import alike, joined, pictured
from actcache.masks import Masks, check_isolation, document_masks, document_starts
from actcache.store import TokenTable, heap
from actcache.store.layout import DTYPES

_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SegmentBuilder:
    """Runs contexts through a loaded host and collects token tables and activations."""

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[HookPoint],
        *,
        device: torch.device,
        batch_contexts: int,
        dtype: str,
        cross_documents: bool,
        spare: Context | None = None,
    ) -> None:
        """`dtype` is the storage type; `cross_documents` whether attention crosses documents.

        `spare` is a context with an image that joins every pass without one, and leaves no rows:
        ranks that share a model's weights must all run its vision tower, or none.
        """
        self._model, self._points, self._device = model, points, device
        self._batch, self._dtype, self._cross = batch_contexts, dtype, cross_documents
        self._spare = spare
        heap.keep()

    def alone(self) -> SegmentBuilder:
        """The same host, one context at a time, with rows in float32: for canaries."""
        return SegmentBuilder(
            self._model,
            self._points,
            device=self._device,
            batch_contexts=1,
            dtype="float32",
            cross_documents=self._cross,
            spare=self._spare,
        )

    @property
    def batch_contexts(self) -> int:
        """Contexts of one forward pass."""
        return self._batch

    def widths(self) -> dict[str, int]:
        """d of every hook, from a forward pass over two contexts of three tokens.

        Raises HookError if a hook is silent or not one vector per token, HostError if attention is
        to stop at documents and the host does not do that.
        """
        if not self._cross:
            check_isolation(self._packed, _vocab(self._model), next(self._model.parameters()).dtype)
        probe = Context(np.zeros(3, np.uint32), np.zeros(3, np.uint64), np.zeros(3, np.uint8))
        return {name: x.shape[-1] for name, x in self._run([probe, probe]).items()}

    def dummy(self) -> None:
        """One forward pass over two tokens that nobody keeps: a rank's part in others' passes."""
        if self._spare is not None:
            self._run([self._spare])
            return
        ids_BT = torch.zeros((1, 2), dtype=torch.int64, device=self._device)
        forward(self._model, ids_BT, torch.ones_like(ids_BT), None)

    def build(
        self, contexts: Sequence[Context], advance: Callable[[int], object]
    ) -> tuple[TokenTable, dict[str, NDArray[Any]]]:
        """Token table and activations (n, d) in storage type; `advance(tokens)` after each batch.

        Raises NonFiniteError.
        """
        kept: dict[str, Tensor] = {}  # (n, d) by hook, filled batch by batch
        n, first = sum(map(len, contexts)), 0
        for start in range(0, len(contexts), self._batch):
            batch = contexts[start : start + self._batch]
            last = first + sum(map(len, batch))
            for name, rows in self._run(batch).items():
                if name not in kept:
                    kept[name] = torch.empty(n, rows.shape[1], dtype=_TORCH[self._dtype])
                stored = kept[name][first:last].copy_(rows)
                if not _finite(stored):
                    raise NonFiniteError(_where(name, stored, batch, start, self._dtype))
            advance(last - first)
            first = last
        return token_table(contexts), {name: _array(x) for name, x in kept.items()}

    def _run(self, batch: Sequence[Context], shared: bool = False) -> dict[str, Tensor]:
        """Activations (rows, d) of the real tokens, by hook; `shared` if all fit into one pass."""
        if not shared and len(groups := alike(batch)) > 1:
            parts = [self._run(group) for group in groups]
            return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        if self._spare is not None and not any(map(pictured, batch)):
            rows = sum(map(len, batch))
            found = self._run([*batch, self._spare], shared=True)
            return {name: x[:rows] for name, x in found.items()}
        ids_BT, real_BT = _pad(batch)
        inputs = joined(batch, self._model, self._device, ids_BT.shape[1])
        mask: Masks = real_BT.to(self._device)
        positions = None
        if not self._cross:
            starts = [document_starts(c.flags) for c in batch]
            mask, positions = document_masks(self._model, starts, self._device)
        found = self._forward(ids_BT, mask, positions, inputs)
        for name, x in found.items():
            if x.shape[:2] != ids_BT.shape:
                raise HookError(
                    f"hook {name!r} has shape {tuple(x.shape)} for {tuple(ids_BT.shape)} tokens: "
                    "it does not carry one vector per token"
                )
        if bool(real_BT.all()):
            return {name: x.flatten(0, 1) for name, x in found.items()}
        keep = real_BT.bool()
        return {name: x[keep.to(x.device)] for name, x in found.items()}

    def _forward(
        self,
        ids_BT: Tensor,
        mask: Masks,
        positions: Tensor | None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The hooked tensors (B, T, d) of one forward pass."""
        with Capture(self._model, self._points) as capture:
            forward(self._model, ids_BT.to(self._device), mask, positions, inputs)
            return capture.take(ids_BT.shape)

    def _packed(
        self, starts: Sequence[NDArray[np.bool_]], ids_BT: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """The hooked tensors of contexts with documents at `starts`; alone, as one without."""
        ids = torch.from_numpy(ids_BT)
        if sum(map(np.count_nonzero, starts)) == len(starts):
            return self._forward(ids, torch.ones_like(ids).to(self._device), None)
        return self._forward(ids, *document_masks(self._model, starts, self._device))


def _finite(x: Tensor) -> bool:
    """Whether all values are finite. Their sum tells, for a tenth of the cost; it may overflow."""
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())


def _array(x: Tensor) -> NDArray[Any]:
    """The same memory as a numpy array of the storage type."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view(DTYPES["bfloat16"])
    array: NDArray[Any] = x.numpy()
    return array


def token_table(contexts: Sequence[Context]) -> TokenTable:
    """Rows of contexts numbered from 0, in (ctx, pos) order."""
    lengths = [len(c) for c in contexts]
    return TokenTable(
        token_id=np.concatenate([c.token_id for c in contexts]),
        doc=np.concatenate([c.doc for c in contexts]),
        ctx=np.repeat(np.arange(len(contexts), dtype=np.uint32), lengths),
        pos=np.concatenate([np.arange(n, dtype=np.uint32) for n in lengths]),
        flags=np.concatenate([c.flags for c in contexts]),
    )


def _pad(batch: Sequence[Context]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) with zeros behind short contexts, and 1 where a token is real."""
    ids = np.zeros((len(batch), max(map(len, batch))), dtype=np.int64)
    real = np.zeros_like(ids)
    for row, context in enumerate(batch):
        ids[row, : len(context)] = context.token_id
        real[row, : len(context)] = 1
    return torch.from_numpy(ids), torch.from_numpy(real)


def _vocab(model: nn.Module) -> int:
    config: Any = model.config
    return int(getattr(config.get_text_config(), "vocab_size", None) or 1000)


def _where(name: str, rows: Tensor, batch: Sequence[Context], first: int, dtype: str) -> str:
    """The message for values that are not finite."""
    bad = int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])
    ends = np.cumsum([len(c) for c in batch])
    offset = int(np.searchsorted(ends, bad, side="right"))
    context = batch[offset]
    bad -= int(ends[offset]) - len(context)
    ids = context.token_id[max(0, bad - 8) : bad + 1].tolist()
    return (
        f"hook {name!r} is not finite as {dtype} at context {first + offset} of the segment, "
        f"position {bad}, document key {int(context.doc[bad])}; the tokens up to there are {ids}. "
        "Nothing of this segment is kept. Try host.dtype=float32 or layout.dtype=bfloat16, or "
        "leave the document out"
    )
