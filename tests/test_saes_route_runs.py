"""Routed SAEs, MLSAE and MoLT on stores: from the command line on what a real host computed, scores
by hand, reports, and what stores lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache import SMALL
from stores import make_store
from torch import Tensor

from actcache.host import HostSettings
from actcache.run import CacheSettings
from actcache.run import run as cache
from actcache.sources import DataSettings
from actcache.store import open_store
from saetrain.artefact import Inference, load_sae
from saetrain.cli import main
from saetrain.codes import dense
from saetrain.stream import Stream

LAYERS = ("resid.0", "resid.1", "resid.2")
WORDS = (
    "store=store",
    "hook=resid.1",
    "batch_tokens=64",
    "held_out_fraction=0.2",
    "optim.lr=1e-2",
    "epochs=10",
    "progress=false",
)
CASES: dict[str, tuple[str, ...]] = {
    "hard": ("sae=route", "sae.hooks_in=[resid.0,resid.1,resid.2]", "sae.k=8"),
    "soft": ("sae=route", "sae.start_layer=0", "sae.end_layer=3", "sae.routing=soft", "sae.k=8"),
    "route_matryoshka": ("sae=route_matryoshka", "sae.n_layers=4", "sae.k=8"),
    "mlsae": ("sae=mlsae", "sae.hooks_in=[blocks.0.hook_resid_post,resid.1,resid.2]", "sae.k=8"),
    "molt": ("sae=molt", "sae.hook_out=mlp.2", "sae.ranks={4:8,2:24}", "sae.n_latents=32"),
}


def command(*words: str) -> int:
    try:
        main(list(words))
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0


@pytest.fixture(scope="module")
def store(tiny_host: Path, tiny_parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers of the tiny host."""
    path = tmp_path_factory.mktemp("layers") / "store"
    settings = CacheSettings(
        host=HostSettings(model=str(tiny_host), batch_tokens=128),
        data=DataSettings(files=str(tiny_parquet), id_column="id"),
        store=str(path),
        hooks=(*LAYERS, "mlp.2"),
        context=32,
        layout=SMALL,
        progress=False,
    )
    cache(settings)
    return path


@pytest.fixture
def real(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a link to the store, to run commands in."""
    (tmp_path / "store").symlink_to(store)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def held_out(hooks: tuple[str, ...]) -> dict[str, Tensor]:
    """All held-out rows of some hooks."""
    stream = Stream(
        open_store("store").snapshot(),
        hooks,
        batch_tokens=64,
        seed=0,
        split="held_out",
        held_out_fraction=0.2,
    )
    batches = [batch.acts for batch in stream.one_pass()]
    return {hook: torch.cat([acts[hook] for acts in batches]).clone() for hook in hooks}


def fve(y: Tensor, guess: Tensor) -> float:
    y, guess = y.double(), guess.double()
    return 1 - float((y - guess).square().sum() / (y - y.mean(0)).square().sum())


def by_hand(sae: Inference, case: str) -> tuple[float, float]:
    """(FVE, L0) over all held-out rows at once."""
    acts = held_out((*LAYERS, "mlp.2"))
    if case == "molt":
        out, y = sae(acts["resid.1"]), acts["mlp.2"]
        return fve(y, out["sae_out"]), float((out["feature_acts"] > 0).sum(-1).float().mean())
    x = torch.stack([acts[hook] for hook in LAYERS], dim=1)
    out = sae(x)
    fires = float((out["feature_acts"] > 0).sum(-1).float().mean())
    if case == "mlsae":
        each = [fve(x[:, i], out["sae_out"][:, i]) for i in range(3)]
        return sum(each) / 3, fires
    return fve(sae.target(x), out["sae_out"]), fires


@pytest.mark.parametrize("case", CASES)
def test_they_train_on_real_activations_from_the_command_line(  # F25 F26 F59
    real: Path, case: str, capsys: Any
) -> None:
    latents = () if case == "molt" else ("sae.n_latents=64",)
    assert command(*CASES[case], *latents, *WORDS) == 0, capsys.readouterr().err
    (run_dir,) = (p.parent for p in Path("runs").rglob("run.json"))
    scores = json.loads((run_dir / "eval.json").read_text())
    sae = load_sae(run_dir / "sae")
    with torch.no_grad():
        want_fve, want_l0 = by_hand(sae, case)
    assert scores["fve"] == pytest.approx(want_fve, abs=1e-5)
    assert scores["l0"] == pytest.approx(want_l0, rel=1e-4)
    assert scores["fve"] > 0.3
    assert scores["tokens"] == len(held_out(("resid.1",))["resid.1"])
    assert scores["pca"] is None
    if case != "molt":
        assert sae.hooks_in == sae.hooks_out == LAYERS
        assert json.loads((run_dir / "run.json").read_text())["hooks"]["in"] == list(LAYERS)
    if case not in ("molt", "mlsae"):
        assert list(scores["layers"]) == list(LAYERS)
        assert sum(scores["layers"].values()) == pytest.approx(1)
    features = json.loads((run_dir / "features.json").read_text())
    assert features["n_tokens"] == scores["tokens"]
    assert (run_dir / "report.html").stat().st_size > 10_000
    _check_fires(sae, case, features["latents"]["fires"])
    capsys.readouterr()
    assert command("evaluate", str(run_dir)) == 0
    assert json.loads((run_dir / "eval.json").read_text()) == scores


def _check_fires(sae: Inference, case: str, fires: list[int]) -> None:
    """The report counts a latent on a token where it fires on one of its layers."""
    acts = held_out(LAYERS)
    x = acts["resid.1"] if case == "molt" else torch.stack([acts[h] for h in LAYERS], 1)
    with torch.no_grad():
        f = dense(sae.encode(x)) > 0
    want = (f.any(1) if f.dim() == 3 else f).sum(0)
    assert np.abs(np.array(fires) - want.numpy()).sum() <= 2  # ties of float32


BAD: list[tuple[tuple[str, ...], str]] = [
    (("sae=route", "sae.hooks_in=[resid.0,resid.7]"), "hook 'resid.7' is not in"),
    (("sae=route", "sae.start_layer=1", "sae.end_layer=5"), "resid.3"),
    (("sae=mlsae",), "this SAE reads several layers: give sae.hooks_in=[resid.1,resid.2"),
    (("sae=mlsae", "sae.hooks_in=[resid.0,mlp.0]"), "resid.0 has 16, mlp.0 has 12"),
    (("sae=route", "sae.n_layers=12", "sae.end_layer=20"), "which are 0 to 11 by sae.n_layers=12"),
    (("sae=molt",), "sae.hook_out=None: sae.name=molt reads the hook given by hook (resid.0)"),
    (("sae=molt", "sae.hook_out=mlp.0", "sae.ranks={4:3}"), "add up to sae.n_latents=62"),
    (
        ("sae=molt", "sae.hook_out=mlp.0", "sae.ranks={13:62}"),
        "rank 13 is more than the narrower hook's width, 12",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_what_does_not_fit_the_store_is_said(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    hooks = {"resid.0": 16, "resid.1": 16, "resid.2": 16, "mlp.0": 12}
    make_store(tmp_path / "store", hooks=hooks, segments=(512,))
    more = ("store=store", "hook=resid.0", "tokens=640", "batch_tokens=64", "held_out_fraction=0.2")
    assert command(*words, *more, "progress=false") != 0
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(Path("runs").rglob("run.json"))
