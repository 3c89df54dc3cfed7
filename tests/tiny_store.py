"""A published store made in a second: random features, a fitted quantizer, and a generator at its starting point.

Nothing is trained, and nothing needs to be: the generator's heads start as the codebooks, so every score can be
computed by a plain loop over all items.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ace_core.aligner import Aligner
from ace_core.config import AlignerSettings, EncoderSettings, GeneratorSettings, QuantizerSettings
from ace_core.encoders import load_text_encoder
from ace_core.generator.model import Generator
from ace_core.items import MODALITIES, Modality, content_hash
from ace_core.manifest import Manifest, PartKind, hash_folder, write_manifest
from ace_core.quantize.fit import fit_quantizer
from ace_core.quantize.quantizer import Quantizer
from ace_core.ranking import Ranker
from ace_core.retriever import RANKING_NAME
from ace_core.segment_writer import write_segment
from ace_core.snapshot import CURRENT_NAME, SnapshotManifest, part_ref, write_snapshot

WIDTHS = {Modality.IMAGE: 20, Modality.AUDIO: 12, Modality.VIDEO: 16}


def content_of(number: int) -> bytes:
    """The bytes of an item's file; the 298th and the 299th are segments of one."""
    return f"file {298 if number == 299 else number}".encode()


def item_rows(first: int, count: int) -> pa.Table:
    """``count`` items, their modality and attributes a function of their number."""
    numbers = range(first, first + count)
    modalities = [MODALITIES[n % 3] for n in numbers]
    return pa.table(
        {
            "item_id": [f"item-{n:04d}" for n in numbers],
            "uri": [f"{m}/{n:04d}.bin" for n, m in zip(numbers, modalities)],
            "modality": [str(m) for m in modalities],
            "captions": pa.array([[f"thing number {n}"] for n in numbers], pa.list_(pa.string())),
            "content_hash": [content_hash(content_of(n)) for n in numbers],
            "mime": ["application/octet-stream"] * count,
            "start_seconds": pa.nulls(count, pa.float64()),
            "end_seconds": pa.nulls(count, pa.float64()),
            "attributes": [json.dumps({"parity": "odd" if n % 2 else "even", "number": n}) for n in numbers],
        }
    )


def item_features(first: int, count: int) -> dict[Modality, np.ndarray]:
    """Raw features of the same items, by modality."""
    out: dict[Modality, list[np.ndarray]] = {m: [] for m in MODALITIES}
    for n in range(first, first + count):
        modality = MODALITIES[n % 3]
        out[modality].append(np.random.default_rng(n).normal(size=WIDTHS[modality]))
    return {m: np.array(rows, np.float32).reshape(-1, WIDTHS[m]) for m, rows in out.items()}


def vectors_of(aligner: Aligner, first: int, count: int) -> np.ndarray:
    """Aligned vectors (count, D) in the order of :func:`item_rows`."""
    grouped = aligner.item_vectors(item_features(first, count))
    numbers = np.arange(first, first + count)
    order = np.argsort(np.concatenate([np.flatnonzero(numbers % 3 == m.token) for m in MODALITIES]), kind="stable")
    return grouped[order]


class TinyStore:
    """The models of a store, and calls that publish segments and snapshots into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        encoders = EncoderSettings()
        self.text = load_text_encoder(encoders.text)
        torch.manual_seed(0)
        self.aligner = Aligner(self.text.dim, WIDTHS, AlignerSettings(dim=24, hidden=0))
        self.aligner.eval()
        x = vectors_of(self.aligner, 0, 300)
        settings = QuantizerSettings(coarse=8, fine_levels=2, fine_codes=16, epochs=2)
        self.quantizer: Quantizer = fit_quantizer(x, np.arange(300) % 3, settings)[0]
        self.generator = Generator(GeneratorSettings(width=32), self.quantizer, self.text.width, self.text.layers)
        self.generator.eval()
        with torch.no_grad():  # so that the order by log-probability differs from the order by similarity
            self.generator.log_scales.copy_(torch.tensor([8.0, 30.0, 4.0, 15.0]).log())
        self.inputs = {"aligner": "a1", "quantizer": "q1"}
        self._part("aligner", "a1", {}, self.aligner.save)
        self._part("quantizer", "q1", {"aligner": "a1"}, self.quantizer.save)
        self._part("generator", "g1", self.inputs, self._save_generator)

    def _save_generator(self, folder: Path) -> None:
        self.generator.save(folder)
        Ranker(generator=1.0, similarity=5.0, threshold=0.01).save(folder / RANKING_NAME)

    def _part(self, kind: PartKind, part_id: str, inputs: dict[str, str], save) -> None:
        folder = self.path / kind / part_id
        folder.mkdir(parents=True)
        save(folder)
        write_manifest(folder, Manifest(kind=kind, id=part_id, inputs=inputs, files=hash_folder(folder)))

    def segment(self, segment_id: str, first: int, count: int, *, stored: bool = False) -> str:
        """Write a segment of items ``first .. first + count``."""
        x = vectors_of(self.aligner, first, count)
        codes = self.quantizer.assign(x, np.arange(first, first + count) % 3)
        write_segment(
            self.path / "segments" / segment_id,
            segment_id=segment_id,
            codes=codes,
            vocab_sizes=self.quantizer.vocab_sizes,
            items=item_rows(first, count),
            corpus_root=str(self.path / "corpus"),
            inputs=self.inputs,
            left=x - self.quantizer.reconstruct(codes) if stored else None,
        )
        return segment_id

    def publish(self, snapshot_id: str, segments: list[str], removed: dict[str, np.ndarray] | None = None) -> None:
        """Write a snapshot of these segments and make it current."""
        removed = removed or {}
        manifest = SnapshotManifest(
            id=snapshot_id,
            segments=tuple(part_ref(self.path / "segments" / s) for s in segments),
            models={k: part_ref(self.path / k / i) for k, i in {**self.inputs, "generator": "g1"}.items()},  # type: ignore[misc]
            encoders=EncoderSettings(),
            encoder_identities={"text": self.text.identity},
            items={"image": 1},
            removed=sum(len(r) for r in removed.values()),
        )
        write_snapshot(self.path / "snapshots" / snapshot_id, manifest, removed)
        fresh = self.path / f".{CURRENT_NAME}.fresh"  # whole at once: replicas may read it at any time
        fresh.write_text(json.dumps({"snapshot": snapshot_id}))
        fresh.replace(self.path / CURRENT_NAME)
