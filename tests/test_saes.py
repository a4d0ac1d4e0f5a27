"""Every architecture under the same checks: one row each, and what only one of them promises."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from saes_reference import (
    auxk_reference,
    planted,
    recovery,
    relu_reference,
    space_of,
    topk_reference,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import saetrain.saes as saes
from saetrain.artefact import load_sae
from saetrain.codes import Codes, dense, l0
from saetrain.errors import ConfigError
from saetrain.saes import load_all, make_config, make_sae
from saetrain.saes.base import SAE, Progress, registry

ROOT = Path(__file__).parents[1]
HOOK = "resid.2"
D, FEATURES, ACTIVE = 16, 24, 2
X, TRUE = planted(4096, D, FEATURES, ACTIVE)
SPACES = {HOOK: space_of(X, HOOK)}
UNITS = list(itertools.product(["none", "mean"], ["none", "sqrt_d", "unit"]))
END = Progress(step=10, n_steps=10, tokens=10_000)


def exactly(k: int) -> Callable[[Codes, Tensor], None]:
    """L0 is k wherever at least k pre-activations h are positive, and all positive ones if not."""

    def law(codes: Codes, h_BF: Tensor) -> None:
        assert torch.equal(l0(codes), (h_BF > 0).sum(-1).clamp(max=k))

    return law


def positive_part(codes: Codes, h_BF: Tensor) -> None:
    """Latents are relu(h): as many as are positive, none below zero."""
    assert torch.equal(l0(codes), (h_BF > 0).sum(-1))
    assert (dense(codes) >= 0).all()


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    l0_law: Callable[[Codes, Tensor], None]
    recovers: float  # mean max cosine with a planted dictionary after a short training

    def config(self, **more: Any) -> dict[str, Any]:
        return {"name": self.name, "n_latents": 48, **self.values, **more}

    def make(self, seed: int = 0, **more: Any) -> SAE:
        torch.manual_seed(seed)
        return make_sae(self.config(**more), SPACES)


ROWS = [
    Row(name="topk", values={"k": 2}, l0_law=exactly(2), recovers=0.95),
    Row(
        name="relu",
        values={"l1_coefficient": 0.05},
        l0_law=positive_part,
        recovers=0.9,
    ),
    Row(
        name="relu",
        values={"l1_coefficient": 0.05, "decoder_norm_weighted": False},
        l0_law=positive_part,
        recovers=0.9,
    ),
]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.name}-{len(r.values)}")
TOPK, RELU, UNIT = ROWS


def train(
    sae: SAE, steps: int, x: Tensor = X, lr: float = 5e-3, batch: int = 256
) -> tuple[float, float]:
    """The trainer's order of calls. (first loss, last loss)."""
    optim = torch.optim.Adam(sae.parameters(), lr)
    gen, seen = torch.Generator().manual_seed(1), []
    for step in range(steps):
        optim.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        rows_B = torch.randint(0, len(x), (batch,), generator=gen)
        progress = Progress(step=step, n_steps=steps, tokens=(step + 1) * batch)
        losses = sae.losses({HOOK: x[rows_B]}, progress)
        optim.zero_grad()
        losses.total.backward()
        sae.before_step()
        optim.step()
        sae.after_step()
        sae.note_firing(losses.codes)
        seen.append(losses.terms["reconstruction"].item())
    return seen[0], seen[-1]


def weights(sae: SAE) -> dict[str, Tensor]:
    """Copies of the weights that record gradients of their own."""
    return {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}


def shake(sae: SAE, size: float = 0.1) -> SAE:
    """Move every weight off its special starting value."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in sae.parameters():
            p += size * torch.randn(p.shape, generator=gen).to(p)
    return sae


def assert_equal_gradients(sae: SAE, w: Mapping[str, Tensor]) -> None:
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad, msg=lambda m, n=name: f"{n}: {m}")


# -- the contract, every row -----------------------------------------------------------------------


@rows
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_shapes_and_forward(row: Row, lead: tuple[int, ...]) -> None:  # F19
    sae, x = shake(row.make()), X[:6].reshape(*lead, D)
    for module in (sae, sae.to_inference()):
        out = module(x)
        assert set(out) == {"sae_out", "feature_acts"}
        assert out["sae_out"].shape == (*lead, D)
        assert out["feature_acts"].shape == (*lead, 48)
        codes = module.encode(x)
        assert torch.equal(out["sae_out"], module.decode(codes))
        assert torch.equal(out["feature_acts"], dense(codes))


@rows
def test_l0_law(row: Row) -> None:  # F20, F22, F44
    sae = shake(row.make())
    with torch.no_grad():
        sae.b_enc -= 1.5  # some tokens have fewer than k positive pre-activations
    h_BF = (sae.standardise(X) - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert (l0(sae.encode(X)) < 2).any()
    row.l0_law(sae.encode(X), h_BF)
    row.l0_law(sae.losses({HOOK: X}, END).codes, h_BF)


@rows
def test_every_weight_gets_a_gradient(row: Row) -> None:  # F19
    sae = shake(row.make())
    sae.losses({HOOK: X[:512]}, END).total.backward()
    for name, p in sae.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@rows
def test_loss_falls_and_the_planted_dictionary_is_found(row: Row) -> None:
    sae = row.make()
    first, last = train(sae, 700)
    assert last < 0.3 * first
    assert recovery(sae, TRUE) > row.recovers


@rows
@pytest.mark.parametrize(("center", "scale"), UNITS)
def test_folding_changes_nothing(row: Row, center: str, scale: str) -> None:
    sae = shake(row.make(center=center, scale=scale), 0.02)
    folded = sae.to_inference()
    with torch.no_grad():
        want, got = sae(X[:256]), folded(X[:256])
    for name in want:
        error = (want[name] - got[name]).norm() / want[name].norm()
        assert error < 1e-5, name
    assert all(not p.requires_grad for p in folded.parameters())


@rows
def test_the_decoder_bias_starts_at_the_mean(row: Row) -> None:
    for center, scale in UNITS:
        bias = row.make(center=center, scale=scale).to_inference().b_dec
        torch.testing.assert_close(bias, SPACES[HOOK].mean)


@rows
def test_saving_and_loading_is_bit_equal(row: Row, tmp_path: Path) -> None:  # F19
    sae = shake(row.make())
    sae.note_firing(sae.encode(X[:4]))
    other = row.make(seed=9)
    other.load_state_dict(sae.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in sae.state_dict().items())
    sae.to_inference().save(tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.source["architecture"] == row.name
    for name, value in sae.to_inference()(X[:8]).items():
        assert torch.equal(loaded(X[:8])[name], value)


@rows
def test_configs_survive_a_round_trip(row: Row) -> None:  # F19
    config = make_config(row.config())
    assert make_config({"name": row.name, **dataclasses.asdict(config)}) == config


@rows
def test_bfloat16_inference_is_close(row: Row, tmp_path: Path) -> None:
    sae = row.make()
    train(sae, 60)
    sae.to_inference().save(tmp_path)
    full, half = load_sae(tmp_path), load_sae(tmp_path, dtype=torch.bfloat16)
    want, got = full(X[:512])["sae_out"], half(X[:512].bfloat16())["sae_out"]
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()


@rows
def test_bfloat16_training_is_close(row: Row) -> None:
    exact, mixed = shake(row.make()), shake(row.make())
    exact.losses({HOOK: X[:512]}, END).total.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = mixed.losses({HOOK: X[:512]}, END)
    assert losses.total.dtype == torch.float32
    losses.total.backward()
    for (name, p), q in zip(exact.named_parameters(), mixed.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.1 * p.grad.norm(), name


@rows
def test_inference_does_not_depend_on_the_batch(row: Row) -> None:
    folded = shake(row.make()).to_inference()
    whole, order = folded(X[:64])["sae_out"], torch.randperm(64)
    torch.testing.assert_close(folded(X[:64][order])["sae_out"], whole[order])
    alone = torch.cat([folded(x[None])["sae_out"] for x in X[:64]])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)


@rows
def test_dead_latents_are_counted_in_tokens(row: Row) -> None:  # F53
    sae = row.make(dead_after_tokens=25)
    fires, silent = torch.zeros(2, 5, 48), torch.zeros(10, 48)
    fires[1, 4, 7] = 0.1
    for _ in range(2):
        sae.note_firing(fires)  # contexts (2, 5): 10 tokens
    for expected in (False, False, True):
        sae.note_firing(silent)
        assert sae.dead[7].item() is expected
    assert sae.tokens_since_fired[7] == 30
    assert (sae.tokens_since_fired[8:] == 50).all()
    sae.note_firing(fires)
    assert not sae.dead[7]


@rows
def test_unit_norm_decoders_stay_on_the_sphere(row: Row) -> None:
    sae = row.make()
    train(sae, 5)
    norms = sae.W_dec.norm(dim=1)
    free = getattr(sae.cfg, "decoder_norm_weighted", False)
    assert torch.allclose(norms, torch.ones(48), atol=1e-6) is not free
    sae.losses({HOOK: X[:64]}, END).total.backward()
    sae.before_step()
    radial = (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() / sae.W_dec.grad.norm(dim=1).max()
    assert (radial < 1e-5).item() is not free


# -- loss terms and gradients, against the references ----------------------------------------------


@pytest.mark.parametrize("kind", ["fvu", "mse", "sse"])
@pytest.mark.parametrize("aux_k", [0, 3, 48])
def test_topk_loss_and_gradients(kind: str, aux_k: int) -> None:  # F53
    sae = shake(TOPK.make(reconstruction=kind, aux_k=aux_k, dead_after_tokens=50).double())
    sae.tokens_since_fired[::5] = 51
    w, variance = weights(sae), sae.in_variance.item()
    losses = sae.losses({HOOK: X[:24].double()}, END)
    losses.total.backward()
    x = (X[:24].double() - sae.in_center) * sae.in_scale
    want, e, h = topk_reference(w, x, 2, kind, variance)
    torch.testing.assert_close(losses.terms["reconstruction"], want)
    if aux_k:
        aux = auxk_reference(w, e, h, sae.dead, aux_k) / 32
        torch.testing.assert_close(losses.terms["auxk"], aux)
        want = want + aux
    assert set(losses.terms) == {"reconstruction", *(["auxk"] if aux_k else [])}
    want.backward()
    assert_equal_gradients(sae, w)
    torch.testing.assert_close(losses.extras["fvu"], e.detach().square().sum() / 24 / variance)


@pytest.mark.parametrize("kind", ["fvu", "mse", "sse"])
@pytest.mark.parametrize("weighted", [True, False])
def test_relu_loss_and_gradients(kind: str, weighted: bool) -> None:  # F32
    sae = shake(RELU.make(reconstruction=kind, decoder_norm_weighted=weighted).double())
    w = weights(sae)
    losses = sae.losses({HOOK: X[:24].double()}, END)
    losses.total.backward()
    x = (X[:24].double() - sae.in_center) * sae.in_scale
    recon, penalty = relu_reference(w, x, kind, sae.in_variance.item(), weighted)
    torch.testing.assert_close(losses.terms["reconstruction"], recon)
    torch.testing.assert_close(losses.terms["l1"], 0.05 * penalty)
    (recon + 0.05 * penalty).backward()
    assert_equal_gradients(sae, w)


def test_mse_plus_lambda_l1_by_hand() -> None:  # F32
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    values = {"name": "relu", "n_latents": 2, "l1_coefficient": 0.1, "scale": "none"}
    plain = {"reconstruction": "mse", "decoder_norm_weighted": False, "l1_warmup_fraction": 0}
    sae = make_sae({**values, **plain}, {HOOK: space_of(x, HOOK)})
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        sae.b_enc.copy_(torch.tensor([-0.5, 0.0]))
        sae.b_dec.zero_()
    # Latents (0.5, 2) and (2.5, 0); reconstructions (1.7, 1.6) and (2.5, 0).
    losses = sae.losses({HOOK: x}, Progress(step=0, n_steps=9, tokens=2))
    torch.testing.assert_close(losses.total.item(), 0.225 + 0.1 * 2.5)


def test_l1_warms_up_linearly() -> None:
    sae = RELU.make(l1_warmup_fraction=0.25)
    for step, expected in ((0, 0.0), (10, 0.4), (25, 1.0), (99, 1.0)):
        losses = sae.losses({HOOK: X[:8]}, Progress(step=step, n_steps=100, tokens=8))
        full = sae.losses({HOOK: X[:8]}, END).terms["l1"]
        torch.testing.assert_close(losses.terms["l1"], expected * full)
        assert losses.extras["l1_coefficient"] == pytest.approx(expected * 0.05)


def test_a_larger_l1_coefficient_fires_fewer_latents() -> None:  # F20
    counts = []
    for coefficient in (0.001, 0.01, 0.1):
        sae = RELU.make(l1_coefficient=coefficient)
        train(sae, 150)
        counts.append(l0(sae.encode(X)).float().mean().item())
    assert counts[0] > 1.2 * counts[1] > 1.4 * counts[2] > 0


# -- dead latents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("revived", [True, False])
def test_auxk_revives_a_killed_latent(revived: bool) -> None:  # F53
    sae = TOPK.make(dead_after_tokens=1000, aux_k=8 if revived else 0)
    with torch.no_grad():
        sae.W_enc[:, 5] *= 1e-3  # positive at times, never among the largest
    before = sae.W_enc[:, 5].detach().clone()
    train(sae, 5, batch=200)
    assert not sae.dead.any()
    train(sae, 1, batch=200)
    assert sae.dead[5]
    train(sae, 100, batch=200)
    assert torch.equal(sae.W_enc[:, 5].detach(), before) is not revived
    assert (l0(sae.encode(X)) > 0).all()
    fired = (dense(sae.encode(X))[:, 5] > 0).any().item()
    assert fired is revived
    assert sae.dead[5].item() is not revived


def test_terms_keep_their_names_and_auxk_is_zero_until_something_is_dead() -> None:
    sae = TOPK.make(dead_after_tokens=50)
    before = sae.losses({HOOK: X[:32]}, END)
    sae.tokens_since_fired[3] = 51
    after = sae.losses({HOOK: X[:32]}, END)
    assert list(before.terms) == list(after.terms) == ["reconstruction", "auxk"]
    assert before.terms["auxk"] == 0
    assert after.terms["auxk"] > 0


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


def test_topk_steps_make_nothing_dense_after_the_selection() -> None:
    sae, recorder = TOPK.make(n_latents=2048), Recorder(512 * 2048)
    with recorder:
        sae.losses({HOOK: X[:512]}, END).total.backward()
    assert recorder.large == {"mm", "add_"}  # the pre-activations, and their bias
    assert "embedding_bag" in str(recorder.all)


def test_topk_steps_never_wait_for_the_device() -> None:
    sae = TOPK.make(n_latents=512).to("meta")  # has no values: asking for one raises
    losses = sae.losses({HOOK: X[:64].to("meta")}, END)
    assert set(losses.terms) == {"reconstruction", "auxk"}
    sae.note_firing(losses.codes)


# -- settings --------------------------------------------------------------------------------------

BAD = {
    "k=0": (TOPK, {"k": 0}, "sae.k: expected at least 1, got 0"),
    "k>F": (TOPK, {"k": 64, "n_latents": 32}, "sae.k=64 is larger than sae.n_latents=32"),
    "k>eF": (
        TOPK,
        {"k": 64, "n_latents": None, "expansion_factor": 2},
        "sae.k=64 is larger than sae.n_latents=32 (sae.expansion_factor=2 x width 16)",
    ),
    "aux_k": (TOPK, {"aux_k": -1}, "sae.aux_k: expected 0 (off) or more, got -1"),
    "alpha": (TOPK, {"auxk_alpha": -1.0}, "sae.auxk_alpha: expected 0 (off) or more, got -1.0"),
    "l1": (RELU, {"l1_coefficient": -0.1}, "sae.l1_coefficient: expected 0 or more, got -0.1"),
    "nan": (RELU, {"l1_coefficient": float("nan")}, "expected 0 or more, got nan"),
    "warmup": (RELU, {"l1_warmup_fraction": 1.5}, "sae.l1_warmup_fraction: expected 0 to 1"),
}
EVERY = {
    "neither": ({"n_latents": None}, "exactly one of n_latents and expansion_factor"),
    "both": ({"expansion_factor": 2}, "exactly one of n_latents and expansion_factor"),
    "no latents": ({"n_latents": 0}, "sae.n_latents: expected at least 1, got 0"),
    "typo": ({"n_latent": 9}, "unknown key 'sae.n_latent'. Did you mean n_latents"),
    "type": ({"dead_after_tokens": "many"}, "sae.dead_after_tokens: expected a whole number"),
    "choice": ({"scale": "sqrt"}, "sae.scale: expected one of 'none', 'sqrt_d', 'unit'"),
    "transcoder": ({"hook_out": "mlp.3"}, "sae.hook_out='mlp.3' differs from the input hook"),
}
ALL_BAD = [(f"{n}", r, v, m) for n, (r, v, m) in BAD.items()]
ALL_BAD += [(f"{n}-{r.name}", r, v, m) for n, (v, m) in EVERY.items() for r in (TOPK, RELU)]


@pytest.mark.parametrize(("row", "values", "message"), [b[1:] for b in ALL_BAD], ids=lambda v: "")
def test_bad_settings(row: Row, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        row.make(**values)
    assert message in str(error.value)


def test_k_has_no_default() -> None:
    with pytest.raises(ConfigError, match=r"missing: sae\.k"):
        make_config({"name": "topk", "n_latents": 8})


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean topk"):
        make_config({"name": "topkk", "n_latents": 8})


def test_naming_the_input_hook_as_output_is_an_autoencoder() -> None:
    assert TOPK.make(hook_out=HOOK).hooks_out == (HOOK,)


def test_a_hook_that_does_not_vary_is_refused() -> None:
    flat = {HOOK: space_of(torch.ones(8, D), HOOK)}
    with pytest.raises(ConfigError, match=r"resid\.2.*variance 0\.0.*nothing to learn"):
        make_sae(TOPK.config(), flat)
    with pytest.raises(ConfigError, match=r"sae\.scale=sqrt_d divides by the mean norm"):
        make_sae(TOPK.config(), {HOOK: space_of(torch.zeros(8, D), HOOK)})


def test_several_input_hooks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reads one hook, got 2: resid\.2, resid\.3"):
        make_sae(TOPK.config(), SPACES | {"resid.3": space_of(X, "resid.3")})


def test_an_option_without_effect_is_said_aloud() -> None:
    with pytest.warns(UserWarning, match=r"sae\.aux_k=5 has no effect: sae\.auxk_alpha=0"):
        sae = TOPK.make(aux_k=5, auxk_alpha=0.0)
    assert "auxk" not in sae.losses({HOOK: X[:4]}, END).terms
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TOPK.make(auxk_alpha=0.0).aux_k == 0


def test_aux_k_defaults_to_half_the_width_within_the_latents() -> None:
    assert TOPK.make().aux_k == D // 2
    assert TOPK.make(n_latents=3).aux_k == 3
    assert TOPK.make(aux_k=1000).aux_k == 48


# -- files, and adding your own --------------------------------------------------------------------


def test_files_configs_and_rows_agree() -> None:
    files = {p.stem for p in (ROOT / "saetrain/saes").glob("*.py")}
    names = files - {"base", "__init__", "__main__"}
    configs = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / "conf/sae").glob("*.yaml")}
    assert names == set(configs) == {row.name for row in ROWS}
    for stem, values in configs.items():
        assert values["name"] == stem
        fields = dataclasses.fields(load_all()[stem].Config)
        assert set(values) - {"name"} == {f.name for f in fields}
        for f in (f for f in fields if f.default not in (dataclasses.MISSING, None)):
            assert values[f.name] == f.default, f"{stem}.yaml and the class differ in {f.name}"
        make_config(values)


CUSTOM = '''
from dataclasses import dataclass
import torch
from torch import nn
from saetrain.artefact import fold
from saetrain.losses import reconstruction
from saetrain.saes.base import SAE, Losses, SAEConfig, register

@dataclass(frozen=True, kw_only=True)
class LinearConfig(SAEConfig):
    gain: float = 1.0

@register("linear_{suffix}", LinearConfig)
class Linear(SAE):
    """No sparsity at all."""

    def __init__(self, cfg, spaces):
        super().__init__(cfg, spaces)
        self.W = nn.Parameter(cfg.gain * torch.eye(self.d_in, self.n_latents))

    def encode(self, x):
        return (self.standardise(x) @ self.W).relu()

    def decode(self, codes):
        return self.unstandardise(codes @ self.W.T)

    def losses(self, acts, progress):
        x = acts[self.hooks_in[0]]
        codes = self.encode(x)
        e = self.standardise(x) - codes @ self.W.T
        return Losses({{"reconstruction": reconstruction(e, "mse", 1.0, self.d_in)}}, codes)

    def to_inference(self):
        raise NotImplementedError
'''


@pytest.fixture
def own_names() -> Iterator[None]:
    """Forget architectures that a test registers."""
    known = set(load_all())
    yield
    for name in set(registry()) - known:
        del saes.base._REGISTRY[name]


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize("as_folder", [False, True])
def test_your_own_file_is_found(tmp_path: Path, as_folder: bool) -> None:  # F36
    suffix = "folder" if as_folder else "file"
    file = tmp_path / f"mine_{suffix}.py"
    file.write_text(CUSTOM.format(suffix=suffix))
    values = {"name": f"linear_{suffix}", "n_latents": 20, "gain": 2}
    with pytest.raises(ConfigError, match="saes_path"):
        make_config(values)
    sae = make_sae(values, SPACES, [tmp_path if as_folder else file])
    assert sae.name == f"linear_{suffix}"
    assert sae.losses({HOOK: X[:8]}, END).total > 0
    with pytest.raises(ConfigError, match="Did you mean gain"):
        make_config({**values, "gian": 2.0}, [file])


@pytest.mark.usefixtures("own_names")
def test_an_installed_package_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F36
    (tmp_path / "somebodys_saes.py").write_text(CUSTOM.format(suffix="installed"))
    info = tmp_path / "somebodys_saes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-saes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[saetrain.saes]\nlinear = somebodys_saes\n")
    monkeypatch.syspath_prepend(tmp_path)
    sae = make_sae({"name": "linear_installed", "n_latents": 20}, SPACES)
    assert type(sae).__module__ == "somebodys_saes"


def test_a_missing_saes_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_all([tmp_path / "nowhere.py"])


@pytest.mark.usefixtures("own_names")
def test_a_taken_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "thief.py").write_text(CUSTOM.replace("linear_{suffix}", "topk").format())
    with pytest.raises(ConfigError, match=r"'topk' is taken by saetrain\.saes\.topk\.TopK"):
        load_all([tmp_path])
