"""Batches in pieces, bf16, torch.compile, averages in runs, hopeless runs: what a step may be."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from training import interrupted, planted_store, rows, same, settings, weights

from saetrain import micro, train
from saetrain.compiling import compiled, why_not
from saetrain.errors import ConfigError
from saetrain.hopeless import EarlyStopSettings, HopelessRun
from saetrain.progress import Progress
from saetrain.saes import make_sae
from saetrain.saes.base import HookSpace
from saetrain.units import MASK

RELU = {"name": "relu", "n_latents": 64, "dead_after_tokens": 300}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_store(tmp_path_factory.mktemp("store") / "store").path


def sae_of(values: dict, seed: int = 0):
    torch.manual_seed(seed)
    space = HookSpace(name="h", d=16, mean=torch.zeros(16), mean_norm=4.0, variance=16.0)
    return make_sae(values, {"h": space})


def gradients_of(values: dict, x: torch.Tensor, n: int):
    sae = sae_of(values)
    sae.tokens_since_fired.copy_(torch.arange(sae.n_latents) * 20)  # some dead, some not
    progress = Progress(step=3, n_steps=10, tokens=x.shape[0])
    numbers, last = micro.backward(sae, sae.losses, {"h": x}, progress, n)
    grads = {k: p.grad for k, p in sae.named_parameters()}
    return numbers, grads, sae.tokens_since_fired, last


# F51: the full batch's gradient, numbers and clock. AuxK divides by a piece's own variance.
@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize(
    "values",
    [RELU, {"name": "topk", "n_latents": 64, "k": 4, "dead_after_tokens": 300, "auxk_alpha": 0.0}],
    ids=lambda v: v["name"],
)
def test_pieces_add_up_to_the_batch(values: dict, n: int) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    whole, grads, clock, _ = gradients_of(values, x, 1)
    parts, summed, same_clock, last = gradients_of(values, x, n)
    assert list(whole) == list(parts)
    for name in grads:
        torch.testing.assert_close(summed[name], grads[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(clock, same_clock)
    assert whole["l0"] == pytest.approx(float(parts["l0"]))
    torch.testing.assert_close(whole["loss"], parts["loss"], rtol=1e-5, atol=1e-6)
    assert torch.equal(last["h"], x[-64 // n :])


def test_contexts_are_weighted_by_the_rows_that_count() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    inputs = {"h": torch.zeros(2, 3, 4), MASK: mask}
    shares = [float(micro._share(p, inputs, 2)) for p in micro.pieces(inputs, 2)]
    assert shares == [0.75, 0.25]


class Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def peak_saved_bytes(n: int) -> int:
    """Most bytes that autograd holds at once, counted as they are saved and let go."""
    live = peak = 0

    def release(size: int) -> None:
        nonlocal live
        live -= size

    def pack(tensor: torch.Tensor) -> Held:
        nonlocal live, peak
        held, size = Held(tensor), tensor.numel() * tensor.element_size()
        live, peak = live + size, max(peak, live + size)
        weakref.finalize(held, release, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        gradients_of(RELU, torch.randn(1024, 16), n)
    assert live == 0
    return peak


def test_pieces_need_less_memory() -> None:  # F51
    whole, eighth = peak_saved_bytes(1), peak_saved_bytes(8)
    assert whole >= 1024 * 64 * 4, "the latents of the batch, at least"
    assert eighth < whole / 4


def test_a_run_in_pieces_is_the_run(store: Path, tmp_path: Path) -> None:  # F51
    plain = train(settings(store, tmp_path, sae=RELU)).run_dir
    for n, more in enumerate(
        ({"grad_acc_steps": 4}, {"micro_acc_steps": 4}, {"grad_acc_steps": 2, "micro_acc_steps": 8})
    ):
        cut = train(settings(store, tmp_path / str(n), sae=RELU, **more)).run_dir
        assert len(rows(plain)) == len(rows(cut))
        wa, wb = weights(plain), weights(cut)
        for name in wa:
            torch.testing.assert_close(wa[name], wb[name], rtol=2e-3, atol=2e-4)
        assert rows(plain)[-1]["fve"] == pytest.approx(rows(cut)[-1]["fve"], abs=1e-3)


def test_pieces_that_cannot_be_equal_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"batch_tokens=64 .*grad_acc_steps x micro_acc_steps = 6"
    ):
        settings(store, tmp_path, grad_acc_steps=3, micro_acc_steps=2)
    with pytest.raises(ConfigError, match=r"micro_acc_steps: expected more than 0"):
        settings(store, tmp_path, micro_acc_steps=0)
    with pytest.raises(ConfigError, match="divisor of the 5 rows"):
        list(micro.pieces({"h": torch.zeros(5, 2)}, 2))


# -- bf16 and compile ---------------------------------------------------------------------------


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(store: Path, tmp_path: Path) -> None:
    runs = [
        train(settings(store, tmp_path, sae=RELU, precision=p, tokens=64 * 60)).run_dir
        for p in ("fp32", "bf16")
    ]
    a, b = (weights(r) for r in runs)
    assert all(v.dtype == torch.float32 for v in b.values())
    assert any(not torch.equal(a[n], b[n]) for n in a)
    fve = [json.loads((r / "eval.json").read_text())["fve"] for r in runs]
    assert fve[1] == pytest.approx(fve[0], abs=0.01)


@pytest.mark.skipif(
    why_not(torch.device("cpu")) is not None, reason=str(why_not(torch.device("cpu")))
)
@pytest.mark.filterwarnings("ignore")  # of torch about torch, while it traces
@pytest.mark.slow  # about 20 s of compiling
def test_compiled_losses_are_the_losses() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    for values in (RELU, {"name": "topk", "n_latents": 64, "k": 4, "dead_after_tokens": 300}):
        plain, fast = sae_of(values), sae_of(values)
        traced = compiled(fast.losses, torch.device("cpu"))
        for step in range(4):
            progress = Progress(step=step, n_steps=8, tokens=64 * (step + 1))
            totals = []
            for sae, losses in ((plain, plain.losses), (fast, traced)):
                sae.zero_grad()
                found = losses({"h": x}, progress)
                found.total.backward()
                sae.note_firing(found.codes)
                totals.append(found.total.detach())
            torch.testing.assert_close(totals[1], totals[0], rtol=1e-5, atol=1e-6)
            for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)


def test_compile_without_a_compiler_is_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"compile=true: .*g\+\+ or clang\+\+.*compile=false"):
        train(settings(store, tmp_path, compile=True))


# -- optimizers in runs -------------------------------------------------------------------------

RUNS = [
    {"name": "adamw", "lr": 3e-3, "weight_decay": 0.01},
    {"name": "signum", "lr": 3e-3, "ema_decay": 0.8},
    {"name": "schedulefree", "lr": 1e-2},
    {"name": "muon", "lr": 3e-3},
    {"name": "adam8bit", "lr": 3e-3, "ema_decay": 0.8},
]


@pytest.mark.parametrize("optim", RUNS, ids=lambda o: o["name"])
def test_every_optimizer_learns_and_resumes(optim: dict, store: Path, tmp_path: Path) -> None:
    if optim["name"] == "adam8bit":
        pytest.importorskip("bitsandbytes")
    cfg = settings(store, tmp_path / "cut", optim=optim)
    interrupted(cfg, 17)
    broken = train(cfg)
    assert broken.trained_steps == 13
    whole = train(settings(store, tmp_path / "whole", optim=optim))
    same(broken.run_dir, whole.run_dir)
    found = rows(whole.run_dir)
    assert found[-1]["fve"] > found[0]["fve"] + 0.1
    assert whole.metrics["fve"] > 0.1


def test_schedule_free_with_a_decay_is_told(store: Path, tmp_path: Path, capsys) -> None:
    optim = {"name": "schedulefree"}
    train(settings(store, tmp_path, optim=optim, tokens=64 * 2))
    assert "schedule=constant is meant for it" in capsys.readouterr().err
    train(settings(store, tmp_path, optim=optim, tokens=64, schedule={"decay_fraction": 0.0}))
    assert "schedule=constant" not in capsys.readouterr().err


def test_a_run_saves_and_evaluates_the_average(store: Path, tmp_path: Path) -> None:
    """The saved decoder is the mean of what training held, rows of length 1 again."""
    optim = {"lr": 3e-3, "ema_decay": 0.9}
    averaged = train(
        settings(store, tmp_path, optim=optim, checkpoint={"every_steps": 1, "keep": 30})
    )
    states = averaged.run_dir / "checkpoints"
    from safetensors.torch import load_file

    mean = None
    for n in range(30):
        W = load_file(states / f"step_{n + 1}" / "sae.safetensors")["W_dec"].double()
        decay = min(0.9, n / (n + 9))
        mean = W if mean is None else decay * mean + (1 - decay) * W
    expected = mean / mean.norm(dim=1, keepdim=True)
    found = weights(averaged.run_dir)["W_dec"].double()
    scale = found.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found / scale, expected, rtol=1e-4, atol=1e-5)
    assert float(scale.std()) < 1e-5 * float(scale.mean())
    last = load_file(states / "step_30" / "sae.safetensors")["W_dec"].double()
    assert float((expected - last).abs().max()) > 1e-3, "the average is not the last weights"


# -- hopeless runs ------------------------------------------------------------------------------


def test_a_hopeless_run_is_stopped_and_says_so(store: Path, tmp_path: Path) -> None:
    rule = {"at_step": 8, "min_fve": 0.99}
    cfg = settings(store, tmp_path, early_stop=rule)
    with pytest.raises(HopelessRun, match=r"stopped early at step 8: fve 0\.\d+ is below .*=0\.99"):
        train(cfg)
    record = json.loads((cfg.run_dir / "run.json").read_text())
    assert record["status"] == "stopped"
    assert record["reason"].startswith("stopped early at step 8: fve")
    assert [r["step"] for r in rows(cfg.run_dir)] == [4, 8]
    with pytest.raises(HopelessRun, match="stopped early at step 8"):
        train(cfg)
    assert len(rows(cfg.run_dir)) == 2
    # Other limits continue it, to the same weights as a run that was never stopped.
    done = train(settings(store, tmp_path, early_stop={"at_step": 8, "min_fve": -9.0}))
    assert done.run_dir == cfg.run_dir
    assert done.trained_steps == 22
    same(done.run_dir, train(settings(store, tmp_path / "never")).run_dir)


@pytest.mark.parametrize(
    ("rule", "row", "reason"),
    [
        ({}, {"step": 99, "dead": 1.0, "fve": -1.0}, None),
        ({"at_step": 5}, {"step": 4, "dead": 1.0}, None),
        ({"at_step": 5}, {"step": 5, "dead": 1.0}, "100.0% of the latents are dead"),
        ({"at_step": 5}, {"step": 50, "dead": 0.99, "fve": -3.0}, None),
        ({"at_step": 5, "max_dead": 0.5}, {"step": 7, "dead": 0.5}, "50.0%"),
        ({"at_step": 5, "min_fve": 0.2}, {"step": 7, "dead": 0.0, "fve": 0.2}, None),
        ({"at_step": 5, "min_fve": 0.2}, {"step": 7, "dead": 0.0, "fve": 0.1}, "below"),
    ],
)
def test_the_rule(rule: dict, row: dict, reason: str | None) -> None:
    found = EarlyStopSettings(**rule).reason(row)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"at_step": 0}, "early_stop.at_step"),
        ({"min_fve": 0.1}, "no effect without early_stop.at_step"),
        ({"at_step": 5, "max_dead": 0.0}, "early_stop.max_dead"),
    ],
)
def test_rules_that_cannot_be(rule: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EarlyStopSettings(**rule)


def test_min_fve_without_fve_is_refused() -> None:
    with pytest.raises(ConfigError, match="reports no fve"):
        EarlyStopSettings(at_step=1, min_fve=0.1).reason({"step": 2, "dead": 0.0})


def test_the_same_seed_twice_gives_the_same_log(store: Path, tmp_path: Path) -> None:  # F18
    a, b, other = (
        train(settings(store, tmp_path / name, seed=seed)).run_dir
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    same(a, b)
    assert rows(a) != rows(other)
    assert np.isfinite([r["loss"] for r in rows(a)]).all()
