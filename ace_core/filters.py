"""Item masks: which items of a segment a search may return.

A filter (a predicate on attributes or modality) and the tombstones of removed items are both a bitmap over the
segment's sorted items. Its running counts say in O(1) whether an interval of items, hence a node of the constraint
index, still holds an allowed one, so that the decoder never walks into a branch that the filter empties. (On a CPU
:class:`~ace_core.walk.Walk` turns the bitmap into one of nodes for each level, which is one look-up instead of two
walks down the tree.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ace_core.errors import QueryError


@dataclass(frozen=True, eq=False)
class ItemMask:
    """Allowed items of one segment: 3/16 byte an item.

    Attributes:
        items: length of the mask.
        words: (items // 64 + 1,) uint64; bit ``i % 64`` of word ``i // 64`` says whether item i is allowed.
        before: (items // 64 + 1,) uint32, allowed items before each word.
    """

    items: int
    words: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, allowed: np.ndarray) -> ItemMask:
        """From (items,) bool over the segment's sorted items."""
        if len(allowed) >= 2**32:
            raise QueryError(f"a segment of {len(allowed)} items", remedy="Publish it as segments below 2^32 items.")
        words = len(allowed) // 64 + 1  # one more than needed, so that rank(items) needs no special case
        packed = np.zeros(words * 8, dtype=np.uint8)
        bits = np.packbits(allowed.astype(bool, copy=False), bitorder="little")
        packed[: len(bits)] = bits
        bitmap = packed.view("<u8")
        running = np.zeros(words, dtype=np.uint32)
        np.cumsum(np.bitwise_count(bitmap[:-1]), out=running[1:])
        return cls(len(allowed), bitmap, running)

    def rank(self, items: np.ndarray) -> np.ndarray:
        """Allowed items before each of ``items`` (int, 0..items): interval [a, b) holds rank(b) - rank(a)."""
        word = items >> 6
        below = (np.uint64(1) << (items & 63).astype(np.uint64)) - np.uint64(1)
        return self.before[word].astype(np.int64) + np.bitwise_count(self.words[word] & below)

    def allows(self, item: int) -> bool:
        """Whether one item is allowed."""
        return bool(int(self.words[item >> 6]) >> (item & 63) & 1)

    def to_bool(self) -> np.ndarray:
        """(items,) bool."""
        return np.unpackbits(self.words.view(np.uint8), count=self.items, bitorder="little").astype(bool)
