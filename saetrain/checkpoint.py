"""Checkpoints of a run: safetensors for tensors, one JSON for the rest. No pickle.

checkpoints/step_N/{sae,optim,trainer}.safetensors hold the SAE's weights and buffers, the
optimizer's moments, and the random generators with the unlogged part of the metric window;
state.json holds the step, the stream's integers and the sha256 of the three files. Everything is
written to a temporary folder, synced, and renamed, so a kill leaves either a whole checkpoint or
none; one that was damaged later is skipped aloud in favour of the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
PARTS = ("sae", "optim", "trainer")
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that the next step depends on."""

    step: int  # steps done
    sae: dict[str, Tensor]
    optim: dict[str, Tensor]
    trainer: dict[str, Tensor]
    stream: dict[str, Any]
    facts: dict[str, Any]  # store_id and the like, compared by the trainer


def save(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `root/step_N` and delete all but the newest `keep`. Returns the folder."""
    final = root / f"step_{checkpoint.step}"
    temporary = root / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir(parents=True)
    digests = {}
    for part in PARTS:
        file = temporary / f"{part}.safetensors"
        tensors: Mapping[str, Tensor] = getattr(checkpoint, part)
        # Copies: safetensors refuses tensors that share memory.
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, file)
        digests[file.name] = _digest(file)
        _sync(file)
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "stream": checkpoint.stream,
        "facts": checkpoint.facts,
        "sha256": digests,
    }
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    _sync(temporary / STATE)
    _sync(temporary)
    if final.exists():  # a damaged one, or the same step after an interrupt
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(root)
    for old in _folders(root)[keep:]:
        shutil.rmtree(old)
    return final


def newest(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, or None. Damaged ones are named through `say`."""
    for leftover in root.glob(".tmp-step_*"):
        say(f"removing {leftover}: a checkpoint that was being written when the run stopped")
        shutil.rmtree(leftover)
    for folder in _folders(root):
        try:
            return load(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            say(f"skipping damaged checkpoint {folder}: {e}")
    return None


def load(folder: Path) -> Checkpoint:
    """Read one checkpoint. Raises OSError, ValueError, KeyError or SafetensorError if damaged."""
    state = json.loads((folder / STATE).read_text())
    if state["format"] != FORMAT:
        raise ValueError(f"format {state['format']}, expected {FORMAT}")
    tensors = {}
    for part in PARTS:
        file = folder / f"{part}.safetensors"
        if _digest(file) != state["sha256"][file.name]:
            raise ValueError(f"{file.name} does not match the digest in {STATE}")
        tensors[part] = load_file(file)
    return Checkpoint(step=state["step"], stream=state["stream"], facts=state["facts"], **tensors)


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators, as uint8 tensors."""
    states = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng/cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_rng(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore `rng_tensors`; a run may continue on another kind of device without its generator."""
    torch.set_rng_state(tensors["rng/cpu"])
    if device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], device)


@contextmanager
def own_generator(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for this run and give the caller's generators back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in root.glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("step_")))


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
