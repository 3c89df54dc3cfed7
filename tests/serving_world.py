"""A small real corpus with a real snapshot, and a backend that stands in for the models (and for nothing else)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import soundfile
from PIL import Image, ImageDraw

from ace_core.config import EncoderSettings
from ace_core.errors import QueryError
from ace_core.items import MODALITIES, Modality
from ace_core.manifest import Manifest, write_manifest
from ace_core.media.kinds import mime_of
from ace_core.no_hits import why_nothing
from ace_core.query import Hit
from ace_core.segment_writer import write_segment
from ace_core.snapshot import Snapshot, SnapshotManifest, part_ref, write_snapshot
from ace_store.store import Store
from serve.calls import ExampleCall, Overloaded, Refusal, ReplicaState, Reply, TextCall, Unavailable

VOCAB = (3, 8, 16, 16)
THRESHOLD = 0.5
COLOURS = {"red": (220, 50, 47), "green": (60, 160, 70), "blue": (38, 110, 210), "yellow": (230, 180, 30)}
SHAPES = ("circle", "square", "triangle")
CREDIT = "Shapes by the ACE tests, CC0"


@dataclass(frozen=True)
class WorldItem:
    """An item to publish: its identifier below the modality token is ``tokens``."""

    item_id: str
    uri: str
    modality: Modality
    captions: tuple[str, ...]
    attributes: dict[str, Any]
    tokens: tuple[int, ...]


def draw_corpus(folder: Path) -> list[WorldItem]:
    """12 pictures, 4 sounds and 4 clips, written as PNG, FLAC and MP4."""
    items = []
    for c, (colour, rgb) in enumerate(COLOURS.items()):
        for s, shape in enumerate(SHAPES):
            name = f"pictures/{colour}-{shape}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _picture(shape, rgb).save(folder / name)
            attributes = {"colour": colour, "corners": (0, 4, 3)[s], "attribution": CREDIT}
            captions = (f"a {colour} {shape}", f"{shape} in {colour}")
            items.append(WorldItem(f"{colour}-{shape}", name, Modality.IMAGE, captions, attributes, (s, c, s)))
    for n, pitch in enumerate((220, 330, 440, 660)):
        name = f"sounds/tone-{pitch}.flac"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(16000) / 16000)
        soundfile.write(folder / name, wave.astype(np.float32), 16000)
        items.append(
            WorldItem(f"tone-{pitch}", name, Modality.AUDIO, (f"a tone of {pitch} hertz",), {"pitch": pitch}, (1, n, 0))
        )
    for c, (colour, rgb) in enumerate(COLOURS.items()):
        name = f"clips/{colour} moves.mp4"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _clip(folder / name, rgb)
        captions = (f"a {colour} circle moves to the right",)
        items.append(WorldItem(f"clips/{colour} moves", name, Modality.VIDEO, captions, {"colour": colour}, (2, c, 0)))
    return items


def _picture(shape: str, rgb: tuple[int, int, int], size: int = 96, x: int = 48) -> Image.Image:
    image = Image.new("RGB", (size, size), (250, 250, 248))
    draw = ImageDraw.Draw(image)
    r = size // 3
    box = (x - r, size // 2 - r, x + r, size // 2 + r)
    if shape == "circle":
        draw.ellipse(box, fill=rgb)
    elif shape == "square":
        draw.rectangle(box, fill=rgb)
    else:
        draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=rgb)
    return image


def _clip(path: Path, rgb: tuple[int, int, int]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        for step in range(8):
            frame = av.VideoFrame.from_ndarray(np.asarray(_picture("circle", rgb, x=24 + 6 * step)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def publish(
    store: Path, corpus: Path, items: Sequence[WorldItem], *, snapshot_id: str = "first", removed: Sequence[str] = ()
) -> None:
    """Write a snapshot whose models are named but empty, and make it the current one."""
    for kind in ("aligner", "quantizer", "generator"):
        folder = store / kind / "none"
        if not folder.exists():
            folder.mkdir(parents=True)
            write_manifest(folder, Manifest(kind=kind, id="none"))
    table = pa.table(
        {
            "item_id": [i.item_id for i in items],
            "uri": [i.uri for i in items],
            "modality": [i.modality.value for i in items],
            "captions": [list(i.captions) for i in items],
            "content_hash": [f"{n:064x}" for n in range(len(items))],
            "mime": [mime_of(i.uri) for i in items],
            "start_seconds": pa.nulls(len(items), pa.float64()),
            "end_seconds": pa.nulls(len(items), pa.float64()),
            "attributes": [json.dumps(i.attributes) for i in items],
        }
    )
    codes = np.array([(i.modality.token, *i.tokens) for i in items], np.uint16)
    segment = f"segment-{snapshot_id}"
    write_segment(
        store / "segments" / segment,
        segment_id=segment,
        codes=codes,
        vocab_sizes=VOCAB,
        items=table,
        corpus_root=str(corpus),
        inputs={},
    )
    folder = store / "snapshots" / snapshot_id
    manifest = SnapshotManifest(
        id=snapshot_id,
        segments=(part_ref(store / "segments" / segment),),
        models={kind: part_ref(store / kind / "none") for kind in ("aligner", "quantizer", "generator")},  # type: ignore[misc]
        encoders=EncoderSettings(),
        encoder_identities={},
        items={m.value: sum(i.modality == m and i.item_id not in removed for i in items) for m in MODALITIES},
        removed=len(removed),
    )
    write_snapshot(folder, manifest, {})
    if removed:
        opened = Snapshot.open(store, snapshot_id)
        rows = sorted(r for r in (opened.segments[0].row_of(i) for i in removed) if r is not None)
        (folder / "manifest.json").unlink()
        write_snapshot(folder, manifest, {segment: np.array(rows)})
    handle = Store.open(store)
    handle.move_current(snapshot_id, handle.current())


@dataclass
class WordBackend:
    """Answers by words that a query shares with an item's captions, from the real items of the current snapshot.

    ``down``, ``full``, ``broken`` and ``delay`` make it behave as replicas in trouble do.
    """

    store: str
    down: bool = False
    full: bool = False
    broken: bool = False
    delay: float = 0.0
    refused: str | None = None
    calls: list[TextCall | ExampleCall] = field(default_factory=list)

    async def probe(self) -> ReplicaState:
        return await self.state()

    async def state(self) -> ReplicaState:
        self._trouble()
        return self._state(self._snapshot())

    def _snapshot(self) -> Snapshot:
        return Snapshot.open(Store.open(self.store).mirror(), verify=False)

    def _state(self, snapshot: Snapshot) -> ReplicaState:
        reason = None if self.refused is None else f"the file of {self.refused} does not match its SHA-256"
        return ReplicaState("replica-1", snapshot.id, time.time(), self.refused, reason)

    def _trouble(self) -> None:
        if self.full:
            raise Overloaded
        if self.down:
            raise Unavailable("no replica is up")
        if self.broken:
            raise RuntimeError("a bug")

    async def search(self, call: TextCall | ExampleCall) -> Reply | Refusal:
        self._trouble()
        self.calls.append(call)
        await asyncio.sleep(self.delay)
        snapshot = self._snapshot()
        if isinstance(call, TextCall):
            texts = list(call.texts)
        elif call.item_id is not None:
            found = snapshot.find(call.item_id)
            if found is None:
                return Refusal("missing", f"the snapshot has no item {call.item_id!r}", "item_id")
            texts = [snapshot.segments[found[0]].item(found[1]).captions[0]]
        else:
            if call.media == b"\x89PNG\r\n\x1a\nbroken":
                return Refusal("media", "the picture is truncated", "file", "Send a whole file.")
            texts = ["red circle"]
        try:
            results = tuple(self._rank(snapshot, text, call) for text in texts)
        except QueryError as e:
            return Refusal("query", e.found, e.where, e.remedy)
        stages = {"queue": 0.001, "search": 0.002}
        note = ""
        if not any(results):
            note = why_nothing(snapshot, [Modality(m) for m in call.options.modalities], call.options.filters)
        return Reply(self._state(snapshot), results, THRESHOLD, stages, len(texts), 20, note)

    def _rank(self, snapshot: Snapshot, text: str, call: TextCall | ExampleCall) -> tuple[Hit, ...]:
        words = set(text.lower().split()) - {"a"}
        hits = []
        for segment, removed in zip(snapshot.segments, snapshot.removed):
            keep = segment.matching(call.options.filters)
            keep[removed] = False
            for row in np.flatnonzero(keep):
                item = segment.item(int(row))
                if call.options.modalities and item.modality not in call.options.modalities:
                    continue
                share = len(words & set(" ".join(item.captions).lower().split())) / max(1, len(words))
                score = 0.02 + 0.9 * share
                hits.append(
                    Hit(
                        item_id=item.item_id,
                        score=score,
                        modality=item.modality,
                        uri=item.uri,
                        mime=item.mime,
                        captions=item.captions,
                        attributes=item.attributes,
                        identifier=item.identifier,
                        log_prob=float(np.log(score)),
                        similarity=share,
                        level_probs=(0.9, 0.8, 0.7, 0.6),
                    )
                )
        hits.sort(key=lambda h: (-h.score, h.item_id))
        return tuple(hits[: call.options.k])
