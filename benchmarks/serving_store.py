"""A published store of any size for load tests: real codes of synthetic vectors, models at their starting point.

Nothing is trained. The work of a search is that of a trained store of the same size: the same text encoder, the same
widths, the same constraint index over real identifiers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ace_core.aligner import Aligner
from ace_core.config import AlignerSettings, EncoderSettings, GeneratorSettings, QuantizerSettings
from ace_core.encoders import load_text_encoder
from ace_core.generator.model import Generator
from ace_core.items import MODALITIES
from ace_core.manifest import Manifest, PartKind, hash_folder, write_manifest
from ace_core.quantize.fit import fit_quantizer
from ace_core.ranking import Ranker
from ace_core.retriever import RANKING_NAME
from ace_core.segment_writer import write_segment
from ace_core.snapshot import SnapshotManifest, part_ref, write_snapshot
from ace_store.store import Store

BLOCK = 50_000
_CENTRES = 4096
_FITTED = 20_000


def vectors(items: int, dim: int) -> Iterator[np.ndarray]:
    """Clustered unit vectors in blocks (BLOCK, dim) float32, the same on every call."""
    centres = np.random.default_rng(0).normal(size=(_CENTRES, dim)).astype(np.float32)
    for first in range(0, items, BLOCK):
        rng = np.random.default_rng(first + 1)
        n = min(BLOCK, items - first)
        x = centres[rng.integers(0, _CENTRES, n)] + 0.7 * rng.normal(size=(n, dim)).astype(np.float32)
        yield x / np.linalg.norm(x, axis=1, keepdims=True)


def build(path: Path, items: int) -> str:
    """Write a store with one snapshot of ``items`` items, unless it is there; returns the snapshot's id."""
    name = f"synthetic-{items}"
    store = Store.open(path)
    if store.current().snapshot == name:
        return name
    torch.manual_seed(0)
    encoders, settings = EncoderSettings(), AlignerSettings()
    text = load_text_encoder(encoders.text)
    aligner = Aligner(text.dim, dict.fromkeys(MODALITIES, 8), settings).eval()
    fitted = min(items, _FITTED)
    sample = np.concatenate(list(vectors(fitted, settings.dim)))
    quantizer = fit_quantizer(sample, np.arange(fitted) % 3, QuantizerSettings(epochs=0, kmeans_iterations=5))[0]
    generator = Generator(GeneratorSettings(), quantizer, text.width, text.layers).eval()

    def part(kind: PartKind, save, inputs: dict[str, str]) -> None:
        folder = path / kind / "synthetic"
        folder.mkdir(parents=True, exist_ok=True)
        save(folder)
        write_manifest(folder, Manifest(kind=kind, id="synthetic", inputs=inputs, files=hash_folder(folder)))

    def save_generator(folder: Path) -> None:
        generator.save(folder)
        Ranker(generator=1.0, similarity=5.0).save(folder / RANKING_NAME)

    part("aligner", aligner.save, {})
    part("quantizer", quantizer.save, {"aligner": "synthetic"})
    part("generator", save_generator, {"aligner": "synthetic", "quantizer": "synthetic"})
    modality = np.arange(items) % 3
    codes = [
        quantizer.assign(x, modality[n * BLOCK : n * BLOCK + len(x)])
        for n, x in enumerate(vectors(items, settings.dim))
    ]
    segment = path / "segments" / name
    write_segment(
        segment,
        segment_id=name,
        codes=np.concatenate(codes),
        vocab_sizes=quantizer.vocab_sizes,
        items=_table(items),
        corpus_root=str(path / "corpus"),
        inputs={"aligner": "synthetic", "quantizer": "synthetic"},
    )
    manifest = SnapshotManifest(
        id=name,
        segments=(part_ref(segment),),
        models={kind: part_ref(path / kind / "synthetic") for kind in ("aligner", "quantizer", "generator")},  # type: ignore[misc]
        encoders=encoders,
        encoder_identities={"text": text.identity},
        items={m.value: int((modality == m.token).sum()) for m in MODALITIES},
    )
    write_snapshot(path / "snapshots" / name, manifest, {})
    store.move_current(name, store.current())
    return name


def _table(items: int) -> pa.Table:
    numbers = np.arange(items)
    names = np.char.add("item-", numbers.astype(str))
    return pa.table(
        {
            "item_id": names,
            "uri": names,
            "modality": np.array([m.value for m in MODALITIES])[numbers % 3],
            "captions": pa.ListArray.from_arrays(np.arange(items + 1, dtype=np.int32), pa.array(names)),
            "content_hash": pa.array(names),
            "mime": pa.array(np.full(items, "image/png")),
            "start_seconds": pa.nulls(items, pa.float64()),
            "end_seconds": pa.nulls(items, pa.float64()),
            "attributes": np.where(numbers % 2 == 0, '{"parity": "even"}', '{"parity": "odd"}'),
        }
    )
