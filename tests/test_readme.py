"""The README is true: its Python runs, its commands compose, the files it names are there."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from stores import make_store

from actcache.add_hooks import AddHooksSettings
from actcache.cli import main as actcache_main
from actcache.run import CacheSettings
from actcache.store import open_store
from actcache.store.records import build
from actcache.store.split import doc_key
from saetrain.cli import main as saetrain_main
from saetrain.cli import settings_from

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program):
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [w[1:] for w in words if w and w[0] == program]


def composed(root, overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(root, overrides)


def test_actcache_commands_compose():
    runs = [c[1:] for c in commands("actcache") if c[0] == "run"]
    assert len(runs) >= 3
    for overrides in runs:
        values = OmegaConf.to_container(composed("cache", overrides), throw_on_missing=True)
        build(CacheSettings, values)
    allowed = {"run", "info", "verify", "find", "add-hooks", "ls", "cp", "requantise", "gc", "plan"}
    assert {"run", "info", "verify"} <= {c[0] for c in commands("actcache")} <= allowed


def test_actcache_find_and_add_hooks_compose():  # F108 F109
    lines = commands("actcache")
    (found,) = [c[1:] for c in lines if c[0] == "find"]
    build(CacheSettings, OmegaConf.to_container(composed("cache", found), throw_on_missing=True))
    (added,) = [c[2:] for c in lines if c[0] == "add-hooks"]
    values = OmegaConf.to_container(composed("cache", [*added, "data=pydocs"]))
    known = {f.name for f in fields(AddHooksSettings)}
    build(AddHooksSettings, {k: v for k, v in values.items() if k in known} | {"store": "s"})


def test_saetrain_commands_compose():
    others = ("evaluate", "plots", "report", "sweep-status")
    lines = [c for c in commands("saetrain") if c[0] not in others]
    runs = [c[1:] if c[0] == "plan" else c for c in lines]
    assert len(runs) >= 4
    for overrides in runs:
        words = [re.sub(r"=(\w+)(,\w+)+$", r"=\1", w) for w in overrides if w != "-m"]
        settings_from(composed("train", words))


@pytest.mark.parametrize("host", sorted(p.stem for p in (ROOT / "conf" / "host").glob("*.yaml")))
def test_every_host_config_composes(host):
    more = ["host.model=x"] if host == "local" else []
    cfg = composed("cache", [f"host={host}", "data=pydocs", "store=s", *more])
    build(CacheSettings, OmegaConf.to_container(cfg, throw_on_missing=True))


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf/experiment").glob("*.yaml")))
def test_every_experiment_composes(name):
    settings_from(composed("train", [f"+experiment={name}", "store=s"]))


def test_python_use_equals_command_use(tiny_host, tiny_parquet, tmp_path, monkeypatch):
    (code,) = [b for b in blocks("python") if "from actcache.run" in b]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    for old, new in (
        ("path/to/model", str(tiny_host)),
        ('"corpus"', repr(str(tiny_parquet))),
        ("stores/mine", str(tmp_path / "store")),
        ("4096", "64"),
        ('"k": 32', '"k": 8'),
    ):
        assert old in code
        code = code.replace(old, new)
    code = code.replace("epochs=1", "epochs=1, batch_tokens=64")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    x = found["sae"].W_dec[:3]
    assert found["sae"](x)["sae_out"].shape == x.shape
    assert (found["result"].run_dir / "eval.json").is_file()


def test_own_sae_trains_from_the_command_line(tmp_path):  # F36
    (code,) = [b for b in blocks("python") if "my_sae.py" in b]
    assert len(code.splitlines()) < 30
    (tmp_path / "my_sae.py").write_text(code)
    make_store(tmp_path / "stores" / "demo", segments=(512, 512))
    (words,) = [c for c in commands("saetrain") if "saes_path=[my_sae.py]" in c]
    small = ["sae.n_latents=32", "batch_tokens=64", "eval.bootstrap=5"]
    done = subprocess.run(
        [sys.executable, "-m", "saetrain", *words, *small],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (sae,) = (tmp_path / "runs").glob("log_penalty-*/sae/sae.json")
    assert '"log_penalty"' in sae.read_text()


def test_own_metric_in_a_run_and_after_it(tmp_path, monkeypatch, capsys):  # F37
    (code,) = [b for b in blocks("python") if "my_metric.py" in b]
    assert len(code.splitlines()) < 30
    (tmp_path / "my_metric.py").write_text(code)
    make_store(tmp_path / "stores" / "demo", segments=(512, 512))
    monkeypatch.chdir(tmp_path)
    run, again = [c for c in commands("saetrain") if "metrics_path=[my_metric.py]" in c]
    small = ["sae.n_latents=32", "sae.k=4", "batch_tokens=64", "eval.bootstrap=5", "tokens=640"]
    saetrain_main([*run, *small, "epochs=null", "report=false"])
    (eval_json,) = (tmp_path / "runs").glob("topk_demo-*/eval.json")
    first = json.loads(eval_json.read_text())["metrics"]
    assert 0 < first["poor_rows"] <= 1
    eval_json.unlink()
    saetrain_main([str(eval_json.parent) if "topk_demo-…" in w else w for w in again])
    assert json.loads(eval_json.read_text())["metrics"] == first
    assert "poor_rows" in capsys.readouterr().out


def test_own_data_source_from_the_command_line(tiny_host, tmp_path, monkeypatch):  # F37
    (code,) = [b for b in blocks("python") if "my_source.py" in b]
    assert len(code.splitlines()) < 30
    (tmp_path / "my_source.py").write_text(code)
    (tmp_path / "notes").mkdir()
    texts = {f"{i}.md": f"The parser keeps {i} tokens. " * 9 for i in range(9)}
    for name, text in texts.items():
        (tmp_path / "notes" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    (words,) = [c for c in commands("actcache") if "data=own" in c]
    words = [w for w in words if w != "host=demo"]
    small = [f"host.model={tiny_host}", "context=32", "layout.segment_rows=128", "progress=false"]
    with pytest.raises(SystemExit) as done:
        actcache_main([words[0], "host=local", *words[1:], *small, "hooks=resid.1"])
    assert done.value.code == 0
    tables = [s.tokens() for s in open_store("stores/notes").snapshot().segments]
    assert {int(d) for t in tables for d in t.doc} == {int(doc_key(name)) for name in texts}


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
    tree = README.split("## What is where")[1].split("```")[1].strip("\n")
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.exists(), name
            continue
        for file in re.findall(r"([\w]+\.(?:py|md)|\w+/)(?=[\s;]|$)", line):
            assert (folder / file).exists(), f"{folder / file}"
