"""A features part while it is being written: shards, each with a small statistics file that is written last.

One process writes them (the driver, as encoded rows stream in), so a row is either in one shard or in none. A shard
without its statistics file does not exist: whatever a killed run left of it is removed. The same files tell the next
ingestion of a changed corpus what it need not encode again.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ace_core.features import ERRORS_SCHEMA, ITEM_SCHEMA, embeddings_of, with_embeddings
from ace_core.items import Modality
from ace_core.manifest import MANIFEST_NAME, FileEntry
from ace_store import Store
from pipelines.encode import KnownEmbeddings


@dataclass(frozen=True)
class Shard:
    """A committed shard, as its statistics file tells.

    Attributes:
        name: for example "image-000003".
        encoder: identity of the encoder whose embeddings it holds.
        items: rows with an embedding; ``reused`` of them were encoded by an earlier ingestion.
        errors: rows without, by cause.
        files: data files by path in the part.
    """

    name: str
    modality: Modality
    encoder: str
    items: int
    reused: int
    errors: dict[str, int]
    files: dict[str, FileEntry]

    @property
    def items_file(self) -> str | None:
        return next((f for f in self.files if f.startswith(f"{self.modality.value}/")), None)

    @property
    def errors_file(self) -> str | None:
        return next((f for f in self.files if f.startswith("errors/")), None)


@dataclass
class PartWriter:
    """Writes one features part shard by shard, continuing where a killed run stopped."""

    store: Store
    part_id: str
    shard_items: int
    shard_seconds: float
    shards: list[Shard] = field(default_factory=list)

    @classmethod
    def resume(cls, store: Store, part_id: str, shard_items: int, shard_seconds: float) -> PartWriter:
        """Open a part that may have been begun; removes what a killed run left unfinished."""
        writer = cls(store, part_id, shard_items, shard_seconds, committed_shards(store, part_id))
        known = {writer.path(name) for shard in writer.shards for name in shard.files}
        for info in store.listing(f"features/{part_id}", recursive=True):
            if info.is_file and info.path.endswith(".parquet") and info.path not in known:
                store.filesystem.delete_file(info.path)
        return writer

    def path(self, name: str) -> str:
        return self.store.path("features", self.part_id, name)

    def done_ids(self, modality: Modality) -> pa.Array:
        """Ids of the items of a modality that committed shards hold, good or bad."""
        names = [n for s in self.shards if s.modality == modality for n in (s.items_file, s.errors_file) if n]
        return _ids(self.store, [self.path(name) for name in names])

    def buffer(self, modality: Modality, encoder: str) -> ShardBuffer:
        """Where rows of one modality are collected until they make a shard."""
        return ShardBuffer(self, modality, encoder)

    def commit(
        self, modality: Modality, encoder: str, items: list[pa.Table], errors: list[dict[str, Any]], reused: int
    ) -> None:
        """Write one shard: data, then its statistics."""
        number = 1 + max((int(s.name.rpartition("-")[2]) for s in self.shards if s.modality == modality), default=-1)
        name = f"{modality.value}-{number:06d}"
        files: dict[str, FileEntry] = {}
        rows = sum(t.num_rows for t in items)
        if rows:
            self._write(f"{modality.value}/{name}.parquet", pa.concat_tables(items), files)
        if errors:
            self._write(f"errors/{name}.parquet", pa.Table.from_pylist(errors, schema=ERRORS_SCHEMA), files)
        shard = Shard(name, modality, encoder, rows, reused, dict(Counter(e["cause"] for e in errors)), files)
        self.store.write_json(
            f"features/{self.part_id}/shards/{name}.json",
            {
                "name": shard.name,
                "modality": modality.value,
                "encoder": encoder,
                "items": shard.items,
                "reused": reused,
                "errors": shard.errors,
                "files": {k: v.model_dump() for k, v in files.items()},
            },
        )
        self.shards.append(shard)

    def write_errors(self, name: str, errors: pa.Table) -> dict[str, FileEntry]:
        """Write rows of ``ERRORS_SCHEMA`` that belong to no shard; returns the file's entry (none for no rows)."""
        files: dict[str, FileEntry] = {}
        if errors.num_rows:
            self._write(f"errors/{name}.parquet", errors, files)
        return files

    def _write(self, name: str, table: pa.Table, files: dict[str, FileEntry]) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        self.store.write_bytes(f"features/{self.part_id}/{name}", data)
        files[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class ShardBuffer:
    """Collects rows and commits them when they are many enough or old enough."""

    def __init__(self, writer: PartWriter, modality: Modality, encoder: str) -> None:
        self._writer = writer
        self._modality = modality
        self._encoder = encoder
        self._clear()

    def add(self, items: pa.Table | None, errors: list[dict[str, Any]], *, reused: int = 0) -> None:
        """Take rows of ``features_schema``, of which some were encoded earlier, and rows of ``ERRORS_SCHEMA``."""
        self._reused += reused
        if items is not None and items.num_rows:
            self._items.append(items)
        self._errors.extend(errors)
        rows = sum(t.num_rows for t in self._items) + len(self._errors)
        if rows >= self._writer.shard_items or (rows and time.monotonic() - self._since > self._writer.shard_seconds):
            self.flush()

    def flush(self) -> None:
        """Commit what has been collected."""
        if self._items or self._errors:
            self._writer.commit(self._modality, self._encoder, self._items, self._errors, self._reused)
        self._clear()

    def _clear(self) -> None:
        self._items: list[pa.Table] = []
        self._errors: list[dict[str, Any]] = []
        self._reused = 0
        self._since = time.monotonic()


def committed_shards(store: Store, part_id: str) -> list[Shard]:
    """The shards of a features part, finished or not."""
    shards = []
    for info in store.listing(f"features/{part_id}/shards"):
        raw = store.read_json(f"features/{part_id}/shards/{info.base_name}")
        if raw is not None and info.base_name.endswith(".json"):
            files = {k: FileEntry.model_validate(v) for k, v in raw["files"].items()}
            modality = Modality(raw["modality"])
            shards.append(
                Shard(raw["name"], modality, raw["encoder"], raw["items"], raw["reused"], raw["errors"], files)
            )
    return shards


def indexed_ids(store: Store, part_id: str) -> pa.Array:
    """Ids of all good items of a features part."""
    files = [s.items_file for s in committed_shards(store, part_id)]
    return _ids(store, [store.path("features", part_id, name) for name in files if name])


def _ids(store: Store, paths: list[str]) -> pa.Array:
    columns = [
        pq.read_table(p, columns=["item_id"], filesystem=store.filesystem, partitioning=None).column(0) for p in paths
    ]
    return pa.chunked_array([c for column in columns for c in column.chunks], pa.string()).combine_chunks()


def earlier_parts(store: Store, part_id: str) -> list[str]:
    """Other features parts whose embeddings may be used again: the latest one, and unfinished ones."""
    pointer = store.read_json("features/LATEST")
    latest = None if pointer is None else str(pointer.get("id"))
    found = []
    for info in store.listing("features"):
        name = info.base_name
        if info.is_file or name == part_id:
            continue
        if name == latest or not store.exists(f"features/{name}/{MANIFEST_NAME}"):
            found.append(name)
    return found


def carry_over(
    writer: PartWriter, modality: Modality, encoder: str, wanted: pa.Table, parts: list[str]
) -> tuple[int, KnownEmbeddings]:
    """Copy the embeddings of files that did not change from earlier parts; captions and attributes are the new ones.

    Args:
        wanted: rows of ``LISTING_SCHEMA`` that have no embedding yet.
        parts: ids of earlier features parts.

    Returns:
        how many rows were carried over, and where the other embeddings are by content.
    """
    store = writer.store
    row_of = {item_id: row for row, item_id in enumerate(wanted.column("item_id").to_pylist())}
    uris, stamps = wanted.column("uri").to_pylist(), wanted.column("stamp").to_pylist()
    known: dict[str, tuple[str, int]] = {}
    buffer = writer.buffer(modality, encoder)
    carried = 0
    for part in parts:
        for shard in committed_shards(store, part):
            if shard.modality != modality or shard.encoder != encoder or shard.items_file is None:
                continue
            path = store.path("features", part, shard.items_file)
            table = pq.read_table(path, filesystem=store.filesystem, partitioning=None)
            old_rows, new_rows = [], []
            columns = (table.column(n).to_pylist() for n in ("item_id", "uri", "stamp", "content_hash"))
            for number, (item_id, uri, stamp, content_hash) in enumerate(zip(*columns)):
                known[content_hash] = (path, number)
                row = row_of.get(item_id)
                if row is not None and uris[row] == uri and stamps[row] == stamp:
                    del row_of[item_id]
                    old_rows.append(number)
                    new_rows.append(row)
            if old_rows:
                old = table.take(pa.array(old_rows))
                hashes = old.column("content_hash").combine_chunks()
                buffer.add(
                    item_rows(wanted.take(pa.array(new_rows)), hashes, embeddings_of(old)), [], reused=len(old_rows)
                )
                carried += len(old_rows)
    buffer.flush()
    return carried, KnownEmbeddings(store.filesystem, known)


def item_rows(listed: pa.Table, content_hash: pa.Array, embeddings: np.ndarray) -> pa.Table:
    """Rows of a features file from n listed files, their hashes and embeddings (n, d)."""
    missing = pa.nulls(listed.num_rows, pa.float64())
    columns = {name: listed.column(name) for name in listed.column_names}
    columns |= {"content_hash": content_hash, "start_seconds": missing, "end_seconds": missing}
    table = pa.table([columns[name] for name in ITEM_SCHEMA.names], schema=ITEM_SCHEMA)
    return with_embeddings(table, embeddings)


def not_in(listed: pa.Table, ids: pa.Array) -> pa.Table:
    """The rows of a listing whose id is not among ``ids``."""
    return listed.filter(pc.invert(pc.is_in(listed.column("item_id"), value_set=ids)))
