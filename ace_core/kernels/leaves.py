"""The best items below rows, where a token's log-probability does not depend on the tokens before it."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import cut_nodes
from ace_core.kernels.compiled import NO_BITMAP, bits_end, compiled, next_bit, uint64_at
from ace_core.kernels.selection import nth_largest


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


@compiled
def best_items(
    tokens, stride, rows, low, high, base, bits, table, offsets, keep, node, parent, score, totals, scratch,
):  # fmt: skip
    """The best ``keep`` identifiers below rows: their first allowed items, rows and scores. Returns how many.

    tokens: of the items, ``len(offsets) - 1`` of each; table, offsets: their log-probabilities, and where those of each
    token begin. totals: room for the scores of a chunk of items.
    """
    if bits != NO_BITMAP:
        return _best_allowed_items(
            tokens, stride, rows, low, high, base, bits, table, offsets, keep, node, parent, score, scratch
        )
    count = len(offsets) - 1
    own, second, third = table[offsets[0] :], table[offsets[min(1, count)] :], table[offsets[min(2, count)] :]
    step = np.uint64(stride)
    size = 0
    threshold = -np.inf
    first, begin = 0, low[0]  # where the chunk begins
    highest, tops = np.empty(rows), np.empty(rows)  # of each row in it; the same without rows that have none
    while first < rows:
        filled, row, at, found = np.uint64(0), first, begin, 0
        while row < rows and filled < np.uint64(len(totals)):
            end = min(high[row], at + len(totals) - np.int64(filled))
            here, top = base[row], -np.inf
            for i in range(np.uint64(at), np.uint64(end)):
                at_tokens = i * step
                total = here + own[tokens[at_tokens]]
                if count > 1:
                    total += second[tokens[at_tokens + np.uint64(1)]]
                if count > 2:
                    total += third[tokens[at_tokens + np.uint64(2)]]
                for level in range(3, count):
                    total += table[offsets[level] + tokens[at_tokens + np.uint64(level)]]
                top = max(top, total)
                totals[filled] = total
                filled += np.uint64(1)
            highest[row] = top
            if top > -np.inf:
                tops[found] = top
                found += 1
            if end < high[row]:
                at = end
                break
            row += 1
            at = low[row] if row < rows else 0
        pieces = row + (row < rows and at > low[row]) - first
        if found >= keep:  # each row has an identifier of its own
            least = nth_largest(tops, found, keep, scratch)
            threshold = max(threshold, np.nextafter(least, -np.inf))
        position = 0
        for r in range(first, first + pieces):
            at_here = begin if r == first else low[r]
            end_here = at if r == row else high[r]
            while at_here < end_here:
                stop = min(end_here, at_here + len(score) - size)
                if highest[r] > threshold:
                    part = totals[position : position + stop - at_here]
                    for i in range(np.uint64(len(part))):
                        node[size] = at_here + np.int64(i)
                        parent[size] = r
                        score[size] = part[i]
                        size += part[i] > threshold
                position += stop - at_here
                at_here = stop
                if size == len(score):
                    size = _drop_repeats(tokens, stride, count, node, parent, score, size)
                    size, threshold = cut_nodes(node, parent, score, size, keep, scratch)
        first, begin = row, at
    size = _drop_repeats(tokens, stride, count, node, parent, score, size)
    return cut_nodes(node, parent, score, size, keep, scratch)[0]
