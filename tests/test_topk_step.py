"""What a TopK training step must not do: dense work after the selection, waits for a device."""

from __future__ import annotations

from typing import Any

import pytest
from saes_rows import END, HOOK, X
from test_saes import TOPK
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saetrain.kernels import cpu, encode


class Recorder(TorchDispatchMode):
    """Names of the operations run, and of those with an output of at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.all, self.large = size, set[str](), set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.all.add(name)
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, Tensor) and one.numel() >= self.size:
                self.large.add(name)
        return out


@pytest.mark.parametrize("compiled", [True, False])
def test_topk_steps_make_nothing_dense(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:  # F118
    if not compiled:
        request.getfixturevalue("uncompiled")
    monkeypatch.setattr(encode, "CACHED", 128 * 2048)
    sae, recorder = TOPK.make(n_latents=2048), Recorder(512 * 2048)
    with recorder:
        sae.losses({HOOK: X[:512]}, END).total.backward()
    assert not recorder.large  # the pre-activations come in pieces of 128 tokens
    assert ("embedding_bag" in str(recorder.all)) == (cpu.compiled() is None)


def test_topk_steps_never_wait_for_the_device() -> None:
    sae = TOPK.make(n_latents=512).to("meta")  # has no values: asking for one raises
    losses = sae.losses({HOOK: X[:64].to("meta")}, END)
    assert set(losses.terms) == {"reconstruction", "auxk"}
    sae.note_firing(losses.codes)
