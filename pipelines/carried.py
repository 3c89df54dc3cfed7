"""What an earlier ingestion found out that still holds: embeddings of files that did not change, and which are bad.

A file is known by its id, its place and its stamp (size and time). An embedding holds as long as the encoder does; a
verdict on a bad file or segment, moreover, as long as the limits and the decoders, and only where the file itself is
the cause or was tried often enough (pipelines/tries.py): otherwise the whole file is decoded again.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pyarrow as pa
import pyarrow.parquet as pq

from ace_core.config import LimitSettings
from ace_core.features import embeddings_of
from ace_core.items import Modality
from ace_core.manifest import MANIFEST_NAME, code_version, fingerprint
from ace_store import Store
from pipelines.encode import KnownEmbeddings, Span
from pipelines.shards import PartWriter, bad_rows, committed_shards, file_ids, item_rows
from pipelines.tries import Tries

_DECODERS = ("pillow", "soundfile", "av", "decord")


def judged_by(limits: LimitSettings) -> str:
    """Changes with anything but file and encoder that could change a verdict: limits, decoders, this code."""
    return fingerprint("judged", limits.model_dump(), [_version(name) for name in _DECODERS], code_version())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    writer: PartWriter, modality: Modality, encoder: str, wanted: pa.Table, parts: list[str], tries: Tries
) -> tuple[int, int, KnownEmbeddings]:
    """Copy the embeddings of files that did not change from earlier parts, and which of them are bad; captions and
    attributes are the new ones.

    Args:
        wanted: rows of ``LISTING_SCHEMA`` that have no embedding yet.
        parts: ids of earlier features parts.
        tries: which bad files are to be tried again though they did not change.

    Returns:
        how many good files were carried over, how many bad ones, and where the other embeddings are by content.
    """
    store = writer.store
    row_of = {item_id: row for row, item_id in enumerate(wanted.column("item_id").to_pylist())}
    uris, stamps = wanted.column("uri").to_pylist(), wanted.column("stamp").to_pylist()
    known: dict[str, dict[Span, tuple[str, int]]] = {}
    buffer = writer.buffer(modality, encoder)
    good = bad = 0

    def same(file_id: str, uri: str, stamp: str) -> int | None:
        """The row of a file that did not change."""
        row = row_of.get(file_id)
        return row if row is not None and uris[row] == uri and stamps[row] == stamp else None

    for part in parts:
        for shard in committed_shards(store, part):
            if shard.modality != modality or shard.encoder != encoder:
                continue
            errors = bad_rows(store, part, shard)
            holed = {row["file_id"] for row in errors}  # by its content, only all of a file is known
            errors = [row for row in errors if same(row["file_id"], row["uri"], row["stamp"]) is not None]
            stands = shard.judged == writer.judged
            again = {row["file_id"] for row in errors if not stands or tries.again(row)}
            carried: set[str] = set()  # all that there is of a file is in one shard
            if shard.items_file is not None:
                path = store.path("features", part, shard.items_file)
                table = pq.read_table(path, filesystem=store.filesystem, partitioning=None)
                old_rows, new_rows = [], []
                names = ("uri", "stamp", "content_hash", "start_seconds", "end_seconds")
                columns = (column.to_pylist() for column in (file_ids(table), *(table.column(n) for n in names)))
                for number, (file_id, uri, stamp, content_hash, start, end) in enumerate(zip(*columns)):
                    if file_id not in holed:
                        known.setdefault(content_hash, {})[None if start is None else (start, end)] = (path, number)
                    row = same(file_id, uri, stamp)
                    if row is not None and file_id not in again:
                        old_rows.append(number)
                        new_rows.append(row)
                        carried.add(file_id)
                if old_rows:
                    old = table.take(pa.array(old_rows))
                    hashes, start, end = (old.column(n).combine_chunks() for n in names[2:])
                    rows = item_rows(wanted.take(pa.array(new_rows)), hashes, embeddings_of(old), start, end)
                    # A good file may have segments that are bad.
                    parts_of = [row for row in errors if row["file_id"] in carried]
                    buffer.add(rows, parts_of, reused=len(old_rows))
                    good += len(carried)
            whole = [row for row in errors if row["file_id"] not in carried | again]
            whole_ids = {row["file_id"] for row in whole}
            buffer.add(None, whole)
            bad += len(whole_ids)
            for file_id in carried | whole_ids:
                del row_of[file_id]
    buffer.flush()
    return good, bad, KnownEmbeddings(store.filesystem, known)
