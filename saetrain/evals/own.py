"""Metrics of users' own: a class under `@register_metric("NAME")`, chosen by `eval.metrics=[NAME]`.

It is found in a file or package that `metrics_path` names, or in an installed package by the entry
point group `saetrain.metrics`. It sees every batch of the held-out evaluation and gives numbers at
the end, which stand in eval.json under `metrics`, in the curves, the table and the report. Sums
should be float64: a million float32 terms lose digits.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from numpy.typing import NDArray
from torch import Tensor

from actcache.store import plugins
from actcache.store.records import did_you_mean
from saetrain.codes import Codes
from saetrain.errors import ConfigError, TrainingError
from saetrain.metrics import FORMULAS

ENTRY_POINTS = "saetrain.metrics"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One batch of held-out rows. Of several output hooks, x and y are (N, hooks, D)."""

    x: Tensor  # (N, D) activations to be reconstructed, raw units
    y: Tensor  # (N, D) reconstruction
    codes: Codes  # latents of the N rows; `saetrain.codes.dense` gives (N, F)
    segment: NDArray[Any]  # (N,) and
    ctx: NDArray[Any]  # (N,) say which context a row is from


class Metric(ABC):
    """Base class; made anew for each evaluation, without arguments."""

    name: ClassVar[str]
    formula: ClassVar[str] = ""  # shown beside the number

    @abstractmethod
    def update(self, rows: Evaluated) -> None:
        """Take in a batch; there is no gradient."""

    @abstractmethod
    def compute(self) -> float | dict[str, float]:
        """The number, or several by name, over all batches so far."""


_REGISTRY: dict[str, type[Metric]] = {}
M = TypeVar("M", bound=type[Metric])


def register_metric(name: str) -> Callable[[M], M]:
    """Class decorator: make a metric known as `eval.metrics=[NAME]`.

    ConfigError if the name is taken or no lower_snake_case, or if the class lacks the contract.
    """

    def add(cls: M) -> M:
        if wrong := plugins.check_class("metric", name, cls, Metric, _REGISTRY, FORMULAS):
            raise ConfigError(wrong)
        if any(p.default is p.empty for p in _parameters(cls)):
            where = f"metric {name!r}: {plugins.where_of(cls)}"
            raise ConfigError(f"{where}: __init__ must not need arguments")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def make_metrics(names: Sequence[str], paths: Iterable[str | Path] = ()) -> list[Metric]:
    """New metrics by name. ConfigError for unknown names and for missing files."""
    paths = tuple(paths)
    if not names and not paths:
        return []
    plugins.load(ENTRY_POINTS, paths, "metrics_path", ConfigError)
    for name in names:
        if name not in _REGISTRY:
            known = ", ".join(sorted(_REGISTRY)) or "none"
            raise ConfigError(
                f"eval.metrics: {name!r} is not a known metric.{did_you_mean(name, _REGISTRY)} "
                f"Known of your own: {known}. Name its file in metrics_path=[FILE.py]; those built "
                f"in ({', '.join(FORMULAS)}) are always there"
            )
    return [_REGISTRY[name]() for name in dict.fromkeys(names)]


def results(metrics: Sequence[Metric]) -> dict[str, Any]:
    """{"metrics": {name: number or numbers by part}}, {} without metrics.

    TrainingError for what is no finite number.
    """
    found = {metric.name: _numbers(metric) for metric in metrics}
    return {"metrics": found} if found else {}


def flat(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers under `metrics` of a result by name, `NAME/PART` where there are several."""
    out: dict[str, float] = {}
    for name, value in result.get("metrics", {}).items():
        parts = value if isinstance(value, dict) else {"": value}
        out |= {f"{name}/{part}" if part else name: number for part, number in parts.items()}
    return out


def _numbers(metric: Metric) -> float | dict[str, float]:
    value = metric.compute()
    if isinstance(value, dict):
        return {str(part): _number(f"{metric.name}/{part}", v) for part, v in value.items()}
    return _number(metric.name, value)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TrainingError(f"eval.metrics: {name} gave {value!r:.80}, expected a number") from None
    if not math.isfinite(number):
        raise TrainingError(f"eval.metrics: {name} gave {number}, expected a finite number")
    return number


def _parameters(cls: type) -> list[inspect.Parameter]:
    """Those of `__init__` that could be missing."""
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(cls).parameters.values() if p.kind not in open_ended]
