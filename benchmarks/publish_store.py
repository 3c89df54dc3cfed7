"""A store that is ready to publish, of any size: features in shards as ``ace ingest`` writes them, models that were
fitted to a part of them. The vectors are synthetic; every other column is of the size that real ones have."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ace_core.aligner import Aligner
from ace_core.config import AlignerSettings, EncoderSettings, GeneratorSettings, LimitSettings, QuantizerSettings
from ace_core.encoders import TextEncoder, load_text_encoder
from ace_core.features import ITEM_SCHEMA, with_embeddings
from ace_core.generator.model import Generator
from ace_core.items import Modality
from ace_core.manifest import Manifest
from ace_core.quantize.fit import fit_quantizer
from ace_core.ranking import Ranker
from ace_core.retriever import RANKING_NAME
from ace_store import Store
from pipelines.shards import PartWriter
from pipelines.texts import create_arrays

WIDTH = 64  # of the raw features; everything behind the aligner's first layer is of its real size
SHARD = 2048  # corpus.shard_items
_CENTRES = 20_000
_FITTED = 20_000
_CAPTIONS = 20_000
_ID = "synthetic"
_COLOURS = ("red", "orange", "yellow", "green", "blue", "violet", "black", "white")


@cache
def _centres() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((_CENTRES, WIDTH), np.float32)


def embeddings(first: int, count: int) -> np.ndarray:
    """Clustered unit vectors (count, WIDTH) float32 of items first .. first + count; ``first`` begins a shard."""
    rng = np.random.default_rng(first + 1)
    x = _centres()[rng.integers(0, _CENTRES, count)] + 0.7 * rng.standard_normal((count, WIDTH), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def items(first: int, count: int) -> pa.Table:
    """Rows of ``ITEM_SCHEMA``: one caption and three attributes an item."""
    rng = np.random.default_rng(first)
    numbers = np.arange(first, first + count)
    width, stars = _text(rng.integers(64, 4096, count)), _text(rng.integers(0, 500, count) / 100)
    colours = pa.array(np.array(_COLOURS)[numbers % 8])
    names = _joined("images/", _text(numbers // 1000), "/", pc.utf8_lpad(_text(numbers), 8, "0"), ".jpg")
    captions = _joined("a ", colours, " thing that has the number ", _text(numbers))
    columns = {
        "item_id": names,
        "uri": names,
        "modality": pa.array(["image"] * count),
        "captions": pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32), captions),
        "attributes": _joined('{"colour": "', colours, '", "width": ', width, ', "rating": ', stars, "}"),
        "content_hash": pa.array(rng.bytes(16 * count).hex(" ", -16).split()),
        "mime": pa.array(["image/jpeg"] * count),
        "start_seconds": pa.nulls(count, pa.float64()),
        "end_seconds": pa.nulls(count, pa.float64()),
        "stamp": _joined(width, "-1700000000"),
    }
    return pa.table(columns, schema=ITEM_SCHEMA)


def _text(numbers: np.ndarray) -> pa.Array:
    return pc.cast(pa.array(numbers), pa.string())


def _joined(*parts: pa.Array | str) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


def caption(number: int) -> str:
    """The caption of an item."""
    return f"a {_COLOURS[number % 8]} thing that has the number {number}"


def _bank(count: int, dim: int) -> torch.Tensor:
    """Random queries (count, dim) float16 with the spectrum that Flickr8k's captions have in an aligned space: half of
    their squared length in 16 directions, 95 % in 64, 98 % in 96."""
    draw = torch.randn(count, dim) * torch.exp(-torch.arange(dim) / 44)
    return torch.nn.functional.normalize(draw, dim=-1).half()


def build(path: Path, count: int) -> Store:
    """Write the store."""
    store = Store.open(path)
    torch.manual_seed(0)
    text = load_text_encoder(EncoderSettings().text)
    aligner = Aligner(text.dim, {Modality.IMAGE: WIDTH}, AlignerSettings()).eval()
    aligner.bank = _bank(aligner.settings.bank, aligner.dim - 1)
    some = np.concatenate([embeddings(first, SHARD) for first in range(0, _FITTED, SHARD)])
    x = aligner.item_vectors({Modality.IMAGE: some})
    quantizer, metrics = fit_quantizer(x, np.zeros(len(x), np.int64), QuantizerSettings(epochs=0, kmeans_iterations=5))
    health = quantizer.health(quantizer.assign(x, np.zeros(len(x), np.int64)), x)
    _features(store, count)
    _texts(store, text, min(_CAPTIONS, count))
    with store.scratch() as folder:
        for kind in ("aligner", "quantizer", "generator"):
            (folder / kind).mkdir()
        aligner.save(folder / "aligner")
        quantizer.save(folder / "quantizer")
        Generator(GeneratorSettings(), quantizer, text.width, text.layers).eval().save(folder / "generator")
        Ranker(generator=1.0, similarity=5.0).save(folder / "generator" / RANKING_NAME)
        made_from = {"features": _ID, "texts": _ID}
        store.upload_part(folder / "aligner", Manifest(kind="aligner", id=_ID, inputs=made_from))
        inputs = {**made_from, "aligner": _ID}
        figures = {"items": len(x), "health": health.as_dict(), **metrics}
        store.upload_part(folder / "quantizer", Manifest(kind="quantizer", id=_ID, inputs=inputs, metrics=figures))
        inputs = {**inputs, "quantizer": _ID}
        settings = {"vectors": "int8"}
        store.upload_part(folder / "generator", Manifest(kind="generator", id=_ID, inputs=inputs, settings=settings))
    store.set_latest("generator", _ID)
    return store


def _features(store: Store, count: int) -> None:
    writer = PartWriter(store, _ID, SHARD, 60)
    for first in range(0, count, SHARD):
        rows = min(SHARD, count - first)
        table = with_embeddings(items(first, rows), embeddings(first, rows))
        writer.commit(Modality.IMAGE, "synthetic", [table], [], 0)
    store.seal_part(
        Manifest(
            kind="features",
            id=_ID,
            settings={
                "corpus_root": "synthetic",
                "encoders": EncoderSettings().model_dump(),
                "limits": LimitSettings().model_dump(),
            },
            metrics={"items": {"image": count}, "encoder_identities": {"image": "synthetic"}},
            files={name: entry for shard in writer.shards for name, entry in shard.files.items()},
        )
    )
    store.set_latest("features", _ID)


def _texts(store: Store, text: TextEncoder, count: int) -> None:
    """The captions that the models know: those of the first items."""
    with store.scratch() as folder:
        part = folder / "part"
        part.mkdir()
        (part / "texts.json").write_text(json.dumps([caption(n) for n in range(count)]))
        shapes = {
            "pooled": ((count, text.dim), np.float32),
            "hidden": ((count, 1, 1, 1), np.float16),
            "mask": ((count, 1), np.bool_),
        }
        arrays = create_arrays(part / "texts.safetensors", shapes)
        arrays["pooled"][:] = np.random.default_rng(0).standard_normal((count, text.dim), np.float32)
        arrays["pooled"].flush()
        settings = EncoderSettings().text.model_dump()
        figures = {"captions": count, "encoder_identity": text.identity}
        store.upload_part(part, Manifest(kind="texts", id=_ID, settings=settings, metrics=figures))
