"""One SAE a hook: what `hooks`, `layers` and `layer_stride` mean, and that each run is single."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fakes import planted
from stores import make_store
from training import planted_store, same, settings

from saetrain import train
from saetrain.errors import ConfigError
from saetrain.expand import expand
from saetrain.stream.loader import Loader
from saetrain.sweep import Opener, grouped, train_together

HOOKS = ("embed", "resid.0", "resid.1", "resid.2", "resid.10", "mlp.0", "mlp.1", "mlp.2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layers") / "store"
    planted_store(path, hooks=HOOKS, segments=(1024,))
    return path


@pytest.mark.parametrize(
    ("asked", "hooks"),
    [
        ({"hooks": ("resid.1", "mlp.2")}, ["resid.1", "mlp.2"]),
        ({"layers": (0, 10)}, ["resid.0", "resid.10"]),  # F50
        ({"layers": (1,), "hook": "mlp.0"}, ["mlp.1"]),
        ({"layers": (1, 2), "hook": "blocks.0.hook_resid_post"}, ["resid.1", "resid.2"]),
        ({"layer_stride": 2}, ["resid.0", "resid.2"]),  # F50 F55: the 1st and 3rd of 0 1 2 10
        ({"layer_stride": 3, "hook": "resid.0"}, ["resid.0", "resid.10"]),
        ({"layer_stride": 2, "hook": "mlp.1"}, ["mlp.0", "mlp.2"]),
        ({"hooks": "all", "layer_stride": 2}, ["mlp.0", "mlp.2", "resid.0", "resid.2"]),
        (
            {"hooks": "all"},
            ["mlp.0", "mlp.1", "mlp.2", "resid.0", "resid.1", "resid.2", "resid.10", "embed"],
        ),
    ],
    ids=str,
)
def test_which_hooks(store: Path, tmp_path: Path, asked: dict, hooks: list[str]) -> None:  # F50 F55
    found = expand(settings(store, tmp_path, **asked))
    assert [one.hook for one in found] == hooks
    for one in found:
        assert one == settings(store, tmp_path, hook=one.hook)  # that of a single run


def test_layers_of_joined_stores(store: Path, tmp_path: Path) -> None:
    two = {"stores": {"a": str(store), "b": str(store)}, "hook": "b:resid.2"}
    assert [s.hook for s in expand(settings(None, tmp_path, layers=(0, 1), **two))] == [
        "b:resid.0",
        "b:resid.1",
    ]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": (2,), "layer_stride": 2}, r"layer_stride=2 or layers=\[2\], not both"),  # F50
        ({"hooks": ("resid.1",), "layer_stride": 2}, "layer_stride=2 or hooks=.*not both"),
        ({"hooks": "all", "layers": (2,)}, "give hooks or layers, not both"),
        ({"hooks": "resid.1"}, r"hooks=resid.1: expected all, or a list as in hooks=\[resid.1\]"),
        ({"hooks": ("resid.1", "resid.1")}, "each once"),
        ({"layers": ()}, "expected one or more"),
        ({"layer_stride": 0}, "layer_stride: expected more than 0"),
        ({"layers": (2,), "hook": "embed"}, "hook=embed: .*name like resid.2"),
        ({"layer_stride": 2, "hook": "attn.0"}, "no hooks named like attn.0"),
        ({"hooks": "all", "source": "live"}, "source=live captures what is named"),
    ],
    ids=str,
)
def test_refusals(store: Path, tmp_path: Path, asked: dict, message: str) -> None:  # F50
    with pytest.raises(ConfigError, match=message):
        expand(settings(store, tmp_path, **asked))


def test_architectures_that_read_several_hooks_name_them(store: Path, tmp_path: Path) -> None:
    sae = {"name": "crosscoder", "n_latents": 16, "hooks_in": ["resid.0", "resid.1"]}
    with pytest.raises(ConfigError, match=r"sae.name=crosscoder reads several hooks.*Leave them"):
        expand(settings(store, tmp_path, sae=sae, hooks="all"))


def test_train_refuses_what_is_more_than_one_run(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_together"):
        train(settings(store, tmp_path, layers=(0, 1)))


def test_every_layer_at_once_equals_single_runs(store: Path, tmp_path: Path, monkeypatch) -> None:
    # F43
    opened: list[tuple[str, ...]] = []
    original = Loader.__init__

    def counted(self, segments, hooks, **kw) -> None:
        opened.append(tuple(hooks))
        original(self, segments, hooks, **kw)

    monkeypatch.setattr(Loader, "__init__", counted)
    cfg = settings(store, tmp_path / "all", layer_stride=2, tokens=64 * 12)
    outcomes = train_together([cfg])
    assert [o.settings.hook for o in outcomes] == ["resid.0", "resid.2"]
    assert opened[0] == ("resid.0", "resid.2")  # one reader for the training of both
    for outcome in outcomes:
        hook = outcome.settings.hook
        single = train(settings(store, tmp_path / "one", hook=hook, tokens=64 * 12))
        assert outcome.result is not None
        same(outcome.result.run_dir, single.run_dir)
        assert outcome.result.metrics["fve"] == single.metrics["fve"]
        assert outcome.result.metrics["pca"] == single.metrics["pca"]


def test_hooks_of_another_width_are_read_in_other_units(tmp_path: Path) -> None:
    """So they have streams of their own, and still equal their single runs."""

    def acts(hook, rng, tokens, d):
        return planted(len(tokens), d, seed=int(rng.integers(1 << 30)))

    path = tmp_path / "store"
    make_store(path, hooks={"resid.2": 16, "mlp.2": 64}, segments=(1024, 512), acts=acts)
    cfg = settings(path, tmp_path / "all", hooks=("resid.2", "mlp.2"), tokens=64 * 8)
    opener = Opener()
    assert grouped([opener.open(one) for one in expand(cfg)]) == [[0], [1]]
    for outcome in train_together([cfg]):
        single = settings(path, tmp_path / "one", hook=outcome.settings.hook, tokens=64 * 8)
        same(outcome.settings.run_dir, train(single).run_dir)


def test_transcoders_share_the_stream_with_saes(store: Path, tmp_path: Path) -> None:
    sae = {"name": "transcoder", "n_latents": 32, "k": 3, "hook_out": "mlp.1"}
    many = [
        settings(store, tmp_path / "all", sae=sae, hook="resid.0", tokens=64 * 8),
        settings(store, tmp_path / "all", hook="mlp.0", tokens=64 * 8),
    ]
    outcomes = train_together(many)
    assert [o.reason for o in outcomes] == [None, None]
    for outcome in outcomes:
        values = outcome.settings.to_dict() | {"runs_dir": str(tmp_path / "one")}
        single = train(type(outcome.settings).from_mapping(values))
        same(outcome.settings.run_dir, single.run_dir)
    assert np.isfinite([o.result.metrics["fve"] for o in outcomes if o.result]).all()
