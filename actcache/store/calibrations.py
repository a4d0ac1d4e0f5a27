"""What the writers of a store agreed on before the first int8 segment: one calibration per hook.

The first writer publishes it exclusively, whoever comes later uses it, so segments do not depend on
who wrote them. A store that has segments already (a copy, say) needs no such file: every int8
segment holds the calibration it was made with. Readers look there and never here.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actcache.store import layout
from actcache.store.errors import DamagedError, StoreError
from actcache.store.int8 import Calibration
from actcache.store.int8_reader import read_calibration
from actcache.store.places import Location
from actcache.store.publish import publish
from actcache.store.reader import read_record
from actcache.store.schema import Commit, Record, dump, tag


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord(Record):
    """calibrations/<tag>.json."""

    activation_id: str
    rows: int  # that were looked at
    values: str  # base64 of float32 (2, d): mean, std
    digest: str  # of those bytes
    format_version: int = layout.FORMAT_VERSION

    def decode(self) -> Calibration:
        """DamagedError if the record does not hold what its digest says."""
        try:
            array = np.frombuffer(base64.b64decode(self.values, validate=True), dtype="<f4")
            found = Calibration.from_array(array.reshape(2, -1))
        except (ValueError, StoreError) as e:
            raise DamagedError(f"calibration of {self.activation_id:.80}: {e}") from None
        if found.digest != self.digest:
            raise DamagedError(f"calibration of {self.activation_id:.80} is not what was published")
        return found


def publish_calibration(
    root: Location, activation_id: str, calibration: Calibration, rows: int
) -> None:
    """Publish the calibration of a hook, unless another writer was first; then that one counts."""
    record = CalibrationRecord(
        activation_id=activation_id,
        rows=rows,
        values=base64.b64encode(calibration.array.astype("<f4").tobytes()).decode(),
        digest=calibration.digest,
    )
    try:
        publish(_file(root, activation_id), dump(record))
    except FileExistsError:
        return


def find_calibration(
    root: Location, activation_id: str, commits: Mapping[str, Sequence[Commit]]
) -> Calibration | None:
    """From a committed segment, or else what was published before the first; None if neither."""
    for commit in [c for some in list(commits.values()) for c in some]:
        for hook in commit.hooks:
            if hook.info.activation_id == activation_id and hook.int8 is not None:
                group, what = root / commit.folder, f"segment {commit.segment}"
                return read_calibration(root, group, hook.info, what, hook.int8.calibration)
    file = _file(root, activation_id)
    if not file.exists():
        return None
    record = read_record(CalibrationRecord, root, file)
    if record.activation_id != activation_id:
        raise DamagedError(f"{file} is the calibration of another hook")
    return record.decode()


def _file(root: Location, activation_id: str) -> Location:
    return root / layout.CALIBRATIONS / f"{tag([activation_id])}.json"
