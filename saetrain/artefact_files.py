"""The two files of a saved SAE: written all or nothing, read with nothing taken on trust.

See `saetrain.artefact` for what is in them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from saetrain.errors import SaetrainError

WEIGHTS_FILE, JSON_FILE = "sae.safetensors", "sae.json"
MAX_JSON_BYTES = 16 << 20


class ArtefactError(SaetrainError):
    """A saved SAE is missing, damaged, or of a version this one cannot read."""


def read_json(path: Path) -> bytes:
    if not path.is_file():
        raise ArtefactError(f"{path.parent} holds no saved SAE: {path.name} is missing")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ArtefactError(f"{path}: {size} bytes is too large for a description of an SAE")
    return path.read_bytes()


def read_tensors(path: Path, want: Mapping[str, tuple[int, ...]], digest: str) -> dict[str, Tensor]:
    """Tensors of `path`, after their names, shapes, types and digest have been checked."""
    if not path.is_file():
        raise ArtefactError(f"{path.parent} is incomplete: {path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            check_shapes({n: tuple(s.get_shape()) for n, s in slices.items()}, want, f"{path}: ")
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


def check_shapes(
    got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str = ""
) -> None:
    problems = [f"{n} is missing" for n in expected if n not in got]
    problems += [f"{n} is unexpected" for n in got if n not in expected]
    problems += [
        f"{n} has shape {got[n]}, expected {shape}"
        for n, shape in expected.items()
        if n in got and got[n] != shape
    ]
    if problems:
        raise ArtefactError(f"{where or 'weights: '}{'; '.join(problems)}")


@contextmanager
def published(path: Path) -> Iterator[Path]:
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


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
