"""Clustered vectors and their identifiers, for benchmarks: many or few, the same for the same seed.

Items are points of a mixture in a space of few intrinsic dimensions (as embeddings are), mapped into D dimensions.
Identifiers are (modality, coarse, fine_1 .. fine_4) by residual k-means, fitted to a sample, and sought for every item
as the product seeks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from ace_core.arrays import map_arrays, save_arrays
from ace_core.config import QuantizerSettings
from ace_core.identifiers import sort_order
from ace_core.quantize.quantizer import Quantizer
from ace_core.scoring import Codewords

_CHUNK = 50_000


@dataclass(frozen=True)
class World:
    """A distribution of items.

    Attributes:
        dim: D; intrinsic: dimensions that the items vary in; clusters: components of the mixture.
        spread: standard deviation inside a component, where components are 1 apart.
    """

    dim: int = 384
    intrinsic: int = 16
    clusters: int = 20_000
    spread: float = 0.15
    seed: int = 0

    def vectors(self, items: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunks of (vectors (m, D) float32 of unit norm, modality tokens (m,))."""
        rng = np.random.default_rng(self.seed)
        basis = rng.standard_normal((self.intrinsic, self.dim), np.float32)
        top = rng.standard_normal((64, self.intrinsic), np.float32)
        centres = top[rng.integers(0, 64, self.clusters)]
        centres = centres + 0.6 * rng.standard_normal(centres.shape, np.float32)
        modality_of_centre = rng.integers(0, 3, self.clusters)
        for begin in range(0, items, _CHUNK):
            chosen = rng.integers(0, self.clusters, min(_CHUNK, items - begin))
            z = centres[chosen] + self.spread * rng.standard_normal((len(chosen), self.intrinsic), np.float32)
            x = z @ basis
            yield x / np.linalg.norm(x, axis=1, keepdims=True), modality_of_centre[chosen]

    def matrix(self, items: int) -> np.ndarray:
        """(items, D) float32: all vectors at once."""
        return np.concatenate([x for x, _ in self.vectors(items)])


def queries_near(x: np.ndarray, count: int, noise: float = 0.3, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Queries beside random items: (count, D) float32 of unit norm, and the items' rows."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(x), count)
    q = x[rows] + noise / x.shape[1] ** 0.5 * rng.standard_normal((count, x.shape[1]), np.float32)
    return (q / np.linalg.norm(q, axis=1, keepdims=True)).astype(np.float32), rows


@dataclass(frozen=True)
class Codes:
    """Codebooks, and the sorted identifiers of a corpus.

    Attributes:
        codewords: per level (V_l, D) float32; the modality's first.
        codes: (items, levels) uint16, sorted; order: (items,) the item of each row.
    """

    codewords: tuple[np.ndarray, ...]
    codes: np.ndarray
    order: np.ndarray

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        return tuple(len(table) for table in self.codewords)

    def left(self, x: np.ndarray) -> np.ndarray:
        """(items, D) float32: what the identifiers leave of items' vectors, by row."""
        left, words = x[self.order], Codewords(self.codewords)
        for begin in range(0, len(left), _CHUNK):
            rows = slice(begin, begin + _CHUNK)
            left[rows] -= words.rebuilt(self.codes[rows])
        return left

    def tables(self, queries: np.ndarray, scale: float = 50.0) -> list[np.ndarray]:
        """Per level (n, V_l) float32 log-probabilities: the softmax of scale * q . codeword, as a fresh generator's
        heads give them; their sum ranks items as q . x̂ does."""
        out = []
        for table in self.codewords:
            logits = scale * (queries @ table.T)
            top = logits.max(1, keepdims=True)
            out.append(logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True)))
        return out


def quantizer_of(codewords: Sequence[np.ndarray], beam: int = 1) -> Quantizer:
    """The quantizer of these codewords, per level (V_l, D), whose latent space is that of the items."""
    same = np.eye(codewords[0].shape[1], dtype=np.float32)
    return Quantizer(codewords[0], same, codewords[1], same, tuple(codewords[2:]), tuple(codewords[1:]), beam)


def coded(world: World, items: int, *, levels: int = 5, codes: int = 256, cache: Path | None = None) -> Codes:
    """Fit codebooks to a sample of the world and code its first ``items``.

    Args:
        levels: tokens after the modality; codes: vocabulary of each.
        cache: folder that keeps the result for the next run.
    """
    beam = QuantizerSettings().beam
    name = f"codes-{world.dim}-{world.clusters}-{items}-{levels}x{codes}-beam-{beam}-{world.seed}.safetensors"
    path = cache and cache / name
    if path and path.exists():
        arrays = map_arrays(path)
        return Codes(
            tuple(arrays[f"codewords_{level}"] for level in range(levels + 1)),
            np.array(arrays["codes"]), np.array(arrays["order"]),
        )  # fmt: skip
    sample, modality = (np.concatenate(parts) for parts in zip(*world.vectors(min(items, 50_000))))
    means = np.stack([sample[modality == m].mean(0) for m in range(3)]).astype(np.float32)
    left = sample - means[modality]
    tables = [means]
    for level in range(levels):
        kmeans = faiss.Kmeans(world.dim, codes, niter=6, seed=level, max_points_per_centroid=100, verbose=False)
        kmeans.train(left)
        tables.append(np.array(kmeans.centroids))
        index = faiss.IndexFlatL2(world.dim)
        index.add(tables[-1])
        left = left - tables[-1][index.search(left, 1)[1][:, 0]]
    quantizer = quantizer_of(tables, beam)
    out = np.empty((items, levels + 1), np.uint16)
    begin = 0
    for x, modality in world.vectors(items):
        out[begin : begin + len(x)] = quantizer.assign(x, modality)
        begin += len(x)
    order = sort_order(out, [len(t) for t in tables])
    result = Codes(tuple(tables), out[order], order)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"codewords_{level}": table for level, table in enumerate(tables)}
        save_arrays(path, arrays | {"codes": result.codes, "order": order})
    return result
