"""Runs of SAEs over several hooks on cached activations of a real (tiny) host: command, scores per
output hook, records, report, features; and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cache import SMALL, contexts_of
from commands import read, rows_of
from fakes import FakeStream
from saes_reference import space_of
from saes_rows_multi import BOTH, CROSSCODER, SKIP
from stores import make_store
from test_train_cli import only_run, run
from training import interrupted, planted_store, same, settings

from actcache.host import HostSettings, new_causal_lm
from actcache.run import CacheSettings
from actcache.run import run as cache
from actcache.sources import DataSettings
from actcache.store import open_store
from saetrain import train
from saetrain.artefact import Inference, load_sae
from saetrain.codes import dense
from saetrain.dashboard.features import collect
from saetrain.evals import reconstruction
from saetrain.metrics import Reconstruction
from saetrain.stacking import stacked

HOOKS = ("resid_pre.0", "resid_pre.1", "resid_pre.2", "mlp.0", "mlp.1", "mlp.2", "resid.1")
IN, OUT = "[resid_pre.0,resid_pre.1,resid_pre.2]", "[mlp.0,mlp.1,mlp.2]"
SETTINGS = ("batch_tokens=64", "tokens=6400", "held_out_fraction=0.2", "progress=false")
LEARN = ("optim.lr=1e-2", "log_every=20", "eval.bootstrap=20", "sae.n_latents=64")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_host: Path, tiny_parquet: Path) -> Path:
    """base: seven hooks of the tiny host. chat: one hook of a host with other weights."""
    folder = tmp_path_factory.mktemp("multi")
    config = json.loads((tiny_host / "config.json").read_text())
    keys = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    keys += ("num_attention_heads", "max_position_embeddings", "bos_token_id", "eos_token_id")
    other = new_causal_lm({k: config[k] for k in keys}, seed=1)
    (folder / "host").mkdir()
    for file in tiny_host.glob("tokenizer*"):
        os.link(file, folder / "host" / file.name)
    other.save_pretrained(folder / "host")
    for name, host, hooks in (("base", tiny_host, HOOKS), ("chat", folder / "host", ("resid.1",))):
        cache(
            CacheSettings(
                host=HostSettings(model=str(host), batch_tokens=128),
                data=DataSettings(files=str(tiny_parquet), id_column="id"),
                store=str(folder / name),
                hooks=hooks,
                context=32,
                layout=SMALL,
                progress=False,
            )
        )
    return folder


@pytest.fixture
def here(stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "chat"):
        (tmp_path / name).symlink_to(stores / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CASES = {
    "transcoder": ("hook=resid_pre.1", "sae=transcoder", "sae.hook_out=blocks.1.hook_mlp_out"),
    "skip": ("hook=resid_pre.1", "sae=transcoder", "sae.hook_out=mlp.1", "sae.skip=true"),
    "crosscoder": ("sae=crosscoder", "sae.hooks_in=[resid_pre.1,resid.1]"),
    "models": ("sae=crosscoder", "sae.hooks_in=[base:resid.1,chat:resid.1]"),
    "clt": ("sae=clt", f"sae.hooks_in={IN}", f"sae.hooks_out={OUT}"),
    "clt_topk": (
        *("sae=clt", f"sae.hooks_in={IN}", f"sae.hooks_out={OUT}"),
        *("sae.activation=topk", "+sae.k=8", "sae.penalty=null", "sae.auxk_alpha=0.03125"),
    ),
    "diffing": (
        *("sae=crosscoder", "sae.hooks_in=[base:resid.1,chat:resid.1]", "sae.activation=batchtopk"),
        *("+sae.k=16", "sae.penalty=null", "sae.l1_coefficient=null", "sae.auxk_alpha=0.03125"),
    ),
    "relu": (
        *("hook=resid_pre.1", "sae=transcoder", "sae.hook_out=mlp.1", "sae.activation=relu"),
        *("sae.k=null", "sae.penalty={name:l1,coefficient:0.02}"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_trains_on_cached_activations_from_the_command_line(here: Path, case: str) -> None:
    # F59: learns, is scored per output hook by brute force, leaves records and a report.
    joined = case in ("models", "diffing")
    where = "stores={base:base,chat:chat}" if joined else "store=base"
    assert run(where, *CASES[case], *SETTINGS, *LEARN) == 0
    folder = only_run()
    sae, scores, record = load_sae(folder / "sae"), read(folder / "eval.json"), None
    record = read(folder / "run.json")
    first, *_, last = [r for r in rows_of(folder) if "fve" in r]
    assert last["fve"] > 0.3 > first["fve"] or last["fve"] > first["fve"] + 0.3
    assert set(record["activation_ids"]) == {*sae.hooks_in, *sae.hooks_out}
    one = len(sae.hooks_out) == 1
    assert record["hooks"]["out"] == (sae.hooks_out[0] if one else list(sae.hooks_out))
    x, y = held_out_rows(sae, joined)
    with torch.no_grad():
        out = sae(x)
    got = out["sae_out"].reshape(y.shape)
    each = [fve(y[:, g], got[:, g]) for g in range(y.shape[1])]
    assert scores["fve"] == pytest.approx(np.mean(each), abs=1e-4)
    if not one:
        found = [scores["hooks"][hook]["fve"] for hook in sae.hooks_out]
        assert found == pytest.approx(each, abs=1e-4)
        assert {f"fvu/{hook}" for hook in sae.hooks_out} <= set(last)
    assert scores["l0"] == pytest.approx(float((out["feature_acts"] > 0).sum(1).float().mean()))
    assert (scores["pca"], scores["tokens"]) == (None, len(x))
    page = (folder / "report.html").read_text()
    assert all(f"By output hook: {h}" in page or one or h in page for h in sae.hooks_out)
    assert read(folder / "features.json")["n_latents"] == sae.n_latents
    before = (folder / "eval.json").read_bytes()
    assert run("evaluate", str(folder)) == 0
    assert json.loads(before) == read(folder / "eval.json")


def held_out_rows(sae: Inference, joined: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, (N, G, E) outputs) of held-out tokens, special ones left out, read by zarr."""
    from actcache.store import FLAG_SPECIAL
    from actcache.store.split import held_out

    parts: dict[str, list[torch.Tensor]] = {}
    for name in dict.fromkeys((*sae.hooks_in, *sae.hooks_out)):
        label, _, hook = name.rpartition(":") if joined else ("base", "", name)
        for segment in open_store(label).snapshot().segments:
            table = segment.tokens()
            keep = held_out(table.doc, 0.2) & ((table.flags & FLAG_SPECIAL) == 0)
            rows = np.asarray(segment.acts(hook).read(), dtype=np.float32)[keep]
            parts.setdefault(name, []).append(torch.from_numpy(rows))
    acts = {name: torch.cat(rows) for name, rows in parts.items()}
    return stacked(acts, sae.hooks_in), torch.stack([acts[h] for h in sae.hooks_out], 1)


def fve(y: torch.Tensor, got: torch.Tensor) -> float:
    y, got = y.double(), got.double()
    return float(1 - (y - got).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("name", ["crosscoder", "clt", "transcoder"])
def test_a_run_stopped_halfway_ends_with_the_same_weights(tmp_path: Path, name: str) -> None:
    hooks = ("resid_pre.0", "resid_pre.1", "mlp.0", "mlp.1")
    planted_store(tmp_path / "store", hooks=hooks, segments=(1024,))
    several = {"hooks_in": hooks[:2]} | ({"hooks_out": hooks[2:]} if name == "clt" else {})
    sae = {"name": name, "n_latents": 32} | (
        {"hook_out": "mlp.1", "k": 4} if name == "transcoder" else several
    )
    changes = {"sae": sae, "hook": hooks[0], "precision": "bf16"}
    whole, halved = (
        settings(tmp_path / "store", tmp_path / folder, **changes) for folder in ("a", "b")
    )
    train(whole)
    interrupted(halved, 11)
    train(halved)
    same(whole.run_dir, halved.run_dir)


# -- scores ----------------------------------------------------------------------------------------


def test_scores_of_several_hooks_are_those_of_each_and_their_mean() -> None:
    x = torch.cat(list(BOTH.values()), 1)[:300].numpy()

    class Stream(FakeStream):
        def _batch(self, rows, epoch, step):
            batch = super()._batch(rows, epoch, step)
            both = batch.acts.pop("resid.2")
            batch.acts.update(zip(BOTH, both.split(16, 1), strict=True))
            return batch

    sae = CROSSCODER.make().to_inference()
    names = tuple(BOTH)
    mean = torch.stack([space_of(r, h).mean for h, r in BOTH.items()])
    args = {"hook_in": names, "hook_out": names, "reference": mean}
    got = reconstruction.evaluate(sae, Stream(x, 32).one_pass(), **args)
    y = sae(torch.stack([r[:300] for r in BOTH.values()], 1))["sae_out"]
    for g, (hook, rows) in enumerate(BOTH.items()):
        single = Reconstruction(mean[g])
        single.update(rows[:300], y[:, g])
        for name, value in single.compute().items():
            assert got["hooks"][hook][name] == pytest.approx(value, rel=1e-4), name
    for name in ("fve", "mse", "nmse", "cos", "norm_ratio"):
        assert got[name] == pytest.approx(np.mean([got["hooks"][h][name] for h in BOTH]))
    apart = [got["hooks"][h]["fve_se"] for h in BOTH]
    assert 0 < got["fve_se"] <= max(apart)  # of the mean, over the same draws
    assert got["formulas"]["fve"].startswith("mean over 2 output hooks of 1 - S")

    class Perfect:
        def encode(self, x):
            return torch.ones(len(x), 3)

        def decode(self, codes):
            return torch.zeros(len(codes), 2, 16)

        def reconstruct(self, x, codes):
            return x

    exact = reconstruction.evaluate(Perfect(), Stream(x, 32).one_pass(), **args)
    assert (exact["fve"], exact["fve_se"]) == (1.0, 0.0)


def test_a_skip_counts_in_scores() -> None:
    sae = SKIP.make()
    with torch.no_grad():
        sae.W_skip.normal_()
    saved, x = sae.to_inference(), SKIP.inputs(sae, slice(9))
    codes = saved.encode(x)
    assert not torch.allclose(saved.decode(codes), saved.reconstruct(x, codes))
    assert torch.equal(saved(x)["sae_out"], saved.reconstruct(x, codes))


# -- features --------------------------------------------------------------------------------------


def test_features_read_all_hooks_row_by_row(tmp_path: Path) -> None:
    """With chunks of 100 rows in one hook and 64 in the other."""
    rows = {"resid.1": 16, "resid.2": 16}
    make_store(tmp_path / "s", hooks=rows, segments=(512, 320), dtype="float32")
    snapshot = open_store(tmp_path / "s").snapshot()
    spaces = {h: torch.cat([_rows(s, h) for s in snapshot.segments]) for h in rows}
    sae = CROSSCODER.make()
    sae.hooks_in = tuple(rows)
    saved = sae.to_inference()
    table = collect(saved, snapshot, tuple(rows), split="all", features=[3], top_contexts=2)
    special = torch.cat([_special(s) for s in snapshot.segments])
    f = dense(saved.encode(torch.stack(list(spaces.values()), 1)))[~special]
    assert table.n_tokens == len(f)
    assert table.fires_F.tolist() == (f > 0).sum(0).tolist()
    np.testing.assert_allclose(table.sum_F, f.double().sum(0).numpy(), rtol=1e-5)


def _rows(segment, hook: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(segment.acts(hook).read(), dtype=np.float32))


def _special(segment) -> torch.Tensor:
    return torch.from_numpy((segment.tokens().flags & 1) != 0)


# -- refused ---------------------------------------------------------------------------------------

REFUSED = {
    "no output": (("sae=transcoder", "hook=resid.1"), "missing: sae.hook_out"),
    "no such layer": (
        ("sae=crosscoder", "sae.hooks_in=[resid.1,resid.7]"),
        "resid.7",
    ),
    "no such output": (("sae=transcoder", "hook=resid.1", "sae.hook_out=mlp.9"), "mlp.9"),
    "no hooks": (("sae=crosscoder",), "sae.hooks_in=[resid.1,resid.2]"),
    "alias of the same": (
        ("sae=crosscoder", "sae.hooks_in=[resid.1,blocks.1.hook_resid_post]"),
        "sae.hooks_in names resid.1 more than once",
    ),
    "half a clt": (("sae=clt", f"sae.hooks_in={IN}"), "missing: sae.hooks_out"),
    "tokens of two": (
        ("sae=crosscoder", "sae.hooks_in=[base:resid.1,chat:resid.1]"),
        "base:resid.1",
    ),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_hooks_that_do_not_fit_are_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert run("store=base", *words, *SETTINGS) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(Path("runs").rglob("run.json")) if Path("runs").exists() else True


def test_a_hook_that_is_not_read_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sae=crosscoder", "sae.hooks_in=[resid_pre.1,resid.1]", "hook=mlp.1", "report=false")
    assert run("store=base", *words, *SETTINGS, "tokens=128", "sae.n_latents=16") == 0
    said = capsys.readouterr().err
    assert "hook=mlp.1 has no effect: sae.name=crosscoder reads resid_pre.1, resid.1" in said
    assert only_run().name.startswith("crosscoder-resid_pre.1-")


def test_both_stores_hold_the_same_tokens(stores: Path) -> None:
    a, b = (contexts_of(open_store(stores / n).snapshot()) for n in ("base", "chat"))
    assert a.keys() == b.keys()
    assert not any(np.allclose(a[k][2]["resid.1"], b[k][2]["resid.1"]) for k in a)
