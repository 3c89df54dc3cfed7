"""A features part while it is being written: shards, each with a small statistics file that is written last.

One process writes them (the driver, as encoded rows stream in), so a row is either in one shard or in none. A shard
without its statistics file does not exist: whatever a killed run left of it is removed. The same files tell the next
ingestion of a changed corpus what it need not encode again (pipelines/carried.py).
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ace_core.features import ERRORS_SCHEMA, ITEM_SCHEMA, with_embeddings
from ace_core.items import Modality
from ace_core.manifest import FileEntry
from ace_store import Store

BAD_SCHEMA = pa.unify_schemas([ERRORS_SCHEMA, pa.schema([("file_id", pa.string()), ("stamp", pa.string())])])
"""Rows of a shard's errors: ``item_id`` may be a segment's, ``file_id`` is the listed file's, ``stamp`` as listed."""
_ID_COLUMNS = ("item_id", "start_seconds")
_FRAGMENT = r"#t=[0-9.e+]+,[0-9.e+]+$"


@dataclass(frozen=True)
class Shard:
    """A committed shard, as its statistics file tells.

    Attributes:
        name: for example "image-000003".
        encoder: identity of the encoder whose embeddings it holds; ``judged``: see :func:`pipelines.carried.judged_by`.
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
    judged: str = ""

    @property
    def items_file(self) -> str | None:
        return next((f for f in self.files if f.startswith(f"{self.modality.value}/")), None)

    @property
    def errors_file(self) -> str | None:
        return next((f for f in self.files if f.startswith("errors/")), None)


@dataclass
class PartWriter:
    """Writes one features part shard by shard, continuing where a killed run stopped.

    ``judged`` says by what files are found bad, see :func:`pipelines.carried.judged_by`.
    """

    store: Store
    part_id: str
    shard_items: int
    shard_seconds: float
    judged: str = ""
    shards: list[Shard] = field(default_factory=list)

    @classmethod
    def resume(cls, store: Store, part_id: str, shard_items: int, shard_seconds: float, judged: str) -> PartWriter:
        """Open a part that may have been begun; removes what a killed run left unfinished."""
        writer = cls(store, part_id, shard_items, shard_seconds, judged, committed_shards(store, part_id))
        known = {writer.path(name) for shard in writer.shards for name in shard.files}
        for info in store.listing(f"features/{part_id}", recursive=True):
            if info.is_file and info.path.endswith(".parquet") and info.path not in known:
                store.filesystem.delete_file(info.path)
        return writer

    def path(self, name: str) -> str:
        return self.store.path("features", self.part_id, name)

    def done_ids(self, modality: Modality) -> pa.Array:
        """Ids of the files of a modality that committed shards hold, good or bad."""
        shards = [s for s in self.shards if s.modality == modality]
        good = [self.path(s.items_file) for s in shards if s.items_file]
        bad = [self.path(s.errors_file) for s in shards if s.errors_file]
        ids = [_column(self.store, good, file_ids), _column(self.store, bad, lambda table: table.column("item_id"))]
        return pa.chunked_array(ids, pa.string()).combine_chunks()

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
            self._write(f"errors/{name}.parquet", pa.Table.from_pylist(errors, schema=BAD_SCHEMA), files)
        causes = dict(Counter(e["cause"] for e in errors))
        shard = Shard(name, modality, encoder, rows, reused, causes, files, self.judged)
        self.store.write_json(
            f"features/{self.part_id}/shards/{name}.json",
            {
                "name": shard.name,
                "modality": modality.value,
                "encoder": encoder,
                "items": shard.items,
                "reused": reused,
                "errors": shard.errors,
                "judged": shard.judged,
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
        """Take rows of ``features_schema``, of which some were encoded earlier, and rows of :data:`BAD_SCHEMA`."""
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
            counts = raw["items"], raw["reused"], raw["errors"]
            shards.append(Shard(raw["name"], modality, raw["encoder"], *counts, files, raw.get("judged", "")))
    return shards


def bad_rows(store: Store, part_id: str, shard: Shard) -> list[dict[str, Any]]:
    """A shard's rows of :data:`BAD_SCHEMA`; none where it was written before stamps were."""
    if shard.errors_file is None or not shard.judged:
        return []
    path = store.path("features", part_id, shard.errors_file)
    table = pq.read_table(path, filesystem=store.filesystem, partitioning=None)
    rows: list[dict[str, Any]] = table.select(BAD_SCHEMA.names).to_pylist()
    return rows


def some_errors(store: Store, part_id: str, names: Iterable[str], limit: int) -> list[dict[str, str]]:
    """The first rows of ``ERRORS_SCHEMA`` in some error files (paths in the part) of a features part."""
    rows: list[dict[str, str]] = []
    for name in sorted(names):
        if len(rows) < limit:
            path = store.path("features", part_id, name)
            table = pq.read_table(path, filesystem=store.filesystem, partitioning=None)
            rows += table.slice(0, limit - len(rows)).to_pylist()
    return rows


def indexed_ids(store: Store, part_id: str) -> pa.Array:
    """Ids of all good items of a features part."""
    return _column(store, _item_files(store, part_id), lambda table: table.column("item_id"))


def indexed_files(store: Store, part_id: str) -> pa.Array:
    """Ids of all files of which a features part has an item: a long file's segments count once."""
    return _column(store, _item_files(store, part_id), file_ids).unique()


def _item_files(store: Store, part_id: str) -> list[str]:
    names = (s.items_file for s in committed_shards(store, part_id))
    return [store.path("features", part_id, name) for name in names if name]


def _column(store: Store, paths: list[str], of: Callable[[pa.Table], pa.ChunkedArray]) -> pa.Array:
    """A text column of several files, one after the other."""
    chunks = []
    for path in paths:
        names = [n for n in pq.read_schema(path, filesystem=store.filesystem).names if n in _ID_COLUMNS]
        table = pq.read_table(path, columns=names, filesystem=store.filesystem, partitioning=None)
        chunks += of(table).chunks
    return pa.chunked_array(chunks, pa.string()).combine_chunks()


def segment_id(item_id: str, start: float, end: float) -> str:
    """Id of a segment of a file, with the fragment that media players know: ``talk.mp4#t=30,60``."""
    return f"{item_id}#t={start:g},{end:g}"


def file_ids(items: pa.Table) -> pa.ChunkedArray:
    """For rows of a features file, the ids of the files that they are or are segments of."""
    ids = items.column("item_id")
    return pc.if_else(pc.is_valid(items.column("start_seconds")), pc.replace_substring_regex(ids, _FRAGMENT, ""), ids)


def item_rows(
    listed: pa.Table,
    content_hash: pa.Array,
    embeddings: np.ndarray,
    start: pa.Array | None = None,
    end: pa.Array | None = None,
) -> pa.Table:
    """Rows of a features file from n listed files, their hashes and embeddings (n, d).

    Args:
        start, end: (n,) seconds of the segments that the rows are; null (or None for all) for whole files.
    """
    missing = pa.nulls(listed.num_rows, pa.float64())
    start, end = missing if start is None else start, missing if end is None else end
    columns = {name: listed.column(name) for name in listed.column_names}
    columns |= {"content_hash": content_hash, "start_seconds": start, "end_seconds": end}
    columns["item_id"] = pa.array(
        [
            item_id if first is None else segment_id(item_id, first, last)
            for item_id, first, last in zip(listed.column("item_id").to_pylist(), start.to_pylist(), end.to_pylist())
        ],
        pa.string(),
    )
    table = pa.table([columns[name] for name in ITEM_SCHEMA.names], schema=ITEM_SCHEMA)
    return with_embeddings(table, embeddings)


def not_in(listed: pa.Table, ids: pa.Array) -> pa.Table:
    """The rows of a listing whose id is not among ``ids``."""
    return listed.filter(pc.invert(pc.is_in(listed.column("item_id"), value_set=ids)))
