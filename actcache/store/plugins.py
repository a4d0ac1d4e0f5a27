"""Code of users' own: entry points of installed packages, and files that a setting names.

Importing runs the code with the rights of the process. Files are therefore named by whoever types
the command, never by a store or a saved SAE. What they define announces itself, by a decorator.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path


def load(group: str, paths: Iterable[str | Path], word: str, error: type[Exception]) -> None:
    """Import the entry points of `group`, then each of `paths`; each once per process.

    A path is a .py file, a package (a folder with __init__.py) or a folder of .py files. `word` is
    the setting that named it. `error` is raised for a path that is missing or no Python file, and
    for an entry point that cannot be imported; what goes wrong inside a file passes as it is.
    """
    for point in entry_points(group=group):
        _load_point(point, error)
    for item in paths:
        path = Path(item).expanduser()
        if not path.exists():
            raise error(f"{word}: {path} does not exist")
        for file in _files(path, word, error):
            _import(file)


def _load_point(point: EntryPoint, error: type[Exception]) -> None:
    try:
        point.load()
    except (ImportError, AttributeError) as e:
        package = "?" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        raise error(
            f"the installed package {package} offers {point.group}: {point.name} = {point.value}, "
            f"which cannot be imported: {e}. Repair or uninstall it"
        ) from e


def _files(path: Path, word: str, error: type[Exception]) -> list[Path]:
    if path.is_dir():
        init = path / "__init__.py"
        files = [init] if init.is_file() else sorted(path.glob("*.py"))
        if not files:
            raise error(f"{word}: {path} has no Python file")
        return files
    if path.suffix != ".py":
        raise error(f"{word}: {path} is not a Python file (.py)")
    return [path]


def _import(file: Path) -> None:
    """Under a name of its own, so that two files called alike are two modules."""
    file = file.resolve()
    package = file.name == "__init__.py"
    stem = file.parent.name if package else file.stem
    name = f"{stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    folders = [str(file.parent)] if package else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    assert spec is not None  # of a .py file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # a file that failed must fail again, not be taken for loaded
        raise
