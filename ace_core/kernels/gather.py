"""Which children of the rows of one segment a step of the beam looks at, and how: the slots that they are put into.

Rows and slots go by their addresses, and every function is a part of its caller: a view of an array counts its owner
in and out, and what a call is handed is copied, which would take longer than the work. Whole numbers that index are
unsigned, for then none is counted from the end.
"""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import token_end
from ace_core.kernels.compiled import (
    LOW,
    NO_BITMAP,
    NODE,
    any_bit,
    bit_count,
    compiled,
    inlined,
    trailing_zeros,
    uint64_at,
)
from ace_core.kernels.lanes import LANES
from ace_core.kernels.selection import nth_largest
from ace_core.kernels.vectors import any_exceeding, exceeding

SHORT = np.uint64(24)  # children of a row up to which each is looked at, whatever its score
SLOT = np.uint64(4)  # words of a child that may be kept: its score (float64), row, node, and the end of its run
ROW, CHILD, END = np.uint64(1), np.uint64(2), np.uint64(3)
_ONE, _WORD = np.uint64(1), np.uint64(64)
_LOW, _HIGH = np.uint64(LOW), np.uint64(LOW + 1)


@inlined
def _bound(threshold, base, table):
    """What a log-probability must exceed for its sum with ``base`` to pass the threshold, less what rounding to the
    type of ``table`` could take away. The exact comparison follows."""
    margin = threshold - base
    return table.dtype.type(margin - (1e-5 + 1e-6 * abs(margin)))


@inlined
def _put(slots, reals, size, total, r, low, high):
    at = size * SLOT
    reals[at], slots[at + ROW], slots[at + CHILD], slots[at + END] = total, r, low, high


@compiled
def _keep_best(slots, reals, size, keep, values, scratch):
    """Drop all slots but the best ``keep``, of equal scores the later ones. Returns how many are left, and the score
    that another must exceed."""
    for i in range(size):
        values[i] = reals[i * SLOT]
    threshold = nth_largest(values, size, keep, scratch)
    ties = np.int64(keep)
    for i in range(size):
        ties -= values[i] > threshold
    left = np.uint64(0)
    for i in range(size):
        at = i * SLOT
        tie = (values[i] == threshold) & (ties > 0)
        ties -= tie
        _put(slots, reals, left, values[i], slots[at + ROW], slots[at + CHILD], slots[at + END])
        left += np.uint64((values[i] > threshold) | tie)
    return left, threshold


@inlined
def _gather(
    tokens, stride, flat, bits, r, rows, row_reals, live, words, table, begin, step, threshold, best,
    slots, reals, size, room,
):  # fmt: skip
    """Put the children of short rows, from r on, that pass the threshold and the mask into slots, until a row is long,
    or there is no room for its children, or none of them can pass. Returns the next row and slot.

    No branch depends on a score: where one child in a few passes, a wrong guess costs more than the other children.
    """
    gathered = size
    while r < live:
        low, high = np.uint64(rows[r * words + _LOW]), np.uint64(rows[r * words + _HIGH])
        here = row_reals[r * words]
        if high - low > SHORT or size + high - low > room or here + best <= threshold:
            break
        own = begin + r * step
        for i in range(low, high):
            total = here + min(np.float64(table[own + np.uint64(tokens[i * stride])]), 0.0)
            _put(slots, reals, size, total, r, i, i + _ONE)
            size += np.uint64(total > threshold)
        r += _ONE
    if flat:  # the items of an identifier, which are neighbours, are one child
        left, token = gathered, np.int64(-1)
        for slot in range(gathered, size):
            at, before = slot * SLOT, left * SLOT - SLOT
            last, token = token, np.int64(tokens[np.uint64(slots[at + CHILD]) * stride])
            if token == last and slots[before + ROW] == slots[at + ROW] and slots[before + END] == slots[at + CHILD]:
                slots[before + END] += 1
            else:
                _put(slots, reals, left, reals[at], slots[at + ROW], slots[at + CHILD], slots[at + END])
                left += _ONE
        size = left
    if bits != NO_BITMAP:
        allowed = uint64_at(bits)
        left = gathered
        for slot in range(gathered, size):
            at = slot * SLOT
            low, high = slots[at + CHILD], slots[at + END]
            _put(slots, reals, left, reals[at], slots[at + ROW], low, high)
            left += np.uint64(any_bit(allowed, low, high))
        size = left
    return r, size


@inlined
def _scan(tokens, stride, flat, bits, at, first, end, base, table, own, threshold, slots, reals, size, room, r):
    """Put the children at .. end - 1 of row r, which begin with ``first``, that pass the threshold and the mask into
    slots, until there is no room. Returns the next child and slot. Nearly all children end at the first comparison."""
    bound = _bound(threshold, base, table)
    allowed = uint64_at(bits)
    while at < end:
        value = table[own + np.uint64(tokens[at * stride])]
        if value > bound:
            total = base + min(np.float64(value), 0.0)
            if total > threshold and (not flat or at == first or tokens[at * stride] != tokens[(at - _ONE) * stride]):
                stop = token_end(tokens, np.int64(stride), np.int64(at), np.int64(end)) if flat else np.int64(at) + 1
                if bits == NO_BITMAP or any_bit(allowed, np.int64(at), stop):
                    if size == room:
                        break
                    _put(slots, reals, size, total, r, at, stop)
                    size += _ONE
        at += _ONE
    return at, size


@inlined
def _scan_present(
    present, last, word, node, bits, base, table, address, own, threshold, slots, reals, size, room, r
):  # fmt: skip
    """:func:`_scan` by the bitmap of the tokens that a row's children have, from a ``word`` of it on, whose first child
    is ``node``: 64 tokens are compared at once, whether they exist or not. Returns the next word, child and slot."""
    bound = _bound(threshold, base, table)
    allowed = uint64_at(bits)
    while word < last:
        there = present[word]
        first = own + word * _WORD
        hits = exceeding(address + first * np.uint64(table.itemsize), bound) & there  # type: ignore[call-arg]
        if size + np.uint64(bit_count(hits)) > room:  # type: ignore[call-arg]
            break
        while hits != np.uint64(0):
            lowest = hits & (~hits + _ONE)
            child = node + np.uint64(bit_count(there & (lowest - _ONE)))  # type: ignore[call-arg]
            value = table[first + np.uint64(trailing_zeros(hits))]  # type: ignore[call-arg]
            total = base + min(np.float64(value), 0.0)
            _put(slots, reals, size, total, r, child, child + _ONE)
            passes = total > threshold
            if bits != NO_BITMAP:
                passes &= (allowed[child >> np.uint64(6)] >> (child & np.uint64(63))) & _ONE != np.uint64(0)
            size += np.uint64(passes)
            hits ^= lowest
        node += np.uint64(bit_count(there))  # type: ignore[call-arg]
        word += _ONE
    return word, node, size


@inlined
def best_above(
    threshold, tokens, stride, flat, present, bits, rows, row_reals, live, words, table, begin, step, vocabulary, best,
    keep, slots, reals, room, values, scratch, lanes,
):  # fmt: skip
    """Fill slots with the best ``keep`` children of rows above a threshold. Returns how many there are.

    Children whose score passes the threshold gather in slots, of which only the best are kept whenever they are full;
    the threshold is then the worst score kept. No child scores above its row by more than ``best``, and none above the
    16 ``lanes`` of its row at an address (0: not known).
    """
    size = r = np.uint64(0)
    last = vocabulary >> np.uint64(6)
    address, each = np.uint64(table.ctypes.data), np.uint64(table.itemsize)
    while r < live and row_reals[r * words] + best > threshold:  # rows come by falling score
        r, size = _gather(
            tokens, stride, flat, bits, r, rows, row_reals, live, words, table, begin, step, threshold, best,
            slots, reals, size, room,
        )  # fmt: skip
        if r == live:
            break
        own, base = begin + r * step, row_reals[r * words]
        first, end = np.uint64(rows[r * words + _LOW]), np.uint64(rows[r * words + _HIGH])
        if end - first <= SHORT:
            if size + end - first > room:
                size, threshold = _keep_best(slots, reals, size, keep, values, scratch)
            continue
        if lanes != 0 and not any_exceeding(lanes + r * LANES * each, _bound(threshold, 0.0, table)):  # type: ignore[call-arg]
            r += _ONE
            continue
        if present != NO_BITMAP:
            there = uint64_at(present + np.uint64(rows[r * words + np.uint64(NODE)]) * last * np.uint64(8))
            word, node = np.uint64(0), first
            while True:
                word, node, size = _scan_present(
                    there, last, word, node, bits, base, table, address, own, threshold, slots, reals, size, room, r
                )
                if word == last:
                    break
                size, threshold = _keep_best(slots, reals, size, keep, values, scratch)
        else:
            at = first
            while True:
                at, size = _scan(
                    tokens, stride, flat, bits, at, first, end, base, table, own, threshold, slots, reals, size, room, r
                )
                if at == end:
                    break
                size, threshold = _keep_best(slots, reals, size, keep, values, scratch)
        r += _ONE
    return size
