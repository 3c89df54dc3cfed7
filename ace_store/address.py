"""Where the bytes of an item are: a file, a part of one (in a tar shard), or a cell of a table.

- ``pictures/a.jpg``: a file
- ``shards/00000.tar#bytes=1536,20480``: 20,480 bytes of a file, from its byte 1,536 on
- ``table.parquet#row=17,image``: the cell of row 17 (from 0) in a column (its name percent-encoded) of bytes, or of
  structs with a field ``bytes``

All are text below a corpus folder, so that an item is one string wherever it is listed.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ace_store.location import Location

_FRAGMENT = re.compile(r"(.+)#(?:bytes=(\d{1,18}),(\d{1,18})|row=(\d{1,18}),([\w.%~-]+))")
_CELLS = 16  # cells read at a time: what is in memory of a table whose cells are media


@dataclass(frozen=True)
class Address:
    """A uri taken apart.

    Attributes:
        path: of the file, below the corpus folder or whole, as it was written.
        span: first byte and number of bytes, where the item is a part of the file.
        cell: row and column, where the item is a cell of a Parquet file.
    """

    path: str
    span: tuple[int, int] | None = None
    cell: tuple[int, str] | None = None

    @classmethod
    def parse(cls, uri: str) -> Address:
        """Take a uri apart; without one of the two fragments it is a file's path."""
        match = _FRAGMENT.fullmatch(uri)
        if match is None:
            return cls(uri)
        path, first, length, row, column = match.groups()
        if first is not None:
            return cls(path, span=(int(first), int(length)))
        return cls(path, cell=(int(row), unquote(column)))

    def __str__(self) -> str:
        if self.span is not None:
            return f"{self.path}#bytes={self.span[0]},{self.span[1]}"
        if self.cell is not None:
            return f"{self.path}#row={self.cell[0]},{quote(self.cell[1], safe='')}"
        return self.path


def cell_bytes(value: Any) -> bytes | None:
    """The media in a cell: bytes, or a struct's field ``bytes``; None where there are none."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return bytes(value) if isinstance(value, bytes | bytearray) and value else None


class Cells:
    """A column of a Parquet file, read by rows. Ascending rows cost one pass; memory holds a few cells."""

    def __init__(self, filesystem: fs.FileSystem, path: str, column: str) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be read, or is no Parquet file.
        """
        try:
            source = filesystem.open_input_file(path)
            self._file = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
        except pa.ArrowException as e:
            raise OSError(f"no Parquet file: {e}") from None
        self._column = column
        metadata = self._file.metadata
        counts = (metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
        self._starts = [0, *accumulate(counts)]
        self._next = 0
        self._rows: Iterator[Any] = iter(())
        self._end = 0  # of the row group that is being read

    def read(self, row: int) -> bytes:
        """The media in a row.

        Raises:
            OSError: there is no such row or column, or nothing in it.
        """
        if not 0 <= row < self._starts[-1]:
            raise OSError(f"the table has {self._starts[-1]:,} rows, no row {row:,}")
        if not self._next <= row < self._end:
            group = bisect_right(self._starts, row) - 1
            self._next, self._end = self._starts[group], self._starts[group + 1]
            self._rows = self._values(group)
        try:
            value = None
            while self._next <= row:
                value = next(self._rows, None)
                self._next += 1
        except (pa.ArrowException, OSError) as e:
            self._end = 0
            raise OSError(f"the column {self._column!r} cannot be read: {e}") from None
        data = cell_bytes(value)
        if data is None:
            raise OSError(f"the cell holds no bytes (row {row:,}, column {self._column!r})")
        return data

    def _values(self, group: int) -> Iterator[Any]:
        for batch in self._file.iter_batches(_CELLS, row_groups=[group], columns=[self._column]):
            if not batch.num_columns:
                raise OSError(f"the table has no column {self._column!r}")
            yield from (value.as_py() for value in batch.column(0))


class ItemReader:
    """Reads items below one location by their uris. Safe to call from several threads."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._lock = threading.Lock()
        self._cells: tuple[tuple[str, str], Cells] | None = None  # the table that was read last, where it was left

    def read(self, uri: str) -> bytes:
        """The bytes of an item.

        Raises:
            OSError: they are not there, or not all of them.
        """
        address = Address.parse(uri)
        path = self._location.path(address.path)
        if address.cell is not None:
            row, column = address.cell
            with self._lock:
                if self._cells is None or self._cells[0] != (path, column):
                    self._cells = (path, column), Cells(self._location.filesystem, path, column)
                return self._cells[1].read(row)
        if address.span is not None:
            first, length = address.span
            with self._location.filesystem.open_input_file(path) as f:
                data = f.read_at(length, first)
            if len(data) < length:
                raise OSError(f"{length - len(data):,} bytes of it lie behind the end of {address.path}")
            return data
        with self._location.filesystem.open_input_stream(path) as f:
            return f.read()
