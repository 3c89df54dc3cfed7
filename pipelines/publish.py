"""``ace publish``: identifiers for every item, a segment, a snapshot, and then, atomically, ``CURRENT``."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ace_core.aligner import Aligner, CaptionPairs
from ace_core.arrays import map_arrays
from ace_core.config import EncoderSettings, Settings
from ace_core.errors import StoreError
from ace_core.features import Features
from ace_core.items import MODALITIES
from ace_core.manifest import MANIFEST_NAME, Manifest, fingerprint
from ace_core.quantize.quantizer import Quantizer
from ace_core.retriever import Retriever
from ace_core.segment import write_segment
from ace_core.snapshot import MODEL_KINDS, PartRef, Snapshot, SnapshotManifest, write_snapshot
from ace_store import Current, Store
from ace_store.store import folder_of
from pipelines.corpus import known_captions, load_captions, load_corpus
from pipelines.progress import Reporter

BLOCK = 65_536  # items whose identifiers are assigned together
PROBES = 8  # captions asked of a new snapshot before it becomes the current one

ModelKind = Literal["aligner", "quantizer", "generator"]


@dataclass(frozen=True)
class Models:
    """What gives an item its identifier: the fitted parts, loaded."""

    ids: dict[ModelKind, str]
    texts: str
    vectors: str
    aligner: Aligner
    quantizer: Quantizer

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
        return cls(
            ids,
            generator.inputs["texts"],
            generator.settings["vectors"],
            Aligner.load(store.local_copy("aligner", ids["aligner"])),
            Quantizer.load(store.local_copy("quantizer", ids["quantizer"])),
        )


def publish_stage(settings: Settings, store: Store, reporter: Reporter) -> SnapshotManifest:
    """Publish all items of the latest features; nothing is done when that is what ``CURRENT`` names.

    Raises:
        StoreError: parts do not belong together, or another publisher was faster.
    """
    started = time.monotonic()
    seen = store.current()
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
    manifest = snapshot_manifest(store, features, models, [segment], {}, parent=None, note="publish")
    return commit(store, manifest, {}, seen, reporter, started)


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
    store: Store, features: Manifest, models: Models, rows: np.ndarray | None, settings: Settings, reporter: Reporter
) -> PartRef:
    """The segment of these rows of a features part (None for all), built unless the store has it."""
    inputs: dict[str, str] = {"features": features.id} | {str(kind): part for kind, part in models.ids.items()}
    chosen = None if rows is None else fingerprint(rows.tolist())
    segment_id = fingerprint("segment", inputs, models.vectors, chosen)
    if store.find("segment", segment_id) is None:
        corpus = load_corpus(store, features.id, settings)
        known = known_captions(corpus, load_captions(store, models.texts))
        rows = np.arange(len(corpus.features)) if rows is None else rows
        with store.scratch() as folder, reporter.step("assign identifiers", len(rows)) as step:
            codes = np.empty((len(rows), models.quantizer.levels), np.uint16)
            vectors = np.empty((len(rows), models.aligner.dim), np.float32) if models.vectors == "int8" else None
            error = 0.0
            for block in _blocks(len(rows)):
                x, tokens = _vectors(corpus.features, models.aligner, known, rows[block])
                codes[block] = models.quantizer.assign(x, tokens)
                error += float(np.square(x - models.quantizer.reconstruct(codes[block])).sum())
                if vectors is not None:
                    vectors[block] = x
                step.advance(block.stop - block.start)
            write_segment(
                folder / "part",
                segment_id=segment_id,
                codes=codes,
                vocab_sizes=models.quantizer.vocab_sizes,
                items=corpus.features.items.take(pa.array(rows)),
                corpus_root=features.settings["corpus_root"],
                inputs=inputs,
                vectors=vectors,
                metrics={"by_modality": _by_modality(codes), "error": error / max(1, len(rows))},
            )
            store.adopt_part(folder / "part", "segment", segment_id)
    return part_ref(store, "segment", segment_id)


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def _vectors(
    corpus: Features, aligner: Aligner, known: CaptionPairs, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Aligned vectors (n, D) and modality tokens (n,) of sorted rows (n,) of a corpus."""
    out = np.empty((len(rows), aligner.dim), np.float32)
    tokens = corpus.modality_tokens[rows]
    for modality in corpus.embeddings:
        here = np.flatnonzero(tokens == modality.token)
        if len(here):
            raw = corpus.embeddings[modality][rows[here] - corpus.rows_of(modality).start]
            of_these = np.flatnonzero(np.isin(known.rows, rows[here]))
            place = np.searchsorted(rows[here], known.rows[of_these])
            out[here] = aligner.item_vectors({modality: raw}, CaptionPairs(known.pooled[of_these], place))
    return out, tokens


def _by_modality(codes: np.ndarray) -> dict[str, int]:
    counts = np.bincount(codes[:, 0], minlength=len(MODALITIES))
    return {m.value: int(counts[m.token]) for m in MODALITIES if counts[m.token]}


def part_ref(store: Store, kind: Literal["segment", "aligner", "quantizer", "generator"], part_id: str) -> PartRef:
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
        tombstones: segment id to removed rows.
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
    model_refs: dict[ModelKind, PartRef] = {kind: part_ref(store, kind, models.ids[kind]) for kind in MODEL_KINDS}
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
        removed=sum(len(rows) for rows in tombstones.values()),
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
) -> SnapshotManifest:
    """Write a snapshot, check it as a server would, and make it the current one.

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
    probe(store, manifest.id)
    store.move_current(manifest.id, seen)
    counts = ", ".join(f"{count:,} {name}" for name, count in manifest.items.items())
    reporter.say(
        f"snapshot {manifest.id} is published: {counts}"
        + (f", {manifest.removed:,} removed" if manifest.removed else "")
        + f" ({time.monotonic() - started:.1f} s)"
    )
    return manifest


def probe(store: Store, snapshot_id: str) -> None:
    """Open a snapshot, hashes and all, and ask it a few of its own captions.

    Raises:
        StoreError: a part is damaged, or a query finds nothing or an item that is not live.
    """
    retriever = Retriever.open(store.mirror(snapshot_id), snapshot_id)
    texts: list[str] = []
    for segment in retriever.snapshot.segments:
        captions = segment.items.column("captions")
        step = max(1, len(captions) // PROBES)
        texts += [c[0] for c in captions.take(pa.array(np.arange(0, len(captions), step))).to_pylist() if c]
    if not texts or not len(retriever.snapshot):
        return
    with _named(snapshot_id):
        for hits in retriever.search(texts[:PROBES], k=5):
            if not hits or any(retriever.snapshot.find(hit.item_id) is None for hit in hits):
                raise StoreError("a query finds nothing, or an item that is not live")


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
