"""``ace add | remove | rollback``: the current snapshot changes, the models stay as they are.

Added items go through the frozen encoders, aligner and codebooks into a small segment of their own; removed ones get
a tombstone. Either way a new snapshot is published beside the old, which any later ``ace rollback`` finds again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ace_core.attributes import FilterValue, check_names
from ace_core.config import Settings
from ace_core.errors import CorpusError, QueryError, StoreError
from ace_core.no_hits import why_nothing
from ace_core.segment import Segment, item_versions
from ace_core.snapshot import Snapshot, SnapshotManifest, unwanted_rows
from ace_store import Current, Store
from pipelines.assign import read_items
from pipelines.drift import measure_drift
from pipelines.progress import Reporter, counted
from pipelines.publish import Models, commit, same_encoders, segment_part, snapshot_manifest
from pipelines.removed import SHOWN, VERSION, kept_out, removed_by_name, some_ids, taken_back


def add_stage(
    settings: Settings, store: Store, reporter: Reporter, *, again: Sequence[str] = (), removed: bool = False
) -> SnapshotManifest:
    """Publish what the latest features have and the current snapshot has not: new items, and changed ones in place of
    their older selves. Time and space are those of what is added, beside one comparison of ids.

    Args:
        again: ids of items that come in though they were removed by name; ``removed``: all of them do.

    Raises:
        QueryError: one of ``again`` was not removed by name, or is not in the corpus any more.
        StoreError: nothing is published yet, the encoders changed, or another publisher was faster.
    """
    started = time.monotonic()
    seen, snapshot = _open_current(store)
    features = store.latest("features")
    models = Models.load(store, snapshot.manifest.models["generator"].id)
    same_encoders(store, features, store.latest("generator"))
    columns = ["item_id", "content_hash", "uri", "captions", "attributes"]
    wanted = read_items(store, features, columns, _versions)
    published = _published(snapshot)
    _report_gone(published, wanted, reporter)
    place = pc.index_in(wanted.column("item_id"), value_set=published.column("item_id").combine_chunks())
    same = pc.equal(wanted.column("version"), published.column("version").take(place))
    fresh = ~pc.fill_null(same, False).to_numpy()
    here = place.combine_chunks().filter(pa.array(~fresh)).to_numpy()
    _report_moved(snapshot, published.column("segment").to_numpy()[here], features.settings["corpus_root"], reporter)
    unwanted = removed_by_name(snapshot)
    back = taken_back(unwanted, again, every=removed)
    there = pc.is_in(pa.array(again, pa.string()), value_set=wanted.column("item_id").combine_chunks()).to_pylist()
    if gone := [item_id for item_id, known in zip(again, there) if not known]:
        raise QueryError(
            f"{counted(len(gone), 'item')} not in the corpus any more ({some_ids(gone)})",
            remedy="Nothing was added. Bring their files back first.",
        )
    fresh &= ~kept_out({v: place for v, place in unwanted.items() if v not in back}, wanted, fresh, reporter)
    rows = np.flatnonzero(fresh)
    replaced = place.combine_chunks().take(pa.array(rows)).drop_null().to_numpy()
    tombstones = _with_tombstones(snapshot, published, replaced, back=list(back.values()))
    if not len(rows):
        reporter.say(f"snapshot {snapshot.id}: it has all of the corpus, nothing to add")
        return snapshot.manifest
    chosen = np.zeros(wanted.num_rows, bool)
    chosen[rows] = True
    segment = segment_part(store, features, models, chosen, settings, reporter)
    manifest = snapshot_manifest(
        store, features, models, [*snapshot.manifest.segments, segment], tombstones, parent=snapshot.id, note="add"
    )
    reporter.say(f"adding {counted(len(rows) - len(replaced), 'item')}, replacing {len(replaced):,}")
    joining = Segment(store.local_copy("segment", segment.id), verify=False)
    removed_now = [tombstones[s.manifest.id] for s in snapshot.segments]
    drift = measure_drift(snapshot, joining, store, removed_now)
    reporter.say(str(drift))
    return commit(store, manifest, tombstones, seen, reporter, started, built=[segment.id])


def remove_stage(
    store: Store,
    reporter: Reporter,
    *,
    ids: Sequence[str] = (),
    filters: Mapping[str, FilterValue] | None = None,
    gone: bool = False,
) -> SnapshotManifest:
    """Publish the current snapshot without some items. Those removed by id or attribute stay out of later snapshots,
    until they change or :func:`add_stage` is told to take them in again.

    Args:
        ids: items by id.
        filters: items by attribute, see :data:`ace_core.attributes.FilterValue`; all must hold.
        gone: items that the latest features no longer have.

    Raises:
        QueryError: nothing is asked for, or an id is not there (nothing is removed then).
        StoreError: nothing is published yet, or another publisher was faster.
    """
    started = time.monotonic()
    if not (ids or filters or gone):
        raise QueryError("nothing was said to remove", remedy="Give item ids, --where NAME=VALUE or --gone.")
    seen, snapshot = _open_current(store)
    published = _published(snapshot)
    asked = pc.index_in(pa.array(list(ids), pa.string()), value_set=published.column("item_id").combine_chunks())
    if asked.null_count:
        missing = [item_id for item_id, place in zip(ids, asked.to_pylist()) if place is None]
        raise QueryError(
            f"{counted(len(missing), 'item')} not in the snapshot, or not any more ({some_ids(missing)})",
            where=f"snapshot {snapshot.id}",
            remedy="Nothing was removed. Check the ids: `ace search` shows them, as a rule paths below the corpus.",
        )
    leaving = np.zeros(len(published), bool)
    leaving[asked.to_numpy()] = True
    unwanted = leaving.copy()
    if gone:
        wanted = read_items(store, store.latest("features"), ["item_id"]).column("item_id")
        leaving |= ~pc.is_in(published.column("item_id"), value_set=wanted.combine_chunks()).to_numpy()
    if filters:
        check_names(filters, [run.type for segment in snapshot.segments for run in segment.attributes])
        passes = [segment.matching(filters) for segment in snapshot.segments]
        number, row = published.column("segment").to_numpy(), published.column("row").to_numpy()
        starts = np.cumsum([0, *(len(p) for p in passes)])
        unwanted |= np.concatenate(passes)[starts[number] + row]
    leaving |= unwanted
    if filters and (why := why_nothing(snapshot, (), filters)):
        reporter.say(why)
    if not leaving.any():
        reporter.say(f"snapshot {snapshot.id}: no such item, nothing to remove")
        return snapshot.manifest
    tombstones = _with_tombstones(snapshot, published, np.flatnonzero(leaving), np.flatnonzero(unwanted))
    reporter.say(f"removing {counted(int(leaving.sum()), 'item')}")
    features = store.find("features", snapshot.manifest.inputs["features"])
    if features is None:
        raise StoreError(
            f"the features {snapshot.manifest.inputs['features']} of snapshot {snapshot.id} are gone",
            where=store.uri,
            remedy="Run `ace ingest` and `ace publish` again.",
        )
    manifest = snapshot_manifest(
        store,
        features,
        Models.load(store, snapshot.manifest.models["generator"].id),
        list(snapshot.manifest.segments),
        tombstones,
        parent=snapshot.id,
        note="remove",
    )
    return commit(store, manifest, tombstones, seen, reporter, started, built=[])


def rollback_stage(store: Store, reporter: Reporter, snapshot_id: str | None = None) -> SnapshotManifest:
    """Make an earlier snapshot the current one again: by default the one that the current one was made from, or else
    the newest older one.

    Raises:
        StoreError: nothing is published, there is no such snapshot, it is damaged, or another publisher was faster.
        CorpusError: there is none before the current one.
    """
    started = time.monotonic()
    seen = store.current(damaged=snapshot_id is not None)
    there = _kept(store, seen.snapshot)
    if snapshot_id is None:
        current = store.published()
        if not there:
            raise StoreError(
                f"CURRENT names snapshot {current}, which is gone or damaged",
                where=store.uri,
                remedy="Choose one of those that `ace status` lists: `ace rollback ID`.",
            )
        snapshot_id = _before(store, store.snapshot(current))
    manifest = store.snapshot(snapshot_id)
    if seen.snapshot == manifest.id:
        reporter.say(f"snapshot {manifest.id} is the current one already, nothing to do")
        return manifest
    left = "a damaged CURRENT" if seen.snapshot is None else f"snapshot {seen.snapshot}"
    if seen.snapshot is not None and not there:
        left += ", which is gone or damaged,"
    made = datetime.fromisoformat(manifest.created_at)
    did = f"rolled back from {left} to {manifest.id} ({manifest.note} of {made:%Y-%m-%d %H:%M} UTC)"
    commit(store, manifest, {}, seen, reporter, started, did=did)
    again = f"; back again: `ace rollback {seen.snapshot}`" if there else ""
    reporter.say(f"searches find it now, running servers change to it at their next look (serve.watch_seconds){again}")
    return manifest


def _kept(store: Store, snapshot_id: str | None) -> bool:
    try:
        return snapshot_id is not None and store.find("snapshot", snapshot_id) is not None
    except StoreError:  # its manifest is damaged
        return False


def _before(store: Store, current: SnapshotManifest) -> str:
    """The snapshot that the current one was made from, or where that is gone or was none, the newest older one."""
    older = [m.id for m in store.parts("snapshot") if m.created_at < current.created_at]
    if current.parent is not None and _kept(store, current.parent):
        return current.parent
    if not older:
        raise CorpusError(
            f"there is no snapshot before {current.id}", where=store.uri, remedy="`ace status` lists what is kept."
        )
    return older[-1]


def _open_current(store: Store) -> tuple[Current, Snapshot]:
    seen = store.current()
    return seen, Snapshot.open(store.mirror(seen.snapshot), seen.snapshot)


def _published(snapshot: Snapshot) -> pa.Table:
    """Live items: ``item_id``, ``version``, and the ``segment`` (its number) and ``row`` they are at."""
    parts = []
    for number, (segment, removed) in enumerate(zip(snapshot.segments, snapshot.removed)):
        rows = np.setdiff1d(np.arange(len(segment)), removed, assume_unique=True)
        part = segment.items.select(VERSION).take(pa.array(rows))
        part = part.append_column("segment", pa.array(np.full(len(rows), number)))
        parts.append(part.append_column("row", pa.array(rows)))
    return pa.concat_tables(parts)


def _with_tombstones(
    snapshot: Snapshot,
    published: pa.Table,
    leaving: np.ndarray,
    unwanted: np.ndarray | None = None,
    *,
    back: Sequence[tuple[int, int]] = (),
) -> dict[str, np.ndarray]:
    """The snapshot's tombstones, and those of rows of ``published`` that leave it; ``unwanted`` are to be kept out, and
    what is at the (segment, row) of ``back`` no longer is."""

    def joined(before: Sequence[np.ndarray], rows: np.ndarray) -> list[np.ndarray]:
        number, row = (published.column(name).to_numpy()[rows] for name in ("segment", "row"))
        return [np.union1d(old, row[number == i]).astype(np.int64) for i, old in enumerate(before)]

    ids = [segment.manifest.id for segment in snapshot.segments]
    before = [
        np.setdiff1d(rows, [row for number, row in back if number == i]).astype(np.int64)
        for i, rows in enumerate(snapshot.unwanted)
    ]
    unwanted_now = joined(before, np.empty(0, np.int64) if unwanted is None else unwanted)
    out = dict(zip(ids, joined(snapshot.removed, leaving)))
    return out | {unwanted_rows(name): rows for name, rows in zip(ids, unwanted_now) if len(rows)}


def _versions(items: pa.Table) -> pa.Table:
    return pa.table({"item_id": items.column("item_id"), "version": item_versions(items)})


def _report_moved(snapshot: Snapshot, segments: np.ndarray, root: str, reporter: Reporter) -> None:
    """Say of items that are as they were, in the segments of these numbers, that their files are not looked for where
    the corpus is now: an item is published with its path, a segment with the folder that the paths are below."""
    counts = np.bincount(segments, minlength=len(snapshot.segments)).tolist()
    moved: dict[str, int] = {}
    for segment, count in zip(snapshot.segments, counts):
        if count and segment.corpus_root != root:
            moved[segment.corpus_root] = moved.get(segment.corpus_root, 0) + count
    if moved:
        items = counted(sum(moved.values()), "published item")
        reporter.say(
            f"the corpus moved: the files of {items} are still looked for below {' and '.join(moved)}; `ace publish` "
            f"has them served from {root} (no refit)"
        )


def _report_gone(published: pa.Table, wanted: pa.Table, reporter: Reporter) -> None:
    kept = pc.is_in(published.column("item_id"), value_set=wanted.column("item_id").combine_chunks())
    gone = published.column("item_id").filter(pc.invert(kept))
    if len(gone):
        some = some_ids(gone.slice(0, SHOWN + 1).to_pylist())
        reporter.say(
            f"published, but no longer in the corpus: {counted(len(gone), 'item')} ({some}): `ace remove --gone`"
        )
