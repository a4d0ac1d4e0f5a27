"""The demo host: what it reports is true, it is what any host is, and it is built once."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from actcache.demo import demo_paths, ensure_demo, train_host
from actcache.demo.corpus import Document, _write
from actcache.demo.train_host import HostReport, HostSettings, build_host, load_report
from actcache.errors import ActcacheError
from actcache.store.split import doc_key, held_out

SUBJECTS = ("The parser", "A store", "Every reader", "One stream", "The cache", "This hook")
VERBS = ("keeps", "returns", "checks", "names", "reads twice", "never loses")
OBJECTS = ("its tokens", "a segment", "the row of zeros", "42 bytes", "an ε of error", "“all” data")
QUICK = HostSettings(
    vocab=300,
    d_model=32,
    n_layers=1,
    n_heads=2,
    context=16,
    batch=8,
    steps=20,
    warmup=4,
    min_steps=1,
    minutes=5,
    held_out_fraction=0.2,
    min_gain=None,
)


def write_corpus(path: Path, n: int = 120) -> list[Document]:
    """`n` documents of five sentences drawn from six subjects, verbs and objects."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        picks = rng.integers(6, size=(5, 3))
        text = " ".join(f"{SUBJECTS[a]} {VERBS[b]} {OBJECTS[c]}." for a, b, c in picks)
        rows.append(Document(id=f"doc/{i}", source="docstring", text=text))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, rows)
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.parquet"
    write_corpus(path)
    return path


@pytest.fixture(scope="module")
def host(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts") / "host"
    build_host(folder, corpus, QUICK, progress=False)
    return folder


def split_by_hand(rows: list[Document]) -> tuple[list[str], list[str]]:
    keys = np.array([doc_key(d.id) for d in rows], dtype=np.uint64)
    side = held_out(keys, QUICK.held_out_fraction)
    return (
        [d.text for d, h in zip(rows, side, strict=True) if not h],
        [d.text for d, h in zip(rows, side, strict=True) if h],
    )


def test_report_equals_a_plain_recomputation(host: Path, tmp_path: Path) -> None:
    """Cross-entropy token by token from the saved files, entropies from counters."""
    report = load_report(host)
    train, held = split_by_hand(write_corpus(tmp_path / "c.parquet"))
    tokenizer = AutoTokenizer.from_pretrained(host)
    model = AutoModelForCausalLM.from_pretrained(host)
    ids, train_ids = (
        [i for text in texts for i in [*tokenizer(text)["input_ids"], 0]] for texts in (held, train)
    )
    nats, targets = [], []
    for start in range(0, len(ids) - 15, 16):
        context = ids[start : start + 16]
        with torch.no_grad():
            logits = model(torch.tensor([context])).logits[0].double()
        for t in range(15):
            targets.append(context[t + 1])
            nats.append(-torch.log_softmax(logits[t], -1)[context[t + 1]].item())
    assert report.cross_entropy == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    share = [c / len(targets) for c in Counter(targets).values()]
    assert report.unigram_entropy == pytest.approx(-sum(p * math.log(p) for p in share))
    seen, total = Counter(train_ids), len(train_ids) + len(tokenizer)
    surprise = [-math.log((seen[t] + 1) / total) for t in targets]
    assert report.unigram_cross_entropy == pytest.approx(sum(surprise) / len(surprise))
    assert report.gain == pytest.approx(report.unigram_entropy - report.cross_entropy)
    assert (report.held_out_tokens, report.train_tokens) == (len(targets), len(train_ids))
    assert (report.train_documents, report.held_out_documents) == (len(train), len(held))


def test_it_is_an_ordinary_folder(host: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(host)
    model = AutoModelForCausalLM.from_pretrained(host)
    assert model.config.model_type == "gpt_neox"
    assert model.config.vocab_size == len(tokenizer) == 300
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.config.eos_token_id == 0
    text = "Any text:\t“ünïcode” \U0001f40d, even \x00 bytes\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (host.stat().st_mode & 0o777) == 0o755


def test_it_learns_from_context(corpus: Path, tmp_path: Path) -> None:
    """Sentences of 3 free choices among 6 carry 5.4 nats in many tokens: far below unigram."""
    settings = dataclasses.replace(QUICK, steps=150, lr=1e-2, min_gain=1.5)
    report = build_host(tmp_path / "host", corpus, settings, progress=False)
    assert report.gain > 1.5
    assert report.stopped_by == "steps"
    assert report.tokens_seen == 150 * 8 * 16


def test_equal_seeds_give_equal_weights(host: Path, corpus: Path, tmp_path: Path) -> None:
    build_host(tmp_path / "same", corpus, QUICK, progress=False)
    other = dataclasses.replace(QUICK, seed=1)
    build_host(tmp_path / "other", corpus, other, progress=False)
    weights, same, different = (
        (f / "model.safetensors").read_bytes()
        for f in (host, tmp_path / "same", tmp_path / "other")
    )
    assert weights == same
    assert weights != different


def test_tokenizer_never_sees_held_out_documents(tmp_path: Path) -> None:
    rows = write_corpus(tmp_path / "plain.parquet")
    _, held = split_by_hand(rows)
    spoilt = [dataclasses.replace(d, text="zyzzyva " * 50) if d.text in held else d for d in rows]
    _write(tmp_path / "spoilt.parquet", spoilt)
    build_host(tmp_path / "host", tmp_path / "spoilt.parquet", QUICK, progress=False)
    words = Tokenizer.from_file(str(tmp_path / "host" / "tokenizer.json")).get_vocab()
    assert not [w for w in words if "zyz" in w or "yva" in w]


def test_time_limit_ends_training_but_not_before_min_steps(corpus: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, steps=10_000, minutes=1e-9, min_steps=7)
    report = build_host(tmp_path / "host", corpus, settings, progress=False)
    assert (report.steps, report.stopped_by) == (7, "time")


def test_learning_too_little_is_an_error_and_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, steps=1, min_gain=1.5)
    with pytest.raises(ActcacheError, match=r"learnt too little.*expected 1\.5 below"):
        build_host(tmp_path / "host", corpus, settings, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_learning_too_little(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_host, "_evaluate", lambda model, ids: math.nan)
    with pytest.raises(ActcacheError, match="learnt too little"):
        build_host(tmp_path / "host", corpus, dataclasses.replace(QUICK, min_gain=0.0), False)


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    write_corpus(tmp_path / "one.parquet", n=1)
    with pytest.raises(ActcacheError, match="give more documents"):
        build_host(tmp_path / "host", tmp_path / "one.parquet", QUICK, progress=False)


def test_bars_show_rate_and_time_left(  # F126
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_host(tmp_path / "host", corpus, QUICK)
    bars = capsys.readouterr().err
    assert "training tokenizer" in bars
    last = [b for b in bars.split("\r") if b.startswith("training host")][-1]
    assert "20/20" in last
    assert "step/s" in last or "s/step" in last
    assert "<00:00" in last  # time left
    assert "loss=" in last


# -- ensure_demo ----------------------------------------------------------------------------------


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo_paths(tmp_path).host == tmp_path / "demo" / "host"
    monkeypatch.setenv("ACTCACHE_HOME", str(tmp_path / "home"))
    assert demo_paths().corpus == tmp_path / "home" / "demo" / "pydocs.parquet"
    monkeypatch.delenv("ACTCACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_paths().host == tmp_path / ".cache" / "actcache" / "demo" / "host"


@pytest.mark.timeout(90)
def test_second_process_waits_and_rebuilds_nothing(tmp_path: Path) -> None:
    paths = demo_paths(tmp_path)
    write_corpus(paths.corpus)
    code = (
        "import sys, pathlib; from actcache.demo import ensure_demo\n"
        "ensure_demo(pathlib.Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with (paths.corpus.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert other.stdout is not None
            assert "another process is building" in other.stdout.readline()
            report = build_host(paths.host, paths.corpus, QUICK, progress=False)
            written = (paths.host / "report.json").stat().st_mtime_ns
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert other.wait(timeout=60) == 0
        finally:
            other.kill()
            other.communicate()
    assert (paths.host / "report.json").stat().st_mtime_ns == written
    assert load_report(paths.host) == report


def test_builds_what_is_missing_then_says_it_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = demo_paths(tmp_path)
    write_corpus(paths.corpus)
    assert ensure_demo(tmp_path, QUICK, progress=False) == paths
    assert capsys.readouterr().out == ""
    assert ensure_demo(tmp_path, QUICK) == paths
    assert capsys.readouterr().out == (f"demo corpus and host: already in {paths.corpus.parent}\n")
    result = subprocess.run(
        [sys.executable, "-m", "actcache.demo"],
        env={**os.environ, "ACTCACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "120 documents" in result.stdout
    assert str(load_report(paths.host)) in result.stdout


def test_report_is_plain_json(host: Path) -> None:
    values = json.loads((host / "report.json").read_text("utf-8"))
    assert set(values) == {f.name for f in dataclasses.fields(HostReport)}
    assert values["settings"]["steps"] == 20
