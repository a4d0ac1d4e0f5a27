"""Benchmarks: the harness (table, JSON, order of turns, peers) and a tiny run of bench_cache."""

import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_texts

from actcache.data import contexts, resolve_packing
from actcache.hooks import resolve
from actcache.sources import open_source
from pipelines import bench, bench_cache
from pipelines.bench import (
    COLUMNS,
    Measure,
    Worker,
    command,
    in_slices,
    overlap,
    rate,
    ratios,
    table,
    turns,
    why_absent,
)
from pipelines.bench_cache import Bench, Scale
from pipelines.bench_data import make_data

FIELDS = ["value", "goal", "better", "runs", "min", "max", "unit"]
KEYS = [
    "vs_bare_forward_1_hook",
    "vs_bare_forward_all_hooks",
    "vs_saelens",
    "bare_forward_vs_saelens",
    "vs_saelens_on_hf_model",
    "vs_saelens_all_hooks",
    "bytes_vs_saelens",
    "peak_memory_vs_plan",
]
TINY = Scale(
    d=32,
    layers=3,
    heads=4,
    vocab=400,
    segments=3,
    segment_rows=128,
    context=32,
    batch_tokens=96,  # does not divide a segment
    turns=1,
    hook="resid.1",
)


def row(**kw):
    return Measure(**({"name": "m", "goal": 2.0, "better": "higher", "unit": "x"} | kw))


def quiet(_: str) -> None:
    pass


def test_a_measure_is_the_median_of_its_ratios():
    values = (3.0, 1.0, 9.0, 2.0)
    measure = row(ratios=values)
    assert measure.to_json() == {
        "value": statistics.median(values),
        "goal": 2.0,
        "better": "higher",
        "runs": 4,
        "min": 1.0,
        "max": 9.0,
        "unit": "x",
    }
    assert measure.met
    assert not row(ratios=(3.0,), better="lower").met
    assert row(ratios=(2.0,), better="lower").met
    with pytest.raises(ValueError, match="m: give ratios, or say why"):
        row()


def test_skipped_measures_are_named_in_table_and_json(tmp_path, capsys):
    rows = [row(ratios=(1.5,)), row(name="vs_peer", skipped="peer is not installed (make peers)")]
    assert command("Doc", lambda quick, say: rows, ["--json", str(tmp_path / "m.json")]) == 0
    head, met, skipped = capsys.readouterr().out.splitlines()
    assert head.split() == list(COLUMNS)
    assert met.split() == ["m", "1.500", "(missed)", "≥", "2", "higher", "1", "1.500", "1.500", "x"]
    assert re.match(r"vs_peer +skipped: peer is not installed \(make peers\) +≥ 2", skipped)
    written = json.loads((tmp_path / "m.json").read_text())
    assert list(written) == ["m", "vs_peer"]
    assert list(written["m"]) == FIELDS
    assert written["vs_peer"]["value"] is None
    assert written["vs_peer"]["runs"] == 0
    assert "peer is not installed" in written["vs_peer"]["skipped"]


def side(script, *more):
    return Worker(sys.executable, script, *more)


@pytest.fixture
def counter(tmp_path):
    """A side that counts for a while, and says when it did."""
    script = tmp_path / "side.py"
    script.write_text(
        "import time\n"
        "from pipelines.bench import clock, private_stdout, serve\n"
        "def count(tokens):\n"
        "    print('not an answer')\n"
        "    with clock() as times:\n"
        "        for _ in range(tokens):\n"
        "            until = time.process_time() + 0.001\n"
        "            while time.process_time() < until: pass\n"
        "    return times | {'tokens': tokens}\n"
        "serve(private_stdout(), count=count)\n"
    )
    return script


def test_sides_answer_line_by_line_and_their_death_is_said(counter):
    with side(counter) as worker:
        assert [worker.ask(do="count", tokens=n)["tokens"] for n in (1, 5)] == [1, 5]
        with pytest.raises(RuntimeError, match="ended with status 1"):
            worker.ask(do="nothing")


def test_only_the_slices_of_a_side_count(counter):
    with side(counter) as a, side(counter) as b:
        a.ask(do="count", tokens=1)
        b.ask(do="count", tokens=1)
        sides = {
            "a": (a, {"do": "count", "tokens": 100}),
            "b": (b, {"do": "count", "tokens": 50}),
        }
        answers = in_slices(sides, slice_s=0.02)
    for name, (_, asked) in sides.items():
        found = answers[name]
        assert found["tokens"] == asked["tokens"]
        assert found["processor"] >= 0.001 * asked["tokens"]
        assert found["seconds"] >= 0.9 * found["processor"]  # it ran all the time that it used
    # Each was halted while the other ran: the time from start to finish holds both sides' slices.
    took = answers["a"]["finished"] - answers["a"]["started"]
    assert took >= answers["a"]["seconds"] + 0.5 * answers["b"]["seconds"]


def test_overlap_with_slices():
    windows = [(0.0, 1.0), (2.0, 3.0), (4.0, 5.0)]
    assert overlap(windows, 0.5, 4.25) == 0.5 + 1.0 + 0.25
    assert overlap(windows, 1.0, 2.0) == 0.0


def test_turns_swap_who_begins(monkeypatch):
    began = []

    def slices(sides):
        began.append(next(iter(sides)))
        return {n: {"tokens": 6, "seconds": len(began) if n == "a" else 2.0} for n in sides}

    monkeypatch.setattr(bench, "in_slices", slices)
    found = turns({"a": (None, {}), "b": (None, {})}, 3, quiet)
    assert began == ["a", "a", "b", "a"]  # the first is to warm up
    assert list(found) == ["a", "b"]
    assert ratios(found, rate) == (2.0 / 2, 2.0 / 3, 2.0 / 4)


def test_absent_peers_are_found_out(tmp_path):
    here = Path(sys.executable)
    assert why_absent("numpy", here) is None
    assert why_absent("no-such-peer", here) == "no-such-peer is not installed (make peers)"
    assert "make peers" in str(why_absent("numpy", tmp_path / "python"))


def test_every_peer_is_pinned():
    lines = (bench.ROOT / "peers.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert {p.partition("==")[0] for p in pins} == {"sae-lens", "eai-sparsify"}
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", p) for p in pins)


@pytest.fixture
def tiny(tiny_host, tmp_path):
    documents = [(f"doc/{i}", text) for i, text in enumerate(tiny_texts() * 3)]
    make_data(tmp_path / "data", documents, tiny_host, TINY.tokens)
    return Bench(tmp_path, tiny_host, tmp_path / "data", TINY)


def test_the_bare_side_sees_the_batches_of_the_run(tiny):
    settings = tiny.settings(tiny.one, tiny.folder / "x", TINY.segments)
    source = open_source(settings.data)
    packing = resolve_packing(settings.pack, tiny.host.tokenizer, TINY.context)
    [unit] = source.units(settings.layout.unit_bytes)
    packed = [c.token_id for c in contexts(source.read(unit), tiny.host.tokenizer, packing)]
    assert np.array_equal(tiny.ids.reshape(-1, 32), np.stack(packed[:12]))
    batches = tiny.batches(tiny.ids[128:])
    assert [len(b) for b in batches] == [3, 1, 3, 1]  # 4 contexts a segment, 3 a batch
    # These are what the model is fed when a turn continues the store.
    model = tiny.host.load(resolve(tiny.one, None, tiny.host.skeleton()))
    begun, fed = tiny.begin(tiny.one), []
    model.register_forward_pre_hook(lambda _, a, kw: fed.append(kw["input_ids"]), with_kwargs=True)
    assert tiny.run(tiny.one, begun)["tokens"] == 256
    fed = [ids for ids in fed if ids.shape[1] == 32]  # without the probe for widths
    assert len(fed) == len(batches)
    assert all(map(torch.equal, fed, batches))


def test_a_tiny_run_gives_every_measure(tiny, monkeypatch):
    monkeypatch.setattr(bench, "peer_python", lambda: tiny.folder / "nowhere")
    said: list[str] = []
    rows = bench_cache.measures(tiny, said.append)
    assert [m.name for m in rows] == KEYS
    for m in rows:
        if "saelens" in m.name:
            assert m.skipped == "sae-lens is not installed (make peers)"
        else:
            assert m.value is not None
            assert m.value > 0
    assert "sae-lens is not installed" in table(rows)
    assert any("processor time" in line for line in said)
