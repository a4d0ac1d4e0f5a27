"""Code of users' own: entry points of installed packages, and files that a setting names.

Importing runs the code with the rights of the process. Files are therefore named by whoever types
the command, never by a store or a saved SAE. What they define announces itself, by a decorator.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path


def load(group: str, paths: Iterable[str | Path], word: str, error: type[Exception]) -> None:
    """Import the entry points of `group`, then each of `paths`; each once per process.

    A path is a .py file, a package (a folder with __init__.py) or a folder of .py files. `word` is
    the setting that named it. `error` is raised for a path that is missing or no Python file, and
    for an entry point that cannot be imported; what goes wrong inside a file passes as it is.
    """
    for point in _points(group, tuple((p, _changed(p)) for p in sys.path)):
        _load_point(point, error)
    for item in paths:
        path = Path(item).expanduser()
        if not path.exists():
            raise error(f"{word}: {path} does not exist")
        for file in _files(path, word, error):
            _import(file)


def check_class(
    what: str, name: str, cls: type, base: type, others: Mapping[str, type], built_in: Iterable[str]
) -> str | None:
    """Why a class cannot be known as `name`; None if it can.

    `what` is what it is, `others` who has which name; the same class may come again.
    """
    where = f"{what} {name!r}: {where_of(cls)}"
    if not name.isidentifier() or name != name.lower():
        return f"{where}: expected a name in lower_snake_case"
    old = others.get(name)
    if name in built_in or (old is not None and where_of(old) != where_of(cls)):
        owner = "built in" if old is None else where_of(old)
        return f"{where}: the name is taken ({owner}); choose another"
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return f"{where} is not a subclass of {where_of(base)}"
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        return f"{where} does not define {', '.join(missing)}"
    return None


def where_of(cls: type) -> str:
    """Module and name of a class, for messages."""
    return f"{cls.__module__}.{cls.__qualname__}"


@lru_cache(maxsize=16)
def _points(group: str, where: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group; `where` is sys.path, each with when it last changed.

    Found once: the search opens a file of every installed package, and runs ask many times.
    """
    return tuple(entry_points(group=group))


def _changed(folder: str) -> int:
    """When a package was last put into a folder of sys.path, or taken out; 0 if it is none."""
    try:
        return Path(folder).stat().st_mtime_ns  # "" is the working folder
    except OSError:
        return 0


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
