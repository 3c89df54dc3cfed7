"""Segments: the items of one or more snapshots, in the order of their identifiers.

A segment is immutable: ``add`` writes another one, ``remove`` sets tombstones in the snapshot, and publishing again
merges. Its folder holds

- ``identifiers.safetensors``: ``codes`` uint16 (items, levels), sorted lexicographically
- ``constraint.safetensors``: the constraint index over them
- ``items.arrow``: what is known of each item, in the same order, memory-mapped, in runs of some 100,000 items
- ``lookup.safetensors``: where an id, and a file's content, is in ``items.arrow`` (:mod:`ace_core.lookup`)
- ``remainders.safetensors`` (optional): ``steps`` int8 (items, D) and ``scales`` float32 (items,)
- ``manifest.json``
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ace_core.arrays import map_arrays
from ace_core.attributes import FilterValue, matching
from ace_core.constraint import ConstraintIndex
from ace_core.errors import StoreError
from ace_core.items import AttributeValue, Modality
from ace_core.lookup import Lookup, checksums
from ace_core.manifest import Manifest, read_manifest, verify_files
from ace_core.scoring import Gallery, Remainders

ITEM_COLUMNS = (
    "item_id", "uri", "modality", "captions", "content_hash", "mime", "start_seconds", "end_seconds",
)  # fmt: skip

FORMAT = 4
"""Of a segment's files: the first stored whole 8-bit vectors, the second what the codewords as fitted leave of them,
the third what the codewords in 8 bits do, the fourth is the third and says so in its manifest. The second is read like
the third: there, until it is published again, a similarity is off by the rounding of the item's codewords (see
:class:`ace_core.scoring.Codewords`)."""

LOOKUP_NAME = "lookup.safetensors"
LOOKUPS = ("item_id", "content_hash")
"""Columns that rows are found by."""

_RUN = 65_536  # rows that become Python objects at a time


def item_versions(items: pa.Table) -> pa.ChunkedArray:
    """(n,) text that changes when an item's content, place, captions or attributes do: what `ace add` compares."""
    runs = items.select(["content_hash", "uri", "captions", "attributes"]).to_batches(max_chunksize=_RUN)
    return pa.chunked_array(
        [
            [
                hashlib.blake2b(repr(row).encode(), digest_size=8).hexdigest()
                for row in zip(*(column.to_pylist() for column in run.columns))
            ]
            for run in runs
        ],
        pa.string(),
    )


def finds_less(manifest: Manifest) -> bool:
    """Whether a segment may be of the second format: until it is published again, less is found in it."""
    return "remainders.safetensors" in manifest.files and manifest.settings.get("format", 2) < FORMAT


def found_less(count: int) -> str:
    """What an operator is told of so many segments that :func:`finds_less` is true of."""
    which = "a segment was" if count == 1 else f"{count:,} segments were"
    return f"{which} written by an earlier ACE, and may find a little less: `ace publish` writes them anew (no refit)"


@dataclass(frozen=True)
class StoredItem:
    """One item as a segment holds it. ``root`` is the corpus folder that ``uri`` is relative to."""

    item_id: str
    uri: str
    root: str
    modality: Modality
    captions: tuple[str, ...]
    attributes: dict[str, AttributeValue]
    mime: str
    content_hash: str
    start_seconds: float | None
    end_seconds: float | None
    identifier: tuple[int, ...]


class Segment:
    """A segment opened for reading: memory-mapped, so that opening costs no memory and little time."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Open a segment.

        Raises:
            StoreError: it is unfinished, damaged, or its files do not agree with each other.
        """
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder, expect="segment")
        verify_files(folder, self.manifest, hashes=verify)
        if "vectors.safetensors" in self.manifest.files:
            raise StoreError(
                f"a segment of format 1 (this ACE reads 2 to {FORMAT})",
                where=folder,
                remedy="Run `ace publish` again.",
            )
        stored: Remainders | None = None
        if "remainders.safetensors" in self.manifest.files:
            arrays = map_arrays(folder / "remainders.safetensors")
            stored = Remainders(arrays["steps"], arrays["scales"])
        self.gallery: Gallery = Gallery(
            index=ConstraintIndex.load(folder / "constraint.safetensors"),
            codes=map_arrays(folder / "identifiers.safetensors")["codes"],
            stored=stored,
        )
        self.items: pa.Table = pa.ipc.open_file(pa.memory_map(str(folder / "items.arrow"))).read_all()
        self._batches: list[pa.RecordBatch] = self.items.to_batches()
        self._mapped_lookups: dict[str, np.ndarray] | None = None
        if LOOKUP_NAME in self.manifest.files:  # now, for its files may be deleted while it serves on
            self._mapped_lookups = map_arrays(folder / LOOKUP_NAME)
        self.corpus_root: str = self.manifest.settings["corpus_root"]
        if not len(self.gallery.codes) == self.items.num_rows == self.gallery.index.items:
            raise StoreError(
                f"{len(self.gallery.codes)} identifiers, {self.items.num_rows} items and a constraint index of "
                f"{self.gallery.index.items} do not belong together",
                where=folder,
                remedy="Publish again.",
            )

    def __len__(self) -> int:
        return len(self.gallery.codes)

    @property
    def attributes(self) -> list[pa.StructArray]:
        """Typed attributes of all items, in runs of items as they lie on the disk."""
        chunks: list[pa.StructArray] = self.items.column("attributes").chunks
        return chunks

    def matching(self, filters: Mapping[str, FilterValue]) -> np.ndarray:
        """(items,) bool: which items pass every filter, see :func:`ace_core.attributes.matching`."""
        return np.concatenate([np.empty(0, bool), *(matching(column, filters) for column in self.attributes)])

    @cached_property
    def _lookups(self) -> dict[str, Lookup]:
        arrays = self._mapped_lookups
        if arrays is None:  # of before there was such a file
            return {name: Lookup.of(checksums(self.items.column(name))) for name in LOOKUPS}
        return {name: Lookup(arrays[f"{name}.sums"], arrays[f"{name}.rows"]) for name in LOOKUPS}

    def row_of(self, item_id: str) -> int | None:
        """Row of an item, or None."""
        return next(iter(self._lookups["item_id"].rows_of(item_id, self.items.column("item_id"))), None)

    def rows_of_content(self, digest: str) -> list[int]:
        """Rows of the items that are a file of this :func:`~ace_core.items.content_hash`, or segments of it."""
        return self._lookups["content_hash"].rows_of(digest, self.items.column("content_hash"))

    def item(self, row: int) -> StoredItem:
        """The item at a row."""
        return self.items_at([row])[0]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([batch.num_rows for batch in self._batches])

    def _fields(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """What the table holds of some rows: taken run by run, for Arrow would first copy all runs into one."""
        out: list[dict[str, Any]] = [{}] * len(rows)
        run = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(run).tolist():
            here = np.flatnonzero(run == number)
            batch = self._batches[number]
            local = rows[here] - (self._ends[number] - batch.num_rows)
            for at, fields in zip(here.tolist(), batch.take(pa.array(local)).to_pylist()):
                out[at] = fields
        return out

    def items_at(self, rows: Sequence[int] | np.ndarray) -> list[StoredItem]:
        """The items at some rows."""
        rows = np.asarray(rows, np.int64)
        return [
            StoredItem(
                item_id=fields["item_id"],
                uri=fields["uri"],
                root=self.corpus_root,
                modality=Modality(fields["modality"]),
                captions=tuple(fields["captions"] or ()),
                attributes={k: v for k, v in fields["attributes"].items() if v is not None},
                mime=fields["mime"] or "application/octet-stream",
                content_hash=fields["content_hash"],
                start_seconds=fields["start_seconds"],
                end_seconds=fields["end_seconds"],
                identifier=tuple(identifier),
            )
            for fields, identifier in zip(self._fields(rows), self.gallery.codes[rows].tolist())
        ]
