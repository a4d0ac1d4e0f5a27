"""A host that no single device holds: its weights in slices over all ranks, gathered as they run.

`zero3`: DeepSpeed's ZeRO stage 3 through accelerate. Parameters are split when the model is built
and gathered module by module. `fsdp2`: torch's fully_shard, one group per transformer block and one
for the rest; each rank reads only its slice of the weights. Both are data parallel: a hook sees the
whole (B, T, d) activations of its own rank's tokens, nothing has to be gathered there.

Cost: every forward pass moves all weights between the ranks once, so batches should be large (from
16k tokens per device). Memory: 1/N of the weights, and one block (fsdp2) or a few modules (zero3).
Loading: with zero3 rank 0 reads the checkpoint file by file through its memory map.

Bias: none; the kernels are those of the unsharded model.

Sources: Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), stage 3; Zhao et al. 2023, "PyTorch
FSDP" (arXiv:2304.11277). Stages 1 and 2 of ZeRO split optimizer state and gradients, which a host
that is only read does not have: for it they are replicas, host.sharding=none.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from actcache import ranks
from actcache.errors import HostError
from actcache.families import block_list, runner_path
from actcache.store.errors import SettingsError

Sharding = Literal["none", "zero3", "fsdp2"]


def check_launch(sharding: Sharding) -> None:
    """SettingsError if the launcher and `host.sharding` ask for different things.

    Called before the ranks meet, on all of them.
    """
    if sharding != "none" and not ranks.launched():
        raise SettingsError(
            f"host.sharding={sharding} splits the host over several ranks and this process is "
            "alone: start it with torchrun --nproc_per_node N -m actcache run …, or leave "
            "host.sharding out"
        )
    environment = os.environ
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" and stage == "3":
        _refuse_other("ZeRO stage 3", "zero3", sharding)
        offload = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        if offload != "none":
            raise SettingsError(
                f"accelerate's configuration says offload_param_device: {offload}, which actcache "
                "does not do: leave it out and use more ranks"
            )
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        _refuse_other("FSDP", "fsdp2", sharding)


def _refuse_other(asked: str, name: Sharding, sharding: Sharding) -> None:
    if sharding != name:
        raise SettingsError(
            f"accelerate's configuration asks for {asked}, host.sharding={sharding} does not: say "
            f"host.sharding={name}, or use a configuration without it"
        )


def load(
    sharding: Sharding, from_pretrained: Callable[..., nn.Module], dtype: str, skeleton: nn.Module
) -> nn.Module:
    """The model in slices, ready to run; all ranks call this together.

    `from_pretrained` takes the further keywords of its namesake; `skeleton` is the model without
    weights. Raises HostError if the library for it is not installed or refuses.
    """
    if ranks.current().size == 1:
        raise HostError(
            f"host.sharding={sharding}: only actcache run and actcache add-hooks, started as "
            "several ranks, load a host in slices; use host.sharding=none here"
        )
    if sharding == "zero3":
        return _zero3(from_pretrained, dtype)
    return _fsdp2(from_pretrained, skeleton)


# -- ZeRO-3 ----------------------------------------------------------------------------------------


def _zero3(from_pretrained: Callable[..., nn.Module], dtype: str) -> nn.Module:
    accelerate = _accelerate()
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=zero3_config(dtype, ranks.current().size))
    accelerator = accelerate.Accelerator(
        deepspeed_plugin=plugin, mixed_precision=_MIXED.get(dtype, "no")
    )
    plugin.dschf = None  # see _splitting
    model = from_pretrained(splitting=_splitting(plugin)).eval().requires_grad_(False)
    whole = [name for name, p in model.named_parameters() if not hasattr(p, "ds_id")]
    if whole:
        raise HostError(f"host.sharding=zero3: DeepSpeed did not split {', '.join(whole[:3])}")
    engine = accelerator.prepare(model)
    # Hooks name modules of the model itself; the engine, which owns the slices, must outlive it.
    model.__dict__["_engine"] = (engine, accelerator)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(ranks.device())
    return model


@contextmanager
def _splitting(plugin: Any) -> Iterator[None]:
    """While the plugin's config lives, from_pretrained splits each parameter as it is made."""
    plugin.set_deepspeed_weakref()
    try:
        yield
    finally:
        plugin.dschf = None  # or every later model of this process would be split too


_MIXED = {"bfloat16": "bf16", "float16": "fp16"}


def zero3_config(dtype: str, size: int) -> dict[str, Any]:
    """DeepSpeed's settings for a host in `dtype` that is only read, on `size` ranks."""
    return {
        # Required though nothing is trained; accelerate would count one process on a CPU.
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": size,
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }


def _accelerate() -> Any:
    """accelerate, with DeepSpeed beside it and as quiet as it can be. HostError if not there."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_BUILD_OPS", "0")
    # The launcher's list of what its configuration says of DeepSpeed, which is checked already.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    # Its calls of torch.distributed go by older names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.all_gather", FutureWarning)
    try:
        import accelerate
        import deepspeed
    except ImportError as e:
        raise HostError(
            f"host.sharding=zero3 needs DeepSpeed ({e}): pip install 'actcache-saetrain[zero3]', "
            "or use host.sharding=fsdp2, which needs nothing further"
        ) from e
    from accelerate.state import AcceleratorState

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A kernel for all-reduces on a CPU, compiled for a minute at first use; no pass here calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    AcceleratorState._reset_state(reset_partial_state=True)  # a second model of this process
    return accelerate


# -- FSDP2 -----------------------------------------------------------------------------------------


def _fsdp2(from_pretrained: Callable[..., nn.Module], skeleton: nn.Module) -> nn.Module:
    path, _ = block_list(skeleton)
    if runner_path(skeleton):
        raise HostError(
            "host.sharding=fsdp2: of this host only the encoder runs, which fully_shard cannot "
            "gather alone; use host.sharding=zero3"
        )
    plan = {f"{path}.*": "free_full_weight"}
    try:
        model = from_pretrained(
            distributed_config={"fsdp_size": ranks.current().size, "fsdp_plan": plan}
        )
    except TypeError as e:
        if "distributed_config" not in str(e):
            raise
        raise HostError(
            "host.sharding=fsdp2: this version of transformers cannot load a model in slices; "
            "update it, or use host.sharding=zero3"
        ) from e
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if whole:
        raise HostError(f"host.sharding=fsdp2: fully_shard did not split {', '.join(whole[:3])}")
    return model.eval().requires_grad_(False)
