"""Ranks for tests: forked processes with a launcher's environment, which saves their imports."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 60  # seconds after which a rank counts as hanging


@dataclass
class Ended:
    """What a rank left behind."""

    code: int
    result: Any  # what the job returned, or the exception it raised
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(
    job: Callable[[int], Any], size: int, folder: Path, only: Sequence[int] | None = None
) -> list[Ended]:
    """Run `job(rank)` in `size` processes at once, or in the ranks `only`; none may hang."""
    port = free_port()
    ranks = range(size) if only is None else only
    children = {rank: _fork(job, rank, size, port, folder) for rank in ranks}
    codes = {r: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for r, pid in children.items()}
    return [_ended(folder / f"rank{rank}", codes[rank]) for rank in ranks]


def _ended(base: Path, code: int) -> Ended:
    out, err = (base.with_suffix(s).read_text() for s in (".out", ".err"))
    assert code != -signal.SIGALRM, f"{base.name} hung:\n{out}{err}"
    pickled = base.with_suffix(".pickle")
    return Ended(code, pickle.loads(pickled.read_bytes()) if pickled.exists() else None, out, err)


def _fork(job: Callable[[int], Any], rank: int, size: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        # A handler in Python, such as pytest-timeout's, never runs while C code hangs.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT)
        _become(rank, size, port, folder)
        code = _do(job, rank, folder)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become(rank: int, size: int, port: int, folder: Path) -> None:
    """The environment of a rank, and files for what it prints."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    warnings.resetwarnings()
    for number, suffix in ((1, "out"), (2, "err")):
        fd = os.open(folder / f"rank{rank}.{suffix}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.dup2(fd, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")


def _do(job: Callable[[int], Any], rank: int, folder: Path) -> int:
    result: Any
    try:
        result, code = job(rank), 0
    except SystemExit as e:
        result, code = e, int(e.code or 0)
    except BaseException as e:  # noqa: BLE001 it is handed to the test
        traceback.print_exc()
        result, code = e, 1
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(result))
    return code
