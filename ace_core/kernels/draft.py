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
    bits_end,
    child_at,
    compiled,
    exceeding,
    inlined,
    next_bit,
    prefetch,
    probs_word,
    row_words,
    token_at,
    trailing_zeros,
    uint8_at,
    uint16_at,
    uint64_at,
)
from ace_core.kernels.items import collect_query
from ace_core.kernels.leaves import best_items, identifier_end
from ace_core.kernels.selection import order_best_first

_CHUNK = 16384  # items that are looked at together


@compiled
def _best_children(
    tokens, present, rows, nodes, low, high, base, bits, table, keep, node, parent, score, scratch, order, other
):  # fmt: skip
    """The best ``keep`` allowed children of rows: their nodes, rows and scores. Returns how many."""
    best = -np.inf
    for i in range(len(table)):
        best = max(best, table[i])
    order_best_first(base, rows, order, other)  # so that the threshold rises at once
    likely = likely_threshold(tokens, 1, rows, 1, low, high, base, bits, table, 0, 0, keep, score, len(score), scratch)
    size = _children_above(
        likely, best, tokens, present, rows, nodes, low, high, base, bits, table, keep, node, parent, score, scratch,
        order,
    )  # fmt: skip
    if size < keep and likely > -np.inf:
        size = _children_above(
            -np.inf, best, tokens, present, rows, nodes, low, high, base, bits, table, keep, node, parent, score,
            scratch, order,
        )  # fmt: skip
    return size


@inlined
def _less(bound):
    """A little less than a difference whose rounding could take away what its sum would not."""
    return bound - 1e-12 * (1.0 + abs(bound))


@compiled
def _children_above(
    threshold, best, tokens, present, rows, nodes, low, high, base, bits, table, keep, node, parent, score, scratch,
    order,
):  # fmt: skip
    """:func:`_best_children` of those above a threshold."""
    allowed = uint64_at(bits)
    size = 0
    address, words = np.uint64(table.ctypes.data), np.uint64(len(table) >> 6)
    by_bitmap = present != NO_BITMAP and bits == NO_BITMAP  # under a filter few of what it compares may be left
    for ordinal in range(rows):
        r = order[ordinal]
        here = base[r]
        if here + best <= threshold:
            break
        begin = low[r]
        if by_bitmap:
            there = uint64_at(present + np.uint64(nodes[r]) * words * np.uint64(8))
            child = begin
            for word in range(words):
                hits = exceeding(address + word * np.uint64(512), _less(threshold - here)) & there[word]  # type: ignore[call-arg]
                while hits != np.uint64(0):
                    lowest = hits & (~hits + np.uint64(1))
                    i = child + bit_count(there[word] & (lowest - np.uint64(1)))
                    node[size], parent[size] = i, r
                    score[size] = here + table[word * np.uint64(64) + np.uint64(trailing_zeros(hits))]
                    size += score[size] > threshold
                    hits ^= lowest
                    if size == len(score):
                        size, threshold = cut_nodes(node, parent, score, size, keep, scratch)
                child += bit_count(there[word])
            continue
        while begin < high[r]:
            end = high[r]
            if bits != NO_BITMAP:
                begin = next_bit(allowed, begin, end)
                end = bits_end(allowed, begin, end)
            for i in range(np.uint64(begin), np.uint64(end)):
                total = here + table[tokens[i]]
                if total > threshold:
                    node[size] = i
                    parent[size] = r
                    score[size] = total
                    size += 1
                    if size == len(score):
                        size, threshold = cut_nodes(node, parent, score, size, keep, scratch)
            begin = end
    return cut_nodes(node, parent, score, size, keep, scratch)[0]


@compiled
def _draft_query(
    layout, plan, bits, table, node, parent, score, scratch, order, other, low, high, base, totals, done
):  # fmt: skip
    """:func:`draft` for one query. Returns the number of rows."""
    levels, depth = len(layout), plan[0]
    widths, offsets = plan[2 : 2 + depth], plan[2 + levels :]
    rows = np.int64(1)  # as a plain 1 it is a type of its own, for which all that is called is compiled once more
    low[0], high[0], base[0] = 0, plan[1], 0.0
    for level in range(depth):
        address, present = np.uint64(layout[level, 0, TOKENS]), np.uint64(layout[level, 0, PRESENT])
        above = node[max(level - 1, 0)]
        own = table[offsets[level] : offsets[level + 1]]
        if layout[level, 0, WIDE]:
            rows = _best_children(
                uint16_at(address), present, rows, above, low, high, base, bits[level, 0], own, widths[level],
                node[level], parent[level], score, scratch, order, other,
            )  # fmt: skip
        else:
            rows = _best_children(
                uint8_at(address), present, rows, above, low, high, base, bits[level, 0], own, widths[level],
                node[level], parent[level], score, scratch, order, other,
            )  # fmt: skip
        following = np.uint64(layout[level + 1, 0, TOKENS])
        step = np.uint64(layout[level + 1, 0, STRIDE] * (2 if layout[level + 1, 0, WIDE] else 1))
        for r in range(rows):
            begin, end = child_at(layout, level, 0, node[level, r]), child_at(layout, level, 0, node[level, r] + 1)
            low[r], high[r], base[r] = begin, end, score[r]
            line = following + np.uint64(begin) * step
            prefetch(line)
            if np.uint64(end - begin) * step > np.uint64(48):
                prefetch(line + np.uint64(64))
    address, stride, wide = np.uint64(layout[depth, 0, TOKENS]), layout[depth, 0, STRIDE], layout[depth, 0, WIDE]
    keep = len(done)
    room = min(4 * keep + 256, len(score))
    if wide:
        size = best_items(
            uint16_at(address), stride, rows, low, high, base, bits[levels - 1, 0], table, offsets[depth:], keep,
            node[depth], parent[depth], score[:room], totals, scratch,
        )  # fmt: skip
    else:
        size = best_items(
            uint8_at(address), stride, rows, low, high, base, bits[levels - 1, 0], table, offsets[depth:], keep,
            node[depth], parent[depth], score[:room], totals, scratch,
        )  # fmt: skip
    order_best_first(score, size, order, other)
    reals, codes, probs = done.view(np.float64), done.view(np.uint16), done.view(np.float32)
    prob_at = 2 * probs_word(1, levels)
    for at in range(size):
        slot = order[at]
        item, r = node[depth, slot], parent[depth, slot]
        reals[at, SCORE] = score[slot]
        done[at, PARENT], done[at, LOW] = r, item
        if wide:
            done[at, LOW + 1] = identifier_end(uint16_at(address), stride, levels - depth, item, high[r])
        else:
            done[at, LOW + 1] = identifier_end(uint8_at(address), stride, levels - depth, item, high[r])
        low[at], order[at] = item, r  # from here on the node and the row of each level in turn
    for level in range(levels - 1, -1, -1):
        if level < depth:
            for at in range(size):
                low[at], order[at] = node[level, order[at]], parent[level, order[at]]
        own = table[offsets[level] :]
        for at in range(size):
            token = token_at(layout, level, 0, low[at])
            codes[at, 4 * (LOW + 2) + level] = token
            probs[at, prob_at + level] = own[token]
    done[size:] = 0
    return size


@compiled
def draft(layout, plan, bits, log_probs, done, done_live):
    """The best identifiers of one segment, for every query.

    What :func:`~ace_core.kernels.expand.expand` and :func:`~ace_core.kernels.complete.complete` find together, in a
    fraction of their time, for a row is one node here.

    Args (as in :func:`~ace_core.kernels.complete.complete`, with S = 1, and):
        plan: (2 + L + L + 1,) int64: depth, the number of levels with pointers; how many nodes the first level has;
            prefixes kept at each level; where each level's tokens begin in ``log_probs``, and where the last ends.
    """
    levels, depth = len(layout), plan[0]
    most = done.shape[1]
    for level in range(depth):
        most = max(most, plan[2 + level])
    room = 2 * most + 256
    node, parent = np.empty((depth + 1, room), np.int64), np.empty((depth + 1, room), np.int64)
    score, scratch = np.empty(room), np.empty(room)
    order, other = np.empty(room, np.int64), np.empty(room, np.int64)
    low, high, base = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most)
    table, totals = np.empty(plan[2 + 2 * levels]), np.empty(_CHUNK + 64)
    for q in range(len(done)):
        largest = np.float64(0)
        for i in range(len(table)):
            largest = max(largest, np.float64(log_probs[q, i]))
        for i in range(len(table)):
            table[i] = np.float64(log_probs[q, i]) - largest
        done_live[q] = _draft_query(
            layout, plan, bits[q % bits.shape[0]], table, node, parent, score, scratch, order, other, low, high, base,
            totals, done[q],
        )  # fmt: skip


@compiled
def draft_items(layout, plan, keep, bits, log_probs, valid, segment, item, item_score, item_levels, item_codes):
    """:func:`draft` of ``keep`` identifiers, and :func:`~ace_core.kernels.items.collect` of their items."""
    levels, most = len(layout), np.int64(0)
    leaves, live = np.empty((1, keep, row_words(1, levels)), np.int64), np.empty(1, np.int64)
    for q in range(len(item)):
        own = bits[q % bits.shape[0] : q % bits.shape[0] + 1]
        draft(layout, plan, own, log_probs[q : q + 1], leaves, live)
        found = collect_query(
            own[0, levels - 1], leaves[0], live[0],
            valid[q], segment[q], item[q], item_score[q], item_levels[q], item_codes[q],
        )  # fmt: skip
        most = max(most, found)
    return most
