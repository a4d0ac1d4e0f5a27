"""report.html of a run: one file that opens from disk, with no network and no server.

Everything shown is read from the run folder (config.json, run.json, metrics.jsonl, eval.json, sae/)
and, for the features, from the store; the page holds it as one JSON block that report.js draws.
Beside it, features.json keeps the statistics of every latent and the whole top contexts, for other
tools. The page shows at most 96 tokens on either side of a peak.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from saetrain.artefact import load_sae
from saetrain.dashboard.features import Example, FeatureTable, collect, token_texts
from saetrain.errors import TrainingError
from saetrain.log import read_metrics
from saetrain.runs import open_snapshot, read_json, resolve_device
from saetrain.settings import TrainSettings
from saetrain.several import Readable

_WINDOW = 96  # tokens on either side of a peak, in the page
_POINTS = 800  # of a curve, in the page
_PATHS = (
    "store",
    "stores",
    "runs_dir",
    "saes_path",
    "metrics_path",
)  # of this machine: the page is made to be sent around

# Title of a chart, and its series: key in metrics.jsonl -> legend. `loss/*` is added.
_CHARTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "total"}),
    ("FVE", {"fve": "training batches", "eval/fve": "held out"}),
    ("L0", {"l0": "training batches", "eval/l0": "held out"}),
    ("Dead latents", {"dead": "training clock", "dead_fraction": "training clock"}),
)


def write_report(
    run_dir: str | Path, *, snapshot: Readable | None = None, progress: bool = False
) -> Path:
    """Write report.html and features.json into the folder of a finished run; the page's path.

    `snapshot=None` opens the store named in config.json; a run whose batches came from no store
    gets a page without features. Raises TrainingError if a file of the run is missing or if the
    store is another one than the run was trained on, ArtefactError or StoreError for damaged files.
    """
    run_dir = Path(run_dir)
    config, run, scores = (_need(run_dir / f"{n}.json") for n in ("config", "run", "eval"))
    if snapshot is None and run.get("store_id"):
        settings = TrainSettings.from_mapping(config | {"snapshot": run.get("snapshot")})
        snapshot = open_snapshot(settings)
    if snapshot is not None and run.get("store_id") not in (None, snapshot.store_id):
        raise TrainingError(
            f"{run_dir} was trained on store {run['store_id']}, this one is {snapshot.store_id}"
        )
    features = None
    if snapshot is not None:
        features = _features(run_dir, config, run, snapshot, progress)
        write_text(run_dir / "features.json", json.dumps(features, allow_nan=False))
    data = {
        "title": run_dir.resolve().name,
        "facts": _facts(config, run, scores),
        "tiles": _tiles(scores),
        "metrics": _metrics(scores),
        "charts": charts(read_metrics(run_dir / "metrics.jsonl"), scores),
        "density": scores.get("density"),
        "features": features and page_features(features),
        "settings": [
            row
            for name, record in (("config", config), ("run", run))
            for row in _flat({k: v for k, v in record.items() if k not in _PATHS}, name)
        ],
    }
    return write_text(run_dir / "report.html", page(data))


def page(data: Mapping[str, Any]) -> str:
    """The HTML page around `data`; nothing in `data` can end its script block."""
    static = files("saetrain.dashboard") / "static"
    parts = {
        "title": html.escape(str(data["title"])),
        "css": (static / "report.css").read_text("utf-8"),
        "js": (static / "report.js").read_text("utf-8"),
        # ASCII, and no '<': neither </script> nor <!-- nor U+2028 can occur.
        "data": json.dumps(plain(data), allow_nan=False).replace("<", "\\u003c"),
    }
    template = (static / "report.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], template)  # one pass: values stay as is


def features_json(table: FeatureTable, vocab: Sequence[bytes]) -> dict[str, Any]:
    """Content of features.json: counts of all latents, and cards of the ones with examples."""
    cards = [
        {
            "id": f,
            "fires": int(table.fires_F[f]),
            "contexts": int(table.contexts_F[f]),
            "density": float(table.density_F[f]),
            "log10_density": float(table.log10_density_F[f]) if table.fires_F[f] else None,
            "max": float(table.max_F[f]),
            "mean": float(table.sum_F[f] / table.fires_F[f]) if table.fires_F[f] else None,
            "examples": [_example_json(e, vocab) for e in examples],
        }
        for f, examples in table.examples.items()
    ]
    return {
        "split": table.split,
        "n_tokens": table.n_tokens,
        "n_contexts": table.n_contexts,
        "n_latents": len(table.fires_F),
        "n_dead": table.n_dead,
        "rule": table.rule,
        "latents": {
            "fires": table.fires_F.tolist(),
            "contexts": table.contexts_F.tolist(),
            "sum": table.sum_F.tolist(),
            "max": table.max_F.tolist(),
        },
        "cards": cards,
    }


def page_features(features: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of features.json: the cards, contexts cut around their peaks."""
    cards = [{**c, "examples": [_cut(e) for e in c["examples"]]} for c in features["cards"]]
    return {k: v for k, v in features.items() if k != "latents"} | {"cards": cards}


def charts(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Curves over training: [{title, stride, series: [{name, points: [[step, tokens, value]]}]}].

    Rows of one step are one row. Every n-th row is kept where there are too many; the page says so.
    """
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    points = _with_tokens([merged[s] for s in sorted(merged)])
    if points:  # the final evaluation belongs to the last step
        final = {f"eval/{k}": scores[k] for k in ("fve", "l0") if scores.get(k) is not None}
        points[-1] = points[-1] | final
    terms = sorted({k for p in points for k in p if k.startswith("loss/")})
    stride = max(1, math.ceil(len(points) / _POINTS))
    out = []
    for title, names in _CHARTS:
        if title == "Loss" and len(terms) > 1:
            names = names | {t: t.removeprefix("loss/") for t in terms}
        series = [
            {"name": label, "points": found}
            for key, label in names.items()
            if (found := _series(points, key, 1 if key.startswith("eval/") else stride))
        ]
        if series:
            out.append({"title": title, "stride": stride, "series": series})
    return out


def _series(points: Sequence[Mapping[str, Any]], key: str, stride: int) -> list[list[Any]]:
    """Every `stride`-th point that has `key`, and the last one."""
    known = [[p["step"], p.get("tokens"), p[key]] for p in points if p.get(key) is not None]
    last = [] if (len(known) - 1) % stride == 0 else known[-1:]
    return known[::stride] + last


def _with_tokens(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that hold an evaluation alone have no token count: the pace of the others gives it."""
    pace = [r["tokens"] / r["step"] for r in rows if r.get("tokens") and r["step"]]
    return [{"tokens": round(r["step"] * pace[-1])} | r if pace else r for r in rows]


def _features(
    run_dir: Path,
    config: Mapping[str, Any],
    run: Mapping[str, Any],
    snapshot: Readable,
    progress: bool,
) -> dict[str, Any]:
    """Features over the rows that the evaluation counted, to the end of the last context."""
    device = resolve_device(config.get("device", "auto"))
    table = collect(
        load_sae(run_dir / "sae", device=device),
        snapshot,
        run.get("hooks", {}).get("in") or config["hook"],
        held_out_fraction=config["held_out_fraction"],
        max_rows=config.get("eval", {}).get("tokens"),
        device=device,
        progress=progress,
    )
    return features_json(table, snapshot.vocab())


def _example_json(e: Example, vocab: Sequence[bytes]) -> dict[str, Any]:
    """Columns of one context. `hex` holds the bytes of tokens that are no text on their own."""
    tokens = [vocab[i] for i in e.token_id]
    texts = token_texts(tokens)
    return {
        "segment": e.segment,
        "ctx": e.ctx,
        "first": int(e.pos[0]),
        "length": len(tokens),
        "peak": e.peak,
        "value": float(f"{e.value:.5g}"),
        "id": e.token_id.tolist(),
        "text": texts,
        "hex": {str(i): t.hex(" ") for i, t in enumerate(tokens) if not _is_text(t)},
        "act": [
            float(f"{a:.4g}") if counted else None
            for a, counted in zip(e.acts.tolist(), e.counted.tolist(), strict=True)
        ],
    }


def _is_text(token: bytes) -> bool:
    return "\ufffd" not in token.decode("utf-8", "replace")


def _cut(example: Mapping[str, Any]) -> dict[str, Any]:
    """At most `_WINDOW` tokens on either side of the peak, without token ids."""
    start = max(0, example["peak"] - _WINDOW)
    window = slice(start, example["peak"] + _WINDOW + 1)
    near = {str(int(i) - start): h for i, h in example["hex"].items() if int(i) >= start}
    kept = {k: v for k, v in example.items() if k != "id"}
    return kept | {
        "first": example["first"] + start,
        "peak": example["peak"] - start,
        "text": example["text"][window],
        "act": example["act"][window],
        "hex": near,
    }


def _facts(
    config: Mapping[str, Any], run: Mapping[str, Any], scores: Mapping[str, Any]
) -> list[list[str]]:
    """[label, shown value] of the header; what is not known is left out."""
    sae, versions = config.get("sae", {}), run.get("versions", {})
    hooks = run.get("hooks", {"in": config.get("hook"), "out": config.get("hook")})
    read, made = (h if isinstance(h, str) else ", ".join(h) for h in (hooks["in"], hooks["out"]))
    hook = read if read == made else f"{read} → {made}"
    latents, width = run.get("n_latents"), run.get("d_in")
    shape = f", {_int(latents)} latents on width {_int(width)}" if latents and width else ""
    named = ("actcache-saetrain", "torch", "python")
    found = {
        "SAE": f"{sae.get('name', '?')}{shape}" + (f", k = {sae['k']}" if sae.get("k") else ""),
        "Hook": hook,
        "Store": _each(run.get("store_id") or "", 19),  # sha256: and 12 digits
        "Snapshot": _each(run.get("snapshot")),
        "Training tokens": _int(scores.get("train_tokens")),
        "Steps": _int(scores.get("steps") or run.get("n_steps")),
        "Training time": f"{_num(round(scores['seconds'], 1))} s"
        if scores.get("seconds")
        else None,
        "Seed": run.get("seed", config.get("seed")),
        "Versions": ", ".join(f"{n} {versions[n]}" for n in named if versions.get(n)),
        "Git commit": _commit(run.get("git_commit") or ""),
    }
    return [[k, str(v)] for k, v in found.items() if v not in (None, "")]


def _commit(name: str) -> str:
    """12 digits, and whether the checkout had changes."""
    return name[:12] + (" with changes" if name.endswith("-dirty") else "")


def _tiles(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """The numbers of the run, each with its formula and its token count."""
    pca, se = scores.get("pca"), scores.get("fve_se")
    n = scores.get("tokens", scores.get("n_tokens"))
    formula = {k: _signs(v) for k, v in scores.get("formulas", {}).items()}
    on = f"{_int(n)} held-out tokens" if n else "held-out tokens"
    places = f"{on} in {_int(scores['contexts'])} contexts" if scores.get("contexts") else on
    spread = f"10th to 90th percentile: {scores.get('l0_p10')} to {scores.get('l0_p90')}. "
    bootstrap = " The ± is one standard error, by bootstrap over contexts."
    found = (
        _tile(
            *("FVE", scores.get("fve"), formula.get("fve", "")),
            f"{places}.{bootstrap if se is not None else ''}{_each_fve(scores)}",
            extra=f"± {se:.1g}" if se is not None else "",
        ),
        _tile(
            *("PCA of equal rank", pca and pca["fve"], ""),
            f"FVE of the {pca and pca['rank']} leading principal directions, as many as the SAE's "
            f"L0, on the same {on}.",
        ),
        _tile(
            *("L0", scores.get("l0"), formula.get("l0", "").split(";")[0]),
            f"{spread if scores.get('l0_p90') is not None else ''}{on}.",
        ),
        _tile(
            *("MSE", scores.get("mse"), formula.get("mse", "")),
            f"In the host's units squared. {on}.",
        ),
        _tile(
            *("Dead latents", scores.get("dead", scores.get("dead_fraction")), ""),
            f"{_int(scores.get('dead_latents'))} of {_int(scores.get('n_latents'))} latents fired "
            f"on none of {on}.",
            percent=True,
        ),
    )
    return [tile for tile in found if tile is not None]


def _each_fve(scores: Mapping[str, Any]) -> str:
    """The FVE of each of several output hooks."""
    hooks: Mapping[str, Any] = scores.get("hooks", {})
    each = ", ".join(f"{hook} {_num(one['fve'])}" for hook, one in hooks.items())
    return f" By output hook: {each}." if each else ""


def _tile(
    label: str,
    value: float | None,
    formula: str,
    note: str,
    *,
    extra: str = "",
    percent: bool = False,
) -> dict[str, str] | None:
    if value is None:
        return None
    shown = f"{value:.2%}" if percent else _num(value)
    return {"label": label, "value": shown, "extra": extra, "formula": formula, "note": note}


def _signs(formula: str) -> str:
    """A formula of `saetrain.metrics.FORMULAS` with mathematical signs."""
    for plain, sign in (("S|", "Σ|"), ("^2", "²"), ("xbar", "x̄"), (" - ", " − ")):
        formula = formula.replace(plain, sign)
    return re.sub(r"(?<=\w)-(?=\w)|(?<=x̄)-", "−", formula) if "|" in formula else formula


def _metrics(scores: Mapping[str, Any]) -> list[list[str]]:
    """[name, value, formula] of every plain number of eval.json."""
    formulas = scores.get("formulas", {})
    flat = [kv for k, v in scores.items() if k not in ("formulas", "density") for kv in _flat(v, k)]
    return [[k, v, _signs(formulas.get(k, ""))] for k, v in flat]


def _each(value: Any, length: int | None = None) -> Any:
    """The first letters of a text, or of one per store."""
    if isinstance(value, Mapping):
        return ", ".join(f"{label} {str(v)[:length]}" for label, v in value.items())
    return str(value)[:length] if isinstance(value, str) else value


def _flat(value: Any, name: str) -> list[list[str]]:
    """[dotted key, value as text] of a nested mapping."""
    if isinstance(value, Mapping) and value:
        return [row for k, v in value.items() for row in _flat(v, f"{name}.{k}")]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return [[name, _num(value) if number else json.dumps(value).strip('"')]]


def _num(value: float) -> str:
    if isinstance(value, int):
        return _int(value) if abs(value) >= 100_000 else str(value)
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _int(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def plain(value: Any) -> Any:
    """`value` for strict JSON: a number that is not finite becomes its name, such as 'nan'."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _need(path: Path) -> dict[str, Any]:
    """A JSON object of the run folder, which must be there."""
    if not path.is_file():
        raise TrainingError(
            f"{path.parent} is not the folder of a finished run: {path.name} is missing"
        )
    return read_json(path)


def write_text(path: Path, text: str) -> Path:
    """Replace `path` in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)
    return path
