"""Items that were removed by name: which they are, and how later snapshots keep them out while they stay in the corpus.

The record is in the snapshot, beside its tombstones: rows of its segments. An item is meant as it was then: once its
file, captions or attributes change, it comes in again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pyarrow as pa

from ace_core.errors import QueryError, StoreError
from ace_core.segment import Segment
from ace_core.snapshot import PartRef, Snapshot, SnapshotManifest, unwanted_rows
from ace_store import Current, Store
from pipelines.progress import Reporter, counted

SHOWN = 5  # ids named in a message
VERSION = ["item_id", "version"]
Version = tuple[str, str]  # an item's id, and what its content, captions and attributes were


def removed_by_name(snapshot: Snapshot) -> dict[Version, tuple[int, int]]:
    """What was removed by name, each with the (segment, row) that it is at."""
    found: dict[Version, tuple[int, int]] = {}
    for number, (segment, rows) in enumerate(zip(snapshot.segments, snapshot.unwanted)):
        for row, version in zip(rows.tolist(), _versions(segment, rows)):
            found[version] = (number, row)
    return found


def kept_out(
    removed: dict[Version, tuple[int, int]], wanted: pa.Table, fresh: np.ndarray, reporter: Reporter
) -> np.ndarray:
    """(n,) bool: which of the items to add were removed by name, and are in the corpus as they were then.

    Args:
        wanted: ``item_id`` and ``version`` of n items.
        fresh: (n,) bool: those that would be added.
    """
    out = np.zeros(wanted.num_rows, bool)
    if removed:
        rows = np.flatnonzero(fresh)
        some = wanted.select(VERSION).take(pa.array(rows))
        out[rows] = [version in removed for version in zip(*(column.to_pylist() for column in some.columns))]
    if out.any():
        _say(wanted.column("item_id").filter(pa.array(out)).slice(0, SHOWN + 1).to_pylist(), int(out.sum()), reporter)
    return out


def taken_back(
    removed: dict[Version, tuple[int, int]], ids: Sequence[str], *, every: bool
) -> dict[Version, tuple[int, int]]:
    """Of what was removed by name, what shall come in again: these ids, or all.

    Raises:
        QueryError: one of the ids was not removed by name.
    """
    missing = sorted(set(ids) - {item_id for item_id, _ in removed})
    if missing:
        raise QueryError(
            f"{counted(len(missing), 'item')} not removed by name ({some_ids(missing)})",
            remedy="Nothing was added. Give ids that `ace remove` was given; others need no naming.",
        )
    return {version: place for version, place in removed.items() if every or version[0] in ids}


def still_kept_out(store: Store, seen: Current, segment: PartRef, reporter: Reporter) -> dict[str, np.ndarray]:
    """Tombstones, as :func:`ace_core.snapshot.write_snapshot` takes them, of a segment of the whole corpus: for what
    the record of the current snapshot names, or of the newest where ``CURRENT`` is damaged.

    Raises:
        StoreError: that snapshot cannot be read.
    """
    latest = _latest(store, seen)
    if latest is None or not latest.removed:
        return {}
    try:
        removed = removed_by_name(Snapshot.open(store.mirror(latest.id), latest.id, verify=False))
    except StoreError as e:
        raise StoreError(
            f"what was removed by name from snapshot {latest.id} cannot be read: {e.found}",
            where=e.where,
            remedy="Run `ace rollback ID` to a snapshot that can be read first, or `ace publish --removed`, which "
            "publishes removed items, too.",
        ) from e
    if not removed:
        return {}
    whole = Segment(store.local_copy("segment", segment.id), verify=False)
    found = (whole.row_of(item_id) for item_id in dict.fromkeys(item_id for item_id, _ in removed))
    rows = np.array(sorted(row for row in found if row is not None), np.int64)
    rows = rows[[version in removed for version in _versions(whole, rows)]]
    if not len(rows):
        return {}
    _say(whole.items.column("item_id").take(pa.array(rows[: SHOWN + 1])).to_pylist(), len(rows), reporter)
    return {segment.id: rows, unwanted_rows(segment.id): rows}


def _latest(store: Store, seen: Current) -> SnapshotManifest | None:
    found = None if seen.snapshot is None else store.find("snapshot", seen.snapshot)
    if found is None:
        found = next(reversed(store.parts("snapshot")), None)
    return cast("SnapshotManifest | None", found)


def some_ids(ids: Sequence[str]) -> str:
    """The first of some ids, for a message."""
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


def _versions(segment: Segment, rows: np.ndarray) -> list[Version]:
    items = segment.items.select(VERSION).take(pa.array(rows))
    return list(zip(*(column.to_pylist() for column in items.columns)))


def _say(ids: Sequence[str], count: int, reporter: Reporter) -> None:
    reporter.say(
        f"{counted(count, 'removed item')} kept out ({some_ids(ids)}); `ace add --removed` takes them in again"
    )
