"""The activation store: format, reader, writer. numpy and zarr, nothing of Hugging Face.

FORMAT.md beside this file is the specification. Importing this package also registers bfloat16
with zarr-python, so `zarr.open` reads every array.
"""

from actcache.store.encode import encode_acts as _encode_acts  # registers bfloat16  # noqa: F401
from actcache.store.errors import (
    ActcacheError,
    DamagedError,
    HookMissingError,
    IdentityError,
    OutOfSpaceError,
    SettingsError,
    StoreError,
    StoreMissingError,
    StoreVersionError,
)
from actcache.store.int8 import Calibration, dequantise
from actcache.store.int8_reader import Int8Reader
from actcache.store.layout import (
    FLAG_BOS,
    FLAG_DOC_START,
    FLAG_IMAGE,
    FLAG_SPECIAL,
    ROLES,
    TokenTable,
    eligible,
    roles_of,
)
from actcache.store.reader import Segment, Snapshot, Store, open_store
from actcache.store.schema import HookInfo, Identity, Layout
from actcache.store.stats import HookStats
from actcache.store.verify import verify

__all__ = [
    "FLAG_BOS",
    "FLAG_DOC_START",
    "FLAG_IMAGE",
    "FLAG_SPECIAL",
    "ROLES",
    "ActcacheError",
    "Calibration",
    "DamagedError",
    "HookInfo",
    "HookMissingError",
    "HookStats",
    "Identity",
    "IdentityError",
    "Int8Reader",
    "Layout",
    "OutOfSpaceError",
    "Segment",
    "SettingsError",
    "Snapshot",
    "Store",
    "StoreError",
    "StoreMissingError",
    "StoreVersionError",
    "TokenTable",
    "dequantise",
    "eligible",
    "open_store",
    "roles_of",
    "verify",
]
