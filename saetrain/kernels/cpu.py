"""The sparse step's inner loops in C (`sparse.c`), for float32 on a CPU.

Selection is 5 times and sums of rows are 2 to 3 times as fast as the torch operations they stand
for, which are made for other shapes: a heap, a sort of all slots, a scatter. `takes` says whether a
compiler made them available (see `saetrain.native`); where it is False the caller uses torch, which
is also what they are tested against. They use torch's own team of threads, as many as torch would.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetrain.native import build, wanted

log = logging.getLogger(__name__)
_SMALL = 1 << 15  # numbers read: below this, starting threads takes longer


def takes(*tensors: Tensor, half: bool = False) -> bool:
    """Whether these may be given to the functions below; `half`: bfloat16 as well."""
    types = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    right = all(t.device.type == "cpu" and t.dtype in types for t in tensors)
    return right and not torch.compiler.is_compiling() and compiled() is not None


def topk(h_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices), (B, k) each, of the k largest of each row, in no order; 1 <= k <= F.

    float32 or bfloat16. Plain twin: torch.topk.
    """
    h_BF = h_BF.contiguous()
    n_rows, n = h_BF.shape
    values = h_BF.new_empty(n_rows, k)
    indices = torch.empty(n_rows, k, dtype=torch.int64)
    shape = h_BF.dtype == torch.bfloat16, n_rows, n, k
    _call("topk_rows", h_BF, *shape, values, indices, _threads(h_BF.numel()))
    return values, indices


def dot_rows(
    x_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, used_BK: Tensor | None = None
) -> Tensor:
    """(B, K): x_b · W[indices_bk], 0 where `used_BK` (bool) is given and False.

    Plain twin: torch.einsum("bd,bkd->bk", x, W[indices]). IndexError for an index beyond W.
    """
    x_BD, W_FD, indices_BK = x_BD.contiguous(), W_FD.contiguous(), indices_BK.contiguous()
    used = None if used_BK is None else used_BK.contiguous()
    (n, k), d = indices_BK.shape, W_FD.shape[1]
    out = x_BD.new_empty(n, k)
    _call("dot_rows", x_BD, W_FD, len(W_FD), indices_BK, used, n, k, d, out, _threads(n * k * d))
    return out


def decode(values_BK: Tensor, indices_BK: Tensor, W_FE: Tensor) -> Tensor:
    """(B, E) = Σ_k values · W[indices]; nothing is read for values of 0.

    Plain twin: `SparseCodes(values, indices, F).dense() @ W`. IndexError for an index beyond W.
    """
    values, indices, W = values_BK.contiguous(), indices_BK.contiguous(), W_FE.contiguous()
    (n, k), d = values.shape, W.shape[1]
    out = W.new_empty(n, d)
    _call("decode_rows", values, indices, n, k, W, len(W), d, out, _threads(n * k * d))
    return out


def sum_by_latent(x_BD: Tensor, weights_BK: Tensor, indices_BK: Tensor, out_FD: Tensor) -> Tensor:
    """Row i of `out_FD`, contiguous, becomes the sum of weights_bk x_b over slots with index i.

    Returns it. Plain twin: `SparseCodes(weights, indices, F).dense().T @ x`. IndexError for an
    index beyond F.
    """
    x, weights, indices = x_BD.contiguous(), weights_BK.contiguous(), indices_BK.contiguous()
    (n, k), (n_latents, d) = weights.shape, out_FD.shape
    _call("sum_by_latent", x, weights, indices, n, k, n_latents, d, out_FD, _threads(n * k * d))
    return out_FD


def above(h_BF: Tensor, floor_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, latents, counts): what is not at most its floor, token after token, as one list.

    values and latents are (n,), counts (B,) how many a token has; NaN is never at most a floor.
    Plain twin: (h.le(floor).logical_not_()).nonzero().
    """
    h_BF, floor_F = h_BF.contiguous(), floor_F.expand(h_BF.shape[1]).contiguous()
    counts = torch.empty(len(h_BF), dtype=torch.int64)
    threads = _threads(h_BF.numel())
    _call("count_above", h_BF, *h_BF.shape, floor_F, counts, threads)
    ends = counts.cumsum(0)
    n = int(ends[-1]) if len(ends) else 0
    values, latents = h_BF.new_empty(n), torch.empty(n, dtype=torch.int64)
    _call("list_above", h_BF, *h_BF.shape, floor_F, ends - counts, values, latents, threads)
    return values, latents, counts


def _threads(numbers: int) -> int:
    return torch.get_num_threads() if numbers > _SMALL else 1


def _call(name: str, *arguments: Any) -> None:
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    found = getattr(compiled(), name)(*given)
    if found == -2:
        raise IndexError(f"{name}: an index is not that of one of the rows")
    if found:
        raise MemoryError(f"{name}: no memory for the slots")


@cache
def compiled() -> Any:
    """The library made of `sparse.c`; None, with a line of log, if it cannot be had."""
    library = build(Path(__file__).with_name("sparse.c"), "-march=native", "-fopenmp")
    if library is None and wanted():
        log.warning("no C compiler with OpenMP ($CC, cc): torch does a step's selection, slower")
    if library is not None:
        p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.topk_rows.argtypes = [p, i, n, n, n, p, p, i]
        library.dot_rows.argtypes = [p, p, n, p, p, n, n, n, p, i]
        library.decode_rows.argtypes = [p, p, n, n, p, n, n, p, i]
        library.sum_by_latent.argtypes = [p, p, p, n, n, n, n, p, i]
        library.count_above.argtypes = [p, n, n, p, p, i]
        library.list_above.argtypes = [p, n, n, p, p, p, p, i]
        library.count_above.restype = library.list_above.restype = None
    return library
