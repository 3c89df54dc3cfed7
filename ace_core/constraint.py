"""The constraint index: the prefix tree of a corpus's identifiers as flat arrays.

The nodes of level ``l`` are the distinct prefixes of length ``l + 1``, numbered in sorted order; ``tokens[l][node]`` is
the prefix's last token, ``first_child[l][node] : first_child[l][node + 1]`` are its children at level ``l + 1``. Only
the first levels are kept so (level CSR): where few items share a prefix, pointers would take more room than the items'
remaining tokens, and following them more time than reading those. From level ``depth`` on the nodes are the items
themselves: ``tail[item]`` holds an item's remaining tokens, and a child is a run of items with equal tokens. Every node
is an interval of the sorted items. About 3.4 bytes an item for five levels of 256 codes at a million items (a dict
trie: some 500).
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
_SHARE = 16  # items that may share a prefix before it is worth pointers


def pointer_levels(vocab_sizes: Sequence[int], items: int) -> int:
    """Levels whose nodes have pointers, in an index of so many items: as few as tell ``items / 16`` prefixes apart."""
    prefixes = 1
    for level, size in enumerate(vocab_sizes[:-1]):
        if prefixes * _SHARE >= items:
            return level
        prefixes *= size
    return len(vocab_sizes) - 1


@dataclass(frozen=True, eq=False)
class ConstraintIndex:
    """The identifiers that exist.

    Attributes:
        vocab_sizes: tokens of each level; the first counts the modalities.
        tokens: per level with pointers (nodes,) uint8 (uint16 where the level has more than 256 tokens).
        first_child: per level with pointers (nodes + 1,) int32 (int64 past 2^31 nodes).
        tail: (items, levels - depth) uint8 (uint16 where one of these levels has more than 256 tokens).
    """

    vocab_sizes: tuple[int, ...]
    tokens: tuple[np.ndarray, ...]
    first_child: tuple[np.ndarray, ...]
    tail: np.ndarray

    @classmethod
    def build(cls, codes: np.ndarray, vocab_sizes: Sequence[int], depth: int | None = None) -> ConstraintIndex:
        """Build from identifiers in :func:`~ace_core.identifiers.sort_order`.

        Args:
            codes: (items, levels) uint16, sorted lexicographically; may be empty.
            vocab_sizes: tokens of each level.
            depth: levels with pointers, at most levels - 1; by default as :func:`pointer_levels` says.

        Raises:
            StoreError: identifiers out of order, or out of their vocabulary.
        """
        check_identifiers(codes, vocab_sizes)
        items, levels = codes.shape
        depth = pointer_levels(vocab_sizes, items) if depth is None else depth
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
            if level > depth:
                continue
            if above is not None:
                # the child that starts where the parent starts: its number is the count of starts before it
                numbers = np.cumsum(starts_node, dtype=np.int64) - 1 if level < depth else np.arange(items)
                count = int(numbers[-1]) + 1 if items else 0
                pointer = np.int32 if count <= _INT32_MAX else np.int64
                first_child.append(np.append(numbers[above], count).astype(pointer))
            if level < depth:
                above = np.flatnonzero(starts_node)
                tokens.append(column[above].astype(_token_type(vocab_sizes[level : level + 1])))
        tail: np.ndarray = np.ascontiguousarray(codes[:, depth:], _token_type(vocab_sizes[depth:]))
        return cls(tuple(int(v) for v in vocab_sizes), tuple(tokens), tuple(first_child), tail)

    @property
    def depth(self) -> int:
        """Levels with pointers."""
        return len(self.tokens)

    @property
    def levels(self) -> int:
        return len(self.vocab_sizes)

    @property
    def items(self) -> int:
        return len(self.tail)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in (*self.tokens, *self.first_child, self.tail))

    def level_tokens(self, level: int) -> np.ndarray:
        """(nodes,) last token of each node of a level; (items,), not contiguous, from ``depth`` on."""
        return self.tokens[level] if level < self.depth else self.tail[:, level - self.depth]

    def items_of(self, level: int, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The half-open intervals of sorted items below nodes [low, high) of one level; a gather a level."""
        for pointers in self.first_child[level:]:
            low, high = pointers[low], pointers[high]
        return low, high

    def spelled(self, level: int) -> np.ndarray:
        """(items,) token of every item at a level, as the walk from the root to the item passes it."""
        tokens = self.level_tokens(level)
        nodes = np.arange(len(tokens) + 1)
        starts, _ = self.items_of(level, nodes, nodes)
        return np.repeat(tokens, np.diff(starts))

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        arrays = {f"tokens_{level}": a for level, a in enumerate(self.tokens)}
        arrays |= {f"first_child_{level}": a for level, a in enumerate(self.first_child)}
        save_arrays(path, arrays | {"tail": self.tail, "vocab_sizes": np.array(self.vocab_sizes, dtype=np.int64)})

    @classmethod
    def load(cls, path: Path) -> ConstraintIndex:
        """Memory-map what :meth:`save` wrote.

        Raises:
            StoreError: the file is missing, is not safetensors, or its arrays do not form an index.
        """
        arrays = map_arrays(path)
        try:
            sizes = tuple(int(v) for v in arrays["vocab_sizes"])
            depth = sum(name.startswith("first_child_") for name in arrays)
            tokens = tuple(arrays[f"tokens_{level}"] for level in range(depth))
            first_child = tuple(arrays[f"first_child_{level}"] for level in range(depth))
            # before there were tails, all levels but the last had pointers
            tail = arrays["tail"] if "tail" in arrays else arrays[f"tokens_{depth}"][:, None]
        except KeyError as e:
            raise StoreError(f"the array {e} is missing", where=path, remedy="Publish again.") from None
        if tail.ndim != 2 or depth + tail.shape[1] != len(sizes):
            raise StoreError(
                f"{depth} levels with pointers and a tail of shape {tail.shape} for {len(sizes)} levels",
                where=path,
                remedy="Publish again.",
            )
        index = cls(sizes, tokens, first_child, tail)
        for level in range(len(sizes)):
            token = index.level_tokens(level)
            if token.dtype != _token_type(sizes[level : level + 1] if level < depth else sizes[depth:]):
                raise StoreError(
                    f"tokens of level {level} are {token.dtype} for {sizes[level]} tokens",
                    where=path,
                    remedy="Publish again.",
                )
        for level, pointers in enumerate(first_child):
            # the kernels follow these without bounds checks: an index that points outside is refused here
            ends = (int(pointers[0]), int(pointers[-1])) if len(pointers) else None
            if (
                len(pointers) != len(tokens[level]) + 1
                or ends != (0, len(index.level_tokens(level + 1)))
                or pointers.dtype not in (np.int32, np.int64)
            ):
                raise StoreError(f"level {level} does not fit level {level + 1}", where=path, remedy="Publish again.")
        return index


def _token_type(sizes: Sequence[int]) -> type:
    return np.uint8 if max(sizes) <= 256 else np.uint16
