"""The best items below rows, where a token's log-probability does not depend on the tokens before it."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import cut_nodes
from ace_core.kernels.compiled import (
    NO_BITMAP,
    bits_end,
    compiled,
    exceeding,
    float64_at,
    inlined,
    next_bit,
    trailing_zeros,
    uint64_at,
)
from ace_core.kernels.selection import nth_largest

_SHARE, _SIGMAS = 16, 2.5  # one item of so many is looked at first, for how many standard deviations more than are kept


@compiled
def _same(tokens, stride, count, item, other_item):
    """Have two items the same ``count`` tokens?"""
    for i in range(count):  # noqa: SIM110
        if tokens[item * stride + i] != tokens[other_item * stride + i]:
            return False
    return True


@compiled
def identifier_end(tokens, stride, count, item, end):
    """End of the run of items up to ``end`` with the tokens of ``item``."""
    if item + 1 == end or not _same(tokens, stride, count, item, item + 1):
        return item + 1
    low, high = item + 2, end
    while low < high:
        middle = (low + high) >> 1
        if _same(tokens, stride, count, item, middle):
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _drop_repeats(tokens, stride, count, node, parent, score, size):
    """Of items with one identifier, which are neighbours, leave the first."""
    left = min(size, 1)
    for i in range(1, size):
        equal = score[i] == score[left - 1] and parent[i] == parent[left - 1]
        if not (equal and _same(tokens, stride, count, node[left - 1], node[i])):
            node[left], parent[left], score[left] = node[i], parent[i], score[i]
            left += 1
    return left


@compiled
def _best_allowed_items(
    tokens, stride, rows, low, high, base, bits, table, offsets, keep, node, parent, score, scratch
):  # fmt: skip
    """:func:`best_items` of those that a filter allows: from bit to bit, whatever lies between."""
    count = len(offsets) - 1
    # the first three tokens are written out, here and below: a loop over so few, or a call, would take longer
    own, second, third = table[offsets[0] :], table[offsets[min(1, count)] :], table[offsets[min(2, count)] :]
    step = np.uint64(stride)
    allowed = uint64_at(bits)
    size = 0
    threshold = -np.inf
    for r in range(rows):
        begin, here = low[r], base[r]
        while begin < high[r]:
            begin = next_bit(allowed, begin, high[r])
            end = bits_end(allowed, begin, high[r])
            for item in range(np.uint64(begin), np.uint64(end)):
                at = item * step
                total = here + own[tokens[at]]
                if count > 1:
                    total += second[tokens[at + np.uint64(1)]]
                if count > 2:
                    total += third[tokens[at + np.uint64(2)]]
                for level in range(3, count):
                    total += table[offsets[level] + tokens[at + np.uint64(level)]]
                if total > threshold:
                    node[size] = item
                    parent[size] = r
                    score[size] = total
                    size += 1
                    if size == len(score):
                        size = _drop_repeats(tokens, stride, count, node, parent, score, size)
                        size, threshold = cut_nodes(node, parent, score, size, keep, scratch)
            begin = end
    size = _drop_repeats(tokens, stride, count, node, parent, score, size)
    return cut_nodes(node, parent, score, size, keep, scratch)[0]


@inlined
def _sum(tokens, stride, count, low, high, here, table, offsets, totals, filled):
    """Put the scores of items low .. high - 1 of a row into ``totals``. Returns where the next one's go."""
    if count == 3:  # as many as most identifiers have left: written out, for a loop over so few would take longer
        own, second, third = np.uint64(offsets[0]), np.uint64(offsets[1]), np.uint64(offsets[2])
        for item in range(low, high):
            at = item * stride
            totals[filled] = (
                here
                + table[own + np.uint64(tokens[at])]
                + table[second + np.uint64(tokens[at + np.uint64(1)])]
                + table[third + np.uint64(tokens[at + np.uint64(2)])]
            )
            filled += np.uint64(1)
        return filled
    for item in range(low, high):
        total = here
        for level in range(count):
            total += table[np.uint64(offsets[level]) + np.uint64(tokens[item * stride + np.uint64(level)])]
        totals[filled] = total
        filled += np.uint64(1)
    return filled


@compiled
def _likely_threshold(totals, count, share, keep, sample, scratch):
    """A score that somewhat more than ``keep`` of the first ``count`` totals are likely to pass, from one of ``share``,
    or of more; -inf where they are few."""
    if count < 2 * keep:
        return -np.inf
    looked_at, share = 0, max(share, count // len(sample) + 1)
    for at in range(0, count, share):
        sample[looked_at] = totals[at]
        looked_at += totals[at] > -np.inf
    expected = keep / share
    n = np.int64(expected + _SIGMAS * np.sqrt(expected)) + 1
    return nth_largest(sample, looked_at, n, scratch) if n <= looked_at else -np.inf


@compiled
def _items_above(
    share, tokens, stride, rows, low, high, base, table, offsets, keep, node, parent, score, totals, room, scratch
):  # fmt: skip
    """:func:`best_items` of those above a score that most likely enough of them pass, learned from one item of
    ``share``; of all where that is 0."""
    count = len(offsets) - 1
    step = np.uint64(stride)
    address = np.uint64(totals.ctypes.data)
    sums = float64_at(address)
    size, threshold = 0, -np.inf
    first, begin = 0, low[0]  # where the chunk begins
    while first < rows:
        filled, row, at = np.uint64(0), first, begin
        while row < rows:
            end = min(high[row], at + room - np.int64(filled))
            filled = _sum(tokens, step, count, np.uint64(at), np.uint64(end), base[row], table, offsets, sums, filled)
            if end < high[row]:
                at = end
                break
            row += 1
            at = low[row] if row < rows else 0
        for blank in range(filled, (filled + np.uint64(63)) & ~np.uint64(63)):
            sums[blank] = -np.inf
        if share and first == 0 and begin == low[0]:
            threshold = _likely_threshold(totals, np.int64(filled), share, keep, score, scratch)
        r, item, left = first, begin, np.int64(0)  # the row of a position, its first item here, and that one's position
        past = min(high[r], begin + room) - begin
        for word in range(np.uint64(0), filled, np.uint64(64)):
            hits = exceeding(address + word * np.uint64(8), threshold)  # type: ignore[call-arg, var-annotated]
            while hits != np.uint64(0):
                position = np.int64(word) + trailing_zeros(hits)
                hits &= hits - np.uint64(1)
                while position >= past:
                    r += 1
                    item, left = low[r], past
                    past += high[r] - low[r]
                node[size], parent[size], score[size] = item + position - left, r, totals[position]
                size += totals[position] > threshold
                if size == len(score):
                    size = _drop_repeats(tokens, stride, count, node, parent, score, size)
                    size, worst = cut_nodes(node, parent, score, size, keep, scratch)
                    threshold = max(threshold, worst)
        first, begin = row, at
    size = _drop_repeats(tokens, stride, count, node, parent, score, size)
    return cut_nodes(node, parent, score, size, keep, scratch)[0]


@compiled
def best_items(
    tokens, stride, rows, low, high, base, bits, table, offsets, keep, node, parent, score, totals, scratch,
):  # fmt: skip
    """The best ``keep`` identifiers below rows: their first allowed items, rows and scores. Returns how many.

    tokens: of the items, ``len(offsets) - 1`` of each; table, offsets: their log-probabilities, and where those of each
    token begin. totals: room for the scores of a chunk of items, and 64 more.
    """
    if bits != NO_BITMAP:
        return _best_allowed_items(
            tokens, stride, rows, low, high, base, bits, table, offsets, keep, node, parent, score, scratch
        )
    room, size = len(totals) - 64, 0
    for share in (_SHARE, 0):  # where too few pass what was estimated, or there are no more, all are looked at
        if size < keep:
            size = _items_above(
                np.int64(share), tokens, stride, rows, low, high, base, table, offsets, keep, node, parent, score,
                totals, room, scratch,
            )  # fmt: skip
    return size
