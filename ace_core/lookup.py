"""Finding a text in a column of millions without reading the column.

Sorted 32-bit checksums name the few rows that can hold it, and the column decides among those. Memory-mapped, 8 bytes
a row.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa


def checksums(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(n,) uint32 checksums of n texts."""
    return np.fromiter((_checksum(text) for text in column.to_pylist()), np.uint32, len(column))


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "replace"))  # a lone surrogate, as JSON can hold, is in no column


@dataclass(frozen=True, eq=False)
class Lookup:
    """Which rows can hold a text.

    Attributes:
        sums: (n,) uint32, sorted checksums of the rows' texts.
        rows: (n,) uint32, the row of each.
    """

    sums: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, sums: np.ndarray) -> Lookup:
        """From the :func:`checksums` of all rows, in their order."""
        order = np.argsort(sums, kind="stable")
        return cls(sums[order], order.astype(np.uint32))

    def rows_of(self, text: str, column: pa.ChunkedArray) -> list[int]:
        """The rows of ``column`` that hold ``text``, in their order."""
        wanted = np.uint32(_checksum(text))  # of the column's type, or searchsorted would convert the column
        first, end = (np.searchsorted(self.sums, wanted, side) for side in ("left", "right"))
        return [row for row in self.rows[first:end].tolist() if column[row].as_py() == text]
