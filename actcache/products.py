"""Faster float32 products on CPUs whose MKL does not use AVX-512: linear layers through oneDNN.

torch multiplies float32 matrices with MKL, which stays at AVX2 on processors that are not Intel's;
oneDNN, which torch has too, uses AVX-512 there and is twice as fast (2 cores of an AMD EPYC, widths
512 to 2,048). A forward pass on a CPU is nearly all products, so it is most of the time of a run.

Both sum in float32 in an order of their own: results agree to rounding, as between two processors.
Small layers, where nothing is gained, other types, other devices and subclasses stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SMALLEST = 1 << 16  # weights of a layer that is worth it


def available() -> bool:
    """Whether oneDNN's product is there and the processor has AVX-512."""
    has = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return bool(has and wide and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def speed_up(model: nn.Module) -> int:
    """Let the large float32 linear layers of a model on the CPU use oneDNN; how many do.

    Hooks work as before: only `forward` of a layer is replaced, on this instance.
    """
    if not available():
        return 0
    chosen = [m for m in model.modules() if type(m) is nn.Linear and _worth_it(m)]
    for layer in chosen:
        layer.forward = _product_of(layer)  # type: ignore[method-assign, assignment]
    return len(chosen)


def _worth_it(layer: nn.Linear) -> bool:
    w = layer.weight
    return w.device.type == "cpu" and w.dtype == torch.float32 and w.numel() >= SMALLEST


def _product_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        plain = input.dtype != torch.float32 or torch.is_grad_enabled()
        if plain or not layer.weight.is_contiguous():
            return nn.functional.linear(input, layer.weight, layer.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            input.contiguous(), layer.weight, layer.bias, "none", [], ""
        )
        return y

    return forward
