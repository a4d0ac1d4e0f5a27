"""The wheel, installed outside the checkout in an empty environment, runs both commands.

The new environment sees the dependencies of the running one through a .pth line, which does not
process that folder's own .pth files, so the editable install of this project stays out of sight.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command without the checkout on its path; fails with both its streams."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheel."""
    env = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=env)
    executable = env / "bin" / "python"
    site = Path(
        run(executable, "-c", "import site; print(site.getsitepackages()[0])", cwd=env)[:-1]
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", executable, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=env)
    return executable


def test_each_package_ships_its_own_settings(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"actcache/conf/cache.yaml", "saetrain/conf/train.yaml"} <= names
    assert {"saetrain/stream/hot.c", "saetrain/kernels/sparse.c"} <= names
    for file in (ROOT / "conf").rglob("*.yaml"):
        inside = file.relative_to(ROOT).as_posix()
        owners = [p for p in ("actcache", "saetrain") if f"{p}/{inside}" in names]
        assert len(owners) == 1, inside
    assert not [n for n in names if n.startswith(("tests/", "pipelines/"))]


@pytest.mark.parametrize("command", ["actcache", "saetrain"])
def test_command_runs_from_the_wheel(command: str, python: Path, tmp_path: Path) -> None:  # F72
    module = run(python, "-c", f"import {command}; print({command}.__file__)", cwd=tmp_path)
    assert Path(module.strip()).is_relative_to(python.parents[1])
    text = run(python.parent / command, "--help", cwd=tmp_path)
    assert command in text
    assert list(tmp_path.iterdir()) == []  # help leaves no output folder behind


def test_the_wheel_brings_the_fused_launcher(python: Path, tmp_path: Path) -> None:  # F116
    words = ("hydra/launcher=fused", "--cfg", "hydra", "-p", "hydra.launcher")
    text = run(python.parent / "saetrain", *words, cwd=tmp_path)
    assert "hydra_plugins.saetrain_fused.launcher.FusedLauncher" in text
