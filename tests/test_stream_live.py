"""The live source: the batches of a store without the store.  # F41"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from cache import SMALL
from training import interrupted, rows, same, weights

from actcache.errors import HookError
from actcache.host import Host
from actcache.live import open_live
from actcache.run import run
from actcache.segments import SegmentBuilder
from actcache.store import SettingsError
from saetrain import runs, train
from saetrain.cli import main
from saetrain.errors import ConfigError, TrainingError
from saetrain.evals.run import evaluate_run
from saetrain.log import METRICS, read_metrics
from saetrain.settings import TrainSettings
from saetrain.stream import Stream
from saetrain.stream.capture import Calibration
from saetrain.stream.live import LiveStream

HOOKS = ("resid.1", "mlp.0")
ALL = 10**9


@pytest.fixture
def live(tiny_host, tiny_parquet):
    """`live: …` for what the fixture `asked` asks for."""

    def make(dtype="float32", **more):
        return {
            "host": {"model": str(tiny_host), "batch_tokens": 128},
            "data": {"files": str(tiny_parquet), "id_column": "id"},
            "context": 32,
            "layout": asdict(replace(SMALL, dtype=dtype)),
            "calibration_tokens": ALL,
            **more,
        }

    return make


@pytest.fixture
def built(monkeypatch):
    """Contexts that went through the host, call by call."""
    found, build = [], SegmentBuilder.build
    spy = lambda self, c, a: found.append(len(c)) or build(self, c, a)  # noqa: E731
    monkeypatch.setattr(SegmentBuilder, "build", spy)
    return found


@pytest.fixture
def store(asked):
    return run(asked()).store


def settings(live, runs_dir, **changes) -> TrainSettings:
    values = {
        "live": live,
        "runs_dir": str(runs_dir),
        "hook": "blocks.1.hook_resid_post",
        "sae": {"name": "topk", "n_latents": 48, "k": 4, "dead_after_tokens": 300},
        "batch_tokens": 32,
        "tokens": 32 * 60,
        "held_out_fraction": 0.2,
        "log_every": 4,
        "checkpoint": {"every_steps": 7, "keep": 2},
        "stream": {"window_rows": 200, "shuffle": False},
        "progress": False,
        "report": False,
    }
    return TrainSettings.from_mapping(values | changes)


def capture_of(values):
    return open_live(
        {k: v for k, v in values.items() if k != "calibration_tokens"}, HOOKS, lambda _: None
    )


def stream(values, **kw) -> LiveStream:
    capture = capture_of(values)
    calibration = Calibration(capture, ALL, special=False, keep_bytes=0)
    defaults = {"batch_tokens": 48, "window_rows": 200, "held_out_fraction": 0.2}
    return LiveStream(capture, HOOKS, calibration, **(defaults | kw))


def over_store(store, **kw) -> Stream:
    defaults = {"batch_tokens": 48, "window_rows": 200, "held_out_fraction": 0.2}
    return Stream(store.snapshot(), HOOKS, shuffle=False, **(defaults | kw))


def equal(a, b) -> bool:
    tables = (vars(a.tokens), vars(b.tokens))
    return (
        all(torch.equal(a.acts[h], b.acts[h]) for h in HOOKS)
        and all(np.array_equal(x, y) for x, y in zip(*(t.values() for t in tables), strict=True))
        and np.array_equal(a.segment, b.segment)
        and (a.epoch, a.step) == (b.epoch, b.step)
    )


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ["permuted", "context"])
def test_batches_are_those_of_the_store(asked, live, dtype, order):
    """Over more than an epoch, bit for bit; bf16 is rounded as the store rounds it."""
    layout = replace(SMALL, dtype=dtype, order=order)
    store = run(asked(layout=layout)).store
    a, b = stream(live(layout=asdict(layout))), over_store(store)
    n = b.batches_per_epoch
    assert n > 10
    assert all(equal(x, y) for x, y in islice(zip(a, b, strict=False), 2 * n + 3))
    assert (a.n_rows, a.batches_per_epoch) == (b.n_rows, n)  # known once the data has ended


@pytest.mark.parametrize(
    "kw",
    [
        {"window_rows": 1, "run_chunks": 2},
        {"window_rows": 5000, "seed": 3},
        {"split": "held_out", "batch_tokens": 7},
        {"skip_special": False, "split": "all"},
    ],
)
def test_every_setting_means_what_it_means_for_a_store(store, live, kw):
    a, b = stream(live(), **kw), over_store(store, **kw)
    assert all(equal(x, y) for x, y in islice(zip(a, b, strict=False), b.batches_per_epoch + 2))
    one = list(
        zip(stream(live(), **kw).one_pass(), over_store(store, **kw).one_pass(), strict=True)
    )
    assert one
    assert all(equal(x, y) for x, y in one)


def test_a_budget_ends_the_data_where_it_ends_the_store(asked, live):
    store = run(asked(tokens=300)).store
    a, b = stream(live(tokens=300)), over_store(store)
    assert sum(len(x) for x in a.one_pass()) == sum(len(x) for x in b.one_pass()) == b.n_rows
    assert all(equal(x, y) for x, y in islice(zip(a, b, strict=False), b.batches_per_epoch + 1))


@pytest.mark.parametrize("stop", [0, 1, 9, 24, 40])
def test_resume_anywhere_gives_the_same_batches_and_captures_one_window_again(live, stop, built):
    whole = list(islice(stream(live()), 50))
    part = stream(live())
    for _ in islice(part, stop):
        pass
    state = json.loads(json.dumps(part.state_dict()))
    resumed = stream(live())
    built.clear()
    resumed.load_state_dict(state)
    batches = iter(resumed)
    assert equal(next(batches), whole[stop])
    del batches
    # Two windows of 200 rows and what read ahead has begun; of about 1,500 rows in all.
    assert sum(built) * 32 < 800
    resumed.load_state_dict(state)
    for batch, expected in zip(islice(resumed, 50 - stop), whole[stop:], strict=True):
        assert equal(batch, expected)


def test_a_budget_counts_from_the_start_when_resumed(asked, live):
    truth = over_store(run(asked(tokens=700)).store)
    n = truth.batches_per_epoch
    expected = list(islice(truth, n + 2))
    part = stream(live(tokens=700))
    for _ in islice(part, n - 2):
        pass
    resumed = stream(live(tokens=700))
    resumed.load_state_dict(part.state_dict())
    assert all(equal(x, y) for x, y in zip(resumed, expected[n - 2 :], strict=False))
    assert resumed.n_rows == truth.n_rows


def test_another_stream_is_not_resumed(live):
    state = stream(live()).state_dict()
    with pytest.raises(ConfigError, match=r"cannot resume the live stream.*seed: 0 then, 1 now"):
        stream(live(), seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match="ids: "):
        stream(live(context=64)).load_state_dict(state)


def test_held_out_rows_cost_only_the_passes_they_are_in(live, built):
    rows = sum(len(b) for b in stream(live(), split="held_out").one_pass())
    few, built[:] = sum(built), []
    assert rows > 0
    sum(len(b) for b in stream(live(), split="all").one_pass())
    assert 0 < few < 0.8 * sum(built)


def test_what_one_walk_leaves_out_the_next_one_has(live):
    capture = capture_of(live())
    whole = [len(s.row) for s in capture.segments()]
    for keep in (0, 1 << 30):
        none = capture.segments(wanted=lambda flags, doc: flags > 255, keep_bytes=keep)
        assert sum(len(s.row) for s in none) == 0
        assert [len(s.row) for s in capture.segments()] == whole


def test_calibration_rows_that_fit_are_not_captured_again(store, live, built):
    for keep, passes in ((1 << 30, 1), (0, 2)):
        capture = capture_of(live())
        calibration = Calibration(capture, ALL, special=False, keep_bytes=keep)
        s = LiveStream(capture, HOOKS, calibration, batch_tokens=48, split="all")
        built.clear()
        assert s.space("mlp.0").variance == over_store(store).space("mlp.0").variance
        whole = sum(built)
        first = next(iter(over_store(store, split="all", window_rows=65_536)))
        assert equal(next(iter(s)), first)
        assert sum(built) == passes * whole


# -- training --------------------------------------------------------------------------------------


def test_identical_batches_give_identical_weights(store, live, tmp_path, capsys, monkeypatch):
    """Cache or recompute is one line: source=live, source=store."""
    load = Host.load
    # A host may draw random numbers while it is loaded.
    monkeypatch.setattr(Host, "load", lambda self, points: (torch.rand(3), load(self, points))[1])
    line = {"store": str(store.path)}
    cached = train(settings(live(), tmp_path / "a", source="store", **line))
    captured = train(settings(live(), tmp_path / "b", source="live", **line))
    a, b = weights(cached.run_dir), weights(captured.run_dir)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    told = {"kappa_formula", "kappa_ideal", "kappa", "documents_per_batch"}
    kept = [
        [{k: v for k, v in row.items() if k not in told} for row in rows(r.run_dir)]
        for r in (cached, captured)
    ]
    assert kept[0] == kept[1]
    timing = {"seconds"}
    scores = [{k: v for k, v in r.metrics.items() if k not in timing} for r in (cached, captured)]
    assert scores[0] == scores[1]
    record = json.loads((captured.run_dir / "run.json").read_text())
    assert record["live"]["store_id"] == store.store_id
    assert "mixing: κ = " in capsys.readouterr().err
    assert read_metrics(captured.run_dir / METRICS)[0]["kappa"] > 0


def test_a_stopped_run_continues_bit_for_bit(live, tmp_path):
    cfg = settings(live(), tmp_path / "part", source="live")
    interrupted(cfg, 40)
    whole = train(replace(cfg, runs_dir=str(tmp_path / "whole"))).run_dir
    same(train(cfg).run_dir, whole)


def test_a_finished_run_is_evaluated_again_on_the_same_host_only(live, tmp_path):
    done = train(settings(live(), tmp_path, source="live", report=True))
    assert (done.run_dir / "report.html").is_file()  # without the contexts that a store has
    again = evaluate_run(done.run_dir)
    assert again["fve"] == done.metrics["fve"]
    config = json.loads((done.run_dir / "config.json").read_text())
    config["live"]["context"] = 64
    (done.run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match="the host or the data have changed"):
        evaluate_run(done.run_dir)


def test_cached_once_it_is_trained_on_often_without_the_host(store, live, tmp_path, monkeypatch):
    """F42: two SAEs from one store, and no model is loaded."""

    def load(*_):
        raise AssertionError("the host was loaded")

    monkeypatch.setattr(Host, "load", load)
    monkeypatch.setattr(Host, "skeleton", load)
    for k in (2, 6):
        sae = {"name": "topk", "n_latents": 48, "k": k, "dead_after_tokens": 300}
        found = train(settings({}, tmp_path, store=str(store.path), sae=sae)).metrics
        assert 0 < found["l0"] <= k
    with pytest.raises(AssertionError, match="the host was loaded"):
        train(settings(live(), tmp_path, source="live"))


def test_the_command_takes_presets_and_one_line(live, tmp_path, tiny_host, tiny_parquet, capsys):
    words = [
        f"live.host={{preset:local,model:{tiny_host}}}",
        f"live.data={{preset:parquet,files:{tiny_parquet},id_column:id}}",
        "live.layout=small",
        "live.context=32",
        "hook=resid.1",
        "batch_tokens=32",
        "tokens=640",
        "held_out_fraction=0.2",
        "sae.n_latents=48",
        "sae.k=4",
        "progress=false",
        "report=false",
        f"runs_dir={tmp_path}",
    ]
    main(["source=live", *words])
    (folder,) = (p.parent for p in tmp_path.rglob("run.json"))
    assert json.loads((folder / "eval.json").read_text())["train_tokens"] == 640
    with pytest.raises(SystemExit):
        main(words)  # source=store, and no store
    assert "missing: store" in capsys.readouterr().err


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "more", "error", "message"),
    [
        ({"epochs": 1, "tokens": None}, {}, ConfigError, "epochs=1: how long an epoch is, a live"),
        ({}, {"host": None}, ConfigError, r"missing: live\.host\. source=live captures"),
        ({}, {"capture": "nowhere:f"}, ConfigError, "live.capture=nowhere:f cannot be loaded"),
        ({}, {"capture": "json"}, ConfigError, "live.capture=json: expected MODULE:FUNCTION"),
        ({}, {"layout": "big"}, SettingsError, "live.layout=big: .*one of default, small"),
        ({}, {"layout": {"dtype": "int8"}}, SettingsError, "layout.dtype=int8: its calibration"),
        ({}, {"data": {"fils": 1}}, SettingsError, "unknown key 'live.data.fils'.*Did you mean"),
        (
            {},
            {"host": {"model": "x", "sharding": "zero3"}},
            SettingsError,
            r"host\.sharding=zero3: a live source has the whole",
        ),
        ({"hook": "resid"}, {}, HookError, "expected one place for each, such as resid.2"),
        (
            {"batch_tokens": 5000, "tokens": 5000},
            {},
            ConfigError,
            "more than the rows of the",
        ),
    ],
)
def test_what_cannot_be_is_said(live, tmp_path, changes, more, error, message):
    with pytest.raises(error, match=message):
        train(settings(live(**more), tmp_path, source="live", **changes))


def test_unknown_live_keys_and_those_of_stores_are_refused(live, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'live\.hosts'"):
        settings(live(hosts=1), tmp_path)
    with pytest.raises(SettingsError, match=r"live\.part has no effect"):
        open_live(live() | {"part": "1/2"}, HOOKS, lambda _: None)


def test_settings_without_effect_are_named(live, tmp_path, capsys):
    cfg = settings(live(), tmp_path, source="live", stream={"threads": 2, "cache_dir": "x"})
    runs.sources(cfg, None, None, torch.device("cpu"))
    said = capsys.readouterr().err
    assert "stream.threads has no effect with source=live" in said
    assert "stream.cache_dir has no effect with source=live" in said


def test_a_live_setting_changes_the_run_and_memory_does_not(live, tmp_path):
    key = settings(live(), tmp_path, source="live").result_key()
    assert settings(live(keep_gb=0.1), tmp_path, source="live").result_key() == key
    assert settings(live(calibration_tokens=9), tmp_path, source="live").result_key() != key
    # With a store, what would be captured plays no part.
    plain = settings({}, tmp_path, store="s").result_key()
    assert settings(live(), tmp_path, store="s").result_key() == plain
    assert key != plain


def test_walks_at_once_take_turns(live, store):
    """Training reads ahead while an evaluation walks over the same host."""
    capture = capture_of(live())
    calibration = Calibration(capture, ALL, special=False, keep_bytes=0)
    options = {"batch_tokens": 48, "window_rows": 200, "held_out_fraction": 0.2}
    train_, held = (
        LiveStream(capture, HOOKS, calibration, split=split, **options)
        for split in ("train", "held_out")
    )
    truth = over_store(store)
    both = zip(train_, truth, strict=False)
    for i, (a, b) in enumerate(islice(both, 12)):
        assert equal(a, b)
        if i % 4 == 0:
            pairs = zip(
                held.one_pass(), over_store(store, split="held_out").one_pass(), strict=True
            )
            assert all(equal(x, y) for x, y in pairs)


def test_statistics_are_those_of_the_first_rows(store, live):
    """calibration_tokens: whole segments until so many rows, without special tokens."""
    capture = capture_of(live())
    space = LiveStream(
        capture, HOOKS, Calibration(capture, 200, special=False, keep_bytes=0)
    ).space("resid.1")
    some = store.snapshot().segments[:3]  # 128, 40 and 128 rows
    x = np.concatenate([s.acts("resid.1").read()[(s.column("flags") & 1) == 0] for s in some])
    assert space.variance == pytest.approx(float(x.astype(np.float64).var(0).sum()), rel=1e-5)
    assert np.allclose(space.mean.numpy(), x.mean(0), atol=1e-5)
