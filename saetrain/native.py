"""Hot paths in C, compiled at their first use where there is a C compiler.

The compiler is $CC, or cc; the result is kept in the user's cache folder, under a name made of the
source, the command and the processor, so that a home folder may be shared by unlike machines.
Without a compiler, or with SAETRAIN_COMPILE=0, the caller does the same in Python, slower: every
function of such a library has a twin there, and a test that they are equal.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

SWITCH = "SAETRAIN_COMPILE"
_FLAGS = ("-O3", "-shared", "-fPIC")
_SECONDS = 60  # for the compiler


def wanted() -> bool:
    """Whether the user wants compiled code."""
    return os.environ.get(SWITCH, "1") != "0"


def build(source: Path, *flags: str) -> Any:
    """The library made of a C file; None if it is not wanted or cannot be had."""
    if not wanted():
        return None
    try:
        return ctypes.CDLL(str(_library(source, *_FLAGS, *flags)))
    except (OSError, subprocess.SubprocessError):
        return None


def _library(source: Path, *flags: str) -> Path:
    """The compiled file. OSError or SubprocessError if there is none and it cannot be made."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    about = [source.read_bytes(), *map(str.encode, (*compiler, *flags, *_machine()))]
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(about)).hexdigest()[:16]}.so"
    file = _folder() / name
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            made = Path(scratch) / name
            command = [*compiler, *flags, str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
            made.replace(file)  # whole or not at all: other processes may be doing the same
    return file


@cache
def _machine() -> tuple[str, ...]:
    """What a library made for this machine may depend on."""
    known = platform.system(), platform.machine(), platform.processor()
    try:
        about = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return known
    return *known, next((ln for ln in about if ln.lower().startswith(("flags", "features"))), "")


def _folder() -> Path:
    """A folder of this user's own, kept between runs."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "saetrain"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
