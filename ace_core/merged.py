"""Segments as one prefix tree, for an accelerator: what is laid out once on the host so that a device needs no branch.

The identifiers of all segments are sorted together, so that a beam row is one interval of nodes, whatever the number of
segments; which items of which segment a row holds is found out on the host, after the search. The last level's nodes
are buckets (distinct identifiers), and all levels have pointers: some 10 bytes an item, three times a
:class:`~ace_core.constraint.ConstraintIndex`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from ace_core import kernels
from ace_core.constraint import ConstraintIndex
from ace_core.filters import ItemMask
from ace_core.identifiers import sort_order


@dataclass(frozen=True, eq=False)
class MergedIndex:
    """The identifiers of S segments, L levels; the N items are numbered through all segments in identifier order.

    Attributes:
        tokens: per level (nodes,) uint8 (uint16 where the level has more than 256 tokens).
        pointers: per level (nodes + 1,) int64: where each node's children begin, of the last level its items.
        positions: per segment the numbers of its items, ascending; None for a single segment, which has them all.
        items: of each segment.
    """

    tokens: tuple[np.ndarray, ...]
    pointers: tuple[np.ndarray, ...]
    positions: tuple[np.ndarray, ...] | None
    items: tuple[int, ...]

    @classmethod
    def of(cls, segments: Sequence[ConstraintIndex]) -> MergedIndex:
        """Merge segments over the same vocabularies; equal identifiers stay in the order of their segments."""
        sizes, items = segments[0].vocab_sizes, [s.items for s in segments]
        codes = np.concatenate([_codes(s) for s in segments])
        positions = None
        if len(segments) > 1:
            order = sort_order(codes, sizes)
            codes = codes[order]
            segment_of = np.repeat(np.arange(len(items)), items)[order]
            positions = tuple(np.flatnonzero(segment_of == number) for number in range(len(items)))
        tokens, pointers = _with_buckets(ConstraintIndex.build(codes, sizes, len(sizes) - 1))
        return cls(tuple(tokens), tuple(pointers), positions, tuple(items))

    @cached_property
    def fan_out(self) -> list[int]:
        """Per level the most children that a node of the level above has; at least 1."""
        widest = [len(self.tokens[0]), *(int(np.diff(p).max(initial=0)) for p in self.pointers[:-1])]
        return [max(1, most) for most in widest]

    def items_between(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Intervals (...) of all items as intervals (..., S) of each segment's items."""
        if self.positions is None:
            return low[..., None], high[..., None]
        both = [np.stack([np.searchsorted(p, at) for p in self.positions], -1) for at in (low, high)]
        return both[0], both[1]

    @cached_property
    def bitmap_offsets(self) -> list[int]:
        """Where the bytes of each of the L levels begin in :meth:`bitmap`, and their number."""
        return list(accumulate((8 * _words(len(tokens)) for tokens in self.tokens), initial=0))

    def bitmap(self, masks: Sequence[ItemMask | None]) -> np.ndarray:
        """Which nodes hold an allowed item, all levels one behind the other: bit ``node % 8`` of byte ``node // 8``.

        Args:
            masks: one for each segment; None allows all its items.
        """
        each = [np.ones(n, bool) if m is None else m.to_bool() for m, n in zip(masks, self.items)]
        allowed = each[0]
        if self.positions is not None:
            allowed = np.empty(sum(self.items), bool)
            for of_segment, positions in zip(each, self.positions):
                allowed[positions] = of_segment
        below, levels = ItemMask.of(allowed).words, []
        for pointers in reversed(self.pointers):
            nodes = np.zeros(_words(len(pointers) - 1), np.uint64)
            kernels.mark_parents(below, pointers, nodes)
            levels.append(below := nodes)
        return np.concatenate(levels[::-1]).view(np.uint8)


def _words(nodes: int) -> int:
    return nodes // 64 + 1


def _codes(index: ConstraintIndex) -> np.ndarray:
    return np.stack([index.spelled(level) for level in range(index.levels)], 1).astype(np.uint16)


def _with_buckets(index: ConstraintIndex) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and int64 pointers of every level, the last one's nodes being distinct identifiers."""
    tokens = [*index.tokens, index.tail[:, 0]]
    pointers = [p.astype(np.int64) for p in index.first_child]
    last = tokens[-1]
    begins = np.ones(len(last), bool)
    begins[1:] = last[1:] != last[:-1]
    if pointers:
        begins[pointers[-1][:-1]] = True  # another parent, another bucket
        numbers = np.append(np.cumsum(begins) - 1, begins.sum())
        pointers[-1] = numbers[pointers[-1]]
    first = np.flatnonzero(begins)
    tokens[-1] = last[first]
    return tokens, [*pointers, np.append(first, len(last))]
