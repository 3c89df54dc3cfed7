"""``ace status | gc``: what a store holds, and what of it nothing needs any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import get_args

from pyarrow import fs
from rich.table import Table

from ace_core.errors import StoreError
from ace_core.manifest import MANIFEST_NAME, Manifest, PartKind
from ace_core.segment import finds_less, found_less
from ace_core.snapshot import SnapshotManifest
from ace_store import Store
from ace_store.store import folder_of
from pipelines.progress import Reporter, counted, counted_items

KINDS: tuple[PartKind, ...] = tuple(kind for kind in get_args(PartKind) if kind != "evaluation")  # reports are kept
_POINTED: tuple[PartKind, ...] = ("features", "captions", "text_encoder", "aligner", "quantizer", "generator")


@dataclass(frozen=True)
class Held:
    """A part of a store, with its size in bytes."""

    manifest: Manifest
    bytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> Held:
        return cls(manifest, sum(f.bytes for f in manifest.files.values()))


def status_table(store: Store) -> Table:
    """Snapshots, newest first, and the size of everything else.

    Raises:
        StoreError: there is nothing.
    """
    seen = store.current(damaged=True)  # whoever looks for one to go back to needs the list
    current = seen.snapshot
    sizes = {kind: [Held.of(m) for m in store.parts(kind)] for kind in KINDS}
    if not any(sizes.values()):
        raise _nothing_in(store)
    table = Table(title=store.uri, title_justify="left")
    for name in ("", "snapshot", "made", "by", "from"):
        table.add_column(name)
    for name in ("items", "removed", "segments"):
        table.add_column(name, justify="right")
    snapshots = store.parts("snapshot")
    for manifest in reversed(snapshots):
        assert isinstance(manifest, SnapshotManifest)
        table.add_row(
            "current" if manifest.id == current else "",
            manifest.id,
            f"{_born(manifest):%Y-%m-%d %H:%M} UTC",
            manifest.note,
            manifest.parent or "",
            counted_items(manifest.items),
            f"{manifest.removed:,}",
            str(len(manifest.segments)),
        )
    table.caption_justify = "left"
    table.caption = "; ".join(
        f"{folder_of(kind)} ({len(held)}) {sum(h.bytes for h in held) / 1e6:,.1f} MB"
        for kind, held in sizes.items()
        if held
    )
    if current is None and seen.version is None:
        table.caption += ". Nothing is published yet."
    elif all(m.id != current for m in snapshots):
        names = "no snapshot" if current is None else f"snapshot {current}, which is gone"
        table.caption += f". CURRENT names {names}: choose one with `ace rollback ID`."
    if older := _older_segments(sizes["segment"], snapshots, current):
        table.caption += f".\nIn the current snapshot {found_less(older)}."
    return table


def _older_segments(segments: Sequence[Held], snapshots: Sequence[Manifest], current: str | None) -> int:
    """How many of the current snapshot's segments an earlier ACE wrote."""
    mine = {part.id for m in snapshots if m.id == current and isinstance(m, SnapshotManifest) for part in m.segments}
    return sum(finds_less(held.manifest) for held in segments if held.manifest.id in mine)


def gc_stage(store: Store, reporter: Reporter, *, keep: int, min_age: timedelta, dry_run: bool) -> list[str]:
    """Delete parts that no kept snapshot and no stage needs, and what killed runs left behind.

    Kept: the current snapshot, the ``keep`` newest ones beside it, all they name, what the next stage would read, and
    everything younger than ``min_age`` (a run may be building on it, or a server still reading it).

    Returns:
        what was deleted (or would be), as ``kind/id``.

    Raises:
        StoreError: there is nothing.
    """
    parts = {kind: store.parts(kind) for kind in KINDS}
    now = datetime.now(UTC)
    limit = now - min_age
    doomed, young = _unneeded(store, parts, keep, limit), len(_unneeded(store, parts, keep, now))
    freed = sum(Held.of(m).bytes for _, m in doomed)
    for kind, manifest in doomed:
        if not dry_run:
            store.delete_part(kind, manifest.id)
    left = _left_behind(store, limit)
    if not left and not any(parts.values()):
        raise _nothing_in(store)
    for name in left:
        if not dry_run:
            store.delete(name)
    verb = "would delete" if dry_run else "deleted"
    also = f", and {counted(len(left), 'folder')} that killed runs left behind" if left else ""
    if kept := young - len(doomed):
        hours = min_age / timedelta(hours=1)
        also += f"; kept: {counted(kept, 'part')} younger than {hours:g} h (--min-age-hours), or needed by one that is"
    reporter.say(f"{verb} {counted(len(doomed), 'part')}, {freed / 1e6:,.1f} MB{also}")
    return [*(f"{kind}/{m.id}" for kind, m in doomed), *left]


def _nothing_in(store: Store) -> StoreError:
    return StoreError(
        "there is nothing in this store", where=store.uri, remedy="Check --store, or begin with `ace ingest`."
    )


def _unneeded(
    store: Store, parts: dict[PartKind, list[Manifest]], keep: int, limit: datetime
) -> list[tuple[PartKind, Manifest]]:
    """Parts made before ``limit`` that nothing which stays needs, what needs others first."""
    current = store.current().snapshot
    needed: set[tuple[str, str]] = set()
    newest = [m.id for m in parts["snapshot"] if m.id != current][-keep:] if keep else []
    for manifest in parts["snapshot"]:
        assert isinstance(manifest, SnapshotManifest)
        if manifest.id == current or manifest.id in newest or _born(manifest) > limit:
            needed.add(("snapshot", manifest.id))
            needed |= {("segment", s.id) for s in manifest.segments}
            needed |= {(kind, model.id) for kind, model in manifest.models.items()}
            needed |= set(manifest.inputs.items())
    for kind in _POINTED:
        pointer = store.read_json(f"{kind}/LATEST")
        if pointer is not None:
            needed.add((kind, str(pointer["id"])))
    for kind in KINDS:
        for manifest in parts[kind]:
            if (kind, manifest.id) in needed or _born(manifest) > limit:
                needed |= {(kind, manifest.id), *manifest.inputs.items()}
    return [(kind, m) for kind in reversed(KINDS) for m in parts[kind] if (kind, m.id) not in needed]


def _left_behind(store: Store, limit: datetime) -> list[str]:
    """Checkpoints of fits, folders being built and parts without a manifest in which nothing was written since
    ``limit``: what a killed run of settings that nobody uses any more would leave for ever."""
    folders = [f"runs/{i.base_name}" for i in store.listing("runs") if not i.is_file]
    folders += [i.base_name for i in store.listing("") if i.base_name.startswith(".building-")]
    for kind in KINDS:
        for info in store.listing(folder_of(kind)):
            name = f"{folder_of(kind)}/{info.base_name}"
            if not info.is_file and not store.exists(f"{name}/{MANIFEST_NAME}"):
                folders.append(name)
    return [name for name in folders if all(_written(i) < limit for i in store.listing(name, recursive=True))]


def _written(info: fs.FileInfo) -> datetime:
    return datetime.fromtimestamp(info.mtime.timestamp(), UTC) if info.mtime else datetime.min.replace(tzinfo=UTC)


def _born(manifest: Manifest) -> datetime:
    return datetime.fromisoformat(manifest.created_at)
