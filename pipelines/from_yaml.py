"""`python -m pipelines.from_yaml --config FILE [--config FILE2 …]`: YAML in, a trained SAE out.

Sections model, training, data, wandb; pipelines/seed.yaml shows every key. A later file
overrides an earlier one key by key. Caches, trains, evaluates. Architectures of the wider zoo are
known by name and refused until they are there; nothing else is trained in their place.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from actcache.host import Host
from actcache.store.records import build, did_you_mean
from pipelines import both
from pipelines.both import Say, Values, option
from saetrain.errors import ConfigError

# Model type -> the settings of `saetrain.saes` behind it.
TYPES: dict[str, Values] = {
    "TopKSAE": {"name": "topk"},
    # Loss = MSE + λ·L1 with decoder rows of length 1, λ in force from the first step. Inputs are
    # scaled to mean norm √d, as everywhere here, so a λ means the same on every model and layer.
    "VanillaSAE": {
        "name": "vanilla",
        "reconstruction": "mse",
        "penalty": {"warmup_fraction": 0.0},
        "resample_every": None,
        "init_bias": "mean",
    },
}
LATER = ("JumpReLUSAE", "GatedSAE", "MatryoshkaSAE", "RouteSAE", "RouteMatryoshkaSAE")
# Keys that only one type has a use for.
OWN = {("model", "k"): "TopKSAE", ("training", "l1_coefficient"): "VanillaSAE"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The SAE, and the model and layer it reads."""

    type: str = option("", "TopKSAE or VanillaSAE", MISSING)
    latent_size: int = option("train.sae.n_latents", "latents", MISSING)
    language_model_path: str = option("cache.host.model", "folder, or name on the hub", MISSING)
    k: int | None = option("train.sae.k", "latents that fire per token (TopKSAE)", None)
    hidden_size: int | None = option("", "width of the model, to be checked", None)
    layer: int | None = option("", "residual stream after this layer", None, "the middle one")
    hook: str | None = option("cache.hooks", "another tensor, such as mlp.3, instead", None)
    dtype: str = option("cache.host.dtype", "of the model's forward pass")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training run."""

    batch_size: int = option("train.batch_tokens", "sequences of max_length tokens in a step", 32)
    lr: float | None = option("train.optim.lr", "learning rate")
    num_epochs: int = option("train.epochs", "passes over the cached text", 1)
    device: str = option("cache.host.device train.device", "auto, cpu, cuda:0")
    l1_coefficient: float | None = option("train.sae.l1_coefficient", "λ (VanillaSAE)", None)
    seed: int = option("train.seed", "of weights and order")
    save_every: int | None = option("train.checkpoint.every_steps", "steps between checkpoints")
    log_every: int = option("train.log_every", "steps between rows of metrics.jsonl")
    runs_dir: str = option("train.runs_dir", "where runs go")
    report: bool = option("train.report", "report.html at the end")
    progress: bool = option("cache.progress train.progress", "progress bars")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The text, and where its activations are kept."""

    train_path: str = option(
        "cache.data.files cache.data.dataset", "parquet or data set of the hub", MISSING
    )
    dataset_split: str = option("cache.data.split", "split of a data set")
    streaming: bool = option("", "a local folder is opened as a streamed data set", True)
    max_samples: int | None = option("cache.data.max_samples", "documents read at most")
    text_column: str | None = option("cache.data.text_column", "null: found by name")
    subset: str | None = option("cache.data.subset", "configuration of a data set")
    max_length: int | None = option("cache.context", "tokens of a sequence", None)
    max_tokens: int | None = option("cache.tokens", "tokens cached at most")
    store: str | None = option("cache.store", "null: a folder under runs_dir/stores", None)


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases."""

    use_wandb: bool = option("", "log online (WANDB_MODE=offline is obeyed)", False)
    project: str = option("train.wandb.project", "project")
    entity: str | None = option("train.wandb.entity", "entity")


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """The whole file."""

    model: Model
    training: Training = field(default_factory=Training)
    data: Data
    wandb: Wandb = field(default_factory=Wandb)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 after an error, 130 after Ctrl-C; a wrong option exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.from_yaml",
        description=(__doc__ or "").split("\n\n", 1)[1],
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, help="may be given repeatedly")
    files: list[str] = parser.parse_args(argv).config

    def work(say: Say) -> None:
        cfg = load(files)
        values = values_for(cfg, say)
        host = both.open_host(values)
        settings = both.settings_of(with_hook(cfg, values, host, say), host, say)
        both.cache_then_train(*settings, host, say)

    return both.guarded(work, words())


def words() -> dict[str, str]:
    """Setting -> key of the file."""
    known: dict[str, str] = {}
    for section, cls in get_type_hints(SeedConfig).items():
        known |= both.words_of(cls, lambda name, section=section: f"{section}.{name}")  # type: ignore[misc]
    return known | {"batch_tokens": "training.batch_size x data.max_length"}


# -- the file --------------------------------------------------------------------------------------


def load(files: Sequence[str]) -> SeedConfig:
    """The files, merged. ConfigError or SettingsError names the file, key or type that is wrong."""
    merged: dict[str, Any] = {}
    for file in files:
        for section, keys in _read(file).items():
            merged[section] = {**merged.get(section, {}), **keys}
    _check_type(merged.get("model", {}).get("type"))  # before its keys, which are unknown here
    return build(SeedConfig, merged)


def _read(file: str) -> dict[str, dict[str, Any]]:
    """One file as section -> key -> value."""
    try:
        found = yaml.safe_load(Path(file).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"--config {file} cannot be read: {e}") from None
    sections = found.values() if isinstance(found, Mapping) else [found]
    if not all(isinstance(keys, Mapping) for keys in sections):
        raise ConfigError(f"--config {file}: expected sections with keys, got {found!r}")
    return {s: {k: _number(v) for k, v in keys.items()} for s, keys in found.items()}


def _number(value: Any) -> Any:
    """YAML 1.1 reads 5e-4 as text, because it has no dot."""
    spelled = isinstance(value, str) and re.fullmatch(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if spelled else value


def _check_type(name: Any) -> None:
    if name is None or name in TYPES:
        return
    has = f"this version has {', '.join(TYPES)}"
    if name in LATER:
        raise ConfigError(f"model.type={name} is not in this version yet; {has}")
    near = did_you_mean(str(name), [*TYPES, *LATER])
    raise ConfigError(f"model.type={name} is not a known type.{near} {has.capitalize()}")


# -- from keys to settings -------------------------------------------------------------------------


def values_for(cfg: SeedConfig, say: Say) -> Values:
    """The settings that the keys stand for, the hook aside; says which keys have no effect."""
    values: Values = {}
    for section in (cfg.model, cfg.training, cfg.data, cfg.wandb):
        values |= both.values_of(section)
    for (section_name, key), owner in OWN.items():
        given = getattr(getattr(cfg, section_name), key)
        if owner != cfg.model.type:
            del values[f"train.sae.{key}"]
            if given is not None:
                say(f"{section_name}.{key}={given} has no effect with {cfg.model.type}")
        elif given is None:
            raise ConfigError(f"missing: {section_name}.{key} ({cfg.model.type} needs it)")
    values |= {f"train.sae.{key}": value for key, value in TYPES[cfg.model.type].items()}
    values["train.wandb.mode"] = "online" if cfg.wandb.use_wandb else "disabled"
    del values["cache.data.files"], values["cache.data.dataset"]
    return values | _data(cfg.data, say)


def _data(cfg: Data, say: Say) -> Values:
    if cfg.streaming and Path(cfg.train_path).expanduser().is_dir():
        return {"cache.data.kind": "hub", "cache.data.dataset": cfg.train_path}
    if not cfg.streaming and not both.is_local(cfg.train_path):
        say("data.streaming=false has no effect: a data set of the hub is always streamed")
    return both.data_values(cfg.train_path, cfg.dataset_split)


def with_hook(cfg: SeedConfig, values: Values, host: Host, say: Say) -> Values:
    """`values` with the one hook to train on, the width of the model being as stated."""
    model = cfg.model
    width = host.config.get_text_config().hidden_size
    if model.hidden_size not in (None, width):
        raise ConfigError(
            f"model.hidden_size={model.hidden_size}, but {model.language_model_path} has {width}. "
            "Correct it or leave it out"
        )
    if model.layer is not None and model.hook is not None:
        raise ConfigError(
            f"give model.layer or model.hook, not both, got {model.layer} and {model.hook}"
        )
    layer = both.n_layers(host) // 2 if model.layer is None else model.layer
    if model.layer is None and model.hook is None:
        say(f"model.layer={layer} by default, the middle one")
    return values | {"cache.hooks": (model.hook or f"resid.{layer}",)}


if __name__ == "__main__":
    sys.exit(main())
