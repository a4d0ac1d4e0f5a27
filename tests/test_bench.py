"""Benchmarks: the harness (table, JSON, order of turns, peers) and a tiny run of bench_cache."""

import json
import re
import statistics
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_texts

from actcache.data import contexts
from actcache.sources import open_source
from pipelines import bench, bench_cache
from pipelines.bench import COLUMNS, Measure, Peer, command, in_turn, ratios, table, why_absent
from pipelines.bench_cache import Bench, Scale

FIELDS = ["value", "goal", "better", "runs", "min", "max", "unit"]
KEYS = [
    "vs_bare_forward_1_hook",
    "vs_bare_forward_all_hooks",
    "vs_saelens",
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


def test_sides_run_in_turn_and_swap_places():
    ran = []

    def side(name):
        return lambda: ran.append(name) or len(ran)

    found = in_turn({"a": side("a"), "b": side("b")}, 3, quiet)
    assert "".join(ran) == "abbaab"
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert ratios(found["a"], found["b"]) == (1 / 2, 4 / 3, 5 / 6)


def test_peers_answer_line_by_line_and_their_death_is_said(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'twice': 2 * json.loads(line)['n']}), flush=True)\n"
    )
    with Peer(script, Path(sys.executable)) as peer:
        assert [peer.ask(n=n)["twice"] for n in (1, 5)] == [2, 10]
        with pytest.raises(RuntimeError, match="ended with status 1"):
            peer.ask(m=0)


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
    bench_cache.make_data(tmp_path / "data", documents, tiny_host, TINY.tokens)
    return Bench(tmp_path, tiny_host, tmp_path / "data", TINY)


def test_the_bare_side_sees_the_batches_of_the_run(tiny, monkeypatch):
    settings = tiny.settings(tiny.one, tiny.folder / "x", TINY.segments)
    source = open_source(settings.data)
    packing = SimpleNamespace(
        context=32, eos=0, bos=None, attend_across_documents=True, drop_tail=False, special={0}
    )
    [unit] = source.units(settings.layout.unit_bytes)
    packed = [c.token_id for c in contexts(source.read(unit), tiny.host.tokenizer, packing)]
    batches = tiny.batches()
    assert [len(b) for b in batches] == 2 * [3, 1]  # 4 contexts a segment, 3 a batch
    wanted = np.stack(packed[4:12])
    assert np.array_equal(torch.cat(batches).numpy(), wanted)
    # And these are what the model is fed when a turn continues the store.
    begun, fed = tiny.begin(tiny.one), []
    model = tiny.host.load(bench_cache.resolve(tiny.one, None, tiny.host.skeleton()))
    model.register_forward_pre_hook(
        lambda _, args, kw: fed.append(kw["input_ids"]), with_kwargs=True
    )
    assert tiny.run(tiny.one, begun=begun) > 0
    whole = [ids for ids in fed if ids.shape == (3, 32) or ids.shape == (1, 32)]
    assert np.array_equal(torch.cat(list(islice(whole, 4))).numpy(), wanted)


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
    assert not list(tiny.folder.glob("tmp*/store/segments/*1"))  # turns leave no stores behind
