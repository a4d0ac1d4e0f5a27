"""The stream's settings, each with an effect, and what a run says about its data.  # F115"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeStream, planted
from faulty_proxy import folder_server
from stores import make_store
from training import planted_store, rows, same, settings

from saetrain import runs, train
from saetrain.cli import main
from saetrain.errors import ConfigError
from saetrain.log import METRICS, read_metrics
from saetrain.stream import Stream
from saetrain.stream.mixing import measure
from saetrain.sweep import train_together

SAES = [{"name": "topk", "n_latents": 48, "k": k, "dead_after_tokens": 300} for k in (2, 4)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return planted_store(tmp_path_factory.mktemp("told") / "store").path


@pytest.fixture(scope="module")
def contiguous(tmp_path_factory) -> Path:
    """Contexts of 64 tokens, stored whole: small windows mix them badly."""
    path = tmp_path_factory.mktemp("told") / "contiguous"
    return make_store(path, segments=(2048, 1024), context=64, order="context").path


def stream_of(store: Path, **stream) -> Stream:
    cfg = settings(store, Path("unused"), stream=stream)
    source = runs.open_source(
        runs.resolve(cfg, snapshot := runs.open_snapshot(cfg)),
        snapshot,
        runs.resolve_device("cpu"),
    )
    assert isinstance(source.train, Stream)
    return source.train


def first_rows(stream: Stream) -> list[tuple[int, ...]]:
    batch = next(iter(stream))
    t = batch.tokens
    return list(zip(batch.segment.tolist(), t.ctx.tolist(), t.pos.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "value"), [("window_rows", 300), ("run_chunks", 4), ("shuffle", False)]
)
def test_each_setting_of_the_order_changes_it(store, name, value):
    # In windows of the whole store's size units come in any order: only smaller ones show it.
    base = {"window_rows": 500}
    plain, other = stream_of(store, **base), stream_of(store, **(base | {name: value}))
    assert getattr(other, name) == value
    assert first_rows(plain) != first_rows(other)
    assert plain.n_rows == other.n_rows


def test_each_filter_changes_the_rows(tmp_path):
    flags = np.array([0, 1, 8, 2 << 4, 3 << 4], dtype=np.uint8)

    def acts(hook, rng, tokens, d):
        tokens.flags[:] = flags[np.arange(len(tokens)) % 5]
        return rng.normal(size=(len(tokens), d))

    path = make_store(tmp_path / "s", segments=(640, 640), acts=acts).path
    n = {
        name: stream_of(path, **chosen).n_rows
        for name, chosen in {
            "plain": {},
            "special": {"skip_special": False},
            "text": {"modality": "text"},
            "image": {"modality": "image"},
            "user": {"roles": ["user"]},
            "two": {"roles": ["user", "assistant"]},
        }.items()
    }
    assert n["plain"] == n["text"] + n["image"] < n["special"]
    assert n["user"] < n["two"] < n["plain"]
    assert min(n.values()) > 100
    # What is scaled by are the statistics of the rows that are trained on.
    with_special = stream_of(path, skip_special=False)
    truth = with_special.snapshot.stats("resid.2", special=True)
    assert with_special.space("resid.2").variance == pytest.approx(truth.variance)


def test_threads_are_those_asked_for_and_no_part_of_the_result(store, tmp_path):
    assert stream_of(store, threads=3).threads == 3
    base = settings(store, tmp_path)
    for change in ({"threads": 3}, {"direct": True}, {"cache_dir": "x"}, {"cache_gb": 1}):
        assert settings(store, tmp_path, stream=change).result_key() == base.result_key()
    for change in ({"window_rows": 9}, {"shuffle": False}, {"roles": ["user"]}):
        assert settings(store, tmp_path, stream=change).result_key() != base.result_key()


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"window_row": 9}, r"unknown key 'stream\.window_row'.*Did you mean.*window_rows"),
        ({"window_rows": 0}, r"stream\.window_rows: expected more than 0, got 0"),
        ({"cache_gb": -1}, r"stream\.cache_gb: expected more than 0"),
        ({"cache_dir": ""}, r"stream\.cache_dir is empty"),
        ({"modality": "sound"}, r"stream\.modality: expected one of 'all', 'text', 'image'"),
    ],
)
def test_settings_that_cannot_be(store, tmp_path, stream, message):
    with pytest.raises(ConfigError, match=message):
        settings(store, tmp_path, stream=stream)


def test_the_command_takes_them(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["sae.n_latents=48", "batch_tokens=64", "tokens=640", "progress=false", "report=false"]
    main([f"store={store}", "stream.window_rows=640", "stream.shuffle=false", *words])
    (folder,) = Path("runs").iterdir()
    config = json.loads((folder / "config.json").read_text())
    assert (config["stream"]["window_rows"], config["stream"]["shuffle"]) == (640, False)
    with pytest.raises(SystemExit):
        main([f"store={store}", "stream.windowrows=640", *words])
    assert "unknown key 'stream.windowrows'. Did you mean window_rows" in capsys.readouterr().err


def test_a_run_tells_how_its_batches_are_mixed(store, tmp_path, capsys):
    cfg = settings(store, tmp_path, stream={"window_rows": 500})
    folder = train(cfg).run_dir
    said = capsys.readouterr().err
    found = measure(stream_of(store, window_rows=500))
    assert str(found) in said
    assert "data: " in said
    assert "training waited for it" in said
    first, *others = rows(folder)
    assert first["kappa"] == found.kappa
    assert first["kappa_formula"] == found.predicted
    assert first["documents_per_batch"] == found.documents
    assert not any("kappa" in row for row in others)
    written = read_metrics(folder / METRICS)
    assert all(row["read_gb_per_s"] >= 0 for row in written)
    assert written[0]["read_gb_per_s"] > 0


def test_high_kappa_is_a_warning_whose_remedy_helps(contiguous, tmp_path, capsys):
    small = {"window_rows": 128}
    train(settings(contiguous, tmp_path / "a", stream=small))
    said = capsys.readouterr().err
    assert "warning: batches hold about" in said
    remedy = int(said.split("stream.window_rows=")[1].split()[0])
    before = measure(stream_of(contiguous, **small)).kappa
    after = measure(stream_of(contiguous, window_rows=remedy)).kappa
    assert after < before / 3
    train(settings(contiguous, tmp_path / "b", stream={"window_rows": remedy}))
    # In so small a store no window makes it small, and nobody is told to enlarge it for nothing.
    assert "warning: batches hold" not in capsys.readouterr().err


def test_of_other_streams_only_what_they_know_is_said(tmp_path, capsys):
    x = planted(512, 16)
    streams = {"stream": FakeStream(x, 64), "held_out": FakeStream(x[:128], 64)}
    folder = train(settings(None, tmp_path), **streams).run_dir
    assert "mixing" not in capsys.readouterr().err
    assert "read_gb_per_s" not in read_metrics(folder / METRICS)[0]


def test_a_remote_store_is_read_through_the_cache_with_the_same_result(store, tmp_path, capsys):
    """F110: one setting, and a second run fetches records only."""
    cache = {"cache_dir": str(tmp_path / "cache"), "cache_gb": 0.1}
    local = train(settings(store, tmp_path / "a")).run_dir
    with folder_server(store.parent) as port:
        url = f"http://127.0.0.1:{port}/store"
        far = train(settings(url, tmp_path / "b", stream=cache)).run_dir
        same(local, far)
        kept = sorted((tmp_path / "cache" / "blocks").rglob("*"))
        assert kept
        stream = runs.open_snapshot(settings(url, tmp_path, stream=cache))
        assert stream.segments[0].cache.traffic.fetched == 0
        stream.segments[0].acts("resid.2").read()
        assert stream.segments[0].cache.traffic.fetched == 0
    assert "no effect" not in capsys.readouterr().err
    runs.open_snapshot(settings(store, tmp_path, stream=cache))
    assert "stream.cache_dir has no effect" in capsys.readouterr().err


def test_a_run_counts_what_it_read_itself(store, tmp_path, capsys):
    """Groups of a sweep share a stream; the second one's bytes are not those of both."""
    many = [settings(store, tmp_path, seed=0, fused={"memory_gb": 1e-4}, sae=sae) for sae in SAES]
    train_together(many)
    told = [line.split()[1] for line in capsys.readouterr().err.splitlines() if "GB read" in line]
    assert len(told) == 2
    assert float(told[1]) <= float(told[0])
    read = [read_metrics(cfg.run_dir / METRICS)[0] for cfg in many]
    assert all(r["read_gb_per_s"] >= 0 for r in read)
