"""The Triton kernels against their plain twins, on a GPU or in Triton's interpreter.

Run by tests/test_kernels_triton.py in a process of its own, since the interpreter is chosen when
Triton is imported: TRITON_INTERPRET=1 pytest tests/triton_equality.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from saes_rows import END, HOOK, X
from test_saes import BATCHTOPK, GATED, JUMPRELU, MATRYOSHKA, TOPK, Row
from test_topk_step import Recorder
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from saetrain.kernels import cpu, triton_common
from saetrain.kernels.decode import decode
from saetrain.kernels.triton_common import CHANNELS, KERNELS, ROWS, takes
from saetrain.kernels.triton_decode import launch_decode
from saetrain.kernels.triton_latents import WINDOW, launch_dot, launch_sum, sort_slots

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TYPES = [torch.float32, torch.bfloat16, torch.float16]

# Tokens, slots, latents, width: no multiples of anything, one of all, more than one block of each.
SHAPES = [
    (7, 3, 19, 20),
    (1, 1, 1, 1),
    (5, 1, 4, CHANNELS),
    (6, ROWS + 1, 80, 5),  # most latents have no slot
    (3, 2 * ROWS, 40, CHANNELS + 3),
    (WINDOW + 5, 3, 2, 17),  # windows of one latent, and shared ones
]


@pytest.fixture(autouse=True)
def _kernels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_common, "DEVICE", DEVICE)
    monkeypatch.setattr(cpu, "takes", lambda *tensors, half=False: False)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, D), W (F, D), weights (B, K) of which every third is 0, indices (B, K)."""
    n, k, n_latents, width = shape
    torch.manual_seed(sum(shape))
    weights = torch.randn(n, k)
    weights.view(-1)[::3] = 0
    parts = torch.randn(n, width), torch.randn(n_latents, width), weights
    x, W, weights = (p.to(DEVICE, dtype) for p in parts)
    return x, W, weights, torch.randint(n_latents, (n, k)).to(DEVICE)


def close(got: Tensor, want: Tensor) -> None:
    """Sums in float32, rounded once; `want` is in float64."""
    eps = max(torch.finfo(got.dtype).eps, 1e-5)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps)


def dense(weights_BK: Tensor, indices_BK: Tensor, n_latents: int) -> Tensor:
    """(B, F) in float64: Σ_k weights where an index repeats."""
    zeros = torch.zeros(len(weights_BK), n_latents, dtype=torch.float64, device=weights_BK.device)
    return zeros.scatter_add_(1, indices_BK, weights_BK.double())


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[0], t) for t in TYPES[1:]],
)
def test_kernels_equal_dense_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:  # F118
    x, W, weights, indices = drawn(shape, dtype)
    f_BF = dense(weights, indices, shape[2])
    close(launch_decode(weights, indices, W), f_BF @ W.double())
    close(launch_sum(x, weights, indices, shape[2]), f_BF.T @ x.double())
    close(launch_dot(x, W, indices), (x.double() @ W.double().T).gather(1, indices))


W_ = WINDOW
COUNTS = {
    "one takes all": [0, 2 * W_ + 3, 0],
    "whole windows": [W_, W_, 2 * W_],
    "one less, one more": [W_ - 1, W_ + 1, 1],
    "windows cut by edges": [5, 2 * W_, 3 * W_ - 5, 0, 0, 1],
    "shared windows": [1] * (W_ + 3) + [0] * 4 + [2],
    "more partial sums than a tile has rows": [3, (ROWS + 2) * W_],
    "nothing": [0, 0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_sums_by_latent_whatever_the_counts(counts: list[int]) -> None:  # F118
    torch.manual_seed(len(counts))
    latents = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    indices = latents[torch.randperm(len(latents))][:, None].to(DEVICE)
    x, weights = torch.randn(len(latents), CHANNELS + 1), 1 + torch.rand(len(latents), 1)
    x, weights = x.to(DEVICE), weights.to(DEVICE)
    want = dense(weights, indices, len(counts)).T @ x.double()
    got = launch_sum(x, weights, indices, len(counts))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    if len(counts) == 2:  # more than one window
        assert torch.equal(got, launch_sum(x, weights, indices, len(counts)))  # bit by bit


def test_slots_are_sorted_stably_and_zeros_last() -> None:
    weights = torch.tensor([[1.0, 0.0], [2.0, 3.0], [torch.nan, 4.0]], device=DEVICE)
    indices = torch.tensor([[2, 0], [1, 2], [0, 1]], device=DEVICE)
    weights, tokens, by_latent = sort_slots(weights, indices, 3)
    assert by_latent.tolist() == [0, 1, 1, 2, 2, 3]
    assert tokens.tolist() == [2, 1, 2, 0, 1, 0]
    assert weights.nan_to_num(9).tolist() == [9, 2, 4, 1, 3, 0]


@pytest.mark.parametrize(("n", "k"), [(0, 3), (4, 0)])
def test_no_tokens_and_no_slots(n: int, k: int) -> None:
    x, W = torch.ones(n, 5, device=DEVICE), torch.ones(6, 5, device=DEVICE)
    weights = torch.ones(n, k, device=DEVICE)
    indices = torch.zeros(n, k, dtype=torch.int64, device=DEVICE)
    assert torch.equal(launch_decode(weights, indices, W), torch.zeros_like(x))
    assert torch.equal(launch_sum(x, weights, indices, 6), torch.zeros_like(W))
    assert launch_dot(x, W, indices).shape == (n, k)


def test_inputs_of_any_strides() -> None:
    x, W, weights, indices = drawn((6, 4, 9, 14), torch.float32)
    f_BF, apart = dense(weights, indices, 9), slice(None, None, 2)
    x, W, weights, indices = (
        torch.stack([t, t], -1).flatten(-2)[..., apart] for t in (x, W.T, weights, indices)
    )
    assert not any(t.is_contiguous() for t in (x, W.T, weights, indices))
    close(launch_decode(weights, indices, W.T), f_BF @ W.T.double())
    close(launch_sum(x, weights, indices, 9), f_BF.T @ x.double())
    close(launch_dot(x, W.T, indices), (x.double() @ W.double()).gather(1, indices))


def test_nothing_hides_nan_and_nothing_is_read_for_slots_of_value_0() -> None:
    x, W, _, _ = drawn((4, 2, 5, 3), torch.float32)
    weights = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [0.0, 2.0], [0.0, 0.0]], device=DEVICE)
    indices = torch.tensor([[1, 3], [0, 3], [3, 4], [3, 3]], device=DEVICE)
    W[3], x[3] = torch.nan, torch.nan
    shown = launch_decode(weights, indices, W).isnan().all(1)
    assert shown.tolist() == [False, True, False, False]
    shown = launch_sum(x, weights, indices, 5).isnan().all(1)
    assert shown.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_the_check_before_first_use_passes(name: str, dtype: torch.dtype) -> None:  # F118
    assert takes(name, torch.zeros(1, dtype=dtype, device=DEVICE))


def step(row: Row, device: str, record: set[str] | None = None) -> dict[str, Tensor]:
    """Loss terms and gradients of one training step; `record` gets the operations' names."""
    groups = {"group_sizes": [48, 32, 16]} if row is MATRYOSHKA else {}
    sae = row.make(n_latents=96, **groups).to(device)
    sae.tokens_since_fired[:40] = 10**8  # AuxK has something to do
    recorder = Recorder(1)
    with recorder:
        losses = sae.losses({HOOK: X[:24].to(device)}, END)
        losses.total.backward()
    if record is not None:
        record |= recorder.all
    grads = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    return {name: t.detach().cpu() for name, t in {**losses.terms, **grads}.items()}


# The others take these kernels on a GPU only, if at all: numbers of slots that depend on data.
STEPS = [TOPK, MATRYOSHKA] if DEVICE == "cpu" else [TOPK, MATRYOSHKA, BATCHTOPK, JUMPRELU, GATED]


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row.name)
def test_a_whole_step_equals_that_of_the_cpu(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    used = set[str]()
    got = step(row, DEVICE, used)
    monkeypatch.setattr(triton_common, "DEVICE", "nowhere")
    want = step(row, "cpu")
    assert set(got) == set(want)
    for name, value in want.items():
        same = torch.testing.assert_close
        same(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    if row is TOPK:
        assert {"launch_decode", "launch_dot", "launch_sum"} <= used


@pytest.mark.filterwarnings("ignore")  # of torch about torch, while it traces
def test_compiled_steps_keep_the_kernels_whole() -> None:
    x, W, weights, indices = drawn((6, 3, 11, 12), torch.float32)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        leaves = weights.clone().requires_grad_(), W.clone().requires_grad_()
        (run(leaves[0], indices, leaves[1]) * x).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    seen: list[str] = []

    def note(graph: torch.fx.GraphModule, args: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    got = gradients(torch.compile(decode, fullgraph=True, backend=backend))
    for mine, theirs in zip(got, gradients(decode), strict=True):
        assert torch.equal(mine, theirs)
    for name in ("launch_decode", "launch_dot", "launch_sum"):
        assert any(name in target for target in seen), name
