"""`python -m pipelines.demo` (`make demo`): the main job, end to end, on text that is here.

It builds the corpus and a small host (once, kept under $ACTCACHE_HOME or ~/.cache/actcache), then
runs the commands a user would type: `actcache run`, two `saetrain` runs. It ends with a table of
what came out and the pages to open. Everything that is already there is used, not made again.
`--quick` does the same with toy sizes, in seconds, as a check that the parts fit together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actcache.demo import ensure_demo
from actcache.demo.corpus import corpus_report
from actcache.demo.train_host import HostSettings, load_report
from actcache.errors import ActcacheError
from saetrain.evals.run import summary
from saetrain.log import table

CACHE = ["actcache", "run", "host=demo", "data=pydocs", "hooks=resid", "layers=[1,2,3]"]
TOKENS = "tokens=750_000"  # all of the corpus, told beforehand so that the bar knows its end
EXPERIMENTS = ("topk_demo", "relu_demo")
QUICK_HOST = HostSettings(
    vocab=512, d_model=32, n_layers=4, n_heads=2, batch=4, steps=20, min_steps=1, min_gain=None
)
QUICK_CACHE = ["tokens=20_000", "layout.segment_rows=8192"]
QUICK_TRAIN = ["sae.n_latents=128", "epochs=1", "batch_tokens=512", "eval.bootstrap=20"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the demo, as a user would type it."""

    words: list[str]

    def run(self) -> None:
        """Run it in a process of its own; SystemExit with its status if it fails."""
        print(f"\n$ {' '.join(self.words)}", flush=True)
        program, *rest = self.words
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", program, *rest], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Exit status 0, that of the command that failed, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes: seconds, not minutes")
    parser.add_argument("--store", default="stores/demo", help="where the activations go")
    parser.add_argument("--runs", default="runs", help="where the run folders go")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        _demo(options)
    except ActcacheError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    print(f"\ndone in {time.perf_counter() - started:.0f} s")
    return 0


def _demo(options: argparse.Namespace) -> None:
    quick: bool = options.quick
    if quick and "ACTCACHE_HOME" not in os.environ:
        raise ActcacheError("--quick builds a toy host: set ACTCACHE_HOME to a folder of its own")
    paths = ensure_demo(settings=QUICK_HOST if quick else None)
    corpus, host = corpus_report(paths.corpus), load_report(paths.host)
    print(f"corpus: {corpus.documents:,} documents, {corpus.characters:,} characters")
    print(f"host:   {host}")
    size = QUICK_CACHE if quick else [TOKENS]
    Step(words=[*CACHE, *size, f"store={options.store}"]).run()
    common = [f"store={options.store}", f"runs_dir={options.runs}", *(QUICK_TRAIN if quick else [])]
    for name in EXPERIMENTS:
        Step(words=["saetrain", f"+experiment={name}", *common]).run()
    _summary(Path(options.runs), Path(options.store))


def _summary(runs: Path, store: Path) -> None:
    """A table of the newest run of each experiment, and the pages to open."""
    rows: list[dict[str, object]] = []
    pages = []
    for name in EXPERIMENTS:
        folders = [p.parent for p in runs.glob(f"{name}-*/eval.json")]
        folder = max(folders, key=lambda p: (p / "eval.json").stat().st_mtime)
        rows.append(summary(folder, json.loads((folder / "eval.json").read_text())))
        pages.append(folder / "report.html")
    print(f"\nheld-out documents of {store}")
    print(table(rows))
    print("\nopen in a browser:")
    for page in pages:
        print(f"  {page.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
