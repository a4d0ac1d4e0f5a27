"""The contract of every SAE architecture, and the few things all of them share.

A batch (dict hook -> activations) goes in, a dict of named loss terms comes out; `encode` and
`decode` are the public maths, both in the raw units of the host; `to_inference()` is what gets
saved, exported and injected. An architecture is one file in this folder: a frozen config class and
an `SAE` subclass under `@register("name")`. Nothing else is edited to add one.

Units. Training happens on standardised inputs x' = s (x - c), with the centre c and the scale s
taken from the store's statistics, so learning rates and coefficients carry over between layers and
models. s and c are buffers here and are folded into the weights by `to_inference`:
W_enc <- s W_enc, W_dec <- W_dec / s, b_dec <- b_dec / s + c, latents unchanged.

Shapes: B tokens in a batch, D input width (d_in), E output width (d_out), F latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from actcache.store import HookStats
from saetrain import presets
from saetrain.codes import Codes, SparseCodes, dense, firing_counts
from saetrain.errors import ConfigError
from saetrain.progress import Progress as Progress
from saetrain.units import Unit

if TYPE_CHECKING:
    from saetrain.artefact import Inference

# Parameter name -> index of the entries that `SAE.resample` replaced, such as (..., latents).
Replaced = dict[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class HookSpace:
    """What the store knows of one hook, from the statistics in its commits."""

    name: str
    d: int  # width
    mean: Tensor  # (d,) float32
    mean_norm: float  # E||x||
    variance: float  # E||x - mean||^2, summed over the d channels

    @classmethod
    def of(cls, name: str, stats: HookStats) -> HookSpace:
        """Of statistics as commits hold them."""
        return cls(
            name=name,
            d=len(stats.mean),
            mean=torch.from_numpy(stats.mean.astype(np.float32)),
            mean_norm=stats.mean_norm,
            variance=stats.variance,
        )


@dataclass(frozen=True)
class Losses:
    """Named loss terms, already weighted: the training loss is their sum. Codes for bookkeeping."""

    terms: dict[str, Tensor]
    codes: Codes
    extras: dict[str, Tensor] = field(default_factory=dict)  # logged, not optimised

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What every architecture takes; each adds its own fields."""

    # Fields that name hooks: aliases in them are replaced by the stored names before training.
    HOOK_FIELDS: ClassVar[tuple[str, ...]] = ("hook_out",)
    # Whether these fields name the input hooks, too, so that the run's `hook` is not read.
    NAMES_INPUTS: ClassVar[bool] = False

    n_latents: int | None = None  # F; give this or expansion_factor
    expansion_factor: int | None = None  # F = expansion_factor * d_in
    hook_out: str | None = None  # reconstructed hook; None: the input hook
    center: Literal["none", "mean"] = "none"  # c = 0, or the store's mean
    scale: Literal["none", "sqrt_d", "unit"] = "sqrt_d"  # E||x'|| = sqrt(d), or 1
    reconstruction: Literal["fvu", "mse", "sse"] = "fvu"  # see saetrain.losses.reconstruction
    dead_after_tokens: int = 10_000_000  # a latent silent for so long counts as dead

    def __post_init__(self) -> None:
        if (self.n_latents is None) == (self.expansion_factor is None):
            raise ConfigError(
                "sae: give exactly one of n_latents and expansion_factor, "
                f"got n_latents={self.n_latents}, expansion_factor={self.expansion_factor}"
            )
        for name in ("n_latents", "expansion_factor", "dead_after_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"sae.{name}: expected at least 1, got {value}")

    def hooks(self, hook: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(input hooks, output hooks) in a run with this `hook`; all are read, row by row."""
        return (hook,), (self.hook_out or hook,)

    def latents(self, d_in: int) -> int:
        """F for an input of width d_in."""
        if self.n_latents is not None:
            return self.n_latents
        assert self.expansion_factor is not None  # __post_init__
        return self.expansion_factor * d_in


class SAE(nn.Module, ABC):
    """Base of all architectures. Subclasses set weights in `__init__` and implement the maths."""

    name: ClassVar[str]
    Config: ClassVar[type[SAEConfig]]
    unit: ClassVar[Unit] = "token"  # what it reads at once, see `saetrain.units`

    in_center: Tensor  # (D,) c
    in_scale: Tensor  # () s
    in_variance: Tensor  # () total variance of x', summed over the D channels
    tokens_since_fired: Tensor  # (F,) int64

    def __init__(self, cfg: SAEConfig, spaces: Mapping[str, HookSpace]) -> None:
        """`spaces` is keyed by hook name in input order; the first one is the input hook."""
        super().__init__()
        self.cfg = cfg
        self.hooks_in, self.hooks_out = cfg.hooks(next(iter(spaces)))
        space = spaces[self.hooks_in[0]]
        check_space(space, cfg)
        self.d_in = space.d
        self.n_latents = cfg.latents(space.d)
        scale = {
            "none": 1.0,
            "sqrt_d": space.d**0.5 / space.mean_norm,
            "unit": 1.0 / space.mean_norm,
        }[cfg.scale]
        center = space.mean if cfg.center == "mean" else torch.zeros_like(space.mean)
        self.register_buffer("in_center", center.to(torch.float32).clone())
        self.register_buffer("in_scale", torch.tensor(scale, dtype=torch.float32))
        # Total variance of x', the denominator of FVU: from the store, so no batch-size bias.
        self.register_buffer(
            "in_variance", torch.tensor(space.variance * scale**2, dtype=torch.float32)
        )
        self.register_buffer("tokens_since_fired", torch.zeros(self.n_latents, dtype=torch.int64))

    # -- the public maths, raw units -------------------------------------------------------------

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """Latents of raw activations x (..., D), of several hooks (..., H, D)."""

    @abstractmethod
    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (..., E) in raw units, of several hooks (..., G, E)."""

    def reconstruct(self, x: Tensor, codes: Codes) -> Tensor:
        """`decode(codes)`, and whatever reaches the output past the latents, such as a skip."""
        return self.decode(codes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """{"sae_out": (..., E), "feature_acts": (..., F) dense}."""
        codes = self.encode(x)
        return {"sae_out": self.reconstruct(x, codes), "feature_acts": dense(codes)}

    # -- training ---------------------------------------------------------------------------------

    @abstractmethod
    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """Loss terms of one batch; `acts[hook]` is (B, d_hook) raw activations.

        With `unit = "sequence"` (S, T, d_hook), and masks beside them: see `saetrain.units`.
        """

    def init_from_data(self, acts: Mapping[str, Tensor]) -> None:
        """Called once with the first batch, before the first step. Default: nothing."""

    def resample(self, acts: Mapping[str, Tensor], progress: Progress) -> Replaced:
        """Called after every step with its batch: may give dead latents new weights.

        Returns what was replaced, so that the optimizer forgets its moments there. Default: {}.
        """
        return {}

    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Called once after the last step with held-out batches. Default: reads none."""

    def before_step(self) -> None:
        """Called between backward and the optimizer step, e.g. to project gradients."""

    def after_step(self) -> None:
        """Called after the optimizer step, e.g. to renormalise the decoder."""

    @torch.no_grad()
    def note_firing(self, codes: Codes) -> None:
        """Advance the dead-latent clock: tokens since each latent last fired in a batch."""
        values = codes.values if isinstance(codes, SparseCodes) else codes
        self.tokens_since_fired += values.shape[:-1].numel()
        self.tokens_since_fired.masked_fill_(firing_counts(codes) > 0, 0)

    @property
    def dead(self) -> Tensor:
        """(F,) bool: silent for more than `dead_after_tokens` training tokens."""
        return self.tokens_since_fired > self.cfg.dead_after_tokens

    @property
    def draws_random(self) -> bool:
        """Whether a training step may use torch's random generator.

        If so, a fused sweep does not give it steps beside others, since all would draw from one
        generator. Known of what is built in; a class from elsewhere is taken to draw unless it
        overrides this.
        """
        drawn = [getattr(self.cfg, name, None) for name in ("resample_every", "random_prefixes")]
        return drawn.count(None) < len(drawn) or not type(self).__module__.startswith("saetrain.")

    @abstractmethod
    def to_inference(self) -> Inference:
        """Folded weights in raw units; encode and decode agree with this module's."""

    # -- shared helpers ---------------------------------------------------------------------------

    def standardise(self, x: Tensor) -> Tensor:
        """x' = s (x - c), in float32."""
        return (x.to(self.in_scale.dtype) - self.in_center) * self.in_scale

    def unstandardise(self, x: Tensor) -> Tensor:
        """x = x' / s + c."""
        return x / self.in_scale + self.in_center


def check_autoencoder(cfg: SAEConfig, spaces: Mapping[str, HookSpace], name: str) -> None:
    """ConfigError unless input and output are one hook; `name` is the architecture's."""
    hook_in = next(iter(spaces))
    if cfg.hook_out not in (None, hook_in):
        raise ConfigError(
            f"sae.hook_out={cfg.hook_out!r} differs from the input hook {hook_in!r}: "
            f"sae.name={name} reconstructs its own input. Remove sae.hook_out"
        )
    if len(spaces) > 1:
        raise ConfigError(f"sae.name={name} reads one hook, got {len(spaces)}: {', '.join(spaces)}")


def check_space(space: HookSpace, cfg: SAEConfig) -> None:
    """ConfigError if the hook's statistics leave nothing to scale by or to learn."""
    if cfg.scale != "none" and not space.mean_norm > 0:
        raise ConfigError(
            f"sae.scale={cfg.scale} divides by the mean norm of hook {space.name!r}, which is "
            f"{space.mean_norm} in the store's statistics"
        )
    if not space.variance > 0:
        raise ConfigError(
            f"hook {space.name!r} has variance {space.variance} in the store's statistics: "
            "there is nothing to learn. Choose another hook"
        )


_REGISTRY: dict[str, type[SAE]] = {}
S = TypeVar("S", bound=type[SAE])


def register(name: str, config: type[SAEConfig]) -> Callable[[S], S]:
    """Class decorator: make an architecture known as `sae.name=NAME`.

    Raises ConfigError if the name is taken by another class or is not lower_snake_case, and if the
    class or its config lack what the contract asks for.
    """

    def add(cls: S) -> S:
        if not name.isidentifier() or name != name.lower():
            raise ConfigError(f"SAE name {name!r}: expected lower_snake_case")
        old = _REGISTRY.get(name)
        if old is not None and (old.__module__, old.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ConfigError(f"SAE name {name!r} is taken by {old.__module__}.{old.__qualname__}")
        if name in presets.names() and presets.preset(name)["name"] != name:
            raise ConfigError(f"SAE name {name!r} is taken by the preset conf/sae/{name}.yaml")
        _check_contract(name, cls, config)
        cls.name, cls.Config = name, config
        _REGISTRY[name] = cls
        return cls

    return add


def _check_contract(name: str, cls: type, config: type) -> None:
    """ConfigError for what would only fail later, or train something else than was written."""
    where = f"SAE {name!r}: {cls.__module__}.{cls.__qualname__}"
    if not (isinstance(cls, type) and issubclass(cls, SAE)):
        raise ConfigError(f"{where} is not a subclass of saetrain.saes.base.SAE")
    if missing := sorted(cls.__abstractmethods__):
        raise ConfigError(f"{where} does not define {', '.join(missing)}")
    params = getattr(config, "__dataclass_params__", None)
    own = params is not None and "__dataclass_fields__" in vars(config)
    if not (own and issubclass(config, SAEConfig) and params.frozen):  # type: ignore[union-attr]
        raise ConfigError(
            f"{where}: its config {getattr(config, '__qualname__', config)} is not a frozen "
            "dataclass over saetrain.saes.base.SAEConfig. Write "
            "@dataclass(frozen=True, kw_only=True) above it"
        )


def registry() -> Mapping[str, type[SAE]]:
    """Name -> class of everything registered so far (see `saetrain.saes.load_all`)."""
    return _REGISTRY


def describe(cls: type[SAE]) -> dict[str, Any]:
    """Name, file and one-line description, for listings."""
    doc = (cls.__doc__ or "").strip().splitlines()
    return {"name": cls.name, "module": cls.__module__, "summary": doc[0] if doc else ""}
