"""Streams of activations: shuffled, resumable, at the speed of memory."""

from saetrain.stream.ahead import Traffic
from saetrain.stream.batch import Batch
from saetrain.stream.join import JoinedSnapshot, join
from saetrain.stream.rows import RowFilter, Split
from saetrain.stream.stream import Stream

__all__ = ["Batch", "JoinedSnapshot", "RowFilter", "Split", "Stream", "Traffic", "join"]
