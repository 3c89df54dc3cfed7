"""A table (Parquet, JSON lines, CSV) whose rows name media files by uri, or hold their bytes."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ace_core.config import CorpusSettings
from ace_core.errors import CorpusError
from ace_core.items import Modality
from ace_core.media.kinds import mime_of, modality_of, sniff
from ace_store import Address, Location, open_location
from ace_store.address import cell_bytes
from pipelines.captions import Columns, Described, read_rows
from pipelines.sources.listing import Found, Listing, Remembered, head_of, listing, stamp_of

TABLE_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")
BYTES_COLUMNS = (
    "bytes",
    "data",
    "content",
    "image",
    "audio",
    "video",
    "media",
    "jpg",
    "png",
    "webp",
    "wav",
    "mp3",
    "mp4",
)
_READERS = 16  # requests about files at the same time
_LISTED_TOGETHER = 16  # files in one folder from which on listing the folder is less work than asking for each
_CELLS = 16  # rows with bytes in memory at a time


class TableSource:
    """One table, or several with the same columns.

    An item's id is its id column, or else the path of its file, or else the table and the row: ``items/17``.

    Args:
        location: the folder that the tables are in.
        files: the tables, by name relative to the location.
    """

    def __init__(
        self, location: Location, files: Mapping[str, fs.FileInfo], settings: CorpusSettings, remembered: Remembered
    ) -> None:
        self._location = location
        self._files = files
        self._settings = settings
        self._columns = Columns.of(settings)
        self._remembered = remembered
        self._rows = 0

    def find(self) -> Listing:
        """Every row.

        Raises:
            CorpusError: the tables cannot be read, say nothing of media, or name media outside of ``corpus.root``.
        """
        held = {name: self._bytes_column(name) for name in self._files}
        by_uri = [name for name, column in held.items() if column is None]
        reading = ["table", self._columns.media, self._columns.captions, self._columns.item_id]
        found = []
        for name, column in held.items():
            if column is not None:
                read = partial(self._cells, name, column)
                found.append(self._remembered.get(self._files[name], [*reading, column], read))
        root = self._location
        if by_uri:
            if found:
                raise CorpusError(
                    f"some tables hold media ({len(found)}), others name files ({len(by_uri)})",
                    where=self._settings.path,
                    remedy="Ingest them one by one, each with a store of its own.",
                )
            root = self._location if self._settings.root is None else open_location(self._settings.root)
            found.append(self._by_uri(root, by_uri))
        names = ", ".join(list(self._files)[:2]) + (", ..." if len(self._files) > 2 else "")
        rows = sum(table.num_rows for table in found) if self._rows == 0 else self._rows
        said = f" in a table of {rows:,} rows ({names}), {{captioned}} of them with captions"
        empty = "not one row of the table is an item"
        return listing(root, found, said, columns=self._columns, where=self._settings.path, empty=empty)

    def _bytes_column(self, name: str) -> str | None:
        """The column of a Parquet file that holds media, or None."""
        if not name.lower().endswith(".parquet"):
            return None
        try:
            with self._location.filesystem.open_input_file(self._location.path(name)) as f:
                schema = pq.read_schema(f)
        except (pa.ArrowException, OSError) as e:
            raise CorpusError(
                f"the table cannot be read ({e})", where=name, remedy="Write it again, or take it out of the folder."
            ) from None
        binary = [field.name for field in schema if _holds_bytes(field.type)]
        if self._settings.media_column is not None:
            return self._settings.media_column if self._settings.media_column in binary else None
        return next((c for c in (*BYTES_COLUMNS, *binary) if c in binary), None)

    def _cells(self, name: str, column: str) -> pa.Table:
        """The items of a table of bytes. Each row's first bytes, or the name beside them, tell what it is."""
        found, info, stem = Found(), self._files[name], posixpath.splitext(name)[0]
        with self._location.filesystem.open_input_file(info.path) as f:
            file = pq.ParquetFile(f, buffer_size=1 << 20, pre_buffer=False)
            rows = (row for batch in file.iter_batches(_CELLS) for row in batch.to_pylist())
            for number, row in enumerate(rows):
                data, beside = cell_bytes(row[column]), _name_beside(row, column, self._columns)
                described = self._columns.describe(row, (column,))
                item_id = described.item_id or f"{stem}/{number}"
                uri = str(Address(name, cell=(number, column)))
                if data is None:
                    found.error(item_id, uri, None, "empty", f"row {number:,} holds no bytes")
                    continue
                kind = sniff(data[:256]) or posixpath.splitext(beside)[1] or f".{column}"
                modality = modality_of(f"x{kind}") or _named_modality(column)
                if modality is None:
                    found.error(
                        item_id, uri, None, "unknown-kind", "the bytes are of no known kind, and nothing says which"
                    )
                    continue
                found.item(
                    item_id, uri, modality, described, mime=mime_of(f"x{kind}"), stamp=stamp_of(info), size=len(data)
                )
        return found.table()

    def _by_uri(self, root: Location, tables: list[str]) -> pa.Table:
        """The items of tables that name files; rows with the same file are one item."""
        entries: dict[str, Described] = {}
        found = Found()
        outside: Counter[str] = Counter()
        for written, described in self._named(tables, found):
            name = _below(root, written)
            if name is None:
                outside[posixpath.dirname(written)] += 1
                detail = f"the uri does not lie below {root.uri}"
                found.error(described.item_id or written, written, modality_of(written), "outside", detail)
                continue
            entry = entries.setdefault(name, Described())
            entry.item_id = described.item_id or entry.item_id
            entry.add(described.captions, described.attributes)
        if outside and not entries:
            common = posixpath.commonpath(list(outside)) if len({o.startswith("/") for o in outside}) == 1 else ""
            common = common.replace(":/", "://", 1) or "FOLDER"
            raise CorpusError(
                f"not one of the {sum(outside.values()):,} uris lies below the folder of the table",
                where=root.uri,
                remedy=f"Say where the media are, for example corpus.root={common}.",
            )
        infos = _file_infos(root, list(entries))
        for name, entry in entries.items():
            info, item_id, modality, kind = infos.get(name), entry.item_id or name, modality_of(name), name
            if info is None:
                found.error(item_id, name, modality, "absent", "the table names it; there is no such file")
                continue
            if modality is None and "." not in posixpath.basename(name):
                kind = f"x{sniff(head_of(root, name)) or ''}"
                modality = modality_of(kind)
            if modality is None:
                found.error(item_id, name, None, "unknown-kind", "the file is of no kind that ACE reads")
                continue
            found.item(item_id, name, modality, entry, mime=mime_of(kind), stamp=stamp_of(info), size=info.size)
        return found.table()

    def _named(self, tables: list[str], found: Found) -> Iterator[tuple[str, Described]]:
        """The uri in each row of the tables, and what the row says; rows without one are errors."""
        for table in tables:
            with self._location.filesystem.open_input_file(self._location.path(table)) as f:
                number, any_column = 0, False
                for number, row in enumerate(read_rows(f, table, self._columns), start=1):
                    any_column = any_column or any(c in row for c in self._columns.media)
                    if not any_column:
                        has = ", ".join(map(str, row)) or "none"
                        raise CorpusError(
                            f"row {number} does not name a media file (its columns: {has})",
                            where=table,
                            remedy="Say which column does: corpus.media_column=NAME (usual names are found: "
                            f"{', '.join(self._columns.media)}).",
                        )
                    column = next((c for c in self._columns.media if isinstance(row.get(c), str) and row[c]), None)
                    described = self._columns.describe(row, () if column is None else (column,))
                    if column is None:
                        place = described.item_id or f"{posixpath.splitext(table)[0]}/{number - 1}"
                        found.error(place, f"{table}#row={number - 1}", None, "absent", f"row {number:,} names no file")
                        continue
                    yield row[column].replace("\\", "/"), described
                self._rows += number


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_bytes(kind.field(at).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _name_beside(row: Mapping[str, Any], column: str, columns: Columns) -> str:
    """A file name that says what the bytes in a row are: in the same cell, or in a column that names files."""
    cell = row[column]
    inside = cell.get("path") if isinstance(cell, dict) else None
    names = (inside, *(row.get(c) for c in columns.media if c != column))
    return next((n for n in names if isinstance(n, str) and modality_of(n)), "")


def _named_modality(column: str) -> Modality | None:
    return Modality(column) if column in {m.value for m in Modality} else None


def _below(root: Location, written: str) -> str | None:
    """A uri relative to the root, or None where it lies elsewhere."""
    name = written.removeprefix("file://")
    if "://" in name or name.startswith("/"):
        starts = (root.root, root.uri.partition("?")[0].removeprefix("file://").rstrip("/"))
        start = next((s for s in starts if name.startswith(s + "/")), None)
        if start is None:
            return None
        name = name[len(start) + 1 :]
    name = posixpath.normpath(name)
    return None if name.startswith("..") or name in (".", "/") else name


def _file_infos(root: Location, names: list[str]) -> dict[str, fs.FileInfo]:
    """Size and time of the files that are there: folder by folder where many are asked for, else one by one."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(posixpath.dirname(name), []).append(name)
    found: dict[str, fs.FileInfo] = {}

    def ask(folder: str) -> None:
        wanted = folders[folder]
        if len(wanted) < _LISTED_TOGETHER:
            infos = root.filesystem.get_file_info([root.path(name) for name in wanted])
        else:
            infos = root.filesystem.get_file_info(fs.FileSelector(root.path(folder), allow_not_found=True))
        there = {info.base_name: info for info in infos if info.type == fs.FileType.File}
        for name in wanted:
            if (info := there.get(posixpath.basename(name))) is not None:
                found[name] = info

    try:
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(ask, folders))
    except OSError as e:
        raise CorpusError(
            f"the media cannot be listed ({e})",
            where=root.uri,
            remedy="Check corpus.root and its permissions; for s3:// the credentials, region and endpoint.",
        ) from None
    return found
