"""The walls between the packages, and the length of files, as DESIGN.md states them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("actcache", "saetrain", "pipelines", "hydra_plugins")
MAX_LINES = 400
# What a longer file says in its first 15 lines, followed by why.
REASON = re.compile(r"(above|over|more than) 400 lines", re.IGNORECASE)

# Library -> the files that may import it.
ONLY_IN = {
    "transformers": {
        "actcache/host.py",
        "actcache/data.py",
        "pipelines/peer_sweep.py",  # another tool, in an environment of its own
    },
    "hydra": {
        "actcache/cli.py",
        "saetrain/cli.py",
        "hydra_plugins/saetrain_fused/launcher.py",
    },
    "wandb": {"saetrain/log.py"},
}


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(source: str) -> set[str]:
    """Dotted names a file imports, at any depth, also through `import_module("name")`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
            if name in ("import_module", "__import__") and literal:
                found.add(str(first.value))  # type: ignore[attr-defined]
    return found


def importers(library: str) -> set[str]:
    """Files of the packages that import `library`, relative to the repository."""
    return {
        str(file.relative_to(ROOT))
        for file in python_files(*PACKAGES)
        if any(name.split(".")[0] == library for name in imports(file.read_text("utf-8")))
    }


def too_long(name: str, text: str) -> str | None:
    """What is wrong with a file's length, or None."""
    lines = text.splitlines()
    if len(lines) <= MAX_LINES or REASON.search("\n".join(lines[:15])):
        return None
    return f"{name}: {len(lines)} lines; split it, or say at its top why it is above 400 lines"


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_is_imported_in_its_place_only(library: str) -> None:
    assert importers(library) - ONLY_IN[library] == set()


def test_saetrain_sees_the_store_only() -> None:
    for file in python_files("saetrain"):
        for name in imports(file.read_text("utf-8")):
            if name.split(".")[0] == "actcache":
                assert name.startswith("actcache.store"), f"{file}: imports {name}"


def test_files_are_short_or_say_why() -> None:
    texts = {
        str(f.relative_to(ROOT)): f.read_text("utf-8") for f in python_files(*PACKAGES, "tests")
    }
    assert [p for name, text in texts.items() if (p := too_long(name, text))] == []


def test_lint_imports_keeps_all_contracts() -> None:
    command = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run(
        [str(command), "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"[1-9]\d* kept, 0 broken", result.stdout), result.stdout


def test_the_checks_themselves_find_what_they_look_for() -> None:
    source = (
        "import wandb.sdk as w\n"
        "def f():\n"
        "    from transformers.models import gpt_neox\n"
        "    import_module('hydra')\n"
        "from . import hydra_like\n"
        "text = 'import datasets'\n"
    )
    assert imports(source) == {"wandb.sdk", "transformers.models.gpt_neox", "hydra"}
    assert "actcache/host.py" in importers("transformers")
    assert too_long("x.py", "a = 1\n" * 401) is not None
    assert too_long("x.py", "a = 1\n" * 400) is None
    assert too_long("x.py", '"""Above 400 lines: a table."""\n' + "a = 1\n" * 500) is None
