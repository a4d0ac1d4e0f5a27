"""Streams of activations: shuffled, resumable, at the speed of memory."""

from saetrain.stream.batch import Batch
from saetrain.stream.rows import RowFilter, Split
from saetrain.stream.stream import Stream, Traffic

__all__ = ["Batch", "RowFilter", "Split", "Stream", "Traffic"]
