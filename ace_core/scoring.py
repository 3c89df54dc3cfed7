"""How similar candidates are to the query: one definition for search, for the fit of the ranking and for evaluation, so
that what is measured is what is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ace_core.constraint import ConstraintIndex

# Whoever only looks items up (the server's ingress) needs neither torch nor the compiled loops.
if TYPE_CHECKING:
    from ace_core.decoding import Candidates
    from ace_core.quantize.quantizer import Quantizer


@dataclass(frozen=True, eq=False)
class StoredVectors:
    """8-bit item vectors.

    Attributes:
        vectors: (n, D) int8.
        scales: (n,) float32; row i stands for ``vectors[i] * scales[i]``.
    """

    vectors: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> StoredVectors:
        """Quantise (n, D) float vectors, each with its own scale."""
        scales = np.maximum(np.abs(x).max(axis=1), 1e-12).astype(np.float32) / 127
        return cls(np.rint(x / scales[:, None]).astype(np.int8), scales)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Vectors (m, D) float32 of some rows."""
        return self.vectors[rows] * self.scales[rows, None]

    def similarities(self, queries: np.ndarray, rows: np.ndarray, chosen: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out`` (n, c) float32 with inner products of queries (n, D) float32 and rows (n, c), where chosen."""
        from ace_core import kernels

        kernels.similarities(queries, *self._addresses, rows, chosen, out)

    @cached_property
    def _addresses(self) -> tuple[np.uint64, np.uint64]:
        return _address(self.vectors), _address(self.scales)


class Codewords:
    """All levels' codewords side by side, in 16 bits: half of what a query must read of them.

    A product is off by at most |q| |w| sqrt(D) / 65534, and what float32 rounds.

    Args:
        tables: per level (V_l, D) float32.
    """

    def __init__(self, tables: Sequence[np.ndarray]) -> None:
        words = np.concatenate(tables)
        self._scales = np.maximum(np.abs(words).max(axis=1), 1e-12).astype(np.float32) / 32767
        self._words = np.rint(words / self._scales[:, None]).astype(np.int16)

    def products(self, queries: np.ndarray) -> np.ndarray:
        """(n, sum of V_l) float32 of queries (n, D) float32; a query's are the same in any batch."""
        from ace_core import kernels

        out = np.empty((len(queries), len(self._words)), np.float32)
        kernels.products(queries, self._words, self._scales, out)
        return out


@dataclass(frozen=True, eq=False)
class Gallery:
    """The items of one segment as the search path sees them, in identifier order.

    Attributes:
        index: constraint index over the items.
        codes: (items, levels) uint16, sorted.
        stored: their vectors, or None: then an item is rebuilt from its codes.
    """

    index: ConstraintIndex
    codes: np.ndarray
    stored: StoredVectors | None = None

    def vectors(self, rows: np.ndarray, quantizer: Quantizer) -> np.ndarray:
        """(m, D) float32 item vectors that similarities are measured with."""
        return quantizer.reconstruct(self.codes[rows]) if self.stored is None else self.stored.rows(rows)


def similarity(
    queries: np.ndarray, candidates: Candidates, galleries: Sequence[Gallery], quantizer: Quantizer
) -> np.ndarray:
    """Inner product of each candidate's item vector with its query.

    Args:
        queries: (n, D) float32, refined by the generator (:meth:`ace_core.generator.model.Generator.refine`).
        candidates: (n, c) of the search over ``galleries``.

    Returns:
        (n, c) float32; zeros where a candidate is not valid.
    """
    out = np.zeros(candidates.valid.shape, np.float32)
    for number, gallery in enumerate(galleries):
        here = candidates.valid & (candidates.segment == number)
        if gallery.stored is not None:
            gallery.stored.similarities(queries, candidates.row, here, out)
            continue
        query, _ = np.nonzero(here)
        if len(query):
            out[here] = np.einsum("nd,nd->n", queries[query], gallery.vectors(candidates.row[here], quantizer))
    return out


def _address(array: np.ndarray) -> np.uint64:
    assert array.flags.c_contiguous
    return np.uint64(array.__array_interface__["data"][0])
