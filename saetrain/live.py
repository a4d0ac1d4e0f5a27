"""source=live: training on activations that are captured meanwhile, nothing on disk.

The capture is made by a function that a setting names (live.capture), loaded when it is asked for:
this package knows its interface (`saetrain.stream.live.Capture`) and nothing of host models.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

import torch

from saetrain.errors import ConfigError
from saetrain.log import say
from saetrain.runs import Source, renamed
from saetrain.saes import make_config
from saetrain.settings import TrainSettings
from saetrain.stream.capture import Calibration, Capture
from saetrain.stream.live import LiveStream


def open_live(settings: TrainSettings, device: torch.device) -> tuple[TrainSettings, Source]:
    """Settings with hooks by their stored names, and live streams of them.

    Reads the digests of data and weights; the host is loaded for the first batch. ConfigError for
    settings that cannot work; ActcacheError where the capture raises it.
    """
    if settings.stream.max_norm is not None:
        raise ConfigError(
            f"stream.max_norm={settings.stream.max_norm}: a live source does not look at norms; "
            "leave it out, or make a store"
        )
    config = make_config(settings.sae, settings.saes_path)
    hooks_in, hooks_out = config.hooks(settings.hook)
    capture = open_capture(settings, tuple(dict.fromkeys((*hooks_in, *hooks_out))))
    names = capture.names
    settings = renamed(settings, lambda hook: names.get(hook, hook))
    _say_needless(settings)
    train, held_out = _streams(settings, capture, device)
    source = Source(
        train=train,
        held_out=held_out,
        hooks_in=tuple(names[h] for h in hooks_in),
        hooks_out=tuple(names[h] for h in hooks_out),
        start=train.state_dict(),
        snapshot=None,
        live=capture.ids(),
    )
    return settings, source


def _streams(
    settings: TrainSettings, capture: Capture, device: torch.device
) -> tuple[LiveStream, LiveStream]:
    """Training and held-out batches, with the same statistics."""
    chosen, live = settings.stream, settings.live
    calibration = Calibration(
        capture,
        live.calibration_tokens,
        special=not chosen.skip_special,
        keep_bytes=int(live.keep_gb * 1e9),
    )

    def make(split: Any) -> LiveStream:
        return LiveStream(
            capture,
            tuple(dict.fromkeys(capture.names.values())),
            calibration,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
            split=split,
            held_out_fraction=settings.held_out_fraction,
            skip_special=chosen.skip_special,
            modality=chosen.modality,
            roles=chosen.roles,
            window_rows=chosen.window_rows,
            run_chunks=chosen.run_chunks,
            device=device,
        )

    return make("train"), make("held_out")


def open_capture(settings: TrainSettings, hooks: Sequence[str]) -> Capture:
    """What `live.capture` makes of the other settings of `live`."""
    live = settings.live
    missing = [f"live.{n}" for n in ("host", "data") if getattr(live, n) is None]
    if missing:
        raise ConfigError(
            f"missing: {', '.join(missing)}. source=live captures while training: name host and "
            "data as for actcache run, such as live.host=demo live.data=pydocs; or source=store"
        )
    module, colon, function = live.capture.partition(":")
    try:
        make = getattr(import_module(module), function) if colon else None
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"live.capture={live.capture} cannot be loaded: {e}") from e
    if make is None:
        raise ConfigError(f"live.capture={live.capture}: expected MODULE:FUNCTION")
    return cast(Capture, make(live.asked(), hooks, say))


def _say_needless(settings: TrainSettings) -> None:
    """Name what was set and means something for stores only."""
    chosen = settings.stream
    given = {
        "snapshot": settings.snapshot,
        "stream.threads": chosen.threads,
        "stream.direct": chosen.direct,
        "stream.cache_dir": chosen.cache_dir,
    }
    for name in (n for n, value in given.items() if value is not None):
        say(f"{name} has no effect with source=live")
