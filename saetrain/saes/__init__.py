"""SAE architectures, discovered: every module of this folder, entry points, and `saes_path`.

`python -m saetrain.saes` lists them. To add one, see the README, "Your own SAE".
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from actcache.store import plugins
from actcache.store.errors import SettingsError
from actcache.store.records import build as build_record
from actcache.store.records import did_you_mean
from saetrain import presets
from saetrain.errors import ConfigError
from saetrain.saes.base import SAE, HookSpace, SAEConfig, registry

ENTRY_POINTS = "saetrain.saes"


def load_all(saes_path: Iterable[str | Path] = ()) -> Mapping[str, type[SAE]]:
    """Import all architectures: built in, from installed packages, and from `saes_path`.

    Each item of `saes_path` is a .py file, a package or a folder of files: see
    `actcache.store.plugins`. ConfigError if one is missing or breaks the contract of `register`.
    """
    for module in pkgutil.iter_modules(__path__):
        if module.name not in ("base", "__main__"):
            importlib.import_module(f"{__name__}.{module.name}")
    plugins.load(ENTRY_POINTS, saes_path, "saes_path", ConfigError)
    return registry()


def make_config(values: Mapping[str, Any], saes_path: Iterable[str | Path] = ()) -> SAEConfig:
    """The architecture's config from `{"name": "topk", ...}`; unknown keys raise ConfigError.

    `name` is an architecture or a preset; see `saetrain.presets` for presets and short forms.
    """
    return _resolve(values, saes_path)[1]


def sae_class(values: Mapping[str, Any], saes_path: Iterable[str | Path] = ()) -> type[SAE]:
    """The class of the architecture that `values` name."""
    return _resolve(values, saes_path)[0]


def make_sae(
    values: Mapping[str, Any],
    spaces: Mapping[str, HookSpace],
    saes_path: Iterable[str | Path] = (),
) -> SAE:
    """Build an SAE by name for the given hooks. Weights come from torch's global generator."""
    cls, cfg = _resolve(values, saes_path)
    return cls(cfg, spaces)


def _resolve(
    values: Mapping[str, Any], saes_path: Iterable[str | Path]
) -> tuple[type[SAE], SAEConfig]:
    known = load_all(saes_path)
    values = presets.with_preset(values)
    name = str(values.pop("name", None))
    if name not in known:
        every = sorted({*known, *presets.names()})
        raise ConfigError(
            f"sae.name={name!r} is not a known architecture or preset.{did_you_mean(name, every)} "
            f"Known: {', '.join(every)}. Your own: put its file in saes_path=[...]"
        )
    cls = known[name]
    presets.check_keys(values, cls.Config)
    try:
        return cls, build_record(cls.Config, presets.expand(values, cls.Config), "sae")
    except SettingsError as e:
        raise ConfigError(f"{e} (sae.name={name})") from None
