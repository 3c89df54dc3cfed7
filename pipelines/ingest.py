"""``ace ingest``: media to features, on Ray Data.

The corpus is listed, what an earlier ingestion already encoded is carried over, and the rest streams through one pool
of actors, modality by modality. Encoded rows come back to the driver, which writes them in shards; killed at any
moment, the same command goes on after the last shard.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ace_core.config import MediaEncoderSettings, Settings
from ace_core.errors import CorpusError
from ace_core.features import ERRORS_SCHEMA
from ace_core.items import MODALITIES, Modality
from ace_core.manifest import Manifest, fingerprint
from ace_core.media.causes import PASSING
from ace_store import Store
from pipelines.carried import carry_over, earlier_parts, judged_by
from pipelines.cluster import encoder_pool, ensure_ray, map_rows
from pipelines.encode import EncodeCorpus, EncodeItems, KnownEmbeddings, ModalityWork, files_together
from pipelines.progress import Reporter, counted, counted_items, duration
from pipelines.shards import (
    PartWriter,
    bad_rows,
    committed_shards,
    indexed_files,
    item_rows,
    not_in,
    segment_id,
    some_errors,
)
from pipelines.sources import Listing, list_corpus
from pipelines.tries import Tries

SHOWN = 5  # bad files named in the terminal
_AT_ONCE = {"log-mel": 16}  # groups of files that a call gets of encoders that take milliseconds a file ...
_CALL_BYTES = 8 << 20  # ... unless files of this corpus are long


def ingest(settings: Settings, store: Store, reporter: Reporter) -> Manifest:
    """Make the features part of the corpus as it is now. When the store has it, nothing is done, but for files whose
    cause may have passed: these are tried again (``corpus.tries`` times in all), and give a new part if any of them can
    be used now.

    Raises:
        CorpusError: the corpus cannot be used, or not one of its files can.
        ModelError: an encoder cannot be had.
    """
    started = time.monotonic()
    listing = list_corpus(settings.corpus, store)
    reporter.say(f"{listing.root}: {listing.summary}")
    present = [m for m in MODALITIES if listing.of(m).num_rows]
    identities = encoder_identities(settings, present)
    marks = {m: encoder_mark(settings, m, identity) for m, identity in identities.items()}
    made_of = fingerprint("features", listing.root, listing.digest(), marks, settings.limits.model_dump())
    judged, corpus = judged_by(settings.limits), settings.corpus
    tries = Tries.read(store, fingerprint(judged, marks), corpus.tries)
    done = _done(store, made_of)
    if done is not None:
        store.set_latest("features", done.id)
        if not (again := {row["file_id"] for row in _passing_rows(done, store) if tries.again(row)}):
            reporter.say(f"features {done.id}: nothing changed, nothing to do")
            _report_bad(done, store, tries, reporter)
            return done
        files = counted(len(again), "file")
        reporter.say(f"features {done.id}: nothing changed; trying again what may have passed: {files}")
    part_id = made_of if done is None else _again(done)
    with store.making("features"):
        writer = PartWriter.resume(store, part_id, corpus.shard_items, corpus.shard_seconds, judged)
        left = [_left(writer, listing, modality, marks[modality], tries, reporter) for modality in present]
        _encode_left(settings, writer, listing.root, [one for one in left if one.files.num_rows], tries, reporter)
        tries.write(set(listing.items.column("item_id").to_pylist()))
        # More of a file may be bad than was: what could be used before is not given up for that.
        if done is not None and sum(shard.items for shard in writer.shards) <= sum(done.metrics["items"].values()):
            store.delete(f"features/{part_id}")
            reporter.say(f"features {done.id}: as they were, none of it can be used yet")
            _report_bad(done, store, tries, reporter)
            return done
        manifest = _seal(settings, made_of, writer, listing, identities, time.monotonic() - started, reporter)
    _summarise(manifest, store, tries, reporter)
    return manifest


def _done(store: Store, made_of: str) -> Manifest | None:
    """The finished part of this corpus and these settings; the last one, where bad files were tried again."""
    pointer = store.read_json("features/LATEST")
    done = None if pointer is None else store.find("features", str(pointer["id"]))
    if done is None or done.settings.get("made_of") != made_of:
        done = store.find("features", made_of)
    while done is not None and (later := store.find("features", _again(done))) is not None:
        done = later
    return done


def _again(done: Manifest) -> str:
    """Id of the part that trying the bad files of another one again makes."""
    return fingerprint("tried again", done.id)


def _passing(causes: Mapping[str, int]) -> int:
    """How many of the bad files, by cause, may be good another time."""
    return sum(count for cause, count in causes.items() if cause in PASSING)


def _passing_rows(manifest: Manifest, store: Store) -> list[dict[str, Any]]:
    """Those of a part's bad files and segments whose cause may pass, as rows of ``BAD_SCHEMA``."""
    if not _passing(manifest.metrics["errors"]):
        return []
    shards = [shard for shard in committed_shards(store, manifest.id) if _passing(shard.errors)]
    return [row for shard in shards for row in bad_rows(store, manifest.id, shard) if row["cause"] in PASSING]


def encoder_identities(settings: Settings, modalities: list[Modality]) -> dict[str, str]:
    """What the encoders are: any other weight or setting gives another identity."""
    from ace_core.encoders import load_media_encoder

    return {m.value: load_media_encoder(m, settings.encoders.media(m), settings.limits).identity for m in modalities}


def encoder_mark(settings: Settings, modality: str, identity: str) -> str:
    """What gave a modality's rows: the encoder, and how long files are cut for it."""
    seconds = settings.segments.seconds(Modality(modality))
    return fingerprint(identity, seconds, settings.segments.overlap) if seconds else identity


@dataclass(frozen=True)
class _Left:
    """What of one modality is still to be encoded: listed files, by an encoder, beside what is known by content."""

    modality: Modality
    encoder: str
    files: pa.Table
    known: KnownEmbeddings


def _left(
    writer: PartWriter, listing: Listing, modality: Modality, encoder: str, tries: Tries, reporter: Reporter
) -> _Left:
    """Take over what earlier runs did of a modality."""
    listed = listing.of(modality)
    missing = not_in(listed, writer.done_ids(modality))
    if missing.num_rows < listed.num_rows:
        reporter.say(f"{modality.value}: {listed.num_rows - missing.num_rows:,} done in an earlier run")
    parts = earlier_parts(writer.store, writer.part_id)
    good, bad, known = carry_over(writer, modality, encoder, missing, parts, tries)
    if good or bad:
        still_bad = f", {bad:,} known to be bad and not tried again" if bad else ""
        reporter.say(f"{modality.value}: {good:,} unchanged since the last ingestion{still_bad}")
        missing = not_in(missing, writer.done_ids(modality))
    return _Left(modality, encoder, missing, known)


def _encode_left(
    settings: Settings, writer: PartWriter, corpus: str, left: list[_Left], tries: Tries, reporter: Reporter
) -> None:
    """Encode all that is left, and write it."""
    if not left:
        return
    buffers = {one.modality: writer.buffer(one.modality, one.encoder) for one in left}
    names = ", ".join(one.modality.value for one in left)
    bad = 0
    with reporter.step(f"encode {names}", sum(one.files.num_rows for one in left), "files") as step:
        for modality, rows, result in _encoded(settings, corpus, left):
            good = np.flatnonzero(result["cause"] == "")
            failed = np.flatnonzero(result["cause"] != "")
            items = None
            if len(good):
                hashes = pa.array(result["content_hash"][good], pa.string())
                start, end = (pa.array(result[name][good], from_pandas=True) for name in ("start", "end"))
                items = item_rows(rows.take(pa.array(good)), hashes, result["embedding"][good], start, end)
            errors = _error_rows(rows, result, failed)
            tries.failed(errors)
            buffers[modality].add(items, errors, reused=int(result["reused"].sum()))
            bad += len(failed)
            step.advance(len(np.unique(result["row"])), f"{bad:,} bad" if bad else "")
        for buffer in buffers.values():
            buffer.flush()


def _encoded(
    settings: Settings, corpus: str, left: list[_Left]
) -> Iterator[tuple[Modality, pa.Table, dict[str, np.ndarray]]]:
    """Encode listed files on Ray; yields files of one modality with the results of :class:`EncodeItems` for them."""
    ensure_ray(settings.compute)
    files = pa.concat_tables([one.files for one in left])
    work = files.select(["uri", "bytes"]).append_column("kind", files.column("modality"))
    work = work.append_column("row", pa.array(np.arange(work.num_rows)))
    encoders = {one.modality: settings.encoders.media(one.modality) for one in left}
    together = {m: files_together(e, settings.compute.device) for m, e in encoders.items()}
    most = sum(-(-one.files.num_rows // together[one.modality]) for one in left)
    pool = encoder_pool(settings.compute, most=most)
    args = (
        {one.modality: ModalityWork(encoders[one.modality], one.known) for one in left},
        (settings.limits, corpus),
        {"threads": pool.threads, "device": pool.device, "segments": settings.segments},
    )
    at_once = {
        one.modality.value: files_a_call(one.files, encoders[one.modality], together[one.modality]) for one in left
    }
    for result in map_rows(work, EncodeCorpus, pool, at_once, args, {}, lost=EncodeItems.lost):
        rows = files.take(pa.array(result["row"]))
        yield Modality(rows.column("modality")[0].as_py()), rows, result


def files_a_call(files: pa.Table, encoder: MediaEncoderSettings, together: int) -> int:
    """How many files a Ray call gets: the call itself costs as much as encoding a few short sounds."""
    held = max(1.0, together * pc.mean(files.column("bytes")).as_py())
    return together * max(1, min(_AT_ONCE.get(encoder.kind, 1), int(_CALL_BYTES / held)))


def _error_rows(rows: pa.Table, result: dict[str, np.ndarray], failed: np.ndarray) -> list[dict[str, Any]]:
    chosen = rows.select(["item_id", "uri", "modality", "stamp"]).take(pa.array(failed, pa.int64())).to_pylist()
    for row, i in zip(chosen, failed.tolist()):
        row |= {"cause": str(result["cause"][i]), "detail": str(result["detail"][i]), "file_id": row["item_id"]}
        if not np.isnan(result["start"][i]):
            row["item_id"] = segment_id(row["item_id"], result["start"][i], result["end"][i])
    return chosen


def _seal(
    settings: Settings,
    made_of: str,
    writer: PartWriter,
    listing: Listing,
    identities: dict[str, str],
    seconds: float,
    reporter: Reporter,
) -> Manifest:
    items, reused, causes = Counter[str](), Counter[str](), Counter[str](listing.errors.column("cause").to_pylist())
    for shard in writer.shards:
        items[shard.modality.value] += shard.items
        reused[shard.modality.value] += shard.reused
        causes.update(shard.errors)
    total = sum(items.values())
    if not total:
        names = [name for shard in writer.shards for name in shard.files]
        some = "".join(f", such as {_told(row)}" for row in some_errors(writer.store, writer.part_id, names, 1))
        found = f"not one of {listing.items.num_rows:,} files can be used ({_counted(causes)}){some}"
        if _passing(causes):
            writer.store.delete(f"features/{writer.part_id}")
            raise CorpusError(found, where=listing.root, remedy="That may pass: run `ace ingest` again.")
        raise CorpusError(found, where=listing.root, remedy=f"The reasons are in {writer.path('errors')}.")
    files = {name: entry for shard in writer.shards for name, entry in shard.files.items()}
    files |= writer.write_errors("listing", listing.errors.cast(ERRORS_SCHEMA))
    manifest = Manifest(
        kind="features",
        id=writer.part_id,
        settings={
            "made_of": made_of,
            "corpus_root": listing.root,
            "encoders": settings.encoders.model_dump(),
            "limits": settings.limits.model_dump(),
            "segments": settings.segments.model_dump(),
        },
        metrics={
            "items": dict(items),
            "errors": dict(causes),
            "reused": dict(reused),
            "disappeared": _disappeared(writer.store, listing, reporter),
            "encoder_identities": identities,
            "bytes": int(pc.sum(listing.items.column("bytes")).as_py()),
            "seconds": round(seconds, 1),
        },
        files=files,
    )
    writer.store.seal_part(manifest)
    writer.store.set_latest("features", manifest.id)
    return manifest


def _disappeared(store: Store, listing: Listing, reporter: Reporter) -> int:
    """Count, and name some of, the items of the last ingestion that are no longer in the corpus."""
    pointer = store.read_json("features/LATEST")
    manifest = None if pointer is None else store.find("features", str(pointer["id"]))
    if manifest is None or manifest.settings.get("corpus_root") != listing.root:
        return 0
    before = pa.table({"item_id": indexed_files(store, manifest.id)})
    gone = not_in(before, listing.items.column("item_id").combine_chunks()).column("item_id").to_pylist()
    if gone:
        more = ", ..." if len(gone) > 3 else ""
        reporter.say(f"gone since the last ingestion: {counted(len(gone), 'item')} ({', '.join(gone[:3])}{more})")
    return len(gone)


def _summarise(manifest: Manifest, store: Store, tries: Tries, reporter: Reporter) -> None:
    metrics = manifest.metrics
    reporter.say(f"features {manifest.id}: {counted_items(metrics['items'])} in {duration(metrics['seconds'])}")
    _report_bad(manifest, store, tries, reporter)


def _report_bad(manifest: Manifest, store: Store, tries: Tries, reporter: Reporter) -> None:
    metrics = manifest.metrics
    if not metrics["errors"]:
        return
    total = counted(sum(metrics["errors"].values()), "file")
    reporter.say(f"  {total} could not be used: {_counted(Counter(metrics['errors']))}")
    names = [name for name in manifest.files if name.startswith("errors/")]
    for row in some_errors(store, manifest.id, names, SHOWN):
        reporter.say(f"    {_told(row)}")
    reporter.say(f"  all of them, with their reasons: {store.path('features', manifest.id, 'errors')} (Parquet)")
    passing = _passing_rows(manifest, store)
    causes = sorted({row["cause"] for row in passing if tries.again(row)})
    also = "; by the next `ace ingest` after " + " or ".join(causes) if causes else ""
    reporter.say(f"  one is tried again when it changes (`touch` it), or the limits or its encoder do{also}")
    if given_up := {row["file_id"]: row for row in passing if not tries.again(row)}:
        some = "; ".join(f"{row['uri']}: {row['cause']}" for row in list(given_up.values())[:SHOWN])
        more = "; ..." if len(given_up) > SHOWN else ""
        most = max(map(tries.count, given_up.values()))
        reporter.say(
            f"  {counted(len(given_up), 'file')} tried {most} times and left alone from now on ({some}{more}); to try "
            f"again: `touch`, or --set corpus.tries={most + 1}"
        )


def _told(row: dict[str, str]) -> str:
    return f"{row['uri']}: {row['cause']} ({row['detail']})"


def _counted(causes: Counter[str]) -> str:
    return ", ".join(f"{count:,} {cause}" for cause, count in causes.most_common()) or "no reason recorded"
