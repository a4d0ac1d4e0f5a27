"""Every file of conf/experiment runs as it is, but for its size."""

import json

import pytest
from training import planted_store

from saetrain.cli import config_dir, main

NAMES = sorted(f.stem for f in (config_dir() / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments") / "store"
    planted_store(folder, hooks=("resid.2", "resid.5"), segments=(1024,))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_experiments_run_with_tiny_overrides(store, name, tmp_path, monkeypatch):  # F70
    monkeypatch.chdir(tmp_path)
    hook = "resid.5" if name == "pythia_160m_l5r" else "resid.2"
    main(
        (
            f"+experiment={name}", f"store={store}", f"hook={hook}", "epochs=null", "tokens=1280",
            "batch_tokens=64", "sae.n_latents=48", "sae.expansion_factor=null",
            "held_out_fraction=0.2", "eval.pca_tokens=0", "report=false", "progress=false",
            "precision=fp32", *(["sae.k=4"] if name.startswith("topk") else []),
        )
    )  # fmt: skip
    (found,) = tmp_path.rglob("eval.json")
    assert json.loads(found.read_text())["fve"] > -1.0
    config = json.loads((found.parent / "config.json").read_text())
    if name == "pythia_160m_l5r":
        assert config["sae"]["penalty"]["name"] == "tanh_quad"
        assert config["optim"]["jumprelu_lr_factor"] == 0.1
        assert found.parent.parent.name == "pythia-sae"
