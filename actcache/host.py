"""The host model: load any Hugging Face model and its tokenizer, and say which one it is.

The only module (with data.py) that imports transformers. A hub name is first resolved to a local
snapshot, so local folders and hub models go through the same code and the same weights have the
same identity wherever they lie. The host loses its blocks above the deepest hook when it is built,
before weights are read, so theirs are never loaded; no exception stops a forward pass. Its config
stays whole, as some families derive a block's form from the number of blocks.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actcache import ranks, sharded
from actcache.adapter import Adapter
from actcache.errors import HostError
from actcache.families import cut_class, deepest_block, is_stateful, runner, runner_path
from actcache.hooks import HookPoint
from actcache.hub import digests, explained, local_folder, model_folder
from actcache.placing import placed
from actcache.products import speed_up
from actcache.store.ids import digest
from actcache.tokens import token_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Attention = Literal[
    "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
]
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """Which model to run. `conf/host/*.yaml` are examples."""

    model: str  # local folder, or hub repository
    revision: str | None = None  # of a hub repository
    adapter: str | None = None  # PEFT adapter: local folder, or hub repository
    quantization: dict[str, Any] | None = (
        None  # such as {"load_in_8bit": True}, for from_pretrained
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Attention = "auto"  # auto: sdpa, or eager where the family has no other
    device: str = "auto"  # auto: cuda if there is one
    device_map: str | dict[str, Any] | None = None  # "auto", or {module: device}, instead of device
    batch_tokens: int = 4096  # tokens of one forward pass
    sharding: sharded.Sharding = "none"  # how ranks share the weights; none: each has all of them
    rank_timeout: float = 1800.0  # seconds that ranks wait for each other
    trust_remote_code: bool = False


class Host:
    """A model's files, config and tokenizer. Weights are read by `load` only."""

    def __init__(self, settings: HostSettings) -> None:
        """Raises HostError if the model is not there or its tokenizer does not fit it.

        `notes` is what the user should know: settings without effect, an adapter of another name.
        """
        from transformers import AutoConfig, AutoTokenizer

        self.settings = settings
        self.folder = model_folder(settings.model, settings.revision)
        self.adapter = _adapter(settings)
        self.notes = _notes(settings, self.adapter)
        trust = settings.trust_remote_code
        with _explained(settings):
            self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=trust)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=trust
            )
        self._check_tokenizer()

    # -- identity ---------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations: weights, config, number type, attention, adapter."""
        optional = {
            "adapter": self.adapter.identity if self.adapter else None,
            "quantization": self.settings.quantization,
        }
        return {
            "architecture": self.config.model_type,
            "config": digest(self._plain_config()),
            "weights": digest(digests(self._weight_files())),
            "dtype": self.settings.dtype,
            "attention": self.attention,
        } | {k: v for k, v in optional.items() if v}

    @cached_property
    def attention(self) -> str:
        """The attention kernel that runs; where it is left open, the library's choice."""
        if self.settings.attention != "auto":
            return self.settings.attention
        config: Any = self.skeleton().config
        return str(config.get_text_config()._attn_implementation or "eager")

    @cached_property
    def tokenizer_identity(self) -> str:
        """Digest of the tokenizer's own serialisation and its special tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab())
        return digest([rules, {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}])

    def _plain_config(self) -> dict[str, Any]:
        noise = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
        config = json.loads(self.config.to_json_string(use_diff=True))
        return {k: v for k, v in config.items() if k not in noise}

    def _weight_files(self) -> list[Path]:
        files = [f for pattern in _WEIGHTS for f in sorted(self.folder.glob(pattern))]
        if not files:
            raise HostError(f"host.model={self.settings.model}: no weight files in {self.folder}")
        return files

    # -- the model --------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where token ids go; with `device_map` the library moves them on."""
        if self.settings.device == "auto":
            return ranks.device()
        with explained(f"host.device={self.settings.device}"):
            return torch.device(self.settings.device)

    def skeleton(self) -> nn.Module:
        """The whole base model on the meta device: its module names, no weights.

        With its adapter, if it has one. Raises HostError if that belongs to another model, or if
        the model does not read text.
        """
        from transformers import AutoModel

        with torch.device("meta"), _explained(self.settings):
            model = AutoModel.from_config(  # type: ignore[no-untyped-call]
                copy.deepcopy(self.config),
                trust_remote_code=self.settings.trust_remote_code,
            )
        reads = getattr(model, "main_input_name", "input_ids")
        if reads != "input_ids":
            raise HostError(f"host.model={self.settings.model} reads {reads}, not tokens of text")
        if self.settings.attention == "sdpa" and not getattr(model, "_supports_sdpa", True):
            raise HostError(
                f"host.attention=sdpa: {self.config.model_type} has no such attention; use "
                "host.attention=auto"
            )
        if self.adapter is not None:
            self.adapter.apply(model, whole=True)
        return _module(model)

    def load(self, points: list[HookPoint]) -> nn.Module:
        """The base model (no LM head), cut above the deepest of `points`, ready to run.

        Raises HostError if it cannot be loaded, or if its files lack weights that would run.
        """
        sharding, load = self.settings.sharding, partial(self._from_pretrained, points)
        if sharding != "none":
            return sharded.load(sharding, load, self.settings.dtype, self.skeleton())
        model = load()
        if self.adapter is not None:
            self.adapter.apply(model, whole=False)
        if not self._placed:
            model = model.to(self.device)
        speed_up(model)
        return model.eval().requires_grad_(False)

    def _from_pretrained(
        self,
        points: list[HookPoint],
        splitting: AbstractContextManager[None] | None = None,
        **more: Any,
    ) -> nn.Module:
        """The cut model with its weights, made within `splitting`, which may take them apart.

        `more` are further keywords of its namesake.
        """
        skeleton = self.skeleton()
        deepest = deepest_block((p.module for p in points), skeleton)
        options: dict[str, Any] = {
            "dtype": DTYPES[self.settings.dtype],
            "attn_implementation": self.attention,
        }
        if self._placed:
            options["device_map"] = placed(self.settings.device_map, self.device, skeleton, deepest)
        if self.settings.quantization:
            options["quantization_config"] = dict(self.settings.quantization)
        with splitting or nullcontext(), _explained(self.settings), _quiet():
            model, report = cut_class(type(skeleton), deepest).from_pretrained(
                self.folder,
                config=_without_cache(self.config),
                output_loading_info=True,
                **(options | more),
            )
        inside = runner_path(model)  # what a decoder lacks is not run
        self._refuse_missing([k for k in report["missing_keys"] if k.startswith(inside)], points)
        return _module(model)

    @property
    def _placed(self) -> bool:
        """Whether the library puts weights on devices; quantised ones do not move afterwards."""
        return bool(self.settings.device_map or self.settings.quantization)

    def _refuse_missing(self, keys: Any, points: list[HookPoint]) -> None:
        """Weights that no file has would be random. A pooler that no hook asks for may be."""
        asked = any("pooler" in p.module for p in points)
        missing = sorted(k for k in keys if asked or "pooler" not in k.split("."))
        if missing:
            raise HostError(
                f"host.model={self.settings.model}: its files lack {len(missing)} of the weights "
                f"that its config asks for, such as {missing[0]}; they would be random"
            )

    def check_packing(self, attend_across_documents: bool, skeleton: nn.Module) -> None:
        """HostError if documents are to be kept apart and this host cannot do that."""
        if attend_across_documents:
            return
        remedy = "use pack.attend_across_documents=true"
        if is_stateful(skeleton):
            raise HostError(
                f"pack.attend_across_documents=false: {self.config.model_type} carries a state "
                "from token to token, which no attention mask restarts at a document; " + remedy
            )
        if self.attention not in ("sdpa", "eager"):
            raise HostError(
                f"pack.attend_across_documents=false: host.attention={self.settings.attention} "
                f"takes no mask of documents; use host.attention=sdpa, or {remedy[4:]}"
            )

    def _check_tokenizer(self) -> None:
        vocab = getattr(self.config.get_text_config(), "vocab_size", None)
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if vocab is not None and largest >= vocab:
            raise HostError(
                f"host.model={self.settings.model}: its tokenizer has token ids up to {largest}, "
                f"the model embeds {vocab}. They do not belong together"
            )

    def check_context(self, context: int) -> None:
        """HostError if the model has fewer positions than a context has tokens."""
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and context > most:
            raise HostError(
                f"context={context} is longer than the {most} positions of "
                f"host.model={self.settings.model}; use at most context={most}"
            )

    def vocab(self) -> list[bytes]:
        """The exact bytes of every token id, padded to the model's vocabulary."""
        return token_bytes(self.tokenizer)


def forward(
    model: nn.Module,
    ids_BT: Tensor,
    mask: Tensor | dict[str, Tensor],
    positions_BT: Tensor | None,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Run the model for its hooks; of an encoder-decoder, the encoder.

    `mask` is (B, T) of ones and zeros, or (B, 1, T, T), or several of those by kind of attention;
    `inputs` are pixels and the like, see inputs.py.
    """
    part = runner(model)
    kind: Any = type(getattr(part, "module", part))
    takes = inspect.signature(kind.forward).parameters
    extra: dict[str, Any] = {"position_ids": positions_BT, "use_cache": False}
    extra = {k: v for k, v in extra.items() if k in takes and v is not None}
    with torch.inference_mode():
        part(input_ids=ids_BT, attention_mask=mask, **extra, **(inputs or {}))


# -- making and finding models ---------------------------------------------------------------------


def new_causal_lm(config: Mapping[str, Any], seed: int) -> nn.Module:
    """A freshly initialised causal LM from a config mapping such as {"model_type": "gpt_neox"}."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    cfg = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    return _module(AutoModelForCausalLM.from_config(cfg))  # type: ignore[no-untyped-call]


def save_host(model: nn.Module, tokenizer: Any, folder: Path, **special_tokens: str) -> None:
    """Write model and tokenizer (a `tokenizers.Tokenizer`) as an ordinary HF folder."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)  # type: ignore[no-untyped-call]
    with _quiet():
        wrapped.save_pretrained(folder)
        model.save_pretrained(folder)  # type: ignore[operator]


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _without_cache(config: Any) -> Any:
    """A copy of the config that keeps no keys and values of past tokens."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def _adapter(settings: HostSettings) -> Adapter | None:
    if settings.adapter is None:
        return None
    return Adapter(settings.adapter, local_folder(settings.adapter, None, "host.adapter"))


def _notes(settings: HostSettings, adapter: Adapter | None) -> list[str]:
    """Settings without effect, and what looks like a mistake. HostError for contradictions."""
    if settings.device_map is not None and settings.device != "auto":
        raise HostError(
            f"host.device={settings.device} and host.device_map={settings.device_map} both say "
            "where the weights go: leave one out"
        )
    beside = {k: getattr(settings, k) for k in ("adapter", "quantization", "device_map")}
    for key, value in beside.items():
        if settings.sharding != "none" and value is not None:
            raise HostError(
                f"host.{key}={value} does not go with host.sharding={settings.sharding}"
                + (": merge it into the host's weights first" if key == "adapter" else "")
            )
    notes = []
    if settings.revision is not None and Path(settings.model).expanduser().is_dir():
        notes.append(
            f"host.revision={settings.revision} has no effect: host.model={settings.model} is a "
            "local folder"
        )
    base = adapter.trained_on if adapter else ""
    if base and Path(base).name != Path(settings.model).name:
        notes.append(
            f"host.adapter={settings.adapter} names {base} as its base, the host is "
            f"{settings.model}: whether it belongs there is for you to know"
        )
    return notes


def _explained(settings: HostSettings) -> AbstractContextManager[None]:
    """Library errors, in the words of the settings that caused them."""
    beside = {"device_map": settings.device_map, "quantization": settings.quantization}
    said = ", ".join(f"host.{k}={v}" for k, v in beside.items() if v)
    return explained(f"host.model={settings.model}", f" with {said}" if said else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, and no report of weights left out: truncation and the dropped head are meant."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
