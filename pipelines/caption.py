"""``ace caption``: captions for items that have none, sampled from a captioning model on Ray Data.

They become a part of their own beside the features, so that they stay apart from what people wrote: fits train on
them and the index knows them, and no evaluation ever asks with them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ace_core.captioner import Captioner, distinct
from ace_core.config import CaptionSettings, LimitSettings, Settings, TextEncoderSettings
from ace_core.errors import AceError, MediaError, SettingsError
from ace_core.items import MODALITIES, Modality
from ace_core.manifest import FileEntry, Manifest, fingerprint
from ace_core.media.causes import Cause
from ace_store import ItemReader, Store, open_location
from pipelines.assign import read_items
from pipelines.cluster import encoder_pool, ensure_ray, map_rows
from pipelines.generated import GENERATED_SCHEMA, read_generated
from pipelines.progress import Reporter, duration

SHARD_ITEMS = 512  # what a killed run may repeat
SHARD_SECONDS = 10.0
COLUMNS = ["item_id", "uri", "modality", "captions", "content_hash", "start_seconds", "end_seconds"]


class CaptionItems:
    """Reads, decodes and describes items of one modality: a plain class over a dictionary of arrays."""

    def __init__(
        self,
        modality: Modality,
        caption: CaptionSettings,
        limits: LimitSettings,
        text: TextEncoderSettings,
        corpus: str,
        *,
        seed: int,
        threads: int,
        device: str,
    ) -> None:
        import torch

        from ace_core.encoders import load_text_encoder

        torch.set_num_threads(threads)
        self._captioner = Captioner(modality, caption, limits, device)
        self._encoder = load_text_encoder(text, device)
        self._reader = ItemReader(open_location(corpus))
        self._limit = caption.similarity
        self._seed = seed

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``row``, ``uri``, ``start``, ``end`` (NaN for none) in; ``row``, ``captions`` (JSON), ``dropped`` near
        duplicates and ``cause`` out."""
        decoded: dict[int, np.ndarray] = {}
        causes = [""] * len(batch["row"])
        for i, (uri, start, end) in enumerate(zip(batch["uri"], batch["start"], batch["end"])):
            try:
                span = (None if np.isnan(start) else float(start), None if np.isnan(end) else float(end))
                decoded[i] = self._captioner.decode(self._reader.read(uri), *span)
            except Exception as e:  # one file's fault is one file's row
                causes[i] = str(e.cause) if isinstance(e, MediaError) else f"{type(e).__name__}"
        sampled = self._captioner.describe(list(decoded.values()), self._seed + int(batch["row"][0]))
        captions: list[list[str]] = [[] for _ in causes]
        dropped = np.zeros(len(causes), np.int64)
        for i, texts in zip(decoded, sampled):
            if texts:
                captions[i] = distinct(texts, self._encoder.encode(texts).pooled.float().numpy(), self._limit)
            dropped[i] = len(texts) - len(captions[i])
            causes[i] = "" if captions[i] else str(Cause.NO_CONTENT)
        return {
            "row": batch["row"],
            "captions": np.array([json.dumps(c) for c in captions], dtype=object),
            "dropped": dropped,
            "cause": np.array(causes, dtype=object),
        }


def caption_stage(settings: Settings, store: Store, reporter: Reporter) -> Manifest:
    """Caption the items of the latest features that have no caption; goes on where a killed run stopped, and takes over
    what an earlier run of the same captioner said of files that did not change.

    Raises:
        SettingsError: no captioner is set.
        AceError: not one item could be captioned.
    """
    started = time.monotonic()
    features = store.latest("features")
    items = read_items(store, features, COLUMNS)
    bare = items.filter(pc.equal(pc.fill_null(pc.list_value_length(items.column("captions")), 0), 0))
    wanted = {m: bare.filter(pc.equal(bare.column("modality"), m.value)) for m in MODALITIES}
    present = [m for m in MODALITIES if wanted[m].num_rows and _model(settings, m) is not None]
    if not present:
        return _nothing(settings, features, bare, reporter)
    identities = {m.value: Captioner(m, settings.caption, settings.limits).identity for m in present}
    key = fingerprint(identities, settings.caption.model_dump(), settings.encoders.text.model_dump())
    part_id = fingerprint("captions", features.id, key, settings.compute.seed)
    manifest = store.find("captions", part_id)
    if manifest is not None:
        reporter.say(f"captions {part_id}: nothing changed, nothing to do")
        store.set_latest("captions", part_id)
        return manifest
    with store.making("captions"):
        shards = _Shards(store, part_id)
        shards.carry_over(bare, key)
        for modality in present:
            _caption_modality(settings, features.settings["corpus_root"], shards, modality, wanted[modality], reporter)
        return _seal(store, features, shards, key, identities, started, reporter)


def _model(settings: Settings, modality: Modality) -> str | None:
    return settings.caption.audio if modality is Modality.AUDIO else settings.caption.image


def _nothing(settings: Settings, features: Manifest, bare: pa.Table, reporter: Reporter) -> Manifest:
    if not bare.num_rows:
        reporter.say("every item has a caption: nothing to do")
        return features
    counts = Counter(bare.column("modality").to_pylist())
    raise SettingsError(
        f"no captioner is set for items without captions ({', '.join(f'{n:,} {m}' for m, n in counts.items())})",
        where="caption.image, caption.audio",
        remedy="Give the folder or hub name of a captioning model, BLIP for example.",
    )


class _Shards:
    """What is already captioned of a part, and the files that more of it is written to."""

    def __init__(self, store: Store, part_id: str) -> None:
        self.store, self.part_id = store, part_id
        self._rows: list[dict[str, Any]] = []
        self._since = time.monotonic()
        self.dropped = 0
        self.done = read_generated(store, part_id)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= SHARD_ITEMS or time.monotonic() - self._since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one more file; whole or not at all."""
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=GENERATED_SCHEMA)
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd")
            number = sum(i.path.endswith(".parquet") for i in self.store.listing(f"captions/{self.part_id}"))
            self.store.write_bytes(f"captions/{self.part_id}/{number:06d}.parquet", sink.getvalue().to_pybytes())
            self.done = pa.concat_tables([self.done, table])
        self._rows, self._since = [], time.monotonic()

    def carry_over(self, bare: pa.Table, key: str) -> None:
        """Take what the latest part of the same captioner has of files with the same content. What failed is tried
        again: a machine that was busy has said nothing of the file."""
        pointer = self.store.read_json("captions/LATEST")
        old = None if pointer is None else self.store.find("captions", str(pointer["id"]))
        if old is None or old.settings["key"] != key or self.done.num_rows:
            return
        rows = read_generated(self.store, old.id).to_pylist()
        known = {r["item_id"]: r for r in rows if r["cause"] in ("", Cause.NO_CONTENT)}
        for item_id, content_hash in zip(*(bare.column(n).to_pylist() for n in ("item_id", "content_hash"))):
            if item_id in known and known[item_id]["content_hash"] == content_hash:
                self.add(known[item_id])
        self.flush()


def _caption_modality(
    settings: Settings, corpus: str, shards: _Shards, modality: Modality, wanted: pa.Table, reporter: Reporter
) -> None:
    left = wanted.filter(pc.invert(pc.is_in(wanted.column("item_id"), value_set=shards.done.column("item_id"))))
    if left.num_rows < wanted.num_rows:
        reporter.say(f"{modality.value}: {wanted.num_rows - left.num_rows:,} captioned in an earlier run")
    if not left.num_rows:
        return
    ensure_ray(settings.compute)
    size = settings.caption.batch_size
    pool = encoder_pool(settings.compute, most=-(-left.num_rows // size))
    nan = float("nan")
    work = pa.table(
        {
            "row": np.arange(left.num_rows),
            "uri": left.column("uri"),
            "start": pc.fill_null(left.column("start_seconds"), nan),
            "end": pc.fill_null(left.column("end_seconds"), nan),
        }
    )
    ids, hashes = left.column("item_id").to_pylist(), left.column("content_hash").to_pylist()
    args = (modality, settings.caption, settings.limits, settings.encoders.text, corpus)
    kwargs = {"seed": settings.compute.seed, "threads": pool.threads, "device": pool.device}
    bad = 0
    with reporter.step(f"caption {modality.value}", left.num_rows) as step:
        for result in map_rows(work, CaptionItems, pool, size, args, kwargs):
            for row, text, cause in zip(result["row"].tolist(), result["captions"], result["cause"]):
                captions = json.loads(text)
                shards.add(
                    {"item_id": ids[row], "content_hash": hashes[row], "captions": captions, "cause": str(cause)}
                )
            shards.dropped += int(result["dropped"].sum())
            bad += int((result["cause"] != "").sum())
            step.advance(len(result["row"]), f"{bad:,} without" if bad else "")
        shards.flush()


def _seal(
    store: Store,
    features: Manifest,
    shards: _Shards,
    key: str,
    identities: dict[str, str],
    started: float,
    reporter: Reporter,
) -> Manifest:
    done = shards.done
    counts = pc.list_value_length(done.column("captions")).to_numpy()
    causes = Counter(c for c in done.column("cause").to_pylist() if c)
    if not counts.sum():
        raise AceError(
            f"not one of {done.num_rows:,} items got a caption ({dict(causes)})",
            where=store.path("captions", shards.part_id),
            remedy="Look at the causes; delete that folder to try again.",
        )
    files: dict[str, FileEntry] = {}
    for info in store.listing(f"captions/{shards.part_id}"):
        if info.path.endswith(".parquet"):
            data = store.read_bytes(f"captions/{shards.part_id}/{info.base_name}") or b""
            files[info.base_name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = Manifest(
        kind="captions",
        id=shards.part_id,
        inputs={"features": features.id},
        settings={"key": key, "captioners": identities},
        metrics={
            "items": done.num_rows,
            "captions": int(counts.sum()),
            "near_duplicates_dropped": shards.dropped,
            "causes": dict(causes),
            "seconds": round(time.monotonic() - started, 1),
        },
        files=files,
    )
    store.seal_part(manifest)
    store.set_latest("captions", manifest.id)
    reporter.say(
        f"captions {manifest.id}: {int(counts.sum()):,} for {int((counts > 0).sum()):,} items, "
        f"{shards.dropped:,} near duplicates left out ({duration(manifest.metrics['seconds'])}); "
        "`ace fit all` trains on them"
    )
    return manifest
