"""The best items below rows, where a token's log-probability does not depend on the tokens before it.

A row has a few items, each row another number: a loop over them ends with a wrong guess of the processor, which takes
longer than what the loop does. So the items of all rows are first laid out side by side, sixteen at a time, of which
the next row's overwrite what is not its own; then one loop sums them all up, and one compares them.
"""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import cut_nodes
from ace_core.kernels.compiled import (
    NO_BITMAP,
    compiled,
    copy_16_bytes,
    float64_at,
    inlined,
    int64_at,
    trailing_zeros,
    uint8_at,
    uint16_at,
    uint64_at,
)
from ace_core.kernels.selection import nth_largest
from ace_core.kernels.vectors import exceeding

_SHARE, _SIGMAS = 16, 2.5  # one item of so many is looked at first, for how many standard deviations more than are kept
_CHUNK = np.uint64(16384)  # items that are laid out together
_STEP = np.uint64(16)
_ONE = np.uint64(1)
# What is laid out, by where each begins in the workspace (bytes): the items' scores (float64), the run that each is in
# (uint16), the runs' rows and their first items less what lies before (2 x int64), and the items' tokens.
_RUN_OF = np.uint64(8) * (_CHUNK + np.uint64(64))
_RUNS = _RUN_OF + np.uint64(2) * (_CHUNK + np.uint64(64))
_LINES = _RUNS + np.uint64(16) * (_CHUNK + np.uint64(64))


@compiled
def workspace(bytes_each):
    """Room for what :func:`best_items` lays out, of items whose tokens take so many bytes."""
    return np.empty((_LINES + bytes_each * (_CHUNK + np.uint64(64))) // np.uint64(8) + _ONE, np.int64)


@inlined
def _same(tokens, bytes_each, item, other_item):
    """Have two items the same tokens?"""
    here, there = uint8_at(tokens + np.uint64(item) * bytes_each), uint8_at(tokens + np.uint64(other_item) * bytes_each)
    different = np.uint8(0)
    for i in range(bytes_each):  # to the end, which is never a wrong guess
        different |= here[i] ^ there[i]
    return different == 0


@compiled
def identifier_end(tokens, bytes_each, item, end):
    """End of the run of items up to ``end`` with the tokens of ``item``."""
    if item + 1 == end or not _same(tokens, bytes_each, item, item + 1):
        return item + 1
    low, high = item + 2, end
    while low < high:
        middle = (low + high) >> 1
        if _same(tokens, bytes_each, item, middle):
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _drop_repeats(tokens, bytes_each, node, parent, score, size):
    """Of items with one identifier, which are neighbours, leave the first."""
    left = min(size, 1)
    for i in range(1, size):
        equal = score[i] == score[left - 1] and parent[i] == parent[left - 1]
        if not (equal and _same(tokens, bytes_each, node[left - 1], node[i])):
            node[left], parent[left], score[left] = node[i], parent[i], score[i]
            left += 1
    return left


@inlined
def _copy(tokens, bytes_each, item, end, last, lines, position, step):
    """Copy the tokens of items up to ``end``, or of ``step`` items where so many exist."""
    source, target = tokens + np.uint64(item) * bytes_each, lines + position * bytes_each
    if item + np.int64(_STEP) <= last:
        for at in range(np.uint64(0), step * bytes_each, np.uint64(16)):
            copy_16_bytes(target + at, source + at)  # type: ignore[call-arg]
    else:
        for at in range(np.uint64(end - item) * bytes_each):
            uint8_at(target)[at] = uint8_at(source)[at]


@inlined
def _lay_out(tokens, bytes_each, row, item, rows, low, high, base, last, work):
    """Lay out the items of rows from one row's item on, while there is room.

    last: end of the rows' last item, beyond which there may be none. Returns the next row and item, and how many lie
    there, each with its row's score.
    """
    sums, run_of, runs, lines = float64_at(work), uint16_at(work + _RUN_OF), int64_at(work + _RUNS), work + _LINES
    filled = run = np.uint64(0)
    while row < rows:
        here, end = base[row], high[row]
        stop = min(end, item + np.int64(_CHUNK - filled))
        runs[2 * run], runs[2 * run + _ONE] = row, item - np.int64(filled)
        own = run
        run += np.uint64(item < stop)
        while item < stop:
            _copy(tokens, bytes_each, item, stop, last, lines, filled, _STEP)
            for at in range(_STEP):
                sums[filled + at] = here
            for at in range(_STEP):
                run_of[filled + at] = own
            taken = min(np.int64(_STEP), stop - item)
            item += taken
            filled += np.uint64(taken)
        if item < end:
            break
        row += 1
        item = low[row] if row < rows else 0
    return row, item, filled


@inlined
def _lay_out_allowed(tokens, bytes_each, bits, row, item, rows, low, high, base, last, work):
    """:func:`_lay_out` of those that a filter allows, one by one."""
    sums, run_of, runs, lines = float64_at(work), uint16_at(work + _RUN_OF), int64_at(work + _RUNS), work + _LINES
    allowed = uint64_at(bits)
    filled = np.uint64(0)
    while row < rows:
        here, end = base[row], high[row]
        while item < end and filled <= _CHUNK - np.uint64(64):
            stop = min((item | 63) + 1, end)
            left = allowed[np.uint64(item) >> np.uint64(6)] >> (np.uint64(item) & np.uint64(63))
            left &= ~np.uint64(0) >> np.uint64(64 - (stop - item))
            while left != np.uint64(0):
                one = item + trailing_zeros(left)  # type: ignore[call-arg]
                left &= left - _ONE
                _copy(tokens, bytes_each, one, one + 1, last, lines, filled, _ONE)
                sums[filled], run_of[filled] = here, filled
                runs[2 * filled], runs[2 * filled + _ONE] = row, one - np.int64(filled)
                filled += _ONE
            item = stop
        if item < end:
            break
        row += 1
        item = low[row] if row < rows else 0
    return row, item, filled


@compiled
def _sum_up(lines, count, filled, table, offsets, sums):
    """Add to each item's score those of its ``count`` tokens, three of them, or what is left, at a time."""
    every = np.uint64(count)
    for level in range(0, count, 3):
        left, begin = count - level, np.uint64(level)
        own = np.uint64(offsets[level])
        second, third = np.uint64(offsets[min(level + 1, count)]), np.uint64(offsets[min(level + 2, count)])
        if left >= 3:
            for item in range(filled):
                at = item * every + begin
                sums[item] = (
                    sums[item]
                    + table[own + np.uint64(lines[at])]
                    + table[second + np.uint64(lines[at + np.uint64(1)])]
                    + table[third + np.uint64(lines[at + np.uint64(2)])]
                )
        elif left == 2:
            for item in range(filled):
                at = item * every + begin
                sums[item] = (
                    sums[item] + table[own + np.uint64(lines[at])] + table[second + np.uint64(lines[at + np.uint64(1)])]
                )
        else:
            for item in range(filled):
                sums[item] += table[own + np.uint64(lines[item * every + begin])]


@compiled
def _likely_threshold(sums, count, keep, sample, room, scratch):
    """A score that somewhat more than ``keep`` of the first ``count`` identifiers are likely to pass, from one item of
    ``_SHARE``, or of more; -inf where they are few.

    An item that scores as the one before it has most likely its identifier.
    """
    if count < 2 * keep:
        return -np.inf
    looked_at, share = 0, max(_SHARE, count // room + 1)
    for at in range(share, count, share):
        sample[looked_at] = sums[at]
        looked_at += sums[at] != sums[at - 1]
    expected = keep / share
    n = np.int64(expected + _SIGMAS * np.sqrt(expected)) + 1
    return nth_largest(sample, looked_at, n, scratch) if n <= looked_at else -np.inf


@compiled
def best_items(
    tokens, wide, count, rows, low, high, base, bits, table, offsets, keep, node, parent, score, room, scratch, work
):  # fmt: skip
    """The best ``keep`` identifiers below rows: their first allowed items, rows and scores. Returns how many.

    Args:
        tokens: address of the items' tokens, ``count`` of each, 8-bit or ``wide``; low, high, base: of rows.
        bits: address of the bitmap of allowed items, 0 for all.
        table, offsets: the tokens' log-probabilities, and where those of each token begin.
        node, parent, score, scratch: room for ``room`` results, which is more than ``keep``.
        work: address of a :func:`workspace`.
    """
    bytes_each = np.uint64(count << wide)
    last = np.int64(0)
    for r in range(rows):
        last = max(last, high[r])
    sums, run_of, runs, lines = float64_at(work), uint16_at(work + _RUN_OF), int64_at(work + _RUNS), work + _LINES
    whole, filled = False, np.uint64(0)  # are all items laid out at once?
    estimate = True
    while True:
        size, row, item, threshold = np.int64(0), np.int64(0), low[0], -np.inf
        likely = threshold
        while row < rows:
            first = row == 0 and item == low[0]
            if whole:
                row = rows
            else:
                if bits == NO_BITMAP:
                    row, item, filled = _lay_out(tokens, bytes_each, row, item, rows, low, high, base, last, work)
                else:
                    row, item, filled = _lay_out_allowed(
                        tokens, bytes_each, bits, row, item, rows, low, high, base, last, work
                    )  # fmt: skip
                if wide:
                    _sum_up(uint16_at(lines), count, filled, table, offsets, sums)
                else:
                    _sum_up(uint8_at(lines), count, filled, table, offsets, sums)
                whole = first and row == rows
            if first and estimate:
                likely = threshold = _likely_threshold(sums, np.int64(filled), keep, score, room, scratch)
            for blank in range(filled, (filled + np.uint64(63)) & ~np.uint64(63)):
                sums[blank] = -np.inf
            for word in range(np.uint64(0), filled, np.uint64(64)):
                hits = exceeding(work + word * np.uint64(8), threshold)  # type: ignore[call-arg, var-annotated]
                while hits != np.uint64(0):
                    position = word + np.uint64(trailing_zeros(hits))
                    hits &= hits - _ONE
                    run = np.uint64(2) * np.uint64(run_of[position])
                    node[size], parent[size] = runs[run + _ONE] + np.int64(position), runs[run]
                    score[size] = sums[position]
                    size += score[size] > threshold
                    if size == room:
                        size = _drop_repeats(tokens, bytes_each, node, parent, score, size)
                        size, worst = cut_nodes(node, parent, score, size, keep, scratch)
                        threshold = max(threshold, worst)
        size = _drop_repeats(tokens, bytes_each, node, parent, score, size)
        if size >= keep or likely == -np.inf:
            return cut_nodes(node, parent, score, size, keep, scratch)[0]
        estimate = False  # too few passed what was estimated: all are looked at
