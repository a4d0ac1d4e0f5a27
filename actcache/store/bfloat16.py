"""bfloat16 for zarr-python: the standard `bfloat16` extension type of zarr v3.

zarr-python has no bfloat16 of its own; the zarr-extensions registry has, and TensorStore and zarrs
read it. This class is registered through the `zarr.data_type` entry point, so with this package
installed `zarr.open_array` returns such arrays as `ml_dtypes.bfloat16` without importing us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype.common import DataTypeValidationError
from zarr.core.dtype.npy.float import BaseFloat
from zarr.core.dtype.wrapper import TBaseDType

BF16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """zarr data type over `ml_dtypes.bfloat16`, little endian on disk."""

    dtype_cls = type(BF16)
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_native_dtype(cls, dtype: TBaseDType) -> Self:
        """Accepts `ml_dtypes.bfloat16` alone: NumPy's class for it is shared by other types."""
        if dtype == BF16:
            return cls()
        raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected {BF16}")

    def to_native_dtype(self) -> np.dtype[Any]:
        return BF16

    @property
    def item_size(self) -> int:
        return 2
