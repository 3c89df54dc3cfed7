"""Features of captions, computed once by the text encoder (frozen, or as `ace fit text` left it) and kept as a part.

The part holds ``texts.json`` (the distinct captions) and ``texts.safetensors``: ``pooled`` float32 (n, E_p), ``hidden``
float16 (n, S, T, E), ``mask`` bool (n, T), written through memory maps so that millions of captions need no memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ace_core.arrays import array_header, map_arrays, save_arrays
from ace_core.config import Settings, TextEncoderSettings
from ace_core.manifest import Manifest, fingerprint
from ace_store import Store
from pipelines.cluster import encoder_pool, ensure_ray, map_rows
from pipelines.progress import Reporter

BATCH = 64


class EncodeTexts:
    """Encodes captions: a plain class over a dictionary of arrays."""

    def __init__(
        self, encoder: TextEncoderSettings, trained: str | None, store: str, *, threads: int, device: str
    ) -> None:
        import torch

        from ace_core.encoders import load_text_encoder

        torch.set_num_threads(threads)
        self._encoder = load_text_encoder(text_encoder_of(encoder, trained, Store.open(store)), device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``row`` (n,) and ``text`` (n,) in; ``row``, ``pooled`` (n, E_p) float32, ``tokens`` (n,) and ``hidden`` (n,)
        out: the float16 bytes of each text's own (S, tokens, E)."""
        features = self._encoder.encode([str(t) for t in batch["text"]])
        tokens = features.mask.sum(1).numpy()
        hidden = features.hidden.numpy().astype(np.float16)
        return {
            "row": batch["row"],
            "pooled": features.pooled.numpy(),
            "tokens": tokens,
            "hidden": np.array([hidden[i, :, :n].tobytes() for i, n in enumerate(tokens)], dtype=object),
        }


@dataclass(frozen=True)
class CaptionFeatures:
    """A texts part opened for reading: arrays as described above, memory-mapped."""

    texts: list[str]
    pooled: np.ndarray
    hidden: np.ndarray
    mask: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> CaptionFeatures:
        arrays = map_arrays(folder / "texts.safetensors")
        texts = json.loads((folder / "texts.json").read_text())
        return cls(texts, arrays["pooled"], arrays["hidden"], arrays["mask"])

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(self.texts)}

    def __contains__(self, text: str) -> bool:
        return text in self._row_of

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) int64 rows of these captions."""
        return np.array([self._row_of[t] for t in texts], np.int64)


def text_encoder_of(encoder: TextEncoderSettings, trained: str | None, store: Store) -> TextEncoderSettings:
    """Settings by which this machine loads the text encoder.

    Args:
        trained: id of the ``text_encoder`` part, where it was trained on the corpus.
    """
    return encoder if trained is None else encoder.in_folder(store.local_copy("text_encoder", trained))


def ensure_texts(texts: Sequence[str], settings: Settings, store: Store, reporter: Reporter) -> Manifest:
    """The texts part of these captions; encoded on Ray unless the store has it."""
    from ace_core.encoders import load_text_encoder

    distinct = sorted(set(texts))
    trained = store.latest("text_encoder").id if settings.text_tuning.layers else None
    identity = load_text_encoder(text_encoder_of(settings.encoders.text, trained, store)).identity
    part_id = fingerprint("texts", identity, distinct)
    manifest = store.find("texts", part_id)
    if manifest is not None:
        return manifest
    with store.making("texts"), store.scratch() as folder:
        part = folder / "part"
        part.mkdir()
        (part / "texts.json").write_text(json.dumps(distinct, ensure_ascii=False))
        with reporter.step("encode captions", len(distinct), "captions") as step:
            spilled = []
            for number, result in enumerate(_encoded(distinct, trained, settings, store)):
                # Lengths are known only at the end, so results wait on disk rather than in memory.
                path = folder / f"{number}.safetensors"
                hidden = np.frombuffer(b"".join(result.pop("hidden")), np.float16)
                save_arrays(path, {**result, "hidden": hidden})
                spilled.append(path)
                step.advance(len(result["row"]))
        _assemble(part / "texts.safetensors", len(distinct), spilled, settings.encoders.text.fusion_layers)
        return store.upload_part(
            part,
            Manifest(
                kind="texts",
                id=part_id,
                inputs={} if trained is None else {"text_encoder": trained},
                settings=settings.encoders.text.model_dump(),
                metrics={"captions": len(distinct), "encoder_identity": identity},
            ),
        )


def _encoded(
    texts: list[str], trained: str | None, settings: Settings, store: Store
) -> Iterator[dict[str, np.ndarray]]:
    ensure_ray(settings.compute)
    pool = encoder_pool(settings.compute, most=-(-len(texts) // BATCH))
    work = pa.table({"row": np.arange(len(texts)), "text": texts})
    kwargs = {"threads": pool.threads, "device": pool.device}
    yield from map_rows(work, EncodeTexts, pool, BATCH, (settings.encoders.text, trained, store.uri), kwargs)


def _assemble(path: Path, count: int, spilled: list[Path], layers: int) -> None:
    """Put the results together in the order of their rows."""
    longest, width, pooled_width = 1, 0, 0
    for part in map(map_arrays, spilled):
        longest = max(longest, int(part["tokens"].max()))
        width = part["hidden"].size // (layers * int(part["tokens"].sum()))
        pooled_width = part["pooled"].shape[1]
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "pooled": ((count, pooled_width), np.float32),
        "hidden": ((count, layers, longest, width), np.float16),
        "mask": ((count, longest), np.bool_),
    }
    arrays = create_arrays(path, shapes)
    for part in map(map_arrays, spilled):
        rows, tokens = part["row"], part["tokens"]
        arrays["pooled"][rows] = part["pooled"]
        arrays["mask"][rows] = np.arange(longest) < tokens[:, None]
        ends = np.cumsum(tokens) * layers * width
        for row, length, end in zip(rows.tolist(), tokens.tolist(), ends.tolist()):
            own = part["hidden"][end - layers * length * width : end].reshape(layers, length, width)
            arrays["hidden"][row, :, :length] = own
    for array in arrays.values():
        array.flush()


def create_arrays(path: Path, shapes: dict[str, tuple[tuple[int, ...], Any]]) -> dict[str, np.memmap]:
    """A new safetensors file of zeros, opened for writing through memory maps.

    Args:
        shapes: name to (shape, dtype).
    """
    header, offsets = array_header(shapes)
    with path.open("wb") as f:
        f.write(header)
        f.truncate(len(header) + sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values()))
    return {name: np.memmap(path, dtype, "r+", offsets[name], shape) for name, (shape, dtype) in shapes.items()}
