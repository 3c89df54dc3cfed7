"""The best identifiers of one segment, where a token's log-probability does not depend on the tokens before it.

Prefixes of the first ``depth`` tokens are expanded level by level; all items below the prefixes that are left are
then looked at, for they lie side by side. What takes the time is waiting for memory: whatever will be read is asked
for one loop before.
"""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import cut_nodes, likely_threshold
from ace_core.kernels.compiled import (
    LOW,
    NO_BITMAP,
    PARENT,
    PRESENT,
    SCORE,
    STRIDE,
    TOKENS,
    WIDE,
    bit_count,
    child_at,
    compiled,
    float32_at,
    inlined,
    prefetch,
    probs_word,
    token_at,
    trailing_zeros,
    uint8_at,
    uint16_at,
    uint64_at,
)
from ace_core.kernels.items import blank_from
from ace_core.kernels.leaves import best_items, identifier_end, workspace
from ace_core.kernels.selection import order_best_first
from ace_core.kernels.vectors import exceeding

_DENSE = 4  # a filter that allows one child of fewer is asked after the scores are compared


@inlined
def _less(bound):
    """A little less than a difference whose rounding could take away what its sum would not."""
    return bound - 1e-12 * (1.0 + abs(bound))


@inlined
def _bit_at(bits, node):
    """Is a node's bit set in the bitmap at an address?"""
    return (uint64_at(bits)[np.uint64(node) >> np.uint64(6)] >> (np.uint64(node) & np.uint64(63))) & np.uint64(1) != 0


@inlined
def _many_allowed(bits, rows, low):
    """Does a filter allow so many of rows' children that what passes is worth comparing before it is asked?"""
    allowed = np.int64(0)
    for r in range(rows):
        allowed += bit_count(uint64_at(bits)[np.uint64(low[r]) >> np.uint64(6)])  # type: ignore[call-arg]
    return allowed * _DENSE > 64 * rows


@compiled
def _present_above(
    threshold, present, rows, nodes, low, base, bits, table, begin, end, keep, node, parent, score, room, scratch
):  # fmt: skip
    """:func:`_best_present` of those above a threshold."""
    best = -np.inf
    for i in range(begin, end):
        best = max(best, table[i])
    size = np.int64(0)
    address, words = np.uint64(table.ctypes.data) + np.uint64(8 * begin), np.uint64((end - begin) >> 6)
    for r in range(rows):
        here = base[r]
        if here + best <= threshold:
            continue
        there = uint64_at(present + np.uint64(nodes[r]) * words * np.uint64(8))
        child = low[r]
        for word in range(words):
            hits = exceeding(address + word * np.uint64(512), _less(threshold - here)) & there[word]  # type: ignore[call-arg]
            while hits != np.uint64(0):
                lowest = hits & (~hits + np.uint64(1))
                node[size], parent[size] = child + bit_count(there[word] & (lowest - np.uint64(1))), r
                score[size] = here + table[np.uint64(begin) + word * np.uint64(64) + np.uint64(trailing_zeros(hits))]
                passes = score[size] > threshold
                if bits != NO_BITMAP:
                    passes &= _bit_at(bits, node[size])
                size += passes
                hits ^= lowest
                if size == room:
                    size, threshold = cut_nodes(node, parent, score, size, keep, scratch)
            child += bit_count(there[word])
    return cut_nodes(node, parent, score, size, keep, scratch)[0]


@compiled
def _best_present(
    address, wide, present, rows, nodes, low, high, base, bits, table, begin, end, keep, node, parent, score, room,
    scratch,
):  # fmt: skip
    """The best ``keep`` children of rows by the bitmaps of which tokens follow them: their nodes, rows and scores.
    Returns how many."""
    if wide:
        likely = likely_threshold(
            uint16_at(address), 1, rows, 1, low, high, base, bits, table, begin, 0, keep, score, room, scratch
        )  # fmt: skip
    else:
        likely = likely_threshold(
            uint8_at(address), 1, rows, 1, low, high, base, bits, table, begin, 0, keep, score, room, scratch
        )  # fmt: skip
    size = _present_above(
        likely, present, rows, nodes, low, base, bits, table, begin, end, keep, node, parent, score, room, scratch
    )  # fmt: skip
    if size < keep and likely > -np.inf:
        size = _present_above(
            -np.inf, present, rows, nodes, low, base, bits, table, begin, end, keep, node, parent, score, room, scratch
        )  # fmt: skip
    return size


@compiled
def _draft_query(
    layout, plan, keep, bits, log_probs, table, node, parent, score, scratch, order, other, low, high, base, work
):  # fmt: skip
    """The nodes and rows of :func:`draft` for one query, at each level, and the order of the last. Returns how many."""
    levels, depth, room = len(layout), plan[0], len(score)
    largest = np.float64(0)
    for i in range(len(table)):
        largest = max(largest, np.float64(log_probs[i]))
    for i in range(len(table)):
        table[i] = np.float64(log_probs[i]) - largest
    widths, offsets = plan[2 : 2 + depth], plan[2 + levels :]
    rows = np.int64(1)  # as a plain 1 it is a type of its own, for which all that is called is compiled once more
    low[0], high[0], base[0] = 0, plan[1], 0.0
    for level in range(depth):
        address, wide, present = np.uint64(layout[level, 0, TOKENS]), layout[level, 0, WIDE], layout[level, 0, PRESENT]
        own_bits = bits[level, 0]
        if present != 0 and (own_bits == NO_BITMAP or _many_allowed(own_bits, rows, low)):
            rows = _best_present(
                address, wide, np.uint64(present), rows, node[level - 1], low, high, base, own_bits, table,
                offsets[level], offsets[level + 1], widths[level], node[level], parent[level], score, room, scratch,
            )  # fmt: skip
        else:
            rows = best_items(
                address, wide, np.int64(1), rows, low, high, base, own_bits, table, offsets[level:],
                widths[level], node[level], parent[level], score, room, scratch, work,
            )  # fmt: skip
        following = np.uint64(layout[level + 1, 0, TOKENS])
        step = np.uint64(layout[level + 1, 0, STRIDE] << layout[level + 1, 0, WIDE])
        for r in range(rows):
            begin, end = child_at(layout, level, 0, node[level, r]), child_at(layout, level, 0, node[level, r] + 1)
            low[r], high[r], base[r] = begin, end, score[r]
            line = following + np.uint64(begin) * step
            prefetch(line)
            if bits[level + 1, 0] != NO_BITMAP:
                prefetch(bits[level + 1, 0] + (np.uint64(begin) >> np.uint64(3)))
            prefetch(line + max(np.uint64(64), np.uint64(16) * step) - np.uint64(1))
    address, wide = np.uint64(layout[depth, 0, TOKENS]), layout[depth, 0, WIDE]
    size = best_items(
        address, wide, levels - depth, rows, low, high, base, bits[levels - 1, 0], table, offsets[depth:], keep,
        node[depth], parent[depth], score, min(4 * keep + 256, room), scratch, work,
    )  # fmt: skip
    order_best_first(score, size, order, other)
    return size


@inlined
def _spell(layout, depth, offsets, table, node, parent, slot, codes, probs):
    """Write the tokens of an identifier, and their log-probabilities, to two addresses."""
    code_at, prob_at = uint16_at(codes), float32_at(probs)
    own, above = node[depth, slot], parent[depth, slot]
    for level in range(len(layout) - 1, -1, -1):
        if level < depth:
            own, above = node[level, above], parent[level, above]
        token = token_at(layout, level, 0, own)
        code_at[level] = token
        prob_at[level] = table[offsets[level] + token]


@inlined
def _room(layout, plan, keep):
    """Arrays for :func:`_draft_query`, from ``table`` on; the last holds what ``work`` is the address of."""
    levels, depth = len(layout), plan[0]
    most = keep
    for level in range(depth):
        most = max(most, plan[2 + level])
    room = 2 * most + 256
    node, parent = np.empty((depth + 1, room), np.int64), np.empty((depth + 1, room), np.int64)
    score, scratch = np.empty(room), np.empty(room)
    order, other = np.empty(room, np.int64), np.empty(room, np.int64)
    low, high, base = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most)
    table = np.empty(plan[2 + 2 * levels])
    return table, node, parent, score, scratch, order, other, low, high, base, workspace(np.uint64(2 * levels))


@compiled
def draft(layout, plan, bits, log_probs, done, done_live):
    """The best identifiers of one segment, for every query.

    What :func:`~ace_core.kernels.expand.expand` and :func:`~ace_core.kernels.complete.complete` find together, in a
    fraction of their time, for a row is one node here.

    Args (as in :func:`~ace_core.kernels.complete.complete`, with S = 1, and):
        plan: (2 + L + L + 1,) int64: depth, the number of levels with pointers; how many nodes the first level has;
            prefixes kept at each level; where each level's tokens begin in ``log_probs``, and where the last ends.
    """
    levels, depth, keep = len(layout), plan[0], np.int64(done.shape[1])
    offsets, tail = plan[2 + levels :], layout[depth, 0]
    table, node, parent, score, scratch, order, other, low, high, base, held = _room(layout, plan, keep)
    reals = done.view(np.float64)
    for q in range(len(done)):
        size = _draft_query(
            layout, plan, keep, bits[q % bits.shape[0]], log_probs[q], table, node, parent, score, scratch, order,
            other, low, high, base, np.uint64(held.ctypes.data),
        )  # fmt: skip
        done_live[q] = size
        for at in range(size):
            slot, row = order[at], np.uint64(done.ctypes.data) + np.uint64(8 * (q * keep + at) * done.shape[2])
            item, r = node[depth, slot], parent[depth, slot]
            reals[q, at, SCORE], done[q, at, PARENT], done[q, at, LOW] = score[slot], r, item
            done[q, at, LOW + 1] = identifier_end(
                np.uint64(tail[TOKENS]), np.uint64(tail[STRIDE] << tail[WIDE]), item, high[r]
            )
            _spell(
                layout, depth, offsets, table, node, parent, slot, row + np.uint64(8 * (LOW + 2)),
                row + np.uint64(8 * probs_word(1, levels)),
            )  # fmt: skip
        done[q, size:] = 0


@compiled
def draft_items(layout, plan, keep, bits, log_probs, valid, segment, item, item_score, item_levels, item_codes):
    """:func:`draft` of ``keep`` identifiers, and :func:`~ace_core.kernels.items.collect` of their items."""
    levels, depth, most = len(layout), plan[0], np.int64(0)
    offsets, tail = plan[2 + levels :], layout[depth, 0]
    table, node, parent, score, scratch, order, other, low, high, base, held = _room(layout, plan, keep)
    capacity = item.shape[1]
    for q in range(len(item)):
        own_bits = bits[q % bits.shape[0]]
        size = _draft_query(
            layout, plan, keep, own_bits, log_probs[q], table, node, parent, score, scratch, order,
            other, low, high, base, np.uint64(held.ctypes.data),
        )  # fmt: skip
        mask, count = own_bits[levels - 1, 0], np.int64(0)
        for at in range(size):
            slot = order[at]
            begin = node[depth, slot]
            end = identifier_end(
                np.uint64(tail[TOKENS]), np.uint64(tail[STRIDE] << tail[WIDE]), begin, high[parent[depth, slot]]
            )
            for i in range(begin, end):
                if count < capacity and (mask == NO_BITMAP or _bit_at(mask, i)):
                    valid[q, count], segment[q, count], item[q, count], item_score[q, count] = True, 0, i, score[slot]
                    token = np.uint64((q * capacity + count) * levels)
                    _spell(
                        layout, depth, offsets, table, node, parent, slot,
                        np.uint64(item_codes.ctypes.data) + np.uint64(2) * token,
                        np.uint64(item_levels.ctypes.data) + np.uint64(4) * token,
                    )  # fmt: skip
                    count += 1
        blank_from(count, valid[q], segment[q], item[q], item_score[q], item_levels[q], item_codes[q])
        most = max(most, count)
    return most
