"""Writing a segment from batches in any order, in the memory of some 100,000 items however many come.

The coarse token sorts the corpus roughly: rows wait on disk in buckets of neighbouring (modality, coarse) cells, which
are identifier order already; at the end each bucket is read, sorted by the other tokens and appended. What stays in
memory are the identifiers themselves, for the constraint index.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ace_core.arrays import array_header, save_arrays
from ace_core.attributes import attribute_types, common_types, typed_attributes
from ace_core.constraint import ConstraintIndex
from ace_core.identifiers import check_identifiers, sort_order
from ace_core.lookup import Lookup, checksums
from ace_core.manifest import Manifest, hash_folder, write_manifest
from ace_core.scoring import Remainders
from ace_core.segment import FORMAT, ITEM_COLUMNS, LOOKUP_NAME, LOOKUPS, item_versions

_WAITING = 65_536  # rows collected before they are put in their buckets
_BUCKETS = 256


def segment_rows(items: pa.Table, codes: np.ndarray, left: np.ndarray | None = None) -> pa.Table:
    """Items with their identifiers, as :meth:`SegmentWriter.add` takes them.

    Args:
        items: n rows, columns of :data:`ace_core.segment.ITEM_COLUMNS` and ``attributes`` (JSON text).
        codes: (n, levels) uint16 identifiers.
        left: (n, D) what these identifiers leave of the item vectors, x - x̂, to be stored in 8 bits; None stores
            nothing of them.
    """
    rows = items.select([*ITEM_COLUMNS, "attributes"]).append_column("version", item_versions(items))
    rows = rows.append_column("codes", _packed(codes.astype(np.uint16)))
    if left is not None:
        stored = Remainders.of(left)
        rows = rows.append_column("remainder", _packed(stored.steps))
        rows = rows.append_column("scale", pa.array(stored.scales, pa.float32()))
    return rows


def write_segment(
    folder: Path,
    *,
    segment_id: str,
    codes: np.ndarray,
    vocab_sizes: tuple[int, ...],
    items: pa.Table,
    corpus_root: str,
    inputs: dict[str, str],
    left: np.ndarray | None = None,
    metrics: dict[str, Any] | None = None,
) -> Manifest:
    """Write a segment of items that are all at hand; arguments as of :func:`segment_rows` and :class:`SegmentWriter`.

    Raises:
        StoreError: identifiers of other codebooks.
    """
    check_identifiers(codes.astype(np.uint16), vocab_sizes)
    with SegmentWriter(folder, vocab_sizes) as writer:
        writer.add(segment_rows(items, codes, left))
        return writer.finish(segment_id, corpus_root=corpus_root, inputs=inputs, metrics=metrics or {})


class SegmentWriter:
    """Takes rows, and writes them as a segment; a context manager that removes what it left on the way.

    Args:
        folder: empty folder to write to.
        vocab_sizes: tokens of each level, the modality's first.
    """

    def __init__(self, folder: Path, vocab_sizes: tuple[int, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._vocab_sizes = vocab_sizes
        self._waiting: list[pa.Table] = []
        self._types: dict[str, pa.DataType] = {}
        self._spilled = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".sorting-"))
        self._buckets: dict[int, pa.RecordBatchStreamWriter] = {}
        self._count = 0

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        for bucket in self._buckets.values():
            bucket.close()
        shutil.rmtree(self._spilled, ignore_errors=True)

    def add(self, rows: pa.Table) -> None:
        """Take rows of :func:`segment_rows`."""
        for chunk in rows.column("attributes").chunks:
            self._types = common_types(self._types, attribute_types(chunk))
        self._count += rows.num_rows
        self._waiting.append(rows)
        if sum(table.num_rows for table in self._waiting) >= _WAITING:
            self._spill()

    def finish(self, segment_id: str, *, corpus_root: str, inputs: dict[str, str], metrics: dict[str, Any]) -> Manifest:
        """Sort and write all rows; the manifest comes last.

        Args:
            corpus_root: absolute folder (or URI) that relative ``uri`` values belong to.
            inputs: ids of the features, aligner, quantizer and generator this was made from.

        Raises:
            StoreError: identifiers of other codebooks.
        """
        codes = np.empty((self._count, len(self._vocab_sizes)), np.uint16)
        sums = {name: np.empty(self._count, np.uint32) for name in LOOKUPS}
        scales = np.empty(self._count, np.float32)
        items, remainders, start = None, None, 0
        try:
            for rows in self._sorted_runs():
                end = start + rows.num_rows
                codes[start:end] = _unpacked(rows.column("codes"), np.uint16)
                for name in LOOKUPS:
                    sums[name][start:end] = checksums(rows.column(name))
                table = self._item_table(rows)
                if items is None:
                    items = pa.ipc.new_file(str(self._folder / "items.arrow"), table.schema)
                items.write_table(table)
                if "remainder" in rows.column_names:
                    if remainders is None:
                        width = rows.schema.field("remainder").type.byte_width
                        shapes = {"steps": ((self._count, width), np.int8), "scales": ((self._count,), np.float32)}
                        remainders = (self._folder / "remainders.safetensors").open("wb")
                        remainders.write(array_header(shapes)[0])
                    remainders.write(_unpacked(rows.column("remainder"), np.int8).data)
                    scales[start:end] = rows.column("scale").to_numpy()
                start = end
            if remainders is not None:
                remainders.write(scales.data)
        finally:
            for opened in (items, remainders):
                if opened is not None:
                    opened.close()
        save_arrays(self._folder / "identifiers.safetensors", {"codes": codes})
        ConstraintIndex.build(codes, self._vocab_sizes).save(self._folder / "constraint.safetensors")
        lookups = {name: Lookup.of(sums.pop(name)) for name in LOOKUPS}
        save_arrays(
            self._folder / LOOKUP_NAME,
            {f"{name}.{part}": getattr(lookup, part) for name, lookup in lookups.items() for part in ("sums", "rows")},
        )
        manifest = Manifest(
            kind="segment",
            id=segment_id,
            inputs=inputs,
            settings={"format": FORMAT, "corpus_root": corpus_root, "vocab_sizes": list(self._vocab_sizes)},
            metrics={"items": self._count, **metrics},
            files=hash_folder(self._folder),
        )
        write_manifest(self._folder, manifest)
        return manifest

    def _spill(self) -> None:
        """Put the waiting rows in their buckets on disk."""
        rows = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting.clear()
        codes = _unpacked(rows.column("codes"), np.uint16).astype(np.int64)
        cells = self._vocab_sizes[0] * self._vocab_sizes[1]
        bucket = (codes[:, 0] * self._vocab_sizes[1] + codes[:, 1]) * min(_BUCKETS, cells) // cells
        order = np.argsort(bucket, kind="stable")
        rows = rows.take(pa.array(order))
        numbers, starts = np.unique(bucket[order], return_index=True)
        for number, start, end in zip(numbers.tolist(), starts.tolist(), [*starts.tolist()[1:], len(order)]):
            if number not in self._buckets:
                self._buckets[number] = pa.ipc.new_stream(str(self._spilled / str(number)), rows.schema)
            self._buckets[number].write_table(rows.slice(start, end - start))

    def _sorted_runs(self) -> Iterator[pa.Table]:
        """All rows in identifier order, bucket by bucket."""
        if not self._buckets:
            yield self._sorted(pa.concat_tables(self._waiting))
            return
        if self._waiting:
            self._spill()
        for number in sorted(self._buckets):
            self._buckets[number].close()
            path = self._spilled / str(number)
            with pa.OSFile(str(path)) as source:
                rows = pa.ipc.open_stream(source).read_all()
            path.unlink()
            yield self._sorted(rows)

    def _sorted(self, rows: pa.Table) -> pa.Table:
        """Rows by identifier; those that share one by id, so that the order they came in leaves no trace."""
        codes = _unpacked(rows.column("codes"), np.uint16)
        order = sort_order(codes, self._vocab_sizes)
        same = np.zeros(len(order) + 1, bool)
        same[1:-1] = (codes[order[1:]] == codes[order[:-1]]).all(axis=1)
        tied = np.flatnonzero(same[1:] | same[:-1])
        if len(tied):
            group = np.cumsum(~same[:-1])[tied]
            ids = rows.column("item_id").take(pa.array(order[tied]))
            keys = [("group", "ascending"), ("id", "ascending")]
            place = pc.sort_indices(pa.table({"group": group, "id": ids}), sort_keys=keys)
            order[tied] = order[tied][place.to_numpy()]
        return rows.combine_chunks().take(pa.array(order)).combine_chunks()

    def _item_table(self, rows: pa.Table) -> pa.Table:
        attributes = typed_attributes(rows.column("attributes").combine_chunks(), self._types)
        table = rows.select(ITEM_COLUMNS).append_column("attributes", attributes)
        return table.append_column("version", rows.column("version"))


def _packed(matrix: np.ndarray) -> pa.Array:
    """Rows of a matrix (n, m) as n binary values."""
    matrix = np.ascontiguousarray(matrix)
    width = matrix.shape[1] * matrix.itemsize
    return pa.Array.from_buffers(pa.binary(width), len(matrix), [None, pa.py_buffer(matrix)])


def _unpacked(column: pa.ChunkedArray, dtype: type[np.generic]) -> np.ndarray:
    """The matrix (n, m) of :func:`_packed`."""
    width = column.type.byte_width
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        for chunk in column.chunks
        if len(chunk)
    ]
    flat = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint8), *parts])
    return flat.view(dtype).reshape(-1, width // np.dtype(dtype).itemsize)
