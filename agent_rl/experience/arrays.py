"""Token arrays as they lie in SQL: little-endian, four bytes each, NaN for None."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack_ids(ids: Sequence[int]) -> bytes:
    """Raises OverflowError for an id that does not fit in 32 bits."""
    return np.array(ids, dtype="<i4").tobytes()


def unpack_ids(data: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(data, dtype="<i4").tolist())


def pack_floats(values: Sequence[float | None]) -> bytes:
    return np.array([np.nan if v is None else v for v in values], dtype="<f4").tobytes()


def unpack_floats(data: bytes) -> tuple[float | None, ...]:
    return tuple(None if v != v else v for v in np.frombuffer(data, dtype="<f4").tolist())
