"""A score that a beam's worth of children pass, found without looking at any of them by itself.

The children of each row (of each 64 tokens, where rows are few) go through 16 lanes, which keep the largest they have
seen. The n-th largest of all lanes is a score that n children reach and few others do, since it is rare that two of the
best share a lane. Which rows have none of them, the lanes say as well. No branch depends on a child's score.
"""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import LOW, NODE, bit_count, inlined, uint64_at
from ace_core.kernels.vectors import add_to_lanes, exceeding, raise_lanes, set_lanes

LANES = np.uint64(16)
_TOGETHER = np.uint64(4)  # times 16 lanes are compared at once
_FEW = np.uint64(24)  # words of 64 tokens in all rows, up to which each has lanes of its own
_MORE = 8  # one child in so many, beyond those that are needed, may pass the threshold
_LOW, _HIGH, _NODE = np.uint64(LOW), np.uint64(LOW + 1), np.uint64(NODE)
_WORD = np.uint64(64)


@inlined
def _count_above(lanes, end, each, bound):
    count = np.int64(0)
    for at in range(lanes, end, _WORD * each):
        count += bit_count(exceeding(at, bound))  # type: ignore[call-arg]
    return count


@inlined
def lanes_room(rows):
    """Numbers that the lanes of so many rows may take."""
    return np.int64(LANES) * (max(rows, np.int64(_FEW)) + np.int64(_TOGETHER))


@inlined
def lanes_by_row(live, vocabulary):
    """Does each of the rows have 16 lanes, and not each word of 64 tokens?"""
    return live * (vocabulary >> np.uint64(6)) > _FEW


@inlined
def lane_threshold(present, short, rows, row_reals, live, words, table, begin, step, vocabulary, keep, lanes):
    """A score that at least ``keep`` children of the rows with more than ``short`` pass; -inf where there may be fewer.

    Args:
        present: address of the bitmaps of the children that nodes have.
        table: log-probabilities, those of row r's children from ``begin + r * step`` on.
        lanes: address with room for :func:`lanes_room` numbers of the table's type. Left in it: the best scores of each
            row's children (:func:`lanes_by_row`), -inf for a row with few.
    """
    kind = table.dtype.type
    nothing = kind(-np.inf)
    each, last = np.uint64(table.itemsize), vocabulary >> np.uint64(6)
    scores = np.uint64(table.ctypes.data) + begin * each
    by_row = lanes_by_row(live, vocabulary)
    end = lanes
    for r in range(live):
        row = r * words
        many = np.uint64(rows[row + _HIGH] - rows[row + _LOW]) > short
        there = uint64_at(present + np.uint64(rows[row + _NODE]) * last * np.uint64(8))
        own, base = scores + r * step * each, kind(row_reals[row])
        for word in range(last):
            if word == np.uint64(0) or not by_row:
                set_lanes(end, nothing)  # type: ignore[call-arg]
            if many:
                raise_lanes(end, own + word * _WORD * each, there[word], nothing)  # type: ignore[call-arg]
            if word + np.uint64(1) == last or not by_row:
                add_to_lanes(end, base)  # type: ignore[call-arg]
                end += LANES * each
    while (end - lanes) % (_TOGETHER * LANES * each) != np.uint64(0):
        set_lanes(end, nothing)  # type: ignore[call-arg]
        end += LANES * each
    if _count_above(lanes, end, each, nothing) < keep:
        return -np.inf
    high = kind(row_reals[0])  # no child is above the best row
    width = kind(1)
    while _count_above(lanes, end, each, high - width) < keep:
        width *= kind(2)
    low = high - width
    while True:
        middle = kind(0.5) * (low + high)
        if not low < middle < high:
            break
        count = _count_above(lanes, end, each, middle)
        low, high = (middle, high) if count >= keep else (low, middle)
        if keep <= count <= keep + keep // _MORE:
            break
    return np.float64(low) - (1e-5 + 1e-6 * abs(np.float64(low)))  # sums in the type of the table may be rounded up
