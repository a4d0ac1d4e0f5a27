"""Where the files of a host lie: a local folder, or what the hub has under a name.

Hub repositories are first copied to a local snapshot, so that both go through the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from actcache.adapter import CONFIG as ADAPTER_JSON
from actcache.errors import HostError
from actcache.store.ids import file_digest

_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja"]


def model_folder(name: str, revision: str | None) -> Path:
    """The folder of host.model. HostError if it is not there, or is not one model alone."""
    folder = local_folder(name, revision, "host.model")
    has_adapter = (folder / ADAPTER_JSON).is_file()
    if not (folder / "config.json").is_file():
        hint = f"; it holds a PEFT adapter: say host.adapter={name}, and its base as host.model"
        raise HostError(
            f"host.model={name}: this folder has no config.json{hint if has_adapter else ''}"
        )
    if has_adapter:  # the library would put it in place unasked
        raise HostError(
            f"host.model={name}: this folder holds a model and a PEFT adapter. Put the adapter "
            "into a folder of its own, and name it with host.adapter if it is meant to be used"
        )
    return folder


def local_folder(name: str, revision: str | None, key: str) -> Path:
    """A local folder as it is, or a snapshot of the repository. `key` is the user's setting."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise HostError(f"{key}={name}: there is no such folder")
    from huggingface_hub import snapshot_download

    with explained(f"{key}={name}"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))


def digests(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and digest of each file; a bar where there is enough to wait for."""
    sizes = [f.stat().st_size for f in files]
    found = []
    with tqdm(
        total=sum(sizes),
        unit="B",
        unit_scale=True,
        desc="reading weights for their digest",
        disable=sum(sizes) < 2 << 30,
    ) as bar:
        for file, size in zip(files, sizes, strict=True):
            found.append({"name": file.name, "bytes": size, "sha256": file_digest(file)})
            bar.update(size)
    return found


@contextmanager
def explained(setting: str, beside: str = "") -> Iterator[None]:
    """Library errors as HostError, in the words of the setting that caused them."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AssertionError) as e:
        first = str(e).strip().split("\n")[0] or type(e).__name__
        raise HostError(f"{setting} cannot be loaded{beside}: {first}") from e
