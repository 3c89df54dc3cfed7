"""What a user wrote about the media: a captions file for the whole corpus, or a text file beside each item."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from ace_core.errors import CorpusError

CAPTIONS_NAMES = ("captions.jsonl", "captions.csv", "captions.parquet")
PATH_COLUMNS = ("path", "uri", "file", "file_name", "filename", "filepath", "image", "audio", "video")
CAPTION_COLUMNS = ("captions", "caption", "text")
ID_COLUMN = "item_id"


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


def read_captions(data: bytes, name: str) -> dict[str, Described]:
    """Read a captions file: JSON lines, CSV with a header, or Parquet; one row an item, or one row a caption.

    A row names its file in one of :data:`PATH_COLUMNS` and its captions in one of :data:`CAPTION_COLUMNS`; it may
    name the item (``item_id``). All other columns become attributes.

    Returns:
        by the path as written.

    Raises:
        CorpusError: the file cannot be read, or lacks a column that names the media file.
    """
    rows = _rows(data, name)
    described: dict[str, Described] = {}
    for number, row in enumerate(rows, start=1):
        path_column = next((c for c in PATH_COLUMNS if isinstance(row.get(c), str) and row[c]), None)
        if path_column is None:
            raise CorpusError(
                f"row {number} does not name a media file (its columns: {', '.join(map(str, row)) or 'none'})",
                where=name,
                remedy=f"Name the file in a column called one of {', '.join(PATH_COLUMNS)}.",
            )
        caption_columns = [c for c in CAPTION_COLUMNS if c in row]
        captions = [text for c in caption_columns for text in _texts(row[c])]
        used = {path_column, ID_COLUMN, *caption_columns}
        entry = described.setdefault(row[path_column], Described())
        if row.get(ID_COLUMN) not in (None, ""):
            entry.item_id = str(row[ID_COLUMN])
        entry.add(captions, {str(k): _plain(v) for k, v in row.items() if k not in used})
    return described


def _rows(data: bytes, name: str) -> list[dict[str, Any]]:
    suffix = name.rpartition(".")[2].lower()
    try:
        if suffix == "parquet":
            return pq.read_table(pa.BufferReader(data)).to_pylist()
        if suffix == "csv":
            return _csv_rows(data)
        text = data.decode("utf-8-sig")
    except (UnicodeDecodeError, pa.ArrowException, OSError) as e:
        raise CorpusError(
            f"the captions file cannot be read ({e})", where=name, remedy="Save it as UTF-8 text or Parquet."
        ) from None
    if suffix not in ("jsonl", "ndjson", "json"):
        raise CorpusError(
            f"captions files of kind {suffix!r} are not known", where=name, remedy="Use .jsonl, .csv or .parquet."
        )
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
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
        rows.append(row)
    return rows


def _csv_rows(data: bytes) -> list[dict[str, Any]]:
    """Rows of a CSV file, with the types that all values of a column share; names and texts stay text."""
    as_text = dict.fromkeys((*PATH_COLUMNS, *CAPTION_COLUMNS, ID_COLUMN), pa.string())
    return csv.read_csv(
        pa.BufferReader(data),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=as_text, strings_can_be_null=True),
    ).to_pylist()


def read_sidecar(data: bytes, name: str) -> Described:
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
    if isinstance(row, dict):
        captions = [t for c in CAPTION_COLUMNS if c in row for t in _texts(row[c])]
        described.add(captions, {str(k): _plain(v) for k, v in row.items() if k not in CAPTION_COLUMNS})
    return described


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [str(v) for v in value if v is not None]
    return []


def _plain(value: Any) -> Any:
    """A JSON value of whatever a Parquet cell held (dates become text)."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value)
