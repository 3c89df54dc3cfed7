"""Items below nodes: which nodes hold allowed ones, and the items of a search's leaves."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import NO_MASK, any_bit, compiled, uint64_at


@compiled
def mark_parents(children, pointers, parents):
    """Set the bit of every node that has a child whose bit is set.

    Args:
        children, parents: (nodes // 64 + 1,) uint64 bitmaps of two levels, ``parents`` all zero; pointers: first_child.
    """
    for node in range(len(pointers) - 1):
        if any_bit(children, pointers[node], pointers[node + 1]):
            parents[node >> 6] |= np.uint64(1) << np.uint64(node & 63)


@compiled
def collect(bits, low, high, score, rows, segment, item, leaf, item_score, found):
    """The allowed items of each query's leaves, in the order of leaf, segment, item, up to C a query.

    Args:
        bits: (n or 1, L, S) uint64 addresses of the bitmaps, 0 for all.
        low, high: (n, B, S) int64 intervals of items; score: (n, B) of the leaves; rows: (n,) live leaves.
        segment, item, leaf: (n, C) int64 outputs; item_score: (n, C) float32, of their leaf; found: (n,) int64, how
            many of each query.
    """
    capacity = item.shape[1]
    for q in range(low.shape[0]):
        count = 0
        for r in range(rows[q]):
            for s in range(low.shape[2]):
                address = bits[q % bits.shape[0], bits.shape[1] - 1, s]
                allowed = uint64_at(address)
                for i in range(low[q, r, s], high[q, r, s]):
                    if count == capacity:
                        break
                    if address == NO_MASK or (allowed[i >> 6] >> np.uint64(i & 63)) & np.uint64(1):
                        segment[q, count] = s
                        item[q, count] = i
                        leaf[q, count] = r
                        item_score[q, count] = score[q, r]
                        count += 1
        found[q] = count
