"""What the ranker needs to know of candidates: their similarity to the query, and how much they attract queries.

One definition, used by search, by the fit of the ranking and by evaluation, so that what is measured is what is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ace_core.constraint import ConstraintIndex
from ace_core.decoding import Candidates
from ace_core.quantize.quantizer import Quantizer


@dataclass(frozen=True, eq=False)
class Gallery:
    """The items of one segment as the search path sees them, in identifier order.

    Attributes:
        index: constraint index over the items.
        codes: (items, levels) uint16, sorted.
        vectors: (items, D) int8 stored vectors, or None: then an item is rebuilt from its codes.
        priors: (items,) float, see :func:`ace_core.ranking.item_prior`; None for none.
    """

    index: ConstraintIndex
    codes: np.ndarray
    vectors: np.ndarray | None = None
    priors: np.ndarray | None = None


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of (..., D) at length one (zero rows stay zero)."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def item_vectors(quantizer: Quantizer, codes: np.ndarray, stored: np.ndarray | None) -> np.ndarray:
    """(n, D) float32 unit vectors that similarities are measured with.

    Args:
        codes: (n, levels) identifiers, used where nothing is stored.
        stored: (n, D) int8 vectors, or None. Their scale does not matter here.
    """
    return unit(quantizer.reconstruct(codes) if stored is None else stored.astype(np.float32)).astype(np.float32)


def similarity_and_prior(
    queries: np.ndarray, candidates: Candidates, galleries: Sequence[Gallery], quantizer: Quantizer
) -> tuple[np.ndarray, np.ndarray | None]:
    """Cosine similarity of each candidate with its query, and its prior.

    Args:
        queries: (n, D) float32 unit vectors (refined by the generator).
        candidates: (n, c) of the search over ``galleries``.

    Returns:
        similarity (n, c) float32 and prior (n, c) float32 (None when no gallery has priors); zeros where invalid.
    """
    shape = candidates.valid.shape
    similarity = np.zeros(shape, np.float32)
    has_priors = any(g.priors is not None for g in galleries)
    prior = np.zeros(shape, np.float32) if has_priors else None
    for number, gallery in enumerate(galleries):
        here = candidates.valid & (candidates.segment == number)
        query, _ = np.nonzero(here)
        if not len(query):
            continue
        rows = candidates.row[here]
        stored = None if gallery.vectors is None else gallery.vectors[rows]
        vectors = item_vectors(quantizer, candidates.codes[here], stored)
        similarity[here] = np.einsum("nd,nd->n", queries[query], vectors)
        if prior is not None and gallery.priors is not None:
            prior[here] = gallery.priors[rows]
    return similarity, prior
