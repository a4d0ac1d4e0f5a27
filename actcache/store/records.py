"""Frozen dataclasses from plain mappings (a YAML config, a JSON record), strictly.

An unknown key is an error that names the nearest known one: a misspelt override must not train
silently for a day. Used for configs at the rim and for every JSON file of a store.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from actcache.store.errors import SettingsError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make `cls` (a dataclass) from `values`; nested dataclasses are built from nested mappings.

    `where` is the key the user typed, such as "sae"; it prefixes every message.
    Raises SettingsError on an unknown or missing key and on a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where or cls.__name__}: expected a mapping, got {values!r}")
    hints = _hints(cls)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise SettingsError(_unknown(f"{where}.{key}" if where else str(key), str(key), fields))
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        prefix = f"{where}." if where else ""
        raise SettingsError(f"missing: {', '.join(prefix + m for m in missing)}")
    prefix = f"{where}." if where else ""
    kwargs = {k: _convert(hints[k], v, prefix + k) for k, v in values.items()}
    return cls(**kwargs)


def keys_at(cls: type, path: typing.Sequence[str]) -> list[str]:
    """Field names of the nested dataclass that `path` leads to; none where keys are open."""
    for key in path:
        inner = _hints(cls).get(key)
        if not (isinstance(inner, type) and dataclasses.is_dataclass(inner)):
            return []
        cls = inner
    return [f.name for f in dataclasses.fields(cls)]


def did_you_mean(name: str, known: typing.Iterable[str], n: int = 3) -> str:
    """'' or ' Did you mean a, b?' with the names nearest to `name`."""
    spelled = {k.casefold(): k for k in known}
    found = difflib.get_close_matches(name.casefold(), spelled, n=n, cutoff=0.5)
    near = [spelled[f] for f in found]
    return f" Did you mean {', '.join(near)}?" if near else ""


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _unknown(path: str, key: str, fields: Mapping[str, Any]) -> str:
    return (
        f"unknown key '{path}'.{did_you_mean(key, fields)} Known here: {', '.join(sorted(fields))}"
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`, widening int to float and list to tuple, or SettingsError."""
    origin = typing.get_origin(hint)
    if hint is Any or (origin is None and isinstance(hint, TypeVar)):
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value in allowed and type(value) in {type(a) for a in allowed}:
            return value
        raise SettingsError(
            f"{where}: expected one of {', '.join(map(repr, allowed))}, got {value!r}"
        )
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise SettingsError(f"{where}: expected a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping) or hint is dict or origin is types.MappingProxyType:
        if not isinstance(value, Mapping):
            raise SettingsError(f"{where}: expected a mapping, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # tokens=1e9
    plain = origin or hint
    if isinstance(value, bool) and plain is int:
        raise SettingsError(f"{where}: expected a whole number, got {value!r}")
    if isinstance(plain, type) and not isinstance(value, plain):
        raise SettingsError(f"{where}: expected {_word(plain)}, got {value!r}")
    return value


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    args = typing.get_args(hint)
    if value is None and type(None) in args:
        return None
    problems = []
    for arg in (a for a in args if a is not type(None)):
        try:
            return _convert(arg, value, where)
        except SettingsError as e:
            problems.append(str(e))
    raise SettingsError(problems[0] if len(problems) == 1 else "; or ".join(problems))


def _word(t: type) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(t, t.__name__)
