"""Benchmark of int8 storage on real activations: bytes, error, speed, and the SAE it gives.

Two hosts read the demo corpus: the demo host as it is, and with four channels of its last hooked
layer made 1000 times larger, as the massive channels of large models are. Their float32 rows are
stored as bfloat16 and as int8, and the stored bfloat16 bytes compressed, chunk by chunk, with zstd
and with zstd behind a byte shuffle (which no reader of ours takes; it is here to be compared).

  bytes   of the hook's files, against bfloat16's
  fvu     sum |x - x̂|² / sum |x - mean|² over the rows without special tokens, of 1e-3
  channel the same for the worst single channel, which a massive one cannot hide
  write   rows a processor second, segment to commit, against bfloat16; zstd: its codec besides
  read    rows a processor second, file to float32 rows with checksums checked, likewise
  fve     held-out FVE, on the float32 rows, of a TopK SAE trained on int8 over one trained on
          bfloat16, equal seeds and batches

Bias: processor time says nothing about a disk that is slower than it; there half the bytes count.

    python -m pipelines.bench_int8 [--quick] [--json FILE]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from actcache.demo import ensure_demo
from actcache.host import HostSettings
from actcache.requantise import requantise
from actcache.run import CacheSettings, LayoutSettings, run
from actcache.sources import DataSettings
from actcache.store import FLAG_SPECIAL, Snapshot, Store, TokenTable
from actcache.store.calibrations import publish_calibration
from actcache.store.int8 import Calibration
from actcache.store.layout import VOCAB_JSON
from actcache.store.stats import HookStats, wide
from actcache.store.untrusted import read_file
from actcache.store.writer import StoreWriter
from pipelines.bench import Measure, command
from saetrain import train
from saetrain.artefact import load_sae
from saetrain.evals.run import SAE_FOLDER, evaluate_sae
from saetrain.runs import open_source
from saetrain.settings import TrainSettings

HOOKS = ("resid.1", "resid.2", "resid.3")
LAST, MASSIVE = 3, (7, 70, 133, 200)  # the block whose MLP writes them, and the channels
CODECS: dict[str, Any] = {
    "bf16_zstd": Zstd(level=1),
    "bf16_shuffle_zstd": Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE),
}


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    tokens: int
    turns: int
    seeds: int
    latents: int
    epochs: int


FULL = Scale(tokens=262_144, turns=7, seeds=3, latents=1024, epochs=2)
QUICK = Scale(tokens=4096, turns=1, seeds=1, latents=64, epochs=1)


# -- stores ----------------------------------------------------------------------------------------


def massive_host(source: Path, folder: Path) -> Path:
    """The host at `source` with channels MASSIVE of its block LAST's MLP output times 1000."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for part in ("weight", "bias"):
        weights[f"gpt_neox.layers.{LAST}.mlp.dense_4h_to_h.{part}"][list(MASSIVE)] *= 1000.0
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Stores:
    """The same tokens and hooks in three types."""

    float32: Store
    bfloat16: Store
    int8: Store


def make_stores(host: Path, corpus: Path, folder: Path, scale: Scale) -> Stores:
    """Activations of `host` below `folder`."""
    settings = CacheSettings(
        host=HostSettings(model=str(host)),
        data=DataSettings(files=str(corpus), id_column="id", text_column="text"),
        store=str(folder / "float32"),
        hooks=HOOKS,
        tokens=scale.tokens,
        layout=LayoutSettings(dtype="float32", segment_rows=min(131_072, scale.tokens)),
        catalog=str(folder / "catalog"),
        progress=False,
    )
    exact = run(settings).store
    made = {
        dtype: requantise(exact.snapshot(), folder / dtype, dtype).store
        for dtype in ("bfloat16", "int8")
    }
    return Stores(exact, **made)


# -- bytes and error -------------------------------------------------------------------------------


def stored_bytes(snapshot: Snapshot, hook: str) -> int:
    """Of the hook's files, scales and calibration included."""
    return sum(sum(s.hooks[hook].files(s.n_rows).values()) for s in snapshot.segments)


def chunks(snapshot: Snapshot, hook: str) -> Iterator[NDArray[Any]]:
    """Rows as they are stored, chunk by chunk."""
    for reader in (s.acts(hook) for s in snapshot.segments):
        yield from (reader.read_chunk(i) for i in range(reader.n_chunks))


def compressed(snapshot: Snapshot, hook: str, codec: Any) -> int:
    """Bytes of the hook's chunks under a codec, each with checksum and index entry."""
    return sum(
        len(codec.encode(np.ascontiguousarray(c).view(np.uint8))) + 20
        for c in chunks(snapshot, hook)
    )


def errors(exact: Snapshot, stored: Snapshot, hook: str) -> tuple[float, float, float]:
    """FVU over plain rows, the worst channel's, and how massive channels are, from the rows.

    The last is the largest channel's standard deviation over the median channel's.
    """
    lost, total = np.zeros(exact.hooks[hook].d), HookStats.empty(exact.hooks[hook].d)
    for a, b in zip(exact.segments, stored.segments, strict=True):
        plain = (a.tokens().flags & FLAG_SPECIAL) == 0
        x, back = a.acts(hook).read()[plain], wide(b.acts(hook).read()[plain])
        lost += np.square(x - back, dtype=np.float64).sum(0)
        total = total.merge(HookStats.of(x.astype(np.float64)))
    std = np.sqrt(total.m2)
    shares = lost / total.m2
    return (
        float(lost.sum() / total.m2.sum()),
        float(shares.max()),
        float(std.max() / np.median(std)),
    )


# -- speed -----------------------------------------------------------------------------------------


def processor(act: Callable[[], object]) -> float:
    """Processor seconds of a call, of all threads."""
    started = time.process_time()
    act()
    return time.process_time() - started


def write_once(stores: Stores, dtype: str, folder: Path) -> float:
    """Seconds to permute, encode, publish and commit one segment of one hook as `dtype`."""
    source: Store = getattr(stores, dtype)
    snapshot = source.snapshot()
    segment, info = snapshot.segments[0], snapshot.hooks[HOOKS[1]]
    store = "bfloat16" if dtype == "bfloat16" else "float32"  # rows as they wait to be written
    rows = getattr(stores, store).snapshot().segments[0].acts(info.name).read()
    tokens: TokenTable = segment.tokens()
    vocab = read_file(source.path, source.path / VOCAB_JSON, 1 << 28)
    writer = StoreWriter(folder, source.identity, {VOCAB_JSON: vocab})
    if dtype == "int8":
        publish_calibration(
            folder, info.activation_id, Calibration.of(snapshot.stats(info.name)), 0
        )
    commit = segment.commits[0]
    seconds = processor(
        lambda: writer.write_segment(
            unit=commit.unit,
            index=commit.index,
            last_in_unit=True,
            tokens=tokens,
            acts=[(info, rows)],
            writer={},
        )
    )
    shutil.rmtree(folder)
    return seconds


def read_once(snapshot: Snapshot) -> float:
    """Seconds to read one segment of one hook into float32 rows."""
    segment = snapshot.segments[0]
    out = np.empty((segment.n_rows, snapshot.hooks[HOOKS[1]].d), dtype=np.float32)

    def read() -> None:
        reader, first = segment.acts(HOOKS[1]), 0
        for i in range(reader.n_chunks):
            rows = reader.read_chunk(i)
            out[first : first + len(rows)] = wide(rows)
            first += len(rows)

    return processor(read)


def codec_once(snapshot: Snapshot, codec: Any) -> tuple[float, float]:
    """Seconds to compress, and to decompress, the chunks of one segment of one hook."""
    reader = snapshot.segments[0].acts(HOOKS[1])
    raw = [
        np.ascontiguousarray(reader.read_chunk(i)).view(np.uint8) for i in range(reader.n_chunks)
    ]
    done: list[bytes] = []
    encode = processor(lambda: done.extend(codec.encode(c) for c in raw))
    return encode, processor(lambda: [codec.decode(c) for c in done])


def speeds(stores: Stores, folder: Path, turns: int) -> dict[str, list[float]]:
    """Rate of each kind over bfloat16's, turn by turn; one turn more, the first, is dropped."""
    found: dict[str, list[float]] = {}
    bf16, int8 = stores.bfloat16.snapshot(), stores.int8.snapshot()
    for turn in range(turns + 1):
        write, read = write_once(stores, "bfloat16", folder), read_once(bf16)
        rates = {
            "write_int8": write / write_once(stores, "int8", folder),
            "read_int8": read / read_once(int8),
        }
        for name, codec in CODECS.items():
            encode, decode = codec_once(bf16, codec)
            rates |= {
                f"write_{name}": write / (write + encode),
                f"read_{name}": read / (read + decode),
            }
        for name, rate in rates.items() if turn else ():
            found.setdefault(name, []).append(rate)
    return found


# -- SAEs ------------------------------------------------------------------------------------------


def fve(store: Store, exact: Store, folder: Path, scale: Scale, seed: int) -> float:
    """Held-out FVE, on the rows of `exact`, of an SAE trained on `store`."""
    settings = TrainSettings.from_mapping(
        {
            "store": str(store.path),
            "hook": HOOKS[-1],
            "runs_dir": str(folder),
            "seed": seed,
            "epochs": scale.epochs,
            "batch_tokens": min(2048, scale.tokens // 8),
            "held_out_fraction": 0.1,
            "sae": {
                "name": "topk",
                "n_latents": scale.latents,
                "k": 32,
                "dead_after_tokens": 50_000,
            },
            "optim": {"lr": 3e-3},
            "progress": False,
            "report": False,
        }
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        trained = train(settings)
        there = replace(settings, store=str(exact.path))
        source = open_source(there, exact.snapshot(), torch.device("cpu"))
        sae = load_sae(trained.run_dir / SAE_FOLDER)
        return float(evaluate_sae(sae, source, settings.eval)["fve"])


def fve_ratios(
    stores: Stores, folder: Path, scale: Scale, say: Callable[[str], None]
) -> list[float]:
    """int8 over bfloat16, seed by seed."""
    ratios = []
    for seed in range(scale.seeds):
        mine, other = (
            fve(store, stores.float32, folder / f"{name}-{seed}", scale, seed)
            for name, store in (("int8", stores.int8), ("bf16", stores.bfloat16))
        )
        say(f"  seed {seed}: FVE {mine:.5f} from int8, {other:.5f} from bfloat16")
        ratios.append(mine / other)
    return ratios


# -- the command -----------------------------------------------------------------------------------


def of_storage(stores: Stores, name: str, say: Callable[[str], None]) -> list[Measure]:
    """Bytes and error of one host; the error is that of the worst hook."""
    exact, bf16, int8 = (s.snapshot() for s in (stores.float32, stores.bfloat16, stores.int8))
    base = {h: stored_bytes(bf16, h) for h in HOOKS}
    found = [_bytes(f"bytes_int8{name}", [stored_bytes(int8, h) / base[h] for h in HOOKS], 0.52)]
    for codec, how in CODECS.items():
        shares = [compressed(bf16, h, how) / base[h] for h in HOOKS]
        found.append(_bytes(f"bytes_{codec}{name}", shares, 1.0))
    for kind, stored in (("bf16", bf16), ("int8", int8)):
        lost = {h: errors(exact, stored, h) for h in HOOKS}
        for hook, (all_, worst, ratio) in lost.items():
            say(
                f"  {hook} as {kind}: FVU {all_:.2e}, of the worst channel {worst:.2e}; the "
                f"largest channel is {ratio:,.0f} times the median one"
            )
        found.append(_fvu(f"fvu_{kind}{name}", [e[0] for e in lost.values()]))
        found.append(_fvu(f"channel_{kind}{name}", [e[1] for e in lost.values()]))
    return found


def _bytes(name: str, shares: list[float], goal: float) -> Measure:
    return Measure(
        name=name, goal=goal, better="lower", unit="of bf16's bytes", ratios=tuple(shares)
    )


def _fvu(name: str, errors: list[float]) -> Measure:
    shares = tuple(e / 1e-3 for e in errors)
    return Measure(name=name, goal=1.0, better="lower", unit="FVU / 1e-3", ratios=shares)


def measure(quick: bool, say: Callable[[str], None]) -> list[Measure]:
    """All measures; each row's spread is over hooks (bytes, fvu), turns or seeds."""
    scale = QUICK if quick else FULL
    demo = ensure_demo(progress=False)
    found: list[Measure] = []
    with tempfile.TemporaryDirectory(prefix="bench_int8.") as name:
        folder = Path(name)
        hosts = {"": demo.host, "_massive": massive_host(demo.host, folder / "host")}
        for kind, host in hosts.items():
            say(f"activations of {'four massive channels' if kind else 'the demo host'}")
            stores = make_stores(host, demo.corpus, folder / f"stores{kind}", scale)
            found += of_storage(stores, kind, say)
            if not kind:
                found += [
                    Measure(
                        name=n,
                        goal=0.5 if n.endswith("int8") else 0.0,  # zstd only stands beside it
                        better="higher",
                        unit="of bf16's rate",
                        ratios=tuple(r),
                    )
                    for n, r in speeds(stores, folder / "written", scale.turns).items()
                ]
            ratios = fve_ratios(stores, folder / f"runs{kind}", scale, say)
            found.append(
                Measure(
                    name=f"fve_int8{kind}",
                    goal=0.995,
                    better="higher",
                    unit="of bf16's FVE",
                    ratios=tuple(ratios),
                )
            )
    return found


if __name__ == "__main__":
    sys.exit(command(__doc__, measure))
