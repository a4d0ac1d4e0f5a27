"""Named presets, short forms, and parts: from what users write under `sae` to one plain mapping.

`sae.name` is an architecture (a file in saetrain/saes) or a preset (a file in conf/sae, which names
its architecture and parts). On the command line Hydra has read the preset's file by then; in Python
`{"name": "topk", "k": 64}` means the same file with that change. Rules, in this order:

1. A preset's values are the defaults. A part given by name alone or with another name replaces the
   preset's part; otherwise its keys are merged. n_latents and expansion_factor are one choice.
2. `sae.k` is short for `sae.activation.k`, `sae.l1_coefficient` for `sae.penalty.coefficient` of
   an l1. null: not given.
3. `activation: topk` is short for `activation: {name: topk}`; a penalty of null or "none" is none.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from actcache.store.errors import SettingsError
from actcache.store.records import build as build_record
from actcache.store.records import did_you_mean
from saetrain.activations import ACTIVATIONS
from saetrain.errors import ConfigError
from saetrain.penalties import PENALTIES

Values = dict[str, Any]
PARTS: dict[str, Mapping[str, Any]] = {"activation": ACTIVATIONS, "penalty": PENALTIES}
SHORT = {"k": ("activation", "k"), "l1_coefficient": ("penalty", "coefficient")}


def config_dir() -> Path:
    """conf/ inside the installed package, or the checkout's."""
    package = Path(__file__).resolve().parent
    found = [d for d in (package / "conf", package.parent / "conf") if (d / "train.yaml").is_file()]
    if not found:
        raise ConfigError(f"no train.yaml in {package}/conf or {package.parent}/conf: reinstall")
    return found[0]


@cache
def names() -> tuple[str, ...]:
    """Presets there are: the files of conf/sae."""
    return tuple(sorted(p.stem for p in (config_dir() / "sae").glob("*.yaml")))


def preset(name: str) -> Values:
    """The content of conf/sae/NAME.yaml, the caller's own."""
    return copy.deepcopy(_read(name))


@cache
def _read(name: str) -> Values:
    text = (config_dir() / "sae" / f"{name}.yaml").read_text(encoding="utf-8")
    values: Values = yaml.safe_load(text)
    return values


def label(values: Mapping[str, Any]) -> str:
    """A short name for run folders: the architecture, or the activation of a plain SAE."""
    activation = values.get("activation")
    if values.get("name") == "sae" and activation:
        return str(activation.get("name") if isinstance(activation, Mapping) else activation)
    return str(values.get("name"))


def with_preset(values: Mapping[str, Any]) -> Values:
    """`values` over the preset that their name stands for, if there is one."""
    name = values.get("name")
    if name not in names():
        return dict(values)
    base = preset(str(name))
    if "n_latents" in values or "expansion_factor" in values:
        base |= {"n_latents": None, "expansion_factor": None}
    for short, (part, key) in SHORT.items():
        if key in _mapping(values.get(part)):
            base.pop(short, None)  # the long form is said, the preset's short one gives way
        if values.get(short) is not None:
            _mapping(base.get(part)).pop(key, None)
    merged = base | {k: v for k, v in values.items() if k != "name"}
    for part in PARTS:
        if part in values and part in base:
            merged[part] = _merge(base[part], values[part])
            if _name(merged[part]) != _name(base[part]):  # other part, other short forms
                for short in (s for s, (p, _) in SHORT.items() if p == part and s not in values):
                    merged.pop(short, None)
    return merged


def check_keys(values: Mapping[str, Any], cls: type) -> None:
    """ConfigError on a key that is neither a field of `cls` nor short for one."""
    fields = {f.name for f in dataclasses.fields(cls)}
    known = sorted(fields | {s for s, (part, _) in SHORT.items() if part in fields})
    for key in values:
        if key not in known:
            near = did_you_mean(str(key), known)
            raise ConfigError(f"unknown key 'sae.{key}'.{near} Known here: {', '.join(known)}")


def expand(values: Mapping[str, Any], cls: type) -> Values:
    """Short forms spelled out and parts built, for the config class `cls`. Others pass unchanged.

    ConfigError if a short form has nothing to stand for, or says other than the long one.
    """
    fields = {f.name for f in dataclasses.fields(cls)}
    out = dict(values)
    for part in (p for p in PARTS if p in fields):
        given = out.get(part)
        if isinstance(given, str):
            out[part] = None if given == "none" else {"name": given}
    for short, (part, key) in SHORT.items():
        if part in fields and short not in fields and short in out:
            _spell_out(out, short, out.pop(short), part, key)
    for part in (p for p in PARTS if p in fields):
        if isinstance(out.get(part), Mapping):
            out[part] = _build_part(part, out[part])
    return out


def _spell_out(out: Values, short: str, value: Any, part: str, key: str) -> None:
    """Move `sae.short=value` to where it belongs."""
    if value is None:
        return
    given, said = out.get(part), f"sae.{short}={value}"
    if given is None:
        raise ConfigError(
            f"{said}: this SAE has no sae.{part}. Remove it, or choose one with sae.{part}.name "
            f"({', '.join(PARTS[part])})"
        )
    if not isinstance(given, Mapping):
        raise ConfigError(f"{said}: sae.{part} is a finished {type(given).__name__}; set it there")
    name = given.get("name")
    row = PARTS[part].get(str(name))
    takes = row is not None and key in {f.name for f in dataclasses.fields(row.config)}
    if row is not None and (not takes or (short == "l1_coefficient" and name != "l1")):
        more = f"; its weight is sae.{part}.{key}" if takes else ""
        raise ConfigError(
            f"{said} has no meaning with sae.{part}.name={name}{more}. Remove it, sae.{short}=null"
        )
    if key in given and given[key] != value:
        raise ConfigError(
            f"{said} and sae.{part}.{key}={given[key]} contradict each other: one is short for "
            f"the other. Remove one (sae.{short}=null)"
        )
    out[part] = {**given, key: value}


def _build_part(part: str, values: Mapping[str, Any]) -> Any:
    name, known = values.get("name"), PARTS[part]
    if name not in known:
        raise ConfigError(
            f"sae.{part}.name={name!r} is not known.{did_you_mean(str(name), known)} "
            f"Known: {', '.join(known)}"
        )
    try:
        return build_record(known[str(name)].config, values, f"sae.{part}")
    except SettingsError as e:
        message = str(e)
        for short, (owner, key) in SHORT.items():
            if owner == part and (short != "l1_coefficient" or name == "l1"):
                message = message.replace(f"missing: sae.{part}.{key}", f"missing: sae.{short}")
        raise ConfigError(f"{message} (sae.{part}.name={name})") from None


def _merge(base: Any, given: Any) -> Any:
    """`given` over `base`, if it is the same part."""
    if not isinstance(given, Mapping) or not isinstance(base, Mapping):
        return given
    same = given.get("name", base.get("name")) == base.get("name")
    return {**base, **given} if same else given


def _name(part: Any) -> Any:
    return part.get("name") if isinstance(part, Mapping) else getattr(part, "name", part)


def _mapping(value: Any) -> Any:
    return value if isinstance(value, dict) else {}
