"""Items below nodes: which nodes hold allowed ones, and the items of a search's leaves."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import LOW, NO_BITMAP, SCORE, any_bit, compiled, inlined, probs_word, uint64_at


@compiled
def mark_parents(children, pointers, parents):
    """Set the bit of every node that has a child whose bit is set.

    Args:
        children, parents: (nodes // 64 + 1,) uint64 bitmaps of two levels, ``parents`` all zero; pointers: first_child.
    """
    for node in range(len(pointers) - 1):
        if any_bit(children, pointers[node], pointers[node + 1]):
            parents[node >> 6] |= np.uint64(1) << np.uint64(node & 63)


@inlined
def blank_from(count, valid, segment, item, item_score, item_levels, item_codes):
    """What a query's items are from the one after the last on."""
    capacity, levels = item_codes.shape
    for blank in range(count, capacity):
        valid[blank] = False
        segment[blank] = item[blank] = 0
        item_score[blank] = -np.inf
        for level in range(levels):
            item_levels[blank, level] = -np.inf
            item_codes[blank, level] = 0


@compiled
def _collect_query(bits, leaves, live, valid, segment, item, item_score, item_levels, item_codes):
    """:func:`collect` for one query: the same arrays without their first axis. Returns the number of items."""
    capacity, levels = item_codes.shape
    segments = len(bits)
    code_at, prob_at = 4 * (LOW + 2 * segments), 2 * probs_word(segments, levels)
    reals, codes, probs = leaves.view(np.float64), leaves.view(np.uint16), leaves.view(np.float32)
    count = 0
    for r in range(live):
        for s in range(segments):
            address = bits[s]
            allowed = uint64_at(address)
            for i in range(leaves[r, LOW + s], leaves[r, LOW + segments + s]):
                if count == capacity:
                    break
                if address == NO_BITMAP or (allowed[i >> 6] >> np.uint64(i & 63)) & np.uint64(1):
                    valid[count] = True
                    segment[count] = s
                    item[count] = i
                    item_score[count] = reals[r, SCORE]
                    for level in range(levels):
                        item_levels[count, level] = probs[r, prob_at + level]
                        item_codes[count, level] = codes[r, code_at + level]
                    count += 1
    blank_from(count, valid, segment, item, item_score, item_levels, item_codes)
    return count


@compiled
def collect(bits, leaves, live, valid, segment, item, item_score, item_levels, item_codes):
    """The allowed items of each query's leaves, in the order of leaf, segment, item, up to C a query. Returns how many
    the query with the most has.

    Args:
        bits: (n or 1, L, S) uint64 addresses of the bitmaps, 0 for all.
        leaves: (n, B, W) complete rows; live: (n,) how many there are.
        valid, segment, item: (n, C) bool and int64 outputs; item_score, item_levels, item_codes: (n, C), (n, C, L),
            their leaf's; after the last item 0, and log-probabilities of -inf.
    """
    most = np.int64(0)
    for q in range(len(live)):
        found = _collect_query(
            bits[q % bits.shape[0], bits.shape[1] - 1], leaves[q], live[q],
            valid[q], segment[q], item[q], item_score[q], item_levels[q], item_codes[q],
        )  # fmt: skip
        most = max(most, found)
    return most
