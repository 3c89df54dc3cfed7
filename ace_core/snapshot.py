"""Snapshots: one published version of a corpus.

A snapshot is a small manifest. It names the segments that hold the items, the aligner, quantizer and generator that
belong to them, the encoders that queries must go through, and which items were removed since (tombstones). All of
these are immutable parts of the store, so publishing, adding, removing and rolling back are a new manifest and one
atomic replacement of ``CURRENT``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from ace_core.arrays import map_arrays, save_arrays
from ace_core.config import EncoderSettings, TextEncoderSettings
from ace_core.errors import StoreError
from ace_core.manifest import (
    MANIFEST_NAME,
    Manifest,
    file_entry,
    hash_folder,
    read_manifest,
    verify_files,
    write_manifest,
)
from ace_core.segment import Segment

CURRENT_NAME = "CURRENT"
ModelKind = Literal["text_encoder", "aligner", "quantizer", "generator"]


class PartRef(BaseModel):
    """A part that a snapshot needs: its id, and the SHA-256 of its manifest (which holds those of its files)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    manifest_sha256: str


class SnapshotManifest(Manifest):
    """What a snapshot is made of.

    Attributes:
        segments: in search order; the first is the main one.
        models: aligner, quantizer and generator; the text encoder where it was trained on the corpus.
        encoders: settings of the encoders that queries and new items go through.
        encoder_identities: what those encoders were when the corpus was encoded, by ``text`` or modality.
        items: live items (removed ones are not counted), by modality.
        removed: items with a tombstone.
        parent: the snapshot that this one was made from by add or remove.
    """

    kind: Literal["snapshot"] = "snapshot"
    segments: tuple[PartRef, ...]
    models: dict[ModelKind, PartRef]
    encoders: EncoderSettings
    encoder_identities: dict[str, str]
    items: dict[str, int]
    removed: int = 0
    parent: str | None = None
    note: str = ""


def part_ref(folder: Path) -> PartRef:
    """Reference to a finished part on a local disk."""
    return PartRef(id=folder.name, manifest_sha256=file_entry(folder / MANIFEST_NAME).sha256)


def current_snapshot_id(store: Path) -> str:
    """The snapshot that ``CURRENT`` names.

    Raises:
        StoreError: nothing was published yet, or CURRENT is not what ACE wrote.
    """
    path = store / CURRENT_NAME
    try:
        return json.loads(path.read_text())["snapshot"]
    except FileNotFoundError:
        raise StoreError(
            "nothing has been published here", where=store, remedy="Run `ace publish`, or check --store."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            "CURRENT does not name a snapshot", where=path, remedy="Run `ace publish` or `ace rollback ID`."
        ) from None


def unwanted_rows(segment_id: str) -> str:
    """What a segment's rows that shall stay out of later snapshots are called beside its tombstones."""
    return f"unwanted/{segment_id}"


def write_snapshot(folder: Path, manifest: SnapshotManifest, tombstones: dict[str, np.ndarray]) -> SnapshotManifest:
    """Write a snapshot's folder; ``tombstones`` maps a segment id to sorted removed rows (int64), and
    :func:`unwanted_rows` of it to those of them that were removed by name, not because they were gone or replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(len(rows) for rows in tombstones.values()):
        save_arrays(folder / "tombstones.safetensors", {k: np.asarray(v, np.int64) for k, v in tombstones.items()})
    manifest = manifest.model_copy(update={"files": hash_folder(folder)})
    write_manifest(folder, manifest)
    return manifest


@dataclass(frozen=True)
class Snapshot:
    """A snapshot opened for reading from a local store.

    Attributes:
        store: local store folder.
        segments: opened segments.
        removed: for each segment, sorted int64 rows of removed items; ``unwanted``, those of them to be kept out.
    """

    store: Path
    manifest: SnapshotManifest
    segments: tuple[Segment, ...]
    removed: tuple[np.ndarray, ...]
    unwanted: tuple[np.ndarray, ...]

    @classmethod
    def open(cls, store: Path, snapshot_id: str | None = None, *, verify: bool = True) -> Snapshot:
        """Open a snapshot (by default the current one) and check that its parts belong together.

        Args:
            verify: check every file's SHA-256, not only its size.

        Raises:
            StoreError: a part is missing, damaged, of another version, or was made from other parts; names it.
        """
        store = Path(store)
        snapshot_id = snapshot_id or current_snapshot_id(store)
        folder = store / "snapshots" / snapshot_id
        manifest = read_manifest(folder, expect="snapshot", model=SnapshotManifest)
        verify_files(folder, manifest, hashes=verify)
        tombstones = map_arrays(folder / "tombstones.safetensors") if "tombstones.safetensors" in manifest.files else {}
        for kind, part in manifest.models.items():
            _check_ref(store / kind / part.id, part, manifest.id)
            model: Manifest = read_manifest(store / kind / part.id, expect=kind)
            verify_files(store / kind / part.id, model, hashes=verify)
            _check_inputs(model, manifest)
        segments = []
        for ref in manifest.segments:
            _check_ref(store / "segments" / ref.id, ref, manifest.id)
            segment = Segment(store / "segments" / ref.id, verify=verify)
            _check_inputs(segment.manifest, manifest)
            segments.append(segment)
        none = np.empty(0, np.int64)
        removed = tuple(tombstones.get(ref.id, none) for ref in manifest.segments)
        unwanted = tuple(tombstones.get(unwanted_rows(ref.id), none) for ref in manifest.segments)
        return cls(store, manifest, tuple(segments), removed, unwanted)

    @property
    def id(self) -> str:
        return self.manifest.id

    def __len__(self) -> int:
        return sum(self.manifest.items.values())

    def model_folder(self, kind: ModelKind) -> Path:
        return self.store / kind / self.manifest.models[kind].id

    @property
    def text_encoder(self) -> TextEncoderSettings:
        """What queries are encoded with: where it was trained on the corpus, the snapshot's own."""
        named = self.manifest.encoders.text
        return named.in_folder(self.model_folder("text_encoder")) if "text_encoder" in self.manifest.models else named

    def find(self, item_id: str) -> tuple[int, int] | None:
        """(segment, row) of a live item, or None. A later segment's item replaces an earlier one's."""
        for number in reversed(range(len(self.segments))):
            row = self.segments[number].row_of(item_id)
            if row is not None and self._lives(number, row):
                return number, row
        return None

    def find_content(self, digest: str) -> list[tuple[int, int]]:
        """(segment, row) of the live items that are, or are parts of, a file of this content
        (:func:`ace_core.items.content_hash`)."""
        return [
            (number, row)
            for number, segment in enumerate(self.segments)
            for row in segment.rows_of_content(digest)
            if self._lives(number, row)
        ]

    def _lives(self, number: int, row: int) -> bool:
        removed = self.removed[number]
        at = np.searchsorted(removed, row)
        return bool(at == len(removed) or removed[at] != row)


def _check_ref(folder: Path, ref: PartRef, snapshot_id: str) -> None:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise StoreError(
            f"snapshot {snapshot_id} needs {folder.parent.name}/{ref.id}, which is not there",
            where=folder,
            remedy="Restore it, or go to another snapshot: `ace rollback ID`.",
        )
    if file_entry(path).sha256 != ref.manifest_sha256:
        raise StoreError(
            f"{folder.parent.name}/{ref.id} is not the one that snapshot {snapshot_id} was published with",
            where=path,
            remedy="Restore it, or publish again.",
        )


def _check_inputs(part: Manifest, snapshot: SnapshotManifest) -> None:
    """Refuse a part that was made from other models than the snapshot's."""
    for kind, model in snapshot.models.items():
        made_from = part.inputs.get(kind)
        if made_from is not None and made_from != model.id:
            raise StoreError(
                f"{part.kind} {part.id} was made with {kind} {made_from}, snapshot {snapshot.id} has {kind} {model.id}",
                where=f"snapshots/{snapshot.id}",
                remedy="Publish again: parts of different fits cannot be mixed.",
            )
