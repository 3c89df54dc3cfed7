"""What every source gives: the items of a corpus before anything of it is decoded, and what cannot be one."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ace_core.errors import CorpusError
from ace_core.features import ERRORS_SCHEMA
from ace_core.items import MODALITIES, Modality
from ace_core.manifest import fingerprint
from ace_store import Location, Store
from pipelines.captions import Columns, Described

LISTING_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("uri", pa.string()),
        ("modality", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("attributes", pa.string()),
        ("mime", pa.string()),
        ("stamp", pa.string()),
        ("bytes", pa.int64()),
    ]
)
FOUND_SCHEMA = pa.unify_schemas([LISTING_SCHEMA, ERRORS_SCHEMA])
_REVISION = 1  # raise it when the same file is listed otherwise than before


@dataclass(frozen=True)
class Listing:
    """A corpus before anything of it is decoded.

    Attributes:
        location: where the items' uris start.
        items: rows of :data:`LISTING_SCHEMA`, in the order in which they are best read; ``uri`` is an
            :class:`ace_store.Address` relative to the location.
        errors: rows of ``ERRORS_SCHEMA``: what is named in vain, or cannot be an item.
        summary: one sentence for a person.
    """

    location: Location
    items: pa.Table
    errors: pa.Table
    summary: str

    @property
    def root(self) -> str:
        """Where relative URIs start: an absolute folder, or the URI as given."""
        return self.location.uri if self.location.local is None else str(self.location.local)

    def of(self, modality: Modality) -> pa.Table:
        """The items of one modality."""
        return self.items.filter(pc.equal(self.items.column("modality"), modality.value))

    def digest(self) -> str:
        """Changes with any file's name, size or time, and with anything written about it."""
        digest = hashlib.sha256()
        for table in (self.items, self.errors):
            for batch in table.to_batches(max_chunksize=10_000):
                digest.update(json.dumps(batch.to_pylist(), sort_keys=True, default=str).encode())
        return digest.hexdigest()


class Source(Protocol):
    """One way of keeping a corpus."""

    def find(self) -> Listing:
        """Everything in it.

        Raises:
            CorpusError: it is of no use as a whole.
        """
        ...


class Found:
    """Collects what a source finds: items, and what cannot be one (a row with a ``cause``)."""

    def __init__(self) -> None:
        self._columns: dict[str, list] = {name: [] for name in FOUND_SCHEMA.names}

    def item(
        self, item_id: str, uri: str, modality: Modality, described: Described, *, mime: str, stamp: str, size: int
    ) -> None:
        """One item; ``stamp`` changes when its bytes may have, ``size`` is their number."""
        attributes = json.dumps(described.attributes, sort_keys=True, ensure_ascii=False)
        self._add(item_id, uri, modality.value, described.captions, attributes, mime, stamp, size, None, None)

    def error(self, item_id: str, uri: str, modality: Modality | None, cause: str, detail: str) -> None:
        """Something that cannot be an item, and why."""
        self._add(item_id, uri, modality.value if modality else "", None, None, None, None, None, cause, detail)

    def _add(self, *values: object) -> None:
        for column, value in zip(self._columns.values(), values):
            column.append(value)

    def table(self) -> pa.Table:
        """Rows of :data:`FOUND_SCHEMA`."""
        return pa.table(self._columns, schema=FOUND_SCHEMA)


def listing(
    location: Location, found: Iterable[pa.Table], described_as: str, *, columns: Columns, where: str, empty: str
) -> Listing:
    """Put together what a source found; the second item with an id that one before has becomes an error.

    Args:
        found: tables of :data:`FOUND_SCHEMA`.
        described_as: ends the summary ("found 3 images" + this); ``{captioned}`` in it is replaced.
        columns: what captions were looked for as.
        where: the corpus, and
        empty: what to say when there is no item in it.

    Raises:
        CorpusError: there is no item.
    """
    table = pa.concat_tables([FOUND_SCHEMA.empty_table(), *found]).combine_chunks()
    good = pc.is_null(table.column("cause"))
    items, errors = table.filter(good).select(LISTING_SCHEMA.names), table.filter(pc.invert(good))
    errors = errors.select(ERRORS_SCHEMA.names)
    if not items.num_rows:
        counts = Counter(errors.column("cause").to_pylist())
        also = f" ({', '.join(f'{n:,} {cause}' for cause, n in counts.most_common())})" if counts else ""
        raise CorpusError(f"{empty}{also}", where=where, remedy='See README, "Your own media", for what is read.')
    if pc.count_distinct(items.column("item_id")).as_py() < items.num_rows:
        items, twice = _without_repeated_ids(items)
        errors = pa.concat_tables([errors, twice])
    captioned = pc.sum(pc.greater(pc.list_value_length(items.column("captions")), 0)).as_py()
    summary = f"found {_counts(items)}{described_as.replace('{captioned}', f'{captioned:,}')}"
    if not captioned and (names := _texts_about(items)):
        asked = ", ".join(columns.captions)
        summary += f"; captions are looked for as {asked}: if they are in {names}, say so with corpus.caption_columns"
    return Listing(location, items, errors, summary)


def _without_repeated_ids(items: pa.Table) -> tuple[pa.Table, pa.Table]:
    taken: set[str] = set()
    first = []
    for item_id in items.column("item_id").to_pylist():
        first.append(item_id not in taken)
        taken.add(item_id)
    keep = pa.array(first)
    others = items.filter(pc.invert(keep)).select(["item_id", "uri", "modality"])
    count = others.num_rows
    others = others.append_column("cause", pa.array(["duplicate-id"] * count, pa.string()))
    detail = [f"another item already has the id {item_id!r}" for item_id in others.column("item_id").to_pylist()]
    return items.filter(keep), others.append_column("detail", pa.array(detail, pa.string())).cast(ERRORS_SCHEMA)


def _texts_about(items: pa.Table) -> str:
    """Names of the attributes that are texts, of the first item that has one: where captions might be."""
    for batch in items.select(["attributes"]).to_batches(max_chunksize=1000):
        for attributes in batch.column(0).to_pylist():
            texts = [] if attributes == "{}" else [n for n, v in json.loads(attributes).items() if isinstance(v, str)]
            if texts:
                return " or ".join(map(repr, texts))
    return ""


def _counts(items: pa.Table) -> str:
    counts = Counter(items.column("modality").to_pylist())
    names = {Modality.IMAGE: "image", Modality.AUDIO: "sound", Modality.VIDEO: "video"}
    found = [f"{counts[m.value]:,} {names[m]}{'s' * (counts[m.value] != 1)}" for m in MODALITIES if counts[m.value]]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


class Remembered:
    """Listings of single large files (tar shards, tables of bytes), kept in the store: reading what is in an unchanged
    one costs its bytes once, not once a run."""

    def __init__(self, store: Store | None, location: Location) -> None:
        self._store = store
        self._folder = f"listings/{fingerprint(location.uri)}"
        self._used: set[str] = set()

    def get(self, info: fs.FileInfo, reading: object, read: Callable[[], pa.Table]) -> pa.Table:
        """The rows of :data:`FOUND_SCHEMA` that ``read`` finds in a file, now or earlier.

        Args:
            reading: settings that change what is found (JSON).
        """
        if self._store is None:
            return read()
        name = f"{fingerprint(_REVISION, info.path, stamp_of(info), reading)}.parquet"
        self._used.add(name)
        data = self._store.read_bytes(f"{self._folder}/{name}")
        if data is not None:
            return pq.read_table(pa.BufferReader(data))
        table = read()
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self._store.write_bytes(f"{self._folder}/{name}", sink.getvalue().to_pybytes())
        return table

    def forget_others(self) -> None:
        """Remove the listings of files that are not there any more, or changed."""
        for info in self._store.listing(self._folder) if self._store is not None else ():
            if info.is_file and info.base_name.endswith(".parquet") and info.base_name not in self._used:
                self._store.filesystem.delete_file(info.path)  # type: ignore[union-attr]


def stamp_of(info: fs.FileInfo) -> str:
    """Changes when a file does, as far as its size and time tell."""
    return f"{info.size}-{info.mtime_ns}"


def below(location: Location, path: str) -> str:
    """A path of the location's file system, relative to the location."""
    return posixpath.relpath(path, location.root)


def head_of(location: Location, name: str) -> bytes:
    """The first bytes of a file, none where it cannot be read."""
    try:
        with location.filesystem.open_input_stream(location.path(name)) as f:
            return f.read(256)
    except OSError:
        return b""
