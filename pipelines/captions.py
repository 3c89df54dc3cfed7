"""What a user wrote about the media: a table for the whole corpus, or a text file beside each item."""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from csv import reader as rows_of
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from ace_core.config import CorpusSettings
from ace_core.errors import CorpusError

CAPTIONS_NAMES = ("captions.jsonl", "captions.csv", "captions.parquet")
PATH_COLUMNS = (
    "path", "uri", "url", "file", "file_name", "filename", "filepath", "image", "audio", "video", "image_path",
    "audio_path", "video_path",
)  # fmt: skip
CAPTION_COLUMNS = ("captions", "caption", "text")
ID_COLUMN = "item_id"
_ROWS = 1024  # rows of a table in memory at a time
_HEADER = 1 << 16  # bytes in which a CSV file's first line is looked for


@dataclass
class Described:
    """What is known about one item: its captions, in order and without repetitions, and everything else."""

    item_id: str | None = None
    captions: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)

    def add(self, captions: Iterable[str], attributes: Mapping[str, Any]) -> None:
        for caption in captions:
            text = " ".join(caption.split())
            if text and text not in self.captions:
                self.captions.append(text)
        for name, value in attributes.items():
            if value is not None:
                self.attributes.setdefault(name, value)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table say what; where nothing is given, the usual names do.

    Attributes:
        media: names of the column that names (or holds) the media file; the first that a row has counts.
        captions: names of columns with captions, one or a list a cell; all count.
        item_id: name of the column with the item's id.
    """

    media: tuple[str, ...] = PATH_COLUMNS
    captions: tuple[str, ...] = CAPTION_COLUMNS
    item_id: str = ID_COLUMN

    @classmethod
    def of(cls, settings: CorpusSettings) -> Columns:
        """As the settings say."""
        return cls(
            (settings.media_column,) if settings.media_column else PATH_COLUMNS,
            settings.caption_columns or CAPTION_COLUMNS,
            settings.id_column,
        )

    def describe(self, row: Mapping[str, Any], used: Iterable[str] = ()) -> Described:
        """What a row says of its item: every column with no other use (``used`` names more) is an attribute."""
        captions = [c for c in self.captions if c in row]
        other = {self.item_id, *captions, *used}
        described = Described()
        if row.get(self.item_id) not in (None, ""):
            described.item_id = str(row[self.item_id])
        described.add(
            [text for c in captions for text in _texts(row[c])],
            {str(k): _plain(v) for k, v in row.items() if k not in other},
        )
        return described


def read_captions(data: bytes, name: str, columns: Columns = Columns()) -> dict[str, Described]:
    """Read a captions file: JSON lines, CSV with a header, or Parquet; one row an item, or one row a caption.

    A row names its file and may hold captions and the item's id; all other columns become attributes.

    Returns:
        by the path as written.

    Raises:
        CorpusError: the file cannot be read, or lacks a column that names the media file.
    """
    described: dict[str, Described] = {}
    for number, row in enumerate(read_rows(pa.BufferReader(data), name, columns), start=1):
        path_column = next((c for c in columns.media if isinstance(row.get(c), str) and row[c]), None)
        if path_column is None:
            raise CorpusError(
                f"row {number} does not name a media file (its columns: {', '.join(map(str, row)) or 'none'})",
                where=name,
                remedy=f"Name the file in a column called one of {', '.join(columns.media)}.",
            )
        said = columns.describe(row, (path_column,))
        entry = described.setdefault(row[path_column], Described())
        entry.item_id = said.item_id or entry.item_id
        entry.add(said.captions, said.attributes)
    return described


def read_rows(file: pa.NativeFile, name: str, columns: Columns, chosen: list[str] | None = None) -> Iterator[dict]:
    """Rows of a table (.jsonl, .csv with a header or .parquet), one at a time.

    Args:
        chosen: columns to read of a Parquet file; None for all.

    Raises:
        CorpusError: it cannot be read, or is of another kind.
    """
    suffix = name.rpartition(".")[2].lower()
    if suffix not in ("jsonl", "ndjson", "json", "csv", "parquet"):
        raise CorpusError(
            f"tables of kind {suffix!r} are not known", where=name, remedy="Use .jsonl, .csv or .parquet."
        )
    try:
        if suffix == "parquet":
            for batch in pq.ParquetFile(file).iter_batches(_ROWS, columns=chosen):
                yield from batch.to_pylist()
        elif suffix == "csv":
            yield from _csv_rows(file, columns)
        else:
            yield from _json_rows(file, name)
    except (UnicodeDecodeError, pa.ArrowException, OSError) as e:
        quoted = ", with quotes around a text that has commas or quotes in it" if suffix == "csv" else ""
        raise CorpusError(
            f"the table cannot be read ({e})", where=name, remedy=f"Save it as UTF-8 text{quoted}, or as Parquet."
        ) from None


def _json_rows(file: pa.NativeFile, name: str) -> Iterator[dict]:
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as e:
            raise CorpusError(
                f"line {number} is not a JSON object ({e})", where=name, remedy="Write one JSON object on each line."
            ) from None
        yield row


def _csv_rows(file: pa.NativeFile, columns: Columns) -> Iterator[dict]:
    """Rows of a CSV file, with the types that all values of a column share; names and texts stay text.

    Commas divide the columns, or what spreadsheets write in their place: semicolons, tabs. A name that is known but for
    its case (``File``) is taken for the known one."""
    wanted = {*columns.media, *columns.captions, columns.item_id}
    start, divider, header = _csv_header(file.read(_HEADER))
    file.seek(start)
    known = {name: name.lower() for name in header if name.lower() in wanted - set(header) and name not in wanted}
    as_text = dict.fromkeys((*wanted, *known), pa.string())
    read = csv.read_csv(
        file,
        parse_options=csv.ParseOptions(newlines_in_values=True, delimiter=divider),
        convert_options=csv.ConvertOptions(column_types=as_text, strings_can_be_null=True),
    )
    for batch in read.rename_columns([known.get(name, name) for name in read.column_names]).to_batches(_ROWS):
        yield from batch.to_pylist()


def _csv_header(head: bytes) -> tuple[int, str, list[str]]:
    """Where in a CSV file its header starts, behind blank lines and a spreadsheet's ``sep=;``; what divides the columns
    (that, or what is most frequent outside of quotes), and their names."""
    start, said = 0, ""
    for line in head.splitlines(keepends=True):
        bare = line.removeprefix(codecs.BOM_UTF8).strip(b"\r\n")
        sep = re.fullmatch(rb"sep=([,;:|\t])", bare, re.IGNORECASE)
        if bare.strip() and sep is None:
            break
        said = sep[1].decode() if sep else said
        start += len(line)
    text = head[start:].decode("utf-8-sig", errors="replace")
    first = re.split(r"[\r\n]", re.sub(r'"[^"]*"', "", text), maxsplit=1)[0]
    divider = said or max(",;\t", key=first.count)
    return start, divider, next(rows_of(io.StringIO(text, newline=""), delimiter=divider), [])


def read_sidecar(data: bytes, name: str, columns: Columns = Columns()) -> Described:
    """Read the text file beside one media file: ``.txt`` holds a caption a line, ``.json`` an object as a row of
    :func:`read_captions` without the path. What cannot be read describes nothing."""
    described = Described()
    text = data.decode("utf-8-sig", errors="replace")
    if name.lower().endswith(".txt"):
        described.add(text.splitlines(), {})
        return described
    try:
        row = json.loads(text)
    except ValueError:
        return described
    return columns.describe(row) if isinstance(row, dict) else described


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [str(v) for v in value if v is not None]
    return []


def _plain(value: Any) -> Any:
    """A JSON value of whatever a Parquet cell held (dates become text, "not a number" nothing)."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value)
