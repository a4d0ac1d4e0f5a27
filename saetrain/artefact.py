"""The saved SAE: folded weights in the host's raw units, `sae.safetensors` beside `sae.json`.

Every architecture comes down to four tensors and one of three activations, so loading, exporting
and injecting need to know nothing of how the SAE was trained. Files are written to a temporary
name, synced and renamed; the tensors carry the digest of their JSON, so the halves of two different
saves are refused. Loading runs no code from the files: no pickle, sizes checked before reading.

    f = act((x - b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec      (b_dec on the input is optional)

Shapes: ... leading dimensions, D input width (d_in), E output width (d_out), F latents (d_sae).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from actcache.store.errors import SettingsError
from actcache.store.records import build as build_record
from saetrain.codes import Codes, decode_codes, dense, topk_codes
from saetrain.errors import SaetrainError

if TYPE_CHECKING:
    from saetrain.saes.base import SAE

SCHEMA = 1
WEIGHTS_FILE, JSON_FILE = "sae.safetensors", "sae.json"
_MAX_JSON_BYTES = 16 << 20

Activation = Literal["relu", "topk", "jumprelu"]


class ArtefactError(SaetrainError):
    """A saved SAE is missing, damaged, or of a version this one cannot read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """The contents of sae.json."""

    schema: int = SCHEMA
    activation: Activation
    k: int | None = None  # topk only
    d_in: int
    n_latents: int
    d_out: int
    hooks_in: tuple[str, ...]
    hooks_out: tuple[str, ...]
    apply_b_dec_to_input: bool = True
    source: dict[str, Any] = dataclasses.field(default_factory=dict)  # where it came from

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor in sae.safetensors."""
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (self.d_in, self.n_latents),
            "b_enc": (self.n_latents,),
            "W_dec": (self.n_latents, self.d_out),
            "b_dec": (self.d_out,),
        }
        return shapes | ({"threshold": (self.n_latents,)} if self.activation == "jumprelu" else {})

    def check(self) -> None:
        """ArtefactError if the fields contradict each other."""
        if min(self.d_in, self.d_out, self.n_latents) < 1:
            raise ArtefactError("d_in, d_out and n_latents: expected at least 1 each")
        if (self.activation == "topk") != (self.k is not None):
            raise ArtefactError(f"activation={self.activation} with k={self.k}: k is topk's")
        if self.k is not None and not 1 <= self.k <= self.n_latents:
            raise ArtefactError(f"k={self.k}: expected 1 to n_latents={self.n_latents}")
        if self.apply_b_dec_to_input and self.d_in != self.d_out:
            raise ArtefactError(
                f"apply_b_dec_to_input needs equal widths, got {self.d_in} and {self.d_out}"
            )


class InferenceSAE(nn.Module):
    """Encode and decode raw activations. Weights are parameters that do not ask for gradients."""

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
        activation: Activation,
        hooks_in: tuple[str, ...],
        hooks_out: tuple[str, ...],
        k: int | None = None,
        threshold: Tensor | None = None,
        apply_b_dec_to_input: bool = True,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """ArtefactError if the shapes or the settings do not fit each other."""
        super().__init__()
        self.activation, self.k = activation, k
        self.hooks_in, self.hooks_out = tuple(hooks_in), tuple(hooks_out)
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.source: dict[str, Any] = dict(source or {})
        tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        for name, tensor in tensors.items():
            self.register_parameter(name, _frozen(tensor))
        self.register_parameter("threshold", None if threshold is None else _frozen(threshold))
        tensors |= {} if threshold is None else {"threshold": threshold}
        self.describe().check()
        _check_shapes({n: tuple(t.shape) for n, t in tensors.items()}, self.describe(), "weights")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def n_latents(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[-1]

    def encode(self, x: Tensor) -> Codes:
        """Latents of raw activations x (..., D), in the weights' dtype; topk codes are sparse."""
        x = x.to(self.W_enc.dtype)
        if self.apply_b_dec_to_input:
            x = x - self.b_dec
        h = x @ self.W_enc + self.b_enc
        if self.k is not None:
            return topk_codes(h, self.k)
        if self.threshold is not None:
            return h.relu() * (h > self.threshold)
        return h.relu()

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., E) in raw units, in the weights' dtype."""
        return decode_codes(codes, self.W_dec) + self.b_dec

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """{"sae_out": (..., E), "feature_acts": (..., F) dense}."""
        codes = self.encode(x)
        return {"sae_out": self.decode(codes), "feature_acts": dense(codes)}

    def describe(self) -> Description:
        """What sae.json says."""
        return Description(
            activation=self.activation,
            k=self.k,
            d_in=self.d_in,
            n_latents=self.n_latents,
            d_out=self.d_out,
            hooks_in=self.hooks_in,
            hooks_out=self.hooks_out,
            apply_b_dec_to_input=self.apply_b_dec_to_input,
            source=self.source,
        )

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
        with _published(folder / WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary, metadata={"sae_json_sha256": _digest(text.encode())})
        with _published(folder / JSON_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")


def fold(sae: SAE, *, activation: Activation, k: int | None = None) -> InferenceSAE:
    """Fold x' = s (x - c) into the weights W_enc, b_enc, W_dec, b_dec of `sae`.

    W_enc <- s W_enc, W_dec <- W_dec / s, b_dec <- b_dec / s + c; b_enc and the latents do not
    change. For encoders that subtract b_dec from an input of the hook they reconstruct.
    """
    weights = {n: p.detach() for n, p in sae.named_parameters()}
    s, c = sae.in_scale, sae.in_center
    return InferenceSAE(
        weights["W_enc"] * s,
        weights["b_enc"].clone(),
        weights["W_dec"] / s,
        weights["b_dec"] / s + c,
        activation=activation,
        k=k,
        hooks_in=sae.hooks_in,
        hooks_out=sae.hooks_out,
        source={
            "architecture": sae.name,
            "sae": dataclasses.asdict(sae.cfg),
            "package_version": _package_version(),
        },
    )


def load_sae(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> InferenceSAE:
    """Load what `InferenceSAE.save` wrote; `dtype` None keeps the saved one.

    Raises ArtefactError on a missing file, an unknown schema or field, a tensor that is missing,
    unexpected or of another shape, and on files that come from two different saves.
    """
    folder = Path(folder)
    raw = _read_json_bytes(folder / JSON_FILE)
    description = _parse(raw, folder / JSON_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE, description, _digest(raw))
    return InferenceSAE(
        **{n: t.to(device, dtype or t.dtype) for n, t in tensors.items()},
        activation=description.activation,
        k=description.k,
        hooks_in=description.hooks_in,
        hooks_out=description.hooks_out,
        apply_b_dec_to_input=description.apply_b_dec_to_input,
        source=description.source,
    )


def _read_json_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise ArtefactError(f"{path.parent} holds no saved SAE: {path.name} is missing")
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ArtefactError(f"{path}: {size} bytes is too large for a description of an SAE")
    return path.read_bytes()


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
        description = build_record(Description, values)
        description.check()
    except (SettingsError, ArtefactError) as e:
        raise ArtefactError(f"{path}: {e}") from None
    return description


def _read_tensors(path: Path, want: Description, digest: str) -> dict[str, Tensor]:
    """Tensors of `path`, after their names, shapes, types and digest have been checked."""
    if not path.is_file():
        raise ArtefactError(f"{path.parent} is incomplete: {path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            _check_shapes({n: tuple(s.get_shape()) for n, s in slices.items()}, want, str(path))
            for name, one in slices.items():
                if one.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ArtefactError(f"{path}: {name} is {one.get_dtype()}, expected floats")
            if (file.metadata() or {}).get("sae_json_sha256") != digest:
                raise ArtefactError(
                    f"{path} and {JSON_FILE} are not from the same save, or one was edited: "
                    "save the SAE again"
                )
            return {name: file.get_tensor(name) for name in slices}
    except SafetensorError as e:
        raise ArtefactError(f"{path} is damaged: {e}") from None


def _check_shapes(got: Mapping[str, tuple[int, ...]], want: Description, where: str) -> None:
    expected = want.shapes()
    problems = [f"{n} is missing" for n in expected if n not in got]
    problems += [f"{n} is unexpected" for n in got if n not in expected]
    problems += [
        f"{n} has shape {got[n]}, expected {shape}"
        for n, shape in expected.items()
        if n in got and got[n] != shape
    ]
    if problems:
        raise ArtefactError(f"{where}: {'; '.join(problems)}")


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` at the end, all of it or nothing, even after a crash."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _package_version() -> str:
    try:
        return version("actcache-saetrain")
    except PackageNotFoundError:
        return "not installed"
