"""How similar candidates are to the query: one definition for search, for the fit of the ranking and for evaluation, so
that what is measured is what is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ace_core.constraint import ConstraintIndex

# Whoever only looks items up (the server's ingress) needs neither torch nor the compiled loops.
if TYPE_CHECKING:
    from ace_core.candidates import Candidates
    from ace_core.quantize.quantizer import Quantizer

_BLOCK = 65_536  # items whose remainders are unquantised in memory


@dataclass(frozen=True, eq=False)
class Remainders:
    """What their identifiers leave of item vectors, x - x̂, in 8 bits.

    x itself in as many bits would be off by several times as much: a remainder is shorter, so its steps are smaller.

    Attributes:
        steps: (n, D) int8.
        scales: (n,) float32; the remainder of row i is ``steps[i] * scales[i]``.
    """

    steps: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, left: np.ndarray) -> Remainders:
        """Quantise remainders (n, D), each with its own scale."""
        return cls(*_in_bytes(left))

    @property
    def nbytes(self) -> int:
        return self.steps.nbytes + self.scales.nbytes

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Remainders (m, D) float32 of some rows."""
        return self.steps[rows] * self.scales[rows, None]

    def add_products(self, queries: np.ndarray, rows: np.ndarray, chosen: np.ndarray, out: np.ndarray) -> None:
        """Add to ``out`` (n, c) float32 the products of queries (n, D) float32 and rows (n, c), where chosen."""
        _kernels().add_products(queries, *self._addresses, rows, chosen, out)

    @cached_property
    def _addresses(self) -> tuple[np.uint64, np.uint64]:
        return _address(self.steps), _address(self.scales)


class Codewords:
    """All levels' codewords side by side, in 8 bits: a quarter of what a query must read of them.

    They are what identifiers stand for: a remainder is what the rounded codewords leave of an item, so that rounding
    costs nothing where remainders are stored. Where they are not, the product of a query with a codeword w is off by at
    most |q| |w| sqrt(D) / 254, and mostly by far less.

    Args:
        tables: per level (V_l, D) float32.

    Attributes:
        tables: the same, rounded.
    """

    def __init__(self, tables: Sequence[np.ndarray]) -> None:
        self._steps, self._scales = _in_bytes(np.concatenate(tables))
        words = self._steps * self._scales[:, None]
        self.tables = np.split(words, np.cumsum([len(table) for table in tables[:-1]]))

    @cached_property
    def _blocks(self) -> np.ndarray:
        return _kernels().packed(self._steps)

    def rebuilt(self, codes: np.ndarray) -> np.ndarray:
        """Identifiers (n, levels) -> x̂ (n, D) float32, the sums of their codewords."""
        out = self.tables[0][codes[:, 0]]
        for level, table in enumerate(self.tables[1:], start=1):
            out += table[codes[:, level]]
        return out

    def products(self, queries: np.ndarray) -> np.ndarray:
        """(n, sum of V_l) float32 of queries (n, D) float32; a query's are the same in any batch."""
        out = np.empty((len(queries), len(self._scales)), np.float32)
        _kernels().products(queries, self._blocks, self._scales, out)
        return out


@dataclass(frozen=True, eq=False)
class Gallery:
    """The items of one segment as the search path sees them, in identifier order.

    Attributes:
        index: constraint index over the items.
        codes: (items, levels) uint16, sorted.
        stored: what their identifiers leave of them, or None: then an item is what its codes stand for.
    """

    index: ConstraintIndex
    codes: np.ndarray
    stored: Remainders | None = None

    @classmethod
    def build(cls, codes: np.ndarray, quantizer: Quantizer, vectors: np.ndarray | None = None) -> Gallery:
        """Of items with sorted codes (items, levels), and of their vectors (items, D) what is to be stored."""
        index = ConstraintIndex.build(codes, quantizer.vocab_sizes)
        if vectors is None:
            return cls(index, codes)
        blocks = [slice(begin, begin + _BLOCK) for begin in range(0, max(len(codes), 1), _BLOCK)]
        parts = [Remainders.of(vectors[rows] - quantizer.reconstruct(codes[rows])) for rows in blocks]
        steps, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("steps", "scales"))
        return cls(index, codes, Remainders(steps, scales))

    def vectors(self, rows: np.ndarray, quantizer: Quantizer) -> np.ndarray:
        """(m, D) float32 item vectors that similarities are measured with."""
        rebuilt = quantizer.reconstruct(self.codes[rows])
        return rebuilt if self.stored is None else rebuilt + self.stored.rows(rows)


def similarity(
    queries: np.ndarray, candidates: Candidates, galleries: Sequence[Gallery], quantizer: Quantizer
) -> np.ndarray:
    """Inner product of each candidate's item vector with its query: a term a token, and that of the remainder.

    Args:
        queries: (n, D) float32, refined by the generator (:meth:`ace_core.generator.model.Generator.refine`).
        candidates: (n, c) of the search over ``galleries``.

    Returns:
        (n, c) float32; zeros where a candidate is not valid.
    """
    products = quantizer.short_codewords.products(queries)
    tokens = candidates.codes + np.cumsum([0, *quantizer.vocab_sizes[:-1]])
    out = np.take_along_axis(products, tokens.reshape(len(products), -1), 1).reshape(tokens.shape).sum(2)
    out[~candidates.valid] = 0
    for number, gallery in enumerate(galleries):
        if gallery.stored is not None:
            here = candidates.valid & (candidates.segment == number)
            gallery.stored.add_products(queries, candidates.row, here, out)
    return out


@cache
def _kernels() -> ModuleType:
    from ace_core.kernels import similarity

    return similarity


def _in_bytes(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, D) as steps (n, D) int8 and scales (n,) float32."""
    scales = np.maximum(np.abs(vectors).max(axis=1), 1e-12).astype(np.float32) / 127
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales


def _address(array: np.ndarray) -> np.uint64:
    assert array.flags.c_contiguous
    return np.uint64(array.__array_interface__["data"][0])
