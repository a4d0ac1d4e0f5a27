"""Parameters, FLOPs and memory of a host, from its config on the meta device."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import nn

from actcache import host as hosts
from actcache.calibrate import KEEP_BYTES
from actcache.demo import demo_paths
from actcache.errors import HookError, HostError
from actcache.families import block_list, deepest_block
from actcache.fill import WRITES
from actcache.hooks import Capture, HookPoint
from actcache.host import Host, HostSettings
from actcache.plan.records import (
    Assumptions,
    MemoryPlan,
    ModelPlan,
    PlanSettings,
)
from actcache.run import CacheSettings
from actcache.store import HookInfo, SettingsError
from actcache.store.int8 import CALIBRATION_ROWS
from actcache.store.layout import (
    DTYPES,
)

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@contextmanager
def architecture_of(settings: HostSettings) -> Iterator[Host]:
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


def hook_widths(host: Host, model: nn.Module, points: list[HookPoint]) -> dict[str, int]:
    """d of every hook, from a forward pass over two tokens that have no values."""
    ids_BT = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta")
    model.to(torch.bfloat16)  # grouped expert kernels take nothing else
    try:
        with Capture(model, points) as capture:
            hosts.forward(model, ids_BT, mask, None)
            found = capture.take(ids_BT.shape)
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


class Shape:
    """Parameters of a model on the meta device, and which of them run."""

    def __init__(self, model: nn.Module, points: list[HookPoint], context: int) -> None:
        config: Any = model.config
        self.text = config.get_text_config()
        self.architecture, self.context = str(config.model_type), context
        self.attention = str(self.text._attn_implementation)  # what the library chooses
        self.vocab, self.d = int(self.text.vocab_size), int(self.text.hidden_size)
        tied = getattr(config, "tie_word_embeddings", None)
        tied = getattr(self.text, "tie_word_embeddings", True) if tied is None else tied
        self.head = 0 if tied else self.vocab * self.d
        self._read_blocks(model, points)
        self.k_of_experts = _experts(self.text)
        self.everything = sum(p.numel() for p in model.parameters())
        self.run = {n: p for n, p in model.named_parameters() if not self._behind(n)}
        modules = model.named_modules()
        self.linear = {f"{n}.weight" for n, m in modules if isinstance(m, nn.Linear)}
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
        deepest = deepest_block((p.module for p in points), model)
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

    def _weights(self, host: HostSettings) -> int:
        """Bytes of the parameters that run; bitsandbytes has linear layers in 8 or in 4 bits."""
        size = hosts.DTYPES[host.dtype].itemsize
        total = size * sum(p.numel() for p in self.run.values())
        asked = host.quantization or {}
        small = {"load_in_8bit": 1.0, "load_in_4bit": 0.5}
        per = next((b for key, b in small.items() if asked.get(key)), None)
        if asked and per is None:
            raise SettingsError(
                f"host.quantization={asked}: only load_in_8bit and load_in_4bit can be planned"
            )
        linear = sum(p.numel() for n, p in self.run.items() if n in self.linear)
        return total if per is None else round(total - linear * (size - per))

    def plan(self, host: HostSettings) -> ModelPlan:
        run = sum(p.numel() for p in self.run.values())
        active = round(sum(self._used(n, p) for n, p in self.matrices.items()))
        return ModelPlan(
            architecture=self.architecture,
            blocks=self.blocks,
            blocks_run=self.blocks_run,
            parameters=self.everything + self.head,
            parameters_run=run,
            parameters_active=active,
            weights=self._weights(host),
            flops=2 * active + 2 * self.blocks_run * self.context * sum(self.heads),
        )


def _experts(text: Any) -> tuple[int, int] | None:
    """(experts that a token uses, experts of a layer), if the config says both."""
    used = getattr(text, "num_experts_per_tok", None)
    of = next((n for k in _EXPERTS if (n := getattr(text, k, None))), None)
    return (int(used), int(of)) if used and of else None


def plan_memory(
    settings: PlanSettings | CacheSettings,
    shape: Shape,
    model: ModelPlan,
    hooks: list[HookInfo],
    a: Assumptions,
) -> MemoryPlan:
    """GPU: the widest point of a block is four tensors as wide as the MLP, or queries, keys and
    values beside their rotated and repeated copies, above the residual stream. Host: the segments
    in flight, the permuted copy of one, and twice the shard that is being encoded; of int8 also the
    rows that were computed to calibrate.

    Against measurement: 0.95 to 1.7 times the tensors that are alive at once in GPT-2, GPT-NeoX,
    Llama, Gemma 3, Qwen3-MoE and Mixtral; 1.0 to 1.15 times the growth of a process on the CPU.
    """
    T, size = settings.context, hosts.DTYPES[settings.host.dtype].itemsize
    contexts = max(1, settings.host.batch_tokens // T)
    chosen = shape.k_of_experts[0] if shape.k_of_experts else 0
    widest = (4 + 2 * chosen) * shape.d + max(4 * shape.mlp, 8 * max(shape.heads))
    activations = contexts * T * (widest * size + T)  # and a mask of bytes
    asked = settings.host.attention
    if (shape.attention if asked == "auto" else asked) == "eager":
        activations += contexts * shape.text.num_attention_heads * T * T * (size + 4)
    widths = [h.d for h in hooks]
    dtype = settings.layout.dtype  # rows wait in it; those of int8 in the host's type
    stored = size if dtype == "int8" else DTYPES[dtype].itemsize
    buffers = contexts * T * (2 * sum(widths) * size + max(widths) * stored)
    gathered = shape.gathered * size
    replicated = model.weights + activations + buffers
    zero3 = -(-model.weights // a.gpus) + gathered + activations + buffers
    room = a.gpu_gib * 2**30 * (1 - a.gpu_spare)
    row, flying = settings.layout.segment_rows * stored, WRITES + 1
    rows = min(CALIBRATION_ROWS, settings.tokens or CALIBRATION_ROWS)  # of the calibration
    kept = min(KEEP_BYTES, rows * stored * sum(widths)) if dtype == "int8" else 0
    return MemoryPlan(
        gathered=gathered,
        activations=activations,
        hook_buffers=buffers,
        replicated=replicated,
        zero3=zero3,
        replicated_fits=replicated <= room,
        zero3_fits=zero3 <= room,
        segments_in_flight=flying,
        segment_buffers=row * ((flying + 1) * sum(widths) + 2 * max(widths)) + kept,
    )
