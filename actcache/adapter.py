"""A PEFT adapter on the host: its files, its identity, and putting it in place.

The adapter is put into the base model's own modules and stays unmerged, so that module paths remain
what they are, quantised weights are not rounded again, and the numbers are those of PEFT's own
forward pass. Weights for blocks above the deepest hook, and for heads, are left out.

That an adapter belongs to the host is found out on a model without weights: every tensor of it must
find its module, of the same shape. Needs `peft`. Cost: the adapter's own products in each pass.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from actcache.errors import HostError
from actcache.store.ids import digest, file_digest

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What a config says about its making, not about what it computes.
_NOISE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
HEADS = {"lm_head", "embed_out", "score", "classifier", "cls", "qa_outputs"}
_ROOT = "base_model.model."


class Adapter:
    """The files of an adapter. Weights are read by `apply` only."""

    def __init__(self, name: str, folder: Path) -> None:
        """`name` is what the user typed. Raises HostError if `folder` is not an adapter."""
        self.name, self.folder = name, folder
        if not (folder / CONFIG).is_file():
            raise HostError(f"host.adapter={name}: this folder has no {CONFIG}")
        try:
            self.config: dict[str, Any] = dict(json.loads((folder / CONFIG).read_text("utf-8")))
        except (ValueError, TypeError) as e:
            raise HostError(f"host.adapter={name}: {CONFIG} is not a JSON mapping: {e}") from e
        found = [folder / w for w in _WEIGHTS if (folder / w).is_file()]
        if not found:
            raise HostError(f"host.adapter={name}: no {' or '.join(_WEIGHTS)} in {folder}")
        self.weights = found[0]
        _import()

    @property
    def trained_on(self) -> str:
        """The base model that the adapter names, or ''."""
        return str(self.config.get("base_model_name_or_path") or "")

    @cached_property
    def identity(self) -> str:
        """Digest of the weights and of every setting that bears on the result."""
        settings = {k: v for k, v in self.config.items() if k not in _NOISE}
        return digest({"config": settings, "weights": file_digest(self.weights)})

    def apply(self, model: nn.Module, *, whole: bool) -> None:
        """Put the adapter into `model` in place.

        `whole`: no block of the model is missing, so that every tensor must find its module.
        Raises HostError if the adapter belongs to another model, or is of a kind that adds tokens.
        """
        tensors = self._tensors(model)
        prefix = _prefix(tensors, model)
        inside = {k: v for k, v in tensors.items() if _module_of(k, prefix, model, self._tuner)}
        if whole:
            self._refuse_strangers(set(tensors) - set(inside), prefix)
        if not inside:  # all of it lies above the deepest hook
            return
        with self._explained():
            result = _inject(self.folder, _named(model, prefix), inside)
        missing = [k for k in result.missing_keys if self._tuner in k]
        if missing or result.unexpected_keys:
            odd = (missing or result.unexpected_keys)[0]
            verb = "lacks the weights for" if missing else "has weights without a place:"
            raise HostError(f"host.adapter={self.name} {verb} {odd}")

    @property
    def _tuner(self) -> str:
        """What the names of this kind of adapter's parameters begin with, such as 'lora_'."""
        kind = self.config.get("peft_type")
        known: dict[Any, str] = _import().mapping.PEFT_TYPE_TO_PREFIX_MAPPING
        found = known.get(kind)
        if found is None or "PROMPT" in str(kind) or "PREFIX" in str(kind):
            raise HostError(
                f"host.adapter={self.name}: an adapter of peft_type={kind} cannot be put into a "
                "host's modules: it adds tokens or keys that are no part of the text, or this "
                "version of peft does not know it. LoRA and its kin can"
            )
        return found

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's weights by name without PEFT's root; without values for a model of none."""
        device = "meta" if all(p.is_meta for p in model.parameters()) else "cpu"
        with self._explained():
            found = _import().load_peft_weights(str(self.folder), device="cpu")
        return {k.removeprefix(_ROOT): v.to(device) for k, v in found.items()}

    def _refuse_strangers(self, keys: set[str], prefix: str) -> None:
        """Heads are not part of the base model; anything else is from another model."""
        heads = HEADS | set(self.config.get("modules_to_save") or ())
        other = sorted(
            k for k in keys if (prefix and k.startswith(prefix)) or k.split(".")[0] not in heads
        )
        if other:
            trained = f"; it names {self.trained_on} as its base" if self.trained_on else ""
            raise HostError(
                f"host.adapter={self.name} is for another model: the host has no module for "
                f"{len(other)} of its tensors, such as {other[0]}{trained}"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as e:
            lines = [line.strip() for line in str(e).strip().split("\n")]
            said = next((line for line in lines if "size mismatch" in line), lines[0])
            raise HostError(
                f"host.adapter={self.name} does not fit the host"
                + (", it is for another model" if "size mismatch" in said else "")
                + f": {said}"
            ) from e


def _named(model: Any, prefix: str) -> Any:
    """The base model under the name that it has in the model with a head, as adapters name it."""
    if not prefix:
        return model
    outer: Any = nn.Module()
    outer.add_module(prefix.removesuffix("."), model)
    outer.config, outer.base_model_prefix = model.config, prefix.removesuffix(".")
    return outer


def _prefix(keys: dict[str, Tensor], model: nn.Module) -> str:
    """What stands in front of the base model's module paths in the adapter's names."""
    own = str(getattr(model, "base_model_prefix", ""))
    modules = {name for name, _ in model.named_modules()}

    def fits(prefix: str) -> int:
        tops = (k.removeprefix(prefix).split(".")[0] for k in keys if k.startswith(prefix))
        return sum(top in modules for top in tops)

    return max(("", f"{own}." if own else ""), key=fits)


def _module_of(key: str, prefix: str, model: nn.Module, tuner: str) -> str | None:
    """Path of the module that a tensor of the adapter belongs to, None if there is none."""
    if not key.startswith(prefix):
        return None
    path = key.removeprefix(prefix)
    path = path.rsplit(f".{tuner}", 1)[0] if f".{tuner}" in path else path.rpartition(".")[0]
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    try:
        model.get_submodule(path)
    except AttributeError:
        return None
    return path


def _inject(folder: Path, model: nn.Module, tensors: dict[str, Tensor]) -> Any:
    """PEFT's own way for a model that stays what it is; adapter weights as it loads them."""
    peft = _import()
    from peft.tuners.tuners_utils import cast_adapter_dtype

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    with warnings.catch_warnings():  # the base model has no head: ties to it are no concern
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        peft.inject_adapter_in_model(config, model)
        result = peft.set_peft_model_state_dict(model, tensors)
    cast_adapter_dtype(model, "default")
    return result


def _import() -> Any:
    try:
        import peft
        import peft.mapping
    except ImportError as e:
        raise HostError(
            f"host.adapter needs peft ({e}): pip install 'actcache-saetrain[peft]'"
        ) from e
    return peft
