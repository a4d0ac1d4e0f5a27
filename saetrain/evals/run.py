"""The held-out evaluation of a run: the SAE, the PCA of equal rank beside it, eval.json, the table.

Used at the end of training and by `saetrain evaluate RUN_DIR`, with the same result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch

from saetrain.artefact import Inference, load_sae
from saetrain.errors import TrainingError
from saetrain.evals import own, pca, reconstruction
from saetrain.live import open_live
from saetrain.log import say, table, watched
from saetrain.runs import (
    CONFIG,
    RUN,
    Source,
    open_snapshot,
    open_source,
    read_json,
    resolve_device,
    write_json,
)
from saetrain.settings import EvalSettings, TrainSettings
from saetrain.several import MixedSnapshot, Readable
from saetrain.stream import Batch

EVAL, SAE_FOLDER = "eval.json", "sae"


def evaluate_sae(
    sae: Inference, source: Source, settings: EvalSettings, *, progress: bool = False
) -> dict[str, Any]:
    """Held-out metrics of `sae` (see `saetrain.evals.reconstruction`)."""
    return reconstruction.evaluate(
        sae,
        _held_out(source, settings, "evaluate", progress),
        hook_in=source.hooks_in,
        hook_out=source.hooks_out,
        reference=torch.stack([source.train.space(h).mean for h in source.hooks_out]).to(
            sae.device
        ),
        tokens=settings.tokens,
        bootstrap=settings.bootstrap,
        metrics=own.make_metrics(settings.metrics),
    )


def evaluate_with_baseline(
    sae: Inference, source: Source, settings: EvalSettings, *, progress: bool = False
) -> dict[str, Any]:
    """Held-out metrics, and `pca`: the same rows through a PCA of rank round(L0).

    `pca` is None where it is switched off, where the SAE predicts another hook than it reads, or
    several.
    Moves the training stream back to its start: the PCA is fitted on its first rows.
    """
    result = evaluate_sae(sae, source, settings, progress=progress)
    result["pca"] = None
    if _has_baseline(source, settings):
        rank = round(result["l0"])
        key = ("pca", source.hook_in, settings.pca_tokens, settings.tokens, rank)
        if key not in source.memo:
            source.memo[key] = _baseline(source, settings, rank, sae.device, progress)
        result["pca"] = dict(source.memo[key])
    return result


def fit_baseline(
    source: Source, settings: EvalSettings, device: torch.device, *, progress: bool = False
) -> None:
    """Fit the PCA now, so that evaluations in several threads do not read the training stream."""
    if _has_baseline(source, settings):
        _directions(source, settings, device, progress)


def _has_baseline(source: Source, settings: EvalSettings) -> bool:
    one = source.hooks_out == (source.hook_in,) == source.hooks_in
    return one and settings.pca_tokens > 0


def _baseline(
    source: Source, settings: EvalSettings, rank: int, device: torch.device, progress: bool
) -> dict[str, Any]:
    """Scores of the PCA of `rank`; directions are fitted once for all ranks."""
    directions = _directions(source, settings, device, progress)
    held_out = _held_out(source, settings, "evaluate PCA", progress)
    return pca.evaluate(directions.of_rank(rank), held_out, source.hook_in, settings.tokens)


def _directions(
    source: Source, settings: EvalSettings, device: torch.device, progress: bool
) -> pca.PCA:
    """All directions, leading first."""
    hook, limit = source.hook_in, settings.pca_tokens
    if (key := ("directions", hook, limit)) not in source.memo:
        reference = source.train.space(hook).mean.to(device)
        source.train.load_state_dict(source.start)
        known, steps = source.train.n_rows, source.train.batches_per_epoch
        first = takewhile(lambda batch: batch.epoch == 0, source.train)
        epoch = first if steps is None else islice(source.train, steps)
        rows = watched(epoch, "fit PCA", limit if known is None else min(limit, known), progress)
        source.memo[key] = pca.fit(rows, hook, len(reference), limit, reference)
    found: pca.PCA = source.memo[key]
    return found


def _held_out(source: Source, settings: EvalSettings, what: str, progress: bool) -> Iterator[Batch]:
    n = source.held_out.n_rows
    total = min((x for x in (n, settings.tokens) if x is not None), default=None)
    return watched(source.held_out.one_pass(), what, total, progress)


def evaluate_run(
    run_dir: str | Path,
    store: str | None = None,
    stores: Mapping[str, str] | None = None,
    *,
    metrics: Sequence[str] = (),
    metrics_path: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a finished run again on its own store and snapshot; rewrite eval.json and report.

    `store`, or `stores` by label, says where they are now, if they have moved. `metrics` of your
    own, in `metrics_path`, are added to those of the run. TrainingError if it is another store.
    """
    run_dir = Path(run_dir)
    record, config = read_json(run_dir / RUN), read_json(run_dir / CONFIG)
    if not record or not config:
        raise TrainingError(f"{run_dir} is not a run folder: {RUN} and {CONFIG} expected")
    settings = TrainSettings.from_mapping(config)
    settings = _with_metrics(settings, metrics, metrics_path)
    device = resolve_device(settings.device)
    if settings.source == "live":
        source = _live_again(run_dir, settings, record, device)
    else:
        source = _stores_again(run_dir, settings, record, device, store, stores)
    sae = load_sae(run_dir / SAE_FOLDER, device=device)
    result = evaluate_with_baseline(sae, source, settings.eval, progress=True)
    old = read_json(run_dir / EVAL)
    kept = {k: old[k] for k in ("train_tokens", "seconds", "steps") if k in old}
    write_json(run_dir / EVAL, result | kept)
    if settings.report:
        report(run_dir, source.snapshot, progress=True)
    return result | kept


def _with_metrics(
    settings: TrainSettings, names: Sequence[str], paths: Sequence[str]
) -> TrainSettings:
    """Further metrics beside those of the run. ConfigError if one is not known."""
    wanted = tuple(dict.fromkeys((*settings.eval.metrics, *names)))
    own.make_metrics(wanted, (*settings.metrics_path, *paths))
    evaluation = dataclasses.replace(settings.eval, metrics=wanted)
    return dataclasses.replace(settings, eval=evaluation)


def _stores_again(
    run_dir: Path,
    settings: TrainSettings,
    record: Mapping[str, Any],
    device: torch.device,
    store: str | None,
    stores: Mapping[str, str] | None,
) -> Source:
    """The stores and snapshots of a run. TrainingError if they are others."""
    settings = dataclasses.replace(
        settings,
        store=store or settings.store,
        stores=settings.stores and settings.stores | dict(stores or {}),
        snapshot=record.get("snapshot"),
    )
    snapshot = open_snapshot(dataclasses.replace(settings, snapshot=None))
    if snapshot.store_id != record.get("store_id"):
        raise TrainingError(
            f"{run_dir} was trained on store {record.get('store_id')}, and "
            f"{settings.store or settings.stores} is store {snapshot.store_id}. Give its own with "
            "store=PATH or stores.LABEL=PATH"
        )
    return open_source(settings, open_snapshot(settings), device)


def _live_again(
    run_dir: Path, settings: TrainSettings, record: Mapping[str, Any], device: torch.device
) -> Source:
    """The live source of a run. TrainingError if host or data are others now."""
    source = open_live(settings, device)[1]
    if source.live != record.get("live"):
        raise TrainingError(
            f"{run_dir} was trained on {record.get('live')}, and its settings mean {source.live} "
            "now: the host or the data have changed"
        )
    return source


def report(run_dir: Path, snapshot: Readable | None, *, progress: bool) -> None:
    """Write report.html and say where it is."""
    from saetrain.dashboard.report import write_report  # it reads runs, so not at the top

    if isinstance(snapshot, MixedSnapshot):
        say(f"report: features are shown on store {snapshot.heaviest}, of the largest weight")
    say(f"report: {write_report(run_dir, snapshot=snapshot, progress=progress)}")


def summary(run_dir: Path, result: Mapping[str, Any]) -> dict[str, object]:
    """One row of the table that every run and every sweep ends with."""
    se = result.get("fve_se")
    baseline = result.get("pca")
    return {
        "run": run_dir.name,
        "FVE": f"{result['fve']:.4f}" + (f" ± {se:.4f}" if se is not None else ""),
        "MSE": result["mse"],
        "L0": round(result["l0"], 2),
        f"dead@{result['tokens']:,}": f"{result['dead']:.2%}",
        "PCA FVE": f"{baseline['fve']:.4f} (rank {baseline['rank']})" if baseline else None,
        **{name: round(number, 6) for name, number in own.flat(result).items()},
        "train tokens": result.get("train_tokens"),
        "seconds": round(result["seconds"], 1) if "seconds" in result else None,
    }


def final_table(run_dir: Path, result: Mapping[str, Any]) -> str:
    """The summary of one run as text."""
    return table([summary(run_dir, result)])


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation that make sense as a curve."""
    names = ("fve", "mse", "cos", "l0", "dead")
    numbers = {name: float(result[name]) for name in names} | own.flat(result)
    return {f"eval/{name}": number for name, number in numbers.items()}
