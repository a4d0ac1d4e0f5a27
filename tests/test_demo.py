"""`make demo` in toy sizes: corpus, host, store, two SAEs, table, pages; then again at once."""

import json
from pathlib import Path

from pipelines import demo


def run_demo(folder: Path) -> None:
    words = ["--quick", "--store", str(folder / "store"), "--runs", str(folder / "runs")]
    assert demo.main(words) == 0


def test_the_demo_runs_from_text_to_pages(tmp_path, monkeypatch, capfd):  # F101 F102 F126
    monkeypatch.setenv("ACTCACHE_HOME", str(tmp_path / "home"))
    run_demo(tmp_path)
    out = capfd.readouterr().out
    for words in ("held-out cross-entropy", "$ actcache run host=demo", "$ saetrain +experiment="):
        assert words in out
    pages = sorted((tmp_path / "runs").glob("*/report.html"))
    assert [p.parent.name.split("-")[0] for p in pages] == ["relu_demo", "topk_demo"]
    for page in pages:
        assert str(page) in out
        assert json.loads((page.parent / "eval.json").read_text())["fve"] > 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    run_demo(tmp_path)
    assert "is finished" in capfd.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before


def test_quick_never_takes_the_place_of_the_real_host(monkeypatch, capsys):
    monkeypatch.delenv("ACTCACHE_HOME")
    assert demo.main(["--quick"]) == 1
    assert "set ACTCACHE_HOME" in capsys.readouterr().err
