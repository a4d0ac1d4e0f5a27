"""What a run tells: metrics.jsonl always, wandb when asked, a progress bar, a table at the end.

The JSONL file is the record; wandb gets the same rows under the same step. A resumed run first cuts
the file back to its checkpoint, so the file reads as if nothing had happened. wandb is imported
here and nowhere else, and only when it is switched on.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from saetrain.errors import ConfigError, TrainingError
from saetrain.settings import WandbSettings
from saetrain.stream import Batch

METRICS = "metrics.jsonl"
# What differs between two equal runs; everything else in a row is a function of the settings.
TIMING_KEYS = ("tokens_per_s", "data_wait", "read_gb_per_s", "seconds")


def say(message: str) -> None:
    """One line to stderr, above a running bar."""
    tqdm.write(message, file=sys.stderr)


class JsonlLog:
    """Rows of metrics, one JSON object a line, on disk when `write` returns to the caller."""

    def __init__(self, path: Path, keep_to_step: int = 0) -> None:
        """Opens for appending, dropping rows after `keep_to_step` and a half-written last line."""
        kept = [r for r in read_metrics(path) if r["step"] <= keep_to_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(_line(row) for row in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; empty if there is none. A line cut off by a kill ends the list.

    TrainingError if another line is damaged.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise TrainingError(
                f"{path} is damaged in line {number}: {e}. Remove that line, or train again with "
                "fresh=true"
            ) from None
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def watched(
    batches: Iterable[Batch], what: str, total: int | None, enabled: bool
) -> Iterator[Batch]:
    """The batches, with a bar that counts their tokens."""
    with tqdm(
        total=total,
        desc=what,
        unit="tok",
        unit_scale=True,
        mininterval=0.5,
        dynamic_ncols=True,
        disable=not enabled,
        file=sys.stderr,
    ) as bar:
        for batch in batches:
            yield batch
            bar.update(batch.n_counted)


class _WandbRun(Protocol):
    def log(self, data: dict[str, Any], step: int) -> None: ...
    def finish(self) -> None: ...


class Logger:
    """All outputs of one run behind one `row` call. Use as a context manager."""

    def __init__(
        self,
        run_dir: Path,
        wandb: WandbSettings,
        config: Mapping[str, Any],
        *,
        start_step: int,
        n_steps: int,
        batch_tokens: int,
        progress: bool = True,
    ) -> None:
        self._wandb = open_wandb(wandb, config, run_dir)
        self._jsonl = JsonlLog(run_dir / METRICS, start_step)
        self._batch_tokens, self._n_steps = batch_tokens, n_steps
        self._bar = tqdm(
            total=n_steps * batch_tokens,
            initial=start_step * batch_tokens,
            desc=f"train {run_dir.name}",
            unit="tok",
            unit_scale=True,
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not progress,
            file=sys.stderr,
        )

    def advance(self) -> None:
        """One step done."""
        self._bar.update(self._batch_tokens)

    def row(self, row: Mapping[str, Any]) -> None:
        """Write one row of metrics; `row["step"]` counts steps done."""
        self._jsonl.write(row)
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        shown = {k: f"{row[k]:.4g}" for k in ("loss", "fve", "l0", "dead") if k in row}
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def final(self, numbers: Mapping[str, float]) -> None:
        """The evaluation at the end, which eval.json has in full: to wandb only."""
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=self._n_steps)

    def training_done(self) -> None:
        """Close the bar; other bars may follow."""
        self._bar.close()

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        self._jsonl.close()
        if self._wandb is not None:
            self._wandb.finish()


def open_wandb(
    settings: WandbSettings, config: Mapping[str, Any], run_dir: Path
) -> _WandbRun | None:
    """A wandb run, or None when disabled. A resumed run continues the same wandb run.

    ConfigError if wandb is asked for and not installed.
    """
    if settings.mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"wandb.mode={settings.mode}, but wandb is not installed. Install it "
            "(pip install wandb) or set wandb.mode=disabled; metrics.jsonl is written either way"
        ) from None
    run: _WandbRun = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=settings.name or run_dir.name,
        config=dict(config),
        dir=str(run_dir),
        mode="offline" if settings.mode == "offline" else None,  # None: WANDB_MODE, or online
        id=_wandb_id(run_dir / "wandb_id"),
        resume="allow",
        reinit="create_new",  # a sweep has several at once
    )
    return run


def _wandb_id(file: Path) -> str:
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text()


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as aligned text: keys as the heading, numbers to the right."""
    if not rows:
        return ""
    heads = list(rows[0])
    cells = [heads, *([_cell(row.get(h)) for h in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    right = [all(isinstance(r.get(h), (int, float, type(None))) for r in rows) for h in heads]
    lines = [
        "  ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
