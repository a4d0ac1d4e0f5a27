"""The saved SAE: folded weights in the host's raw units, `sae.safetensors` beside `sae.json`.

A description and named tensors. The description's `kind` says what is computed with them: `sae` is
the class below, other kinds are classes that architectures register, in their own files, with
`@register_kind`. Loading, exporting and injecting need to know nothing of how the SAE was trained.
Files are written to a temporary name, synced and renamed; the tensors carry the digest of their
JSON, so the halves of two different saves are refused. Loading runs no code from the files: no
pickle, the kind is looked up among those installed, names and shapes are checked before reading.

    f = act((x - b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec      (b_dec on the input is optional)

Shapes: ... leading dimensions, D input width (d_in), E output width (d_out), F latents (d_sae).
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from actcache.store.errors import SettingsError
from actcache.store.records import build as build_record
from saetrain.activations import Form, InferenceName
from saetrain.artefact_files import JSON_FILE as JSON_FILE
from saetrain.artefact_files import WEIGHTS_FILE as WEIGHTS_FILE
from saetrain.artefact_files import ArtefactError as ArtefactError
from saetrain.artefact_files import (
    check_shapes,
    digest,
    published,
    read_json,
    read_tensors,
)
from saetrain.codes import Codes, decode_codes, dense
from saetrain.units import Unit

SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """The contents of sae.json."""

    schema: int = SCHEMA
    kind: str = "sae"  # what is computed with the tensors, see `register_kind`
    activation: InferenceName
    k: int | None = None  # topk and groupmax only
    d_in: int
    n_latents: int
    d_out: int
    hooks_in: tuple[str, ...]
    hooks_out: tuple[str, ...]
    apply_b_dec_to_input: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the kind
    source: dict[str, Any] = dataclasses.field(default_factory=dict)  # where it came from

    def check(self) -> None:
        """ArtefactError if the fields contradict each other."""
        if min(self.d_in, self.d_out, self.n_latents) < 1:
            raise ArtefactError("d_in, d_out and n_latents: expected at least 1 each")
        if (self.activation in ("topk", "groupmax")) != (self.k is not None):
            raise ArtefactError(
                f"activation={self.activation} with k={self.k}: k is topk's and groupmax's"
            )
        if self.k is not None and not 1 <= self.k <= self.n_latents:
            raise ArtefactError(f"k={self.k}: expected 1 to n_latents={self.n_latents}")
        if self.activation == "groupmax" and self.n_latents % (self.k or 1):
            raise ArtefactError(f"k={self.k} groups do not divide n_latents={self.n_latents}")
        if self.apply_b_dec_to_input and self.d_in != self.d_out:
            raise ArtefactError(
                f"apply_b_dec_to_input needs equal widths, got {self.d_in} and {self.d_out}"
            )


class Inference(nn.Module, ABC):
    """A saved SAE of any kind. Weights are parameters that do not ask for gradients.

    A kind with several input hooks takes, and one with several output hooks gives, their vectors
    stacked in the order of `hooks_in` and `hooks_out`: (..., hooks, width).
    """

    kind: ClassVar[str]
    unit: ClassVar[Unit] = "token"  # "sequence": encode takes contexts (..., T, D), see `units`
    threshold: Tensor | None  # where the activation has one

    def __init__(self, description: Description, tensors: Mapping[str, Tensor]) -> None:
        """ArtefactError if the shapes or the settings do not fit each other."""
        super().__init__()
        description.check()
        self.check(description)
        check_shapes({n: tuple(t.shape) for n, t in tensors.items()}, self.shapes(description))
        self._description = description
        self.source: dict[str, Any] = dict(description.source)
        self.register_parameter("threshold", None)
        for name in tensors:
            self.register_parameter(name, _frozen(tensors[name]))

    @classmethod
    def build(cls, description: Description, tensors: Mapping[str, Tensor]) -> Self:
        """The module of these parts, whatever a subclass's constructor looks like."""
        made = cls.__new__(cls)
        Inference.__init__(made, description, tensors)
        return made

    # -- what a kind defines -------------------------------------------------------------------

    @classmethod
    def check(cls, description: Description) -> None:
        """ArtefactError if `options` or other fields make no sense for this kind."""
        if description.options:
            raise ArtefactError(f"kind={cls.kind} has no options, got {list(description.options)}")

    @classmethod
    @abstractmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor in sae.safetensors."""

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """Latents of raw activations x (..., D), in the weights' dtype."""

    @abstractmethod
    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., E) in raw units, in the weights' dtype."""

    def reconstruct(self, x: Tensor, codes: Codes) -> Tensor:
        """`decode(codes)`, and whatever reaches the output past the latents, such as a skip."""
        return self.decode(codes)

    # -- the same for all ----------------------------------------------------------------------

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """{"sae_out": (..., E), "feature_acts": (..., F) dense}."""
        codes = self.encode(x)
        return {"sae_out": self.reconstruct(x, codes), "feature_acts": dense(codes)}

    @property
    def activation(self) -> InferenceName:
        return self._description.activation

    @property
    def k(self) -> int | None:
        return self._description.k

    @property
    def d_in(self) -> int:
        return self._description.d_in

    @property
    def n_latents(self) -> int:
        return self._description.n_latents

    @property
    def d_out(self) -> int:
        return self._description.d_out

    @property
    def hooks_in(self) -> tuple[str, ...]:
        return self._description.hooks_in

    @property
    def hooks_out(self) -> tuple[str, ...]:
        return self._description.hooks_out

    @property
    def apply_b_dec_to_input(self) -> bool:
        return self._description.apply_b_dec_to_input

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def form(self) -> Form:
        """The activation, with its numbers."""
        return Form(activation=self.activation, k=self.k, threshold=self.threshold)

    def describe(self) -> Description:
        """What sae.json says."""
        return dataclasses.replace(self._description, source=self.source)

    def save(self, folder: str | Path, source: Mapping[str, Any] | None = None) -> None:
        """Write `sae.safetensors` and `sae.json` into `folder`, made if missing.

        `source` is added to what is known of the origin: store_id, token_stream_id, activation_id,
        the model, the run. Keep it free of machine paths, so that the folder can travel.
        """
        self.source |= dict(source or {})
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self.describe()), indent=2, allow_nan=False) + "\n"
        tensors = {n: p.detach().cpu().contiguous() for n, p in self.named_parameters()}
        with published(folder / WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary, metadata={"sae_json_sha256": digest(text.encode())})
        with published(folder / JSON_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")


_KINDS: dict[str, type[Inference]] = {}
K = TypeVar("K", bound=type[Inference])


def register_kind(name: str) -> Callable[[K], K]:
    """Class decorator: sae.json with `kind` NAME loads as this class. ValueError if it is taken."""

    def add(cls: K) -> K:
        old = _KINDS.get(name)
        if old is not None and old.__qualname__ != cls.__qualname__:
            raise ValueError(f"kind {name!r} is taken by {old.__module__}.{old.__qualname__}")
        cls.kind = name
        _KINDS[name] = cls
        return cls

    return add


@register_kind("sae")
class InferenceSAE(Inference):
    """f = act((x - b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec; tensors named as in SAELens.

    `options.group_sizes` of a matryoshka SAE: sizes of its nested groups of latents, in order.
    """

    W_enc: Tensor  # (D, F)
    b_enc: Tensor  # (F,)
    W_dec: Tensor  # (F, E)
    b_dec: Tensor  # (E,)
    threshold: Tensor | None  # (F,), jumprelu only

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        *,
        activation: InferenceName,
        hooks_in: tuple[str, ...],
        hooks_out: tuple[str, ...],
        k: int | None = None,
        threshold: Tensor | None = None,
        apply_b_dec_to_input: bool = True,
        options: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """ArtefactError if the shapes or the settings do not fit each other."""
        tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        super().__init__(
            Description(
                activation=activation,
                k=k,
                d_in=W_enc.shape[0],
                n_latents=W_enc.shape[-1],
                d_out=W_dec.shape[-1],
                hooks_in=tuple(hooks_in),
                hooks_out=tuple(hooks_out),
                apply_b_dec_to_input=apply_b_dec_to_input,
                options=dict(options or {}),
                source=dict(source or {}),
            ),
            tensors if threshold is None else tensors | {"threshold": threshold},
        )

    @classmethod
    def check(cls, description: Description) -> None:
        unknown = set(description.options) - {"group_sizes"}
        if unknown:
            raise ArtefactError(f"options: expected group_sizes or nothing, got {sorted(unknown)}")
        sizes = description.options.get("group_sizes", [description.n_latents])
        whole = isinstance(sizes, list) and all(type(n) is int and n > 0 for n in sizes)
        if not whole or sum(sizes) != description.n_latents:
            raise ArtefactError(
                f"options.group_sizes={sizes}: expected whole numbers above 0 that add up to "
                f"n_latents={description.n_latents}"
            )

    @classmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        n_latents = description.n_latents
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (description.d_in, n_latents),
            "b_enc": (n_latents,),
            "W_dec": (n_latents, description.d_out),
            "b_dec": (description.d_out,),
        }
        jump = description.activation == "jumprelu"
        return shapes | ({"threshold": (n_latents,)} if jump else {})

    def encode(self, x: Tensor) -> Codes:
        """Latents of raw activations x (..., D), in the weights' dtype; topk codes are sparse."""
        x = x.to(self.W_enc.dtype)
        if self.apply_b_dec_to_input:
            x = x - self.b_dec
        return self.form()(x @ self.W_enc + self.b_enc)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., E) in raw units, in the weights' dtype."""
        return decode_codes(codes, self.W_dec) + self.b_dec

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Sizes of the nested groups of a matryoshka SAE; one group of all latents otherwise."""
        return tuple(self._description.options.get("group_sizes", [self.n_latents]))


def load_sae(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Inference:
    """Load what `Inference.save` wrote; `dtype` None keeps the saved one.

    Raises ArtefactError on a missing file, an unknown schema, kind or field, a tensor that is
    missing, unexpected or of another shape, and on files that come from two different saves.
    """
    folder = Path(folder)
    raw = read_json(folder / JSON_FILE)
    description = _parse(raw, folder / JSON_FILE)
    cls = kind_class(description.kind)
    shapes = _shapes(cls, description, folder / JSON_FILE)
    tensors = read_tensors(folder / WEIGHTS_FILE, shapes, digest(raw))
    return cls.build(description, {n: t.to(device, dtype or t.dtype) for n, t in tensors.items()})


def _parse(raw: bytes, path: Path) -> Description:
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise ArtefactError(f"{path} is damaged: {e}") from None
    schema = values.get("schema") if isinstance(values, dict) else None
    if type(schema) is not int or schema < 1:
        raise ArtefactError(f"{path}: expected a whole number for schema, got {schema!r}")
    if schema > SCHEMA:
        raise ArtefactError(
            f"{path}: schema {schema} was written by a newer version of saetrain; "
            f"this one reads up to {SCHEMA}, upgrade it"
        )
    try:
        return build_record(Description, values)
    except SettingsError as e:
        raise ArtefactError(f"{path}: {e}") from None


def kind_class(kind: str) -> type[Inference]:
    """The class of a kind, built in or of an installed package. ArtefactError if there is none."""
    if kind not in _KINDS:
        from saetrain.saes import load_all  # architectures import this module

        load_all()
    if kind not in _KINDS:
        raise ArtefactError(
            f"kind={kind!r} is not known, expected one of {', '.join(sorted(_KINDS))}. If it is "
            "your own architecture's, import its file first"
        )
    return _KINDS[kind]


def _shapes(
    cls: type[Inference], description: Description, path: Path
) -> dict[str, tuple[int, ...]]:
    try:
        description.check()
        cls.check(description)
    except ArtefactError as e:
        raise ArtefactError(f"{path}: {e}") from None
    return cls.shapes(description)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
