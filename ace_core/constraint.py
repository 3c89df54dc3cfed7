"""The constraint index: the prefix tree of a corpus's identifiers as flat arrays.

Level CSR. The nodes of level ``l`` are the distinct prefixes of length ``l + 1``, numbered in sorted order;
``tokens[l][node]`` is the prefix's last token, ``first_child[l][node] : first_child[l][node + 1]`` are its
children at level ``l + 1``. The nodes of the *last* level are the items themselves (equal identifiers repeat), so
that level needs no pointers, and the item interval of any node is found by following ``first_child`` down: every
node is an interval of the sorted items. About 10 bytes an item for five levels of 256 codes at a million items
(a dict trie: some 500).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ace_core.arrays import map_arrays, save_arrays
from ace_core.errors import StoreError
from ace_core.identifiers import check_identifiers

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class ConstraintIndex:
    """The identifiers that exist.

    Attributes:
        vocab_sizes: tokens of each level; the first counts the modalities.
        tokens: per level (nodes,) uint8 (uint16 where the level has more than 256 tokens).
        first_child: per level but the last (nodes + 1,) int32 (int64 past 2^31 nodes).
    """

    vocab_sizes: tuple[int, ...]
    tokens: tuple[np.ndarray, ...]
    first_child: tuple[np.ndarray, ...]

    @classmethod
    def build(cls, codes: np.ndarray, vocab_sizes: Sequence[int]) -> ConstraintIndex:
        """Build from identifiers in :func:`~ace_core.identifiers.sort_order`.

        Args:
            codes: (items, levels) uint16, sorted lexicographically; may be empty.
            vocab_sizes: tokens of each level.

        Raises:
            StoreError: identifiers out of order, or out of their vocabulary.
        """
        check_identifiers(codes, vocab_sizes)
        items, levels = codes.shape
        starts_node = np.zeros(items, dtype=bool)  # does the prefix of length l + 1 begin at this item?
        if items:
            starts_node[0] = True
        tokens: list[np.ndarray] = []
        first_child: list[np.ndarray] = []
        above: np.ndarray | None = None  # items at which the level above begins its nodes
        for level in range(levels):
            column = codes[:, level]
            rises = column[1:] > column[:-1]
            falls = column[1:] < column[:-1]
            if bool((falls & ~starts_node[1:]).any()):
                raise StoreError("identifiers are not sorted", remedy="Sort them by identifiers.sort_order first.")
            starts_node[1:] |= rises | falls
            if level == levels - 1:
                starts_node[:] = True
            if above is not None:
                # the child that starts where the parent starts: its number is the count of starts before it
                numbers = np.cumsum(starts_node, dtype=np.int64) - 1
                count = int(numbers[-1]) + 1 if items else 0
                pointer = np.int32 if count <= _INT32_MAX else np.int64
                first_child.append(np.append(numbers[above], count).astype(pointer))
            above = np.flatnonzero(starts_node)
            narrow = np.uint8 if vocab_sizes[level] <= 256 else np.uint16
            tokens.append(column[above].astype(narrow))
        return cls(tuple(int(v) for v in vocab_sizes), tuple(tokens), tuple(first_child))

    @property
    def levels(self) -> int:
        return len(self.vocab_sizes)

    @property
    def items(self) -> int:
        return len(self.tokens[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in (*self.tokens, *self.first_child))

    def items_of(self, level: int, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The half-open intervals of sorted items below nodes [low, high) of one level; a gather a level."""
        for pointers in self.first_child[level:]:
            low, high = pointers[low], pointers[high]
        return low, high

    def spelled(self, level: int) -> np.ndarray:
        """(items,) token of every item at a level, as the walk from the root to the item passes it."""
        nodes = np.arange(len(self.tokens[level]) + 1)
        starts, _ = self.items_of(level, nodes, nodes)
        return np.repeat(self.tokens[level], np.diff(starts))

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        arrays = {f"tokens_{level}": a for level, a in enumerate(self.tokens)}
        arrays |= {f"first_child_{level}": a for level, a in enumerate(self.first_child)}
        save_arrays(path, arrays | {"vocab_sizes": np.array(self.vocab_sizes, dtype=np.int64)})

    @classmethod
    def load(cls, path: Path) -> ConstraintIndex:
        """Memory-map what :meth:`save` wrote.

        Raises:
            StoreError: the file is missing, is not safetensors, or its arrays do not form an index.
        """
        arrays = map_arrays(path)
        try:
            sizes = tuple(int(v) for v in arrays["vocab_sizes"])
            tokens = tuple(arrays[f"tokens_{level}"] for level in range(len(sizes)))
            first_child = tuple(arrays[f"first_child_{level}"] for level in range(len(sizes) - 1))
        except KeyError as e:
            raise StoreError(f"the array {e} is missing", where=path, remedy="Publish again.") from None
        for level, (size, token) in enumerate(zip(sizes, tokens)):
            if token.dtype != (np.uint8 if size <= 256 else np.uint16):
                raise StoreError(
                    f"tokens of level {level} are {token.dtype} for {size} tokens", where=path, remedy="Publish again."
                )
        for level, pointers in enumerate(first_child):
            # the kernels follow these without bounds checks: an index that points outside is refused here
            ends = (int(pointers[0]), int(pointers[-1])) if len(pointers) else None
            if (
                len(pointers) != len(tokens[level]) + 1
                or ends != (0, len(tokens[level + 1]))
                or pointers.dtype not in (np.int32, np.int64)
            ):
                raise StoreError(f"level {level} does not fit level {level + 1}", where=path, remedy="Publish again.")
        return cls(sizes, tokens, first_child)
