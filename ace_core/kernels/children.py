"""What the search for the best children of rows is made of, whatever the rows are."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import NO_BITMAP, compiled, uint64_at
from ace_core.kernels.selection import largest_few, nth_largest

_MANY, _SHARE = 6, 12  # children for each row that is kept, from which on one of so many is looked at first
_SIGMAS = 2.5  # of the number of the best ones in the sample: seldom are they not enough, and all are looked at again
_SAMPLE = 512  # children that are looked at first, at most
_HANDFUL = 12


@compiled
def cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch):
    """Drop all slots but the best ``keep``.

    Order is kept, so that of equal scores the earlier row and the lower token stay. Returns how many are left, and
    the score that another must exceed.
    """
    if size < keep:
        return size, -np.inf
    segments = slot_low.shape[1]
    threshold = nth_largest(slot_score, size, keep, scratch)
    ties = keep
    for i in range(size):
        ties -= slot_score[i] > threshold
    left = 0
    for i in range(size):
        score = slot_score[i]
        tie = (score == threshold) & (ties > 0)
        ties -= tie
        slot_score[left] = score
        slot_row[left] = slot_row[i]
        for s in range(segments):
            slot_low[left, s] = slot_low[i, s]
            slot_high[left, s] = slot_high[i, s]
        left += (score > threshold) | tie
    return left, threshold


@compiled
def cut_nodes(node, parent, score, size, keep, scratch):
    """:func:`cut` for nodes or items of one segment."""
    if size < keep:
        return size, -np.inf
    threshold = nth_largest(score, size, keep, scratch)
    ties = keep
    for i in range(size):
        ties -= score[i] > threshold
    left = 0
    for i in range(size):
        value = score[i]
        tie = (value == threshold) & (ties > 0)
        ties -= tie
        node[left] = node[i]
        parent[left] = parent[i]
        score[left] = value
        left += (value > threshold) | tie
    return left, threshold


@compiled
def likely_threshold(
    tokens, stride, rows, each, low, high, base, bits, table, begin, step, keep, values, room, scratch
):  # fmt: skip
    """A score that somewhat more than ``keep`` allowed children of rows are likely to pass, from a sample of them; -inf
    where they are few.

    Args:
        tokens: of the children, ``stride`` apart; low, high, base: of ``rows`` rows, ``each`` apart; bits: address of
            the bitmap of allowed children, 0 for all.
        table: log-probabilities, those of row r's children from ``begin + r * step`` on.
        values, scratch: room for a sample of ``room``.
    """
    children = np.int64(0)
    for at_row in range(0, rows * each, each):
        children += high[at_row] - low[at_row]
    if children < _MANY * keep:
        return -np.inf
    share = max(_SHARE, children // min(room, _SAMPLE) + 1)  # one child of so many is looked at
    allowed = uint64_at(bits)
    count = at = np.int64(0)
    for r in range(rows):
        first, of_row, here = low[r * each], high[r * each] - low[r * each], base[r * each]
        own = np.uint64(begin + r * step)
        while at < of_row:
            node = np.uint64(first + at)
            if bits == NO_BITMAP or (allowed[node >> np.uint64(6)] >> (node & np.uint64(63))) & np.uint64(1):
                values[count] = here + min(np.float64(table[own + np.uint64(tokens[node * np.uint64(stride)])]), 0.0)
                count += 1
            at += share
        at -= of_row
    expected = keep / share
    n = np.int64(expected + _SIGMAS * np.sqrt(expected)) + 1
    if n > count:
        return -np.inf
    return largest_few(values, count, n, scratch) if n <= _HANDFUL else nth_largest(values, count, n, scratch)


@compiled
def token_end(tokens, stride, node, end):
    """End of the run of children with the token of ``node``: where nodes are items, equal tokens are one child."""
    token = tokens[node * stride]
    if node + 1 == end or tokens[(node + 1) * stride] != token:
        return node + 1
    low, high = node + 2, end
    while low < high:
        middle = (low + high) >> 1
        if tokens[middle * stride] == token:
            low = middle + 1
        else:
            high = middle
    return low
