"""Settings that stand for one run a hook, taken apart: `hooks`, `layers`, `layer_stride`.

Each part is the settings of a single run (`hook=…` and nothing of the three), so it has the folder,
the weights and the numbers of that run. `hooks=all` is every hook of the store; `layers=[16,24]`
names hooks like the run's `hook` (hook=resid.2: resid.16, resid.24); `layer_stride=2` takes the
first, third, … of the store's layers, of each kind of hook with hooks=all, else of `hook`'s kind.
Architectures that read several hooks (`sae.hooks_in`, …) name their own and are refused here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from actcache.store.hooknames import canonical, parse_alias
from saetrain.errors import ConfigError
from saetrain.log import say
from saetrain.runs import open_snapshot
from saetrain.saes import make_config
from saetrain.settings import TrainSettings

Numbered = tuple[str, int]  # kind of a hook, with the store's label before it, and its layer


def expand(settings: TrainSettings) -> list[TrainSettings]:
    """One TrainSettings per hook, in the order of layers; [settings] if it names one hook only.

    Opens the store where the hooks follow from it. ConfigError if the architecture names its own.
    """
    if not settings.several_hooks:
        return [settings]
    config = make_config(settings.sae, settings.saes_path)
    if config.NAMES_INPUTS:
        raise ConfigError(
            f"hooks, layers and layer_stride train one SAE a hook, and sae.name="
            f"{settings.sae['name']} reads several hooks at once, those that sae.hooks_in or its "
            "layers name. Leave them out"
        )
    names = _names(settings)
    say(f"one SAE for each of {len(names)} hooks: {', '.join(names)}")
    return [replace(settings, hook=h, hooks=None, layers=None, layer_stride=None) for h in names]


def _names(settings: TrainSettings) -> list[str]:
    if settings.hooks is not None and settings.hooks != "all":
        return list(settings.hooks)
    if settings.layers is not None:
        kind = _kind_of(settings.hook)
        return [f"{kind}.{layer}" for layer in settings.layers]
    found = _stored(settings)
    if settings.layer_stride is None:
        return found
    kinds = {n[0] for n in map(_numbered, found) if n is not None}
    if settings.hooks != "all":
        kinds &= {_kind_of(settings.hook)}
    return _every(settings.layer_stride, found, kinds, settings.hook)


def _every(stride: int, found: list[str], kinds: Iterable[str], hook: str) -> list[str]:
    """Every `stride`-th layer of each kind."""
    numbered = sorted(n for n in map(_numbered, found) if n is not None)
    names: list[str] = []
    for kind in sorted(kinds):
        names += [f"{k}.{layer}" for k, layer in [n for n in numbered if n[0] == kind][::stride]]
    if not names:
        raise ConfigError(f"layer_stride={stride}: the store has no hooks named like {hook}")
    return names


def _stored(settings: TrainSettings) -> list[str]:
    """Hooks of the store, by kind and layer; those without a number last."""
    if settings.source == "live":
        raise ConfigError(
            "source=live captures what is named: give hooks=[resid.0,…] or layers=[0,…] instead of "
            "hooks=all or layer_stride"
        )
    hooks = open_snapshot(settings).hooks
    return sorted(hooks, key=lambda h: (_numbered(h) is None, _numbered(h) or (h, 0)))


def _kind_of(hook: str) -> str:
    if (found := _numbered(hook)) is None:
        raise ConfigError(
            f"hook={hook}: layers and layer_stride need the kind of hook from a name like resid.2. "
            "Give such a hook=…, or the hooks one by one, hooks=[…]"
        )
    return found[0]


def _numbered(hook: str) -> Numbered | None:
    """(kind, layer) of a hook such as resid.2 or base:resid.2, by any of its names."""
    label, colon, name = hook.rpartition(":")
    alias = parse_alias(canonical(name))
    return None if alias is None else (f"{label}{colon}{alias[0]}", alias[1])
