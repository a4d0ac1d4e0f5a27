"""The rules behind `optim.name`: how each is made, from libraries that keep them well.

Parameter groups come with a `factor` on the learning rate, which `optim.Optimizer` multiplies in.

adam, adamw    torch's fused ones: one elementwise pass. Two moments per parameter.
signum         sign of the averaged gradient (Bernstein et al. 2018, arXiv 1802.04434). One moment.
schedulefree   AdamW or, rule=sign, sign descent, averaged instead of decayed (Defazio et al. 2024,
               arXiv 2405.15682), package `schedulefree`. Wants a constant rate after the warm-up
               and about five times Adam's. Two tensors per parameter, sign: one.
muon           matrices by orthogonalised momentum at an update size that matches AdamW's (Jordan et
               al. 2024; Liu et al. 2025, arXiv 2502.16982), all other parameters by Adam. One
               moment, and 15 products of an A x B with an A x A matrix a step (A the shorter side).
adam8bit       Adam with moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), bitsandbytes.
               Two bytes per parameter instead of eight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from saetrain.errors import ConfigError
from saetrain.kernels.adam import Adam, AdamW
from saetrain.optim_settings import OptimSettings

Group = dict[str, Any]  # params: list of tensors, factor: float
Parts = list[torch.optim.Optimizer]

# optim.lr=null at 2^14 latents. Adam: Gao et al. (arXiv 2406.04093). A step of signum or muon is
# as large as one of Adam at the same rate. schedulefree with rule=sign: sparsify's default.
BASE_LR = {"adam": 2e-4, "adamw": 2e-4, "adam8bit": 2e-4, "muon": 2e-4, "signum": 2e-4}
SCHEDULE_FREE_LR = {"adam": 1e-3, "sign": 5e-3}
# These rates are meant for at least LONG_RUN steps; see `optim.base_lr` for shorter runs.
LONG_RUN, SHORT_RUN_LR = 2**15, 1e-2
FASTER_WHEN_SHORT = ("adam", "adamw", "adam8bit", "muon")
# Numbers of a parameter group that change with the steps, so that checkpoints keep them.
GROUP_STATE = ("k", "weight_sum", "lr_max")


def make(groups: list[Group], settings: OptimSettings) -> Parts:
    """The optimizers that together step all groups; ConfigError if a package is missing."""
    return _MAKERS[settings.name](groups, settings)


class Signum(torch.optim.Optimizer):
    """m <- b m + (1 - b) g;  w <- w - lr (sign(m) + weight_decay w)."""

    def __init__(self, groups: Iterable[Group], momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(m.sign(), alpha=-group["lr"])


def _adam(groups: list[Group], s: OptimSettings) -> Parts:
    return [Adam(groups, betas=s.betas, eps=s.eps, fused=True)]


def _adamw(groups: list[Group], s: OptimSettings) -> Parts:
    decay = s.weight_decay
    return [AdamW(groups, betas=s.betas, eps=s.eps, weight_decay=decay, fused=True)]


def _signum(groups: list[Group], s: OptimSettings) -> Parts:
    return [Signum(groups, s.momentum, s.weight_decay)]


def _schedulefree(groups: list[Group], s: OptimSettings) -> Parts:
    try:
        import schedulefree
    except ImportError:
        raise _missing("schedulefree", "schedulefree", "adamw") from None
    made: Any
    if s.rule == "adam":
        made = schedulefree.AdamWScheduleFree(
            groups, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay
        )
    else:
        made = schedulefree.SGDScheduleFree(
            groups, momentum=s.momentum, weight_decay=s.weight_decay
        )
        made.register_step_pre_hook(_sign_of_gradients)
    made.train()  # parameters hold y, where gradients are taken; see `averaged`
    return [made]


def _sign_of_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.sign_()


def averaged(part: torch.optim.Optimizer, group: Group, p: Tensor) -> Tensor | None:
    """Schedule-free's x of parameter `p`, the average that is evaluated: x = y + (1 - 1/b)(z - y).

    None before the first step. The parameter itself holds y.
    """
    z = part.state[p].get("z")
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    return None if z is None else p.detach().lerp(z, 1 - 1 / beta)


def _muon(groups: list[Group], s: OptimSettings) -> Parts:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optim.name=muon needs torch 2.9 or later, this is {torch.__version__}; "
            "take optim=adam"
        )
    matrices, rest = _split(groups, lambda p: p.ndim == 2)
    parts: Parts = []
    if matrices:
        parts.append(
            torch.optim.Muon(
                matrices,
                weight_decay=s.weight_decay,
                momentum=s.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return parts + (_adam(rest, s) if rest else [])


def _adam8bit(groups: list[Group], s: OptimSettings) -> Parts:
    try:
        import bitsandbytes
    except ImportError:
        raise _missing("adam8bit", "bitsandbytes", "adam") from None
    made: Any = bitsandbytes.optim
    adam: torch.optim.Optimizer = made.Adam8bit(groups, betas=s.betas, eps=s.eps)
    keep_strides(adam)
    return [adam]


def keep_strides(optimizer: torch.optim.Optimizer) -> None:
    """Have parameters lie as before after each step: bitsandbytes makes them row-major, which costs
    encoders the fast product, and sums of gradients their order after a resume."""
    before: dict[Tensor, tuple[int, ...]] = {}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before.update((p, p.stride()) for g in optimizer.param_groups for p in g["params"])

    def restore(*_: Any) -> None:
        for p, strides in before.items():
            if p.stride() != strides:
                as_before = torch.empty_strided(p.shape, strides, dtype=p.dtype, device=p.device)
                p.data = as_before.copy_(p.data)

    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(restore)


def _split(
    groups: list[Group], chosen: Callable[[Tensor], bool]
) -> tuple[list[Group], list[Group]]:
    """The groups twice: with the chosen parameters, and with the others; empty ones left out."""
    sides = []
    for side in (True, False):
        parts = [{**g, "params": [p for p in g["params"] if chosen(p) == side]} for g in groups]
        sides.append([g for g in parts if g["params"]])
    return sides[0], sides[1]


def _missing(name: str, package: str, other: str) -> ConfigError:
    return ConfigError(
        f"optim.name={name} needs the package {package}, which is not installed. "
        f"pip install {package}, or take optim={other}"
    )


_MAKERS: dict[str, Callable[[list[Group], OptimSettings], Parts]] = {
    "adam": _adam,
    "adamw": _adamw,
    "signum": _signum,
    "schedulefree": _schedulefree,
    "muon": _muon,
    "adam8bit": _adam8bit,
}
