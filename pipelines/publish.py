"""``ace publish``: identifiers for every item, a segment, a snapshot, and then, atomically, ``CURRENT``."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ace_core.arrays import map_arrays
from ace_core.config import EncoderSettings, Settings
from ace_core.errors import StoreError
from ace_core.items import MODALITIES
from ace_core.manifest import MANIFEST_NAME, Manifest, fingerprint, verify_files
from ace_core.quantize.quantizer import Quantizer
from ace_core.retriever import Retriever
from ace_core.segment import FORMAT, Segment
from ace_core.segment_writer import SegmentWriter
from ace_core.snapshot import ModelKind, PartRef, Snapshot, SnapshotManifest, write_snapshot
from ace_store import Current, Store
from ace_store.store import folder_of
from pipelines.assign import assign_identifiers
from pipelines.corpus import load_captions
from pipelines.progress import Reporter, counted_items
from pipelines.removed import still_kept_out

PROBES = 8  # captions asked of a new snapshot before it becomes the current one


@dataclass(frozen=True)
class Models:
    """What gives an item its identifier: the fitted parts."""

    ids: dict[ModelKind, str]
    texts: str
    vectors: str
    quantizer: Quantizer

    @property
    def of_items(self) -> dict[str, str]:
        """The two that an item passes through on its way to an identifier."""
        return {kind: self.ids[kind] for kind in ("aligner", "quantizer")}

    @classmethod
    def load(cls, store: Store, generator_id: str) -> Models:
        """Load a generator's relatives.

        Raises:
            StoreError: a part is missing.
        """
        generator = store.find("generator", generator_id)
        if generator is None:
            raise StoreError(
                f"there is no generator {generator_id}", where=store.uri, remedy="Run `ace fit generator` again."
            )
        ids: dict[ModelKind, str] = {
            "aligner": generator.inputs["aligner"],
            "quantizer": generator.inputs["quantizer"],
            "generator": generator_id,
        }
        if "text_encoder" in generator.inputs:
            ids["text_encoder"] = generator.inputs["text_encoder"]
        return cls(
            ids,
            generator.inputs["texts"],
            generator.settings["vectors"],
            Quantizer.load(store.local_copy("quantizer", ids["quantizer"])),
        )


def publish_stage(settings: Settings, store: Store, reporter: Reporter, *, removed: bool = False) -> SnapshotManifest:
    """Publish all items of the latest features but those that were removed by name (:mod:`pipelines.removed`); nothing
    is done when that is what ``CURRENT`` names.

    Items stream through: memory holds ids, captions and attributes of all while it decides which captions the index may
    know, then only identifiers; vectors never.

    Args:
        removed: what was removed by name is published, too.

    Raises:
        StoreError: parts do not belong together, it cannot be read what was removed, or another publisher was faster.
    """
    started = time.monotonic()
    seen = store.current(damaged=True)
    features, generator = store.latest("features"), store.latest("generator")
    if generator.settings["vectors"] != settings.publish.vectors:
        raise StoreError(
            f"the ranking of generator {generator.id} was learned with publish.vectors={generator.settings['vectors']}",
            where=f"publish.vectors={settings.publish.vectors}",
            remedy="Run `ace fit generator` with the same setting first.",
        )
    models = Models.load(store, generator.id)
    same_encoders(store, features, generator)
    segment = segment_part(store, features, models, None, settings, reporter)
    tombstones = {} if removed else still_kept_out(store, seen, segment, reporter)
    manifest = snapshot_manifest(store, features, models, [segment], tombstones, parent=None, note="publish")
    return commit(store, manifest, tombstones, seen, reporter, started)


def same_encoders(store: Store, features: Manifest, generator: Manifest) -> None:
    """Refuse features of other encoders than the generator was trained with.

    Raises:
        StoreError: names the encoder.
    """
    trained = store.find("features", generator.inputs["features"])
    if trained is None:
        return  # collected meanwhile: the aligner's own widths still refuse what does not fit
    before = trained.metrics["encoder_identities"]
    for modality, identity in features.metrics["encoder_identities"].items():
        if before.get(modality, identity) != identity:
            raise StoreError(
                f"the {modality} encoder is not the one that generator {generator.id} was trained with",
                where=f"features {features.id}",
                remedy="Run `ace fit all`, then publish.",
            )


def segment_part(
    store: Store,
    features: Manifest,
    models: Models,
    chosen: np.ndarray | None,
    settings: Settings,
    reporter: Reporter,
) -> PartRef:
    """The segment of some items of a features part, built unless the store has it.

    Args:
        chosen: (n,) bool over the items of the part in the order of its files; None for all.
    """
    inputs: dict[str, str] = {"features": features.id} | {str(kind): part for kind, part in models.ids.items()}
    which = None if chosen is None else hashlib.sha256(np.packbits(chosen).tobytes()).hexdigest()
    segment_id = fingerprint("segment", FORMAT, inputs, models.vectors, settings.split.model_dump(), which)
    if store.find("segment", segment_id) is None:
        captions = load_captions(store, models.texts)
        total = sum(features.metrics["items"].values()) if chosen is None else int(chosen.sum())
        counts, error = np.zeros(len(MODALITIES), np.int64), 0.0
        with (
            store.making("segment"),
            store.scratch() as folder,
            SegmentWriter(folder / "part", models.quantizer.vocab_sizes) as writer,
            reporter.step("assign identifiers", total) as step,
        ):
            for done in assign_identifiers(
                store, features, models.of_items, captions, chosen, settings.split, settings.compute,
                stored=models.vectors == "int8",
            ):  # fmt: skip
                writer.add(done.rows)
                counts += counts_of(done.rows)
                error += done.error
                step.advance(done.rows.num_rows)
            writer.finish(
                segment_id,
                corpus_root=features.settings["corpus_root"],
                inputs=inputs,
                metrics={
                    "by_modality": {m.value: int(counts[m.token]) for m in MODALITIES if counts[m.token]},
                    "error": error / max(1, counts.sum()),
                },
            )
            store.adopt_part(folder / "part", "segment", segment_id)
    return part_ref(store, "segment", segment_id)


def counts_of(rows: pa.Table) -> np.ndarray:
    """(modalities,) int64 items of each modality."""
    column = rows.column("modality")
    return np.array([pc.sum(pc.equal(column, m.value)).as_py() or 0 for m in MODALITIES], np.int64)


def _by_modality(codes: np.ndarray) -> dict[str, int]:
    counts = np.bincount(codes[:, 0], minlength=len(MODALITIES))
    return {m.value: int(counts[m.token]) for m in MODALITIES if counts[m.token]}


def part_ref(store: Store, kind: Literal["segment"] | ModelKind, part_id: str) -> PartRef:
    """A snapshot's reference to a part: its id and the SHA-256 of its manifest."""
    data = store.read_bytes(f"{folder_of(kind)}/{part_id}/{MANIFEST_NAME}")
    if data is None:
        raise StoreError(f"there is no {kind} {part_id}", where=store.uri, remedy="Run its stage again.")
    return PartRef(id=part_id, manifest_sha256=hashlib.sha256(data).hexdigest())


def snapshot_manifest(
    store: Store,
    features: Manifest,
    models: Models,
    segments: list[PartRef],
    tombstones: Mapping[str, np.ndarray],
    *,
    parent: str | None,
    note: str,
) -> SnapshotManifest:
    """Describe a snapshot of these segments without their removed rows.

    Args:
        features: the features part that was ingested last.
        tombstones: as :func:`ace_core.snapshot.write_snapshot` takes them.
    """
    texts = store.find("texts", models.texts)
    if texts is None:
        raise StoreError(f"there is no texts {models.texts}", where=store.uri, remedy="Run `ace fit all` again.")
    items: dict[str, int] = {}
    for segment in segments:
        for modality, count in live_counts(store, segment.id, tombstones.get(segment.id)).items():
            items[modality] = items.get(modality, 0) + count
    known = {"text": texts.metrics["encoder_identity"], **features.metrics["encoder_identities"]}
    identity: dict[str, Any] = {
        "segments": [s.id for s in segments],
        "models": models.ids,
        "tombstones": {k: v.tolist() for k, v in tombstones.items() if len(v)},
    }
    model_refs: dict[ModelKind, PartRef] = {kind: part_ref(store, kind, models.ids[kind]) for kind in models.ids}
    return SnapshotManifest(
        id=fingerprint("snapshot", identity),
        inputs={"features": features.id, "texts": models.texts} | {str(k): v for k, v in models.ids.items()},
        segments=tuple(segments),
        models=model_refs,
        encoders=EncoderSettings.model_validate(
            features.settings["encoders"] | {"text": texts.settings}  # each as it was when it was used
        ),
        encoder_identities=known,
        items=items,
        removed=sum(len(tombstones.get(segment.id, ())) for segment in segments),
        parent=parent,
        note=note,
    )


def live_counts(store: Store, segment_id: str, removed: np.ndarray | None) -> dict[str, int]:
    """Items of a segment by modality, without the removed rows."""
    manifest = store.find("segment", segment_id)
    if manifest is None:
        raise StoreError(f"there is no segment {segment_id}", where=store.uri, remedy="Run `ace publish` again.")
    counts: dict[str, int] = dict(manifest.metrics["by_modality"])
    if removed is not None and len(removed):
        codes = map_arrays(store.local_copy("segment", segment_id) / "identifiers.safetensors")["codes"]
        for modality, count in _by_modality(codes[removed]).items():
            counts[modality] -= count
    return counts


def live_ids(snapshot: Snapshot) -> pa.Array:
    """Ids of all items of a snapshot that were not removed."""
    parts = []
    for segment, removed in zip(snapshot.segments, snapshot.removed):
        keep = np.ones(len(segment), bool)
        keep[removed] = False
        parts.append(segment.items.column("item_id").filter(pa.array(keep)).combine_chunks())
    return pa.chunked_array(parts, pa.string()).combine_chunks()


def commit(
    store: Store,
    manifest: SnapshotManifest,
    tombstones: Mapping[str, np.ndarray],
    seen: Current,
    reporter: Reporter,
    started: float,
    *,
    built: Sequence[str] | None = None,
    did: str = "",
) -> SnapshotManifest:
    """Write a snapshot, check it as a server would, and make it the current one.

    Args:
        built: segments that no earlier snapshot was checked with; None where the snapshot is checked whole.
        did: what a person is told that has happened; by default that the snapshot is published.

    Raises:
        StoreError: the check failed (the old snapshot stays), or another publisher was faster.
    """
    if seen.snapshot == manifest.id:
        reporter.say(f"snapshot {manifest.id}: nothing changed, nothing to do")
        return store.snapshot(manifest.id)
    if store.find("snapshot", manifest.id) is None:
        with store.scratch() as folder:
            write_snapshot(folder / "part", manifest, dict(tombstones))
            store.adopt_part(folder / "part", "snapshot", manifest.id)
    verify_snapshot(store, manifest.id, built)
    if not store.move_current(manifest.id, seen):
        reporter.say("this file system cannot refuse a second publisher: publish from one place at a time")
    reporter.say(
        f"{did or f'snapshot {manifest.id} is published'}: {counted_items(manifest.items)}"
        + (f", {manifest.removed:,} removed" if manifest.removed else "")
        + f" ({time.monotonic() - started:.1f} s)"
    )
    return manifest


def verify_snapshot(store: Store, snapshot_id: str, built: Sequence[str] | None = None) -> None:
    """Open a snapshot as a server would, and check that it holds what it says: hashes, counts, every identifier
    reached through the constraint index, and a few of its own captions answered.

    Args:
        built: check the files and identifiers of these segments only (the others': sizes and manifests); None for all.

    Raises:
        StoreError: a part is damaged, or a query finds nothing or an item that is not live.
    """
    retriever = Retriever.open(store.mirror(snapshot_id), snapshot_id, verify=built is None)
    snapshot = retriever.snapshot
    texts: list[str] = []
    with _named(snapshot_id):
        live = 0
        for segment, removed in zip(snapshot.segments, snapshot.removed):
            live += len(segment) - len(removed)
            if built is None or segment.manifest.id in built:
                verify_files(segment.folder, segment.manifest, hashes=built is not None)
                _check_decodable(segment)
            rows = np.arange(0, len(segment), max(1, len(segment) // PROBES))
            texts += [item.captions[0] for item in segment.items_at(rows) if item.captions]
        if live != len(snapshot):
            raise StoreError(f"its manifest counts {len(snapshot):,} items, its segments hold {live:,}")
        if not texts or not live:
            return
        for hits in retriever.search(texts[:PROBES], k=5):
            if not hits or any(snapshot.find(hit.item_id) is None for hit in hits):
                raise StoreError("a query finds nothing, or an item that is not live")


def _check_decodable(segment: Segment) -> None:
    """Follow the constraint index to every item; the tokens on the way must be the item's identifier."""
    for level in range(segment.gallery.index.levels):
        spelled, codes = segment.gallery.index.spelled(level), segment.gallery.codes[:, level]
        if not np.array_equal(spelled, codes):
            raise StoreError(
                f"the constraint index of segment {segment.manifest.id} does not spell its identifiers",
                where=f"level {level}",
            )


@contextmanager
def _named(snapshot_id: str) -> Iterator[None]:
    try:
        yield
    except StoreError as e:
        raise StoreError(
            f"snapshot {snapshot_id} does not answer as it should: {e.found}",
            where=e.where,
            remedy="It was not published; the one before it stays. Publish again.",
        ) from None
