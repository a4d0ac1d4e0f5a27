"""Streams of activations: shuffled, resumable, at the speed of memory."""

from saetrain.stream.ahead import Traffic
from saetrain.stream.batch import Batch
from saetrain.stream.join import JoinedSnapshot, join
from saetrain.stream.mix import Mix
from saetrain.stream.rows import RowFilter, Split
from saetrain.stream.sequences import SequenceBatch, SequenceStream
from saetrain.stream.stream import Stream

__all__ = [
    "Batch",
    "JoinedSnapshot",
    "Mix",
    "RowFilter",
    "SequenceBatch",
    "SequenceStream",
    "Split",
    "Stream",
    "Traffic",
    "join",
]
