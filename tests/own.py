"""A package of a user's own, for tests: an SAE, a metric and a data source, and what finds them."""

from __future__ import annotations

from pathlib import Path

SAE = '''
from dataclasses import dataclass
from saetrain.saes.base import register
from saetrain.saes.sae import Autoencoder, AutoencoderConfig

@dataclass(frozen=True, kw_only=True)
class HalfConfig(AutoencoderConfig):
    share: float = 0.5

@register("half_sae", HalfConfig)
class Half(Autoencoder):
    """Only the first part of the decoder is used."""

    def losses(self, acts, progress):
        found = super().losses(acts, progress)
        return type(found)({n: self.cfg.share * t for n, t in found.terms.items()}, found.codes)
'''
METRIC = '''
from saetrain.codes import dense
from saetrain.evals.own import Metric, register_metric

@register_metric("busiest")
class Busiest(Metric):
    """How many rows the busiest latent fires on, and its share."""

    formula = "max_i n_i"

    def __init__(self):
        self.fires, self.rows = 0, 0

    def update(self, rows):
        assert rows.x.shape == rows.y.shape and len(rows.ctx) == len(rows.x)
        self.fires = self.fires + (dense(rows.codes) > 0).sum(0)
        self.rows += len(rows.x)

    def compute(self):
        return {"rows": int(self.fires.max()), "share": float(self.fires.max()) / self.rows}
'''
SOURCE = '''
from actcache.own_sources import OwnSource, register_source
from actcache.sources import Document

@register_source("counting")
class Counting(OwnSource):
    """Sentences about numbers."""

    def __init__(self, upto: int = 40):
        self.upto = upto

    def content(self):
        return {"upto": self.upto, "version": 1}

    def documents(self, first):
        for i in range(first, self.upto):
            text = f"The parser reads {i} and then {i * i}." if i % 7 else ""
            yield Document(f"number/{i}", text)
'''


def package(folder: Path) -> Path:
    """An installed package in `folder`, which belongs on PYTHONPATH: modules and entry points."""
    for name, code in (("sae", SAE), ("metric", METRIC), ("source", SOURCE)):
        (folder / f"somebodys_{name}.py").write_text(code)
    info = folder / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    groups = {"saetrain.saes": "sae", "saetrain.metrics": "metric", "actcache.sources": "source"}
    lines = [f"[{group}]\nown = somebodys_{name}\n" for group, name in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    return folder
