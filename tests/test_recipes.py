"""Every launch recipe composes as it is, and runs with a tiny host in place of the large one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cache import contexts_of, digests
from hydra import compose, initialize_config_dir
from launch import free_port
from omegaconf import OmegaConf

from actcache.run import CacheSettings, run
from actcache.store import open_store, verify
from actcache.store.records import build

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "pipelines" / "recipes"
NAMES = sorted(p.name for p in RECIPES.iterdir() if p.is_file())
SMALL = [
    "data.id_column=id",
    "layout.dtype=float32",
    "layout.segment_rows=128",
    "layout.chunk_bytes=2048",
    "layout.unit_bytes=1",
    "host.batch_tokens=128",
    "progress=false",
]
# host, sharding and processes that each recipe asks for where nothing is substituted.
ASKS = {
    "cache_fsdp2_72b.sh": ("Qwen/Qwen2.5-VL-72B-Instruct", "fsdp2", "8"),
    "cache_one_box.sh": ("meta-llama/Llama-3.1-8B", "none", "1"),
    "cache_slurm.sbatch": ("meta-llama/Llama-3.1-8B", "none", None),
    "cache_slurm_sharded.sbatch": ("Qwen/Qwen2.5-VL-72B-Instruct", "fsdp2", "8"),
    "cache_zero2_7b.sh": ("Qwen/Qwen2.5-VL-7B-Instruct", "none", "8"),
    "cache_zero3_72b.sh": ("Qwen/Qwen2.5-VL-72B-Instruct", "zero3", "8"),
}

# Launchers take seconds to start. One recipe of each kind of launch runs by default.
SLOW = ("cache_fsdp2_72b.sh", "cache_one_box.sh", "cache_zero2_7b.sh")


def environment(tmp_path, **more):
    """A machine without Slurm: `srun` runs its words, `scontrol` names this host."""
    fake = tmp_path / "bin"
    fake.mkdir(exist_ok=True)
    for name, body in (("srun", 'exec "$@"'), ("scontrol", "echo localhost")):
        (fake / name).write_text(f"#!/bin/sh\n{body}\n")
        (fake / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
    path = f"{fake}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | slurm | {"PATH": path, "PORT": str(free_port())} | more


def bash(name, env, tmp_path, words=()):
    command = ["bash", str(RECIPES / name), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_composes(name, tmp_path):  # F15 F16
    """With a launcher that only prints its words, and none of the variables that have defaults."""
    env = environment(tmp_path, STORE="stores/s", DATA="/data/texts")
    for launcher in ("torchrun", "accelerate", "actcache"):
        file = tmp_path / "bin" / launcher
        file.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        file.chmod(0o755)
    done = bash(name, env, tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("cache", words[words.index("run") + 1 :])
    settings = build(CacheSettings, OmegaConf.to_container(composed, throw_on_missing=True))
    flags = {"--nproc_per_node", "--num_processes"} & set(words)
    processes = words[words.index(flags.pop()) + 1] if flags else None
    assert (settings.host.model, settings.host.sharding, processes) == ASKS[name]
    assert settings.layers


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NAMES]
)
def test_recipe_fills_a_store(name, asked, tmp_path):  # F15 F16
    settings = asked()
    env = environment(
        tmp_path,
        STORE=settings.store,
        DATA=str(settings.data.files),
        HOST="local",
        LAYERS="[0,1]",
        TOKENS="null",
        CONTEXT="32",
        WRITERS="2",
        GPUS="2",
    )
    done = bash(name, env, tmp_path, [f"host.model={settings.host.model}", *SMALL])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loading ") == 1
    store = open_store(settings.store)
    kinds = {h.split(".")[0] for h in store.snapshot().hooks}
    assert len(kinds) == 1
    alone = run(asked(store=str(tmp_path / "alone"), hooks=kinds.pop(), layers=(0, 1))).store
    assert list(contexts_of(store.snapshot())) == list(contexts_of(alone.snapshot()))
    # Kernels of one machine: here the activations are the same bits, also from gathered weights.
    assert digests(store) == digests(alone)
    assert not [c for c in verify(store.snapshot()) if c.problem]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_it_needs(name, tmp_path):
    done = bash(name, os.environ | {"STORE": ""}, tmp_path)
    assert done.returncode != 0
    assert "set STORE" in done.stderr


def test_accelerate_configurations_are_those_of_the_recipes():  # F16
    found = {f.name: yaml.safe_load(f.read_text()) for f in (RECIPES / "accelerate").iterdir()}
    stages = {name: c["deepspeed_config"]["zero_stage"] for name, c in found.items()}
    assert stages == {"zero2.yaml": 2, "zero3.yaml": 3}
    for name in found:
        assert any(name in (RECIPES / recipe).read_text() for recipe in NAMES)
