"""Lorsa from the command line on contexts of a real host, and streams that it cannot read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cache import SMALL
from saes_rows import END
from stores import make_store
from test_lorsa import IN, OUT, X, Y, make
from torch import Tensor
from training import interrupted, same

from actcache.data import PackSettings
from actcache.run import run as cache
from actcache.store import open_store
from saetrain.artefact import load_sae
from saetrain.cli import main
from saetrain.codes import dense
from saetrain.errors import ConfigError
from saetrain.settings import TrainSettings
from saetrain.stream import SequenceStream, Stream
from saetrain.trainer import train
from saetrain.units import DOCUMENT

WORDS = (
    f"hook={IN}",
    f"sae.hook_out={OUT}",
    "sae=lorsa",
    "sae.n_latents=64",
    "sae.heads_per_qk=16",
    "sae.d_qk=8",
    "sae.k=8",
    "batch_tokens=64",
    "held_out_fraction=0.2",
    "optim.lr=5e-3",
    "progress=false",
)


def command(*words: str) -> int:
    try:
        main(list(words))
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0


@pytest.mark.parametrize(("order", "across"), [("context", False), ("permuted", True)])
def test_it_trains_on_real_contexts_from_the_command_line(  # F59
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, across: bool
) -> None:
    """What attention of a real host adds is predicted from what it reads, on held-out rows.

    From the first store by a host that kept packed documents apart, which the Lorsa does, too.
    """
    monkeypatch.chdir(tmp_path)
    pack = PackSettings(attend_across_documents=across)
    wanted = asked(hooks=(f"gpt_neox.{IN}", OUT), layout=replace(SMALL, order=order), pack=pack)
    snapshot = cache(wanted).store.snapshot()
    assert command("store=store", "epochs=12", *WORDS) == 0
    (run_dir,) = (p.parent for p in Path("runs").rglob("run.json"))
    scores = json.loads((run_dir / "eval.json").read_text())
    assert scores["fve"] > 0.3
    assert 0 < scores["l0"] <= 8
    held_out = SequenceStream(
        snapshot,
        (IN, OUT),
        batch_sequences=2,
        split="held_out",
        held_out_fraction=0.2,
    )
    assert scores["tokens"] == held_out.n_rows
    sae, wrong, about, fires = load_sae(run_dir / "sae"), 0.0, [], 0
    by_context: dict[tuple[int, int], Tensor] = {}
    for found in held_out.one_pass():  # by hand
        assert (DOCUMENT in found.inputs) is not across
        document = None if across else torch.from_numpy(found.tokens.doc.view("int64"))
        codes = sae.encode(found.acts[IN], found.present, document)
        y = found.acts[OUT][found.mask].double()
        wrong += (y - sae.decode(codes)[found.mask]).square().sum().item()
        about.append(y)
        fires = fires + (dense(codes)[found.mask] > 0).sum(0)
        names = zip(found.segment.tolist(), found.ctx.tolist(), strict=True)
        by_context |= dict(zip(names, dense(codes), strict=True))
    y = torch.cat(about)
    assert scores["fve"] == pytest.approx(1 - wrong / (y - y.mean(0)).square().sum().item())
    assert scores["l0"] == pytest.approx(int(fires.sum()) / len(y))
    assert (run_dir / "report.html").is_file()
    features = json.loads((run_dir / "features.json").read_text())
    assert features["n_tokens"] == len(y)
    assert features["latents"]["fires"] == fires.tolist()
    shown = [e for card in features["cards"] for e in card["examples"]]
    assert len(shown) > 20
    for card in features["cards"]:
        for example in card["examples"]:
            want = by_context[example["segment"], example["ctx"]][:, card["id"]]
            got = torch.tensor([a or 0.0 for a in example["act"]])
            mine = torch.tensor([a is not None for a in example["act"]])
            torch.testing.assert_close(got[mine], want[: len(got)][mine], rtol=1e-2, atol=1e-3)
    assert command("evaluate", str(run_dir)) == 0
    assert json.loads((run_dir / "eval.json").read_text()) == scores


def settings(store: Path, runs_dir: Path, **more: Any) -> TrainSettings:
    sae = {"name": "lorsa", "n_latents": 32, "heads_per_qk": 8, "d_qk": 4, "k": 4}
    values = {
        "store": str(store),
        "runs_dir": str(runs_dir),
        "sae": sae | {"hook_out": "attn.2"},
        "hook": "resid.1",
        "batch_tokens": 128,
        "tokens": 1280,
        "held_out_fraction": 0.2,
        "progress": False,
        "report": False,
    }
    return TrainSettings.from_mapping(values | more)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "store", hooks={"resid.1": 16, "attn.2": 16}, segments=(512, 512))
    return tmp_path / "store"


def test_streams_of_rows_and_of_contexts_are_not_taken_for_each_other(
    store: Path, tmp_path: Path
) -> None:
    cfg = settings(store, tmp_path / "runs")
    snapshot, hooks = open_store(store).snapshot(), ("resid.1", "attn.2")
    rows = [Stream(snapshot, hooks, batch_tokens=128, split=s) for s in ("train", "held_out")]
    with pytest.raises(ConfigError, match="single, shuffled rows of a store of order=permuted"):
        train(cfg, stream=rows[0], held_out=rows[1])
    contexts = SequenceStream(snapshot, hooks, batch_sequences=4)
    topk = {"name": "topk", "n_latents": 32, "k": 4}
    with pytest.raises(ConfigError, match=r"sae\.name=topk reads single rows"):
        train(replace(cfg, sae=topk), stream=contexts, held_out=contexts)
    with pytest.raises(ConfigError, match=r"whole contexts \(S, T, d\) with their masks"):
        make().losses({IN: X[0], OUT: Y[0]}, END)


def test_batches_are_whole_contexts(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"32 tokens long in this store; .* batch_tokens=96"):
        train(settings(store, tmp_path / "runs", batch_tokens=100))
    two = {"a": str(store), "b": str(store)}
    mixed = {"stores": two, "mix": {"a": 1.0, "b": 1.0}}
    cfg = replace(settings(store, tmp_path / "runs"), store=None, **mixed)
    with pytest.raises(ConfigError, match="mix: this SAE reads whole contexts"):
        train(cfg)


def test_a_resumed_run_gives_the_same_weights(store: Path, tmp_path: Path) -> None:
    more = {"checkpoint": {"every_steps": 3, "keep": 2}, "log_every": 2}
    interrupted(settings(store, tmp_path / "a", **more), 5)
    a = train(settings(store, tmp_path / "a", **more))
    b = train(settings(store, tmp_path / "b", **more))
    assert a.trained_steps == 5
    same(a.run_dir, b.run_dir)
