"""Read rows stored as int8: a chunk of codes, the same chunk of scales, one calibration a hook.

Codes and scales are two shards cut at the same rows, so rows of one chunk are two preads at places
known by arithmetic; mean and std (8 bytes a channel) are read once. For whoever decodes elsewhere,
on a GPU say, everything is at hand undecoded: `codes`, `scales`, `mean`, `std`.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from actcache.store.errors import DamagedError, StoreError
from actcache.store.int8 import F32, Calibration, dequantise
from actcache.store.layout import DTYPES
from actcache.store.places import Location
from actcache.store.schema import HookInfo
from actcache.store.shard import OpenShard, ShardReader, check_crc
from actcache.store.untrusted import read_file


class Int8Reader(ShardReader):
    """Rows of one int8 hook of one segment, decoded to float32: shape (n_rows, d).

    `codes` and `scales` are plain readers of the two shards, (n_rows, d) int8 and (n_rows, 1)
    float32, with the same chunks.
    """

    def __init__(
        self, root: Location, group: Location, info: HookInfo, n_rows: int, what: str, digest: str
    ) -> None:
        """`group` is the segment's folder, `digest` that of its calibration. Reads nothing yet."""
        path = group / "acts" / info.key / "c" / "0" / "0"
        super().__init__(root, path, info, n_rows, what)
        self.dtype = DTYPES["float32"]  # of the rows it gives
        self._digest, self._group = digest, group
        self.codes = ShardReader(root, path, info, n_rows, what)
        path = group / "scales" / info.key / "c" / "0"
        self.scales = ShardReader(root, path, info.scales, n_rows, f"{what}, scales")

    @cached_property
    def calibration(self) -> Calibration:
        """DamagedError unless it is the one that the commit names."""
        return read_calibration(self.root, self._group, self.info, self.what, self._digest)

    @property
    def mean(self) -> F32:
        """(d,) float32."""
        return self.calibration.mean

    @property
    def std(self) -> F32:
        """(d,) float32, positive."""
        return self.calibration.std

    def read_codes(self, chunk: int) -> tuple[NDArray[np.int8], F32]:
        """Codes (rows_in(chunk), d) and scales (rows_in(chunk),) of one inner chunk."""
        return self.codes.read_chunk(chunk), self.scales.read_chunk(chunk)[:, 0]

    def read_chunk(self, chunk: int) -> F32:
        """Rows (rows_in(chunk), d) of one inner chunk, float32. Raises DamagedError."""
        return self._decode(chunk, *self.read_codes(chunk))

    def read_into(
        self, chunk: int, buffer: NDArray[np.uint8], file: OpenShard | None = None
    ) -> F32:
        """Like `read_chunk`; `buffer`, at least `chunk_bytes + 4` bytes, takes the codes.

        `file` is that of the codes.
        """
        scale = self.scales.read_chunk(chunk)[:, 0]
        return self._decode(chunk, self.codes.read_into(chunk, buffer, file), scale)

    def _decode(self, chunk: int, codes: NDArray[np.int8], scale: F32) -> F32:
        if not np.isfinite(scale).all():
            raise DamagedError(f"{self.what}, chunk {chunk}: a scale is not finite")
        return dequantise(codes, scale, self.mean, self.std)


def read_calibration(
    root: Location, group: Location, info: HookInfo, what: str, digest: str
) -> Calibration:
    """The calibration in the segment's folder `group`. DamagedError unless it has `digest`."""
    path, what = group / "calibration" / info.key / "c" / "0" / "0", f"{what}, calibration"
    try:
        data = read_file(root, path, 2 * info.d * 4 + 4, exact=True)
        array = np.frombuffer(check_crc(data, what), dtype="<f4").reshape(2, info.d)
        found = Calibration.from_array(array)
    except StoreError as e:
        raise DamagedError(f"{what}: {e}") from e
    if found.digest != digest:
        raise DamagedError(f"{what}: {path} is not the calibration that the commit names")
    return found
