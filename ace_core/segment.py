"""Segments: the items of one or more snapshots, in the order of their identifiers.

A segment is immutable: ``add`` writes another one, ``remove`` sets tombstones in the snapshot, and publishing again
merges. Its folder holds

- ``identifiers.safetensors``: ``codes`` uint16 (items, levels), sorted lexicographically
- ``constraint.safetensors``: the constraint index over them
- ``items.arrow``: what is known of each item, in the same order, memory-mapped
- ``vectors.safetensors`` (optional): ``vectors`` int8 (items, D) and ``scales`` float32 (items,)
- ``manifest.json``
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ace_core.arrays import map_arrays, save_arrays
from ace_core.attributes import typed_attributes
from ace_core.constraint import ConstraintIndex
from ace_core.errors import StoreError
from ace_core.identifiers import sort_order
from ace_core.items import AttributeValue, Modality
from ace_core.manifest import Manifest, hash_folder, read_manifest, verify_files, write_manifest
from ace_core.scoring import Gallery, StoredVectors

ITEM_COLUMNS = (
    "item_id", "uri", "modality", "captions", "content_hash", "mime", "start_seconds", "end_seconds",
)  # fmt: skip


def item_versions(items: pa.Table) -> pa.Array:
    """(n,) text that changes when an item's content, place, captions or attributes do: what `ace add` compares."""
    columns = (items.column(name).to_pylist() for name in ("content_hash", "uri", "captions", "attributes"))
    return pa.array([hashlib.blake2b(repr(row).encode(), digest_size=8).hexdigest() for row in zip(*columns)])


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


def write_segment(
    folder: Path,
    *,
    segment_id: str,
    codes: np.ndarray,
    vocab_sizes: tuple[int, ...],
    items: pa.Table,
    corpus_root: str,
    inputs: dict[str, str],
    vectors: np.ndarray | None = None,
    metrics: dict[str, Any] | None = None,
) -> Manifest:
    """Sort items by identifier and write them as a segment; the manifest comes last.

    Args:
        folder: empty folder to write to.
        codes: (n, levels) identifiers.
        vocab_sizes: tokens of each level, the modality's first.
        items: n rows, columns of :data:`ITEM_COLUMNS` and ``attributes`` (JSON text).
        corpus_root: absolute folder (or URI) that relative ``uri`` values belong to.
        inputs: ids of the features, aligner, quantizer and generator this was made from.
        vectors: (n, D) aligned embeddings, to be stored as 8-bit vectors; None stores none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = sort_order(codes, vocab_sizes)
    codes = np.ascontiguousarray(codes[order], dtype=np.uint16)
    save_arrays(folder / "identifiers.safetensors", {"codes": codes})
    ConstraintIndex.build(codes, vocab_sizes).save(folder / "constraint.safetensors")
    if vectors is not None:
        stored = StoredVectors.of(vectors[order])
        save_arrays(folder / "vectors.safetensors", {"vectors": stored.vectors, "scales": stored.scales})
    rows = items.take(pa.array(order))
    attributes = typed_attributes(rows.column("attributes").to_pylist())
    table = rows.select(ITEM_COLUMNS).append_column("attributes", attributes)
    table = table.append_column("version", item_versions(rows)).combine_chunks()
    with pa.OSFile(str(folder / "items.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    manifest = Manifest(
        kind="segment",
        id=segment_id,
        inputs=inputs,
        settings={"corpus_root": corpus_root, "vocab_sizes": list(vocab_sizes)},
        metrics={"items": len(codes), **(metrics or {})},
        files=hash_folder(folder),
    )
    write_manifest(folder, manifest)
    return manifest


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
        vectors: dict[str, np.ndarray] | None = None
        if "vectors.safetensors" in self.manifest.files:
            vectors = map_arrays(folder / "vectors.safetensors")
        self.gallery: Gallery = Gallery(
            index=ConstraintIndex.load(folder / "constraint.safetensors"),
            codes=map_arrays(folder / "identifiers.safetensors")["codes"],
            stored=None if vectors is None else StoredVectors(vectors["vectors"], vectors["scales"]),
        )
        self.items: pa.Table = pa.ipc.open_file(pa.memory_map(str(folder / "items.arrow"))).read_all()
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

    @cached_property
    def attributes(self) -> pa.StructArray:
        """(items,) struct column of typed attributes."""
        column = self.items.column("attributes").combine_chunks()
        return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column

    def row_of(self, item_id: str) -> int | None:
        """Row of an item, or None: one vectorised scan (no dictionary of ten million strings in every replica)."""
        row = pc.index(self.items.column("item_id"), pa.scalar(item_id)).as_py()
        return None if row < 0 else row

    def item(self, row: int) -> StoredItem:
        """The item at a row."""
        return self.items_at([row])[0]

    def items_at(self, rows: Sequence[int]) -> list[StoredItem]:
        """The items at some rows, read from the table in one go."""
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
            for fields, identifier in zip(
                self.items.take(pa.array(rows, pa.int64())).to_pylist(), self.gallery.codes[rows].tolist()
            )
        ]
