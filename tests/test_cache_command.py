"""The command actcache, as typed: run, info, verify, wrong words, Ctrl-C."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cache import command, overrides

from actcache.cli import main
from actcache.store import (
    open_store,
)

# -- the command -----------------------------------------------------------------------------------


def test_command_run_info_verify(asked):
    settings = asked(tokens=200)
    done = subprocess.run(command(settings, "tokens=200"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "text column: text (found by name)" in done.stdout
    info = subprocess.run(
        [sys.executable, "-m", "actcache", "info", settings.store, "--json"],
        capture_output=True,
        text=True,
    )
    facts = json.loads(info.stdout)
    snapshot = open_store(settings.store).snapshot()
    assert facts["tokens"] == snapshot.n_rows
    assert set(facts["hooks"]) == {"resid.1", "mlp.0"}
    files = [p for p in (snapshot.store.path / "segments").rglob("*") if p.is_file()]
    assert facts["bytes"] == sum(p.stat().st_size for p in files)
    own = [p for p in files if "/resid.1/" in str(p)]  # rows and their lengths
    assert {p.relative_to(snapshot.store.path).parts[2] for p in own} == {"acts", "norms"}
    sizes = sum(p.stat().st_size for p in own)
    assert facts["hooks"]["resid.1"]["bytes"] == sizes
    plain = subprocess.run(
        [sys.executable, "-m", "actcache", "info", settings.store], capture_output=True, text=True
    )
    for word in ("store id", "resid.1", "contexts of 32", "snapshot"):
        assert word in plain.stdout
    verified = subprocess.run(
        [sys.executable, "-m", "actcache", "verify", settings.store], capture_output=True, text=True
    )
    assert (verified.returncode, "all whole" in verified.stdout) == (0, True)
    next(snapshot.store.path.rglob("acts/resid.1/c/0/0")).unlink()
    damaged = subprocess.run(
        [sys.executable, "-m", "actcache", "verify", settings.store], capture_output=True, text=True
    )
    assert damaged.returncode == 1
    assert "acts/resid.1/c/0/0: is missing" in damaged.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["store="], "store is empty"),
        (["hosts=demo"], "unknown key 'hosts'. Did you mean host"),
        (["host.modl=x"], "unknown key 'host.modl'. Did you mean model"),
        (["data=nope"], "Could not find 'data/nope'"),
        (["+host.modell=x"], "unknown key 'host.modell'"),
        (["context=banana"], "context: expected a whole number, got 'banana'"),
        (["layout.dtype=int3"], "layout.dtype: expected one of 'bfloat16'"),
    ],
)
def test_wrong_arguments_are_named_without_a_traceback(asked, words, message, capsys):
    code, out = said(capsys, *overrides(asked()), *words)
    assert code == 1
    assert message in out.err
    assert "Traceback" not in out.err


def test_help_needs_no_choices(capsys):
    code, out = said(capsys, "run", "--help")
    assert code in (0, None)
    for word in ("host: demo, ", "segment_rows", "actcache run host=demo data=pydocs"):
        assert word in out.out


def test_a_run_without_a_host_says_which_there_are(capsys):
    code, out = said(capsys, "run")
    assert code == 1
    assert out.err.startswith("error: You must specify")
    assert "pydocs" in out.err


def said(capsys, *words):
    """Exit status and output of the command, run in this process."""
    saved = sys.argv
    try:
        with pytest.raises(SystemExit) as e:
            main(list(words))
    finally:
        sys.argv = saved
    return e.value.code, capsys.readouterr()


def test_progress_bar_shows_rate_and_time_left(asked):  # F126
    words = [w for w in overrides(asked()) if w != "progress=false"]
    done = subprocess.run(
        [sys.executable, "-m", "actcache", *words, "tokens=400"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "caching" in done.stderr
    assert "tok/s" in done.stderr


def test_ctrl_c_on_the_command(asked, tmp_path):
    """A real SIGINT while it runs: exit status 130 and a store that continues."""
    settings = asked()
    go_on = tmp_path / "go on"
    waiting = (  # every segment but the first waits until the signal was sent
        "import itertools, pathlib, signal, sys, time, actcache.segments as s\n"
        # Ignored in what a shell starts in the background, this test included.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "b, n, f = s.SegmentBuilder.build, itertools.count(), pathlib.Path(sys.argv.pop(1))\n"
        "def build(*a):\n"
        "    first = next(n) == 0\n"
        "    while not (first or f.exists()): time.sleep(0.01)\n"
        "    return b(*a)\n"
        "s.SegmentBuilder.build = build\n"
        "from actcache.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", waiting, str(go_on), *overrides(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    commits = Path(settings.store) / "commits"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(commits.glob("u*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    go_on.touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command continues" in out
    assert open_store(settings.store).snapshot().n_rows > 0
