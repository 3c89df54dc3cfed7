"""One level of a beam over one segment: :func:`~ace_core.kernels.expand.expand` where nothing is joined or shared.

The step that a search is measured by. What is written to many times goes by its address, because a view of an array
counts its owner in and out, and what a call is handed is copied: here that would take longer than the work.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ace_core.kernels.children import likely_threshold, token_end
from ace_core.kernels.compiled import (
    LOW,
    NO_BITMAP,
    NODE,
    PARENT,
    POINTERS,
    POINTERS_WIDE,
    PRESENT,
    SCORE,
    STRIDE,
    TOKENS,
    WIDE,
    any_bit,
    bit_count,
    child_at,
    compiled,
    exceeding,
    float64_at,
    int64_at,
    prefetch,
    probs_word,
    token_at,
    trailing_zeros,
    uint8_at,
    uint16_at,
    uint64_at,
)
from ace_core.kernels.selection import nth_largest, order_best_first

inlined = partial(compiled, forceinline=True)

_SHORT = 24  # children of a row up to which each is looked at, whatever its score
_SLOT = np.uint64(4)  # words of a child that may be kept: its score (float64), row, node, and the end of its run
_ONE, _ROW, _LOW, _HIGH = np.uint64(1), np.uint64(1), np.uint64(2), np.uint64(3)
_WORD = np.uint64(64)


@inlined
def _ask_for_tokens(tokens, step, rows, live, words):
    """Ask for the memory of rows' children."""
    for r in range(live):
        prefetch(tokens + np.uint64(rows[np.uint64(r) * words + np.uint64(LOW)]) * step)


@inlined
def _ask_for_scores(tokens, stride, rows, live, words, table, address, begin, step, vocabulary):
    """Ask for the memory that rows' children are scored from: all of it where they are many."""
    size = np.uint64(table.itemsize)
    for r in range(np.uint64(live)):
        first = rows[r * words + np.uint64(LOW)]
        last = rows[r * words + np.uint64(LOW + 1)]
        here = address + (np.uint64(begin) + r * np.uint64(step)) * size
        if last - first > _SHORT:
            for at in range(np.uint64(0), np.uint64(vocabulary) * size, np.uint64(64)):
                prefetch(here + at)
        else:
            for node in range(np.uint64(first), np.uint64(last)):
                prefetch(here + np.uint64(tokens[node * stride]) * size)


@inlined
def _bound(threshold, base, table):
    """What a log-probability must exceed for its sum with ``base`` to pass the threshold, less what rounding to the type
    of ``table`` could take away. The exact comparison follows."""
    margin = threshold - base
    return table.dtype.type(margin - (1e-5 + 1e-6 * abs(margin)))


@inlined
def _put(slots, reals, size, total, r, low, high):
    at = size * _SLOT
    reals[at], slots[at + _ROW], slots[at + _LOW], slots[at + _HIGH] = total, r, low, high


@compiled
def _keep_best(slots, reals, size, keep, values, scratch):
    """Drop all slots but the best ``keep``, of equal scores the later ones. Returns how many are left, and the score
    that another must exceed."""
    for i in range(size):
        values[i] = reals[i * _SLOT]
    threshold = nth_largest(values, size, keep, scratch)
    ties = np.int64(keep)
    for i in range(size):
        ties -= values[i] > threshold
    left = np.uint64(0)
    for i in range(size):
        at = i * _SLOT
        tie = (values[i] == threshold) & (ties > 0)
        ties -= tie
        _put(slots, reals, left, values[i], slots[at + _ROW], slots[at + _LOW], slots[at + _HIGH])
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
        low, high = rows[r * words + np.uint64(LOW)], rows[r * words + np.uint64(LOW + 1)]
        here = row_reals[r * words]
        if high - low > _SHORT or size + np.uint64(high - low) > room or here + best <= threshold:
            break
        own = begin + r * step
        for i in range(np.uint64(low), np.uint64(high)):
            total = here + min(np.float64(table[own + np.uint64(tokens[i * stride])]), 0.0)
            _put(slots, reals, size, total, r, i, i + _ONE)
            size += np.uint64(total > threshold)
        r += _ONE
    if flat:  # the items of an identifier, which are neighbours, are one child
        left, token = gathered, np.int64(-1)
        for slot in range(gathered, size):
            at, before = slot * _SLOT, left * _SLOT - _SLOT
            last, token = token, np.int64(tokens[np.uint64(slots[at + _LOW]) * stride])
            if token == last and slots[before + _ROW] == slots[at + _ROW] and slots[before + _HIGH] == slots[at + _LOW]:
                slots[before + _HIGH] += 1
            else:
                _put(slots, reals, left, reals[at], slots[at + _ROW], slots[at + _LOW], slots[at + _HIGH])
                left += _ONE
        size = left
    if bits != NO_BITMAP:
        allowed = uint64_at(bits)
        left = gathered
        for slot in range(gathered, size):
            at = slot * _SLOT
            low, high = slots[at + _LOW], slots[at + _HIGH]
            _put(slots, reals, left, reals[at], slots[at + _ROW], low, high)
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
def _best_above(
    threshold, tokens, stride, flat, present, bits, rows, row_reals, live, words, table, begin, step, vocabulary, best,
    keep, slots, reals, room, values, scratch,
):  # fmt: skip
    """Fill slots with the best ``keep`` children of rows above a threshold. Returns how many there are.

    Children whose score passes the threshold gather in slots, of which only the best are kept whenever they are full;
    the threshold is then the worst score kept. No child scores above its row by more than ``best``.
    """
    size = r = np.uint64(0)
    last = vocabulary >> np.uint64(6)
    address = np.uint64(table.ctypes.data)
    while r < live and row_reals[r * words] + best > threshold:  # rows come by falling score
        r, size = _gather(
            tokens, stride, flat, bits, r, rows, row_reals, live, words, table, begin, step, threshold, best,
            slots, reals, size, room,
        )  # fmt: skip
        if r == live:
            break
        own, base = begin + r * step, row_reals[r * words]
        first, end = np.uint64(rows[r * words + np.uint64(LOW)]), np.uint64(rows[r * words + np.uint64(LOW + 1)])
        if end - first <= np.uint64(_SHORT):
            if size + end - first > room:
                size, threshold = _keep_best(slots, reals, size, keep, values, scratch)
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


@inlined
def _expand_query(
    tokens, entry, bits, address, live, words, table, begin, step, vocabulary, keep, slots, reals, room, values, scratch
):  # fmt: skip
    """Fill slots with children of the ``live`` rows at an address, the best ``keep`` among them. Returns how many."""
    stride, flat, present = np.uint64(entry[STRIDE]), entry[POINTERS] == 0, np.uint64(entry[PRESENT])
    rows, row_reals = int64_at(address), float64_at(address + np.uint64(8 * SCORE))
    best = 0.0
    if step == 0:  # all rows of a query share these
        best = -np.inf
        for token in range(begin, begin + vocabulary):
            best = max(best, min(np.float64(table[token]), 0.0))
    threshold = likely_threshold(
        tokens, stride, np.int64(live), np.int64(words), int64_at(address + np.uint64(8 * LOW)),
        int64_at(address + np.uint64(8 * LOW + 8)), row_reals, bits, table, np.int64(begin), np.int64(step),
        np.int64(keep), values, np.int64(room), scratch,
    )  # fmt: skip
    size = _best_above(
        threshold, tokens, stride, flat, present, bits, rows, row_reals, live, words, table, begin, step, vocabulary,
        best, keep, slots, reals, room, values, scratch,
    )  # fmt: skip
    if size < keep and threshold > -np.inf:
        size = _best_above(
            -np.inf, tokens, stride, flat, present, bits, rows, row_reals, live, words, table, begin, step, vocabulary,
            best, keep, slots, reals, room, values, scratch,
        )  # fmt: skip
    return size


@compiled
def expand_one(layout, level, bits, rows, live, log_probs, next_rows, next_live):
    """:func:`~ace_core.kernels.expand.expand` of one segment, over the whole vocabulary; the same arguments."""
    levels = len(layout)
    code_at, prob_at = 4 * (LOW + 2) + level, 2 * probs_word(1, levels) + level  # as they are counted in views
    next_reals, next_codes, next_probs = next_rows.view(np.float64), next_rows.view(np.uint16), next_rows.view(np.float32)
    keep = next_rows.shape[1]
    room = 3 * keep + 64
    work = np.empty(8 * room, np.int64)  # by its address, hence used once more at the end
    at_work, piece = np.uint64(work.ctypes.data), np.uint64(8 * room)
    slots, reals = int64_at(at_work), float64_at(at_work)
    order, other = int64_at(at_work + np.uint64(4) * piece), int64_at(at_work + np.uint64(5) * piece)
    values, scratch = float64_at(at_work + np.uint64(6) * piece), float64_at(at_work + np.uint64(7) * piece)
    entry = layout[level, 0]
    tokens, stride, pointed = np.uint64(entry[TOKENS]), np.uint64(entry[STRIDE]), entry[POINTERS] != 0
    table, vocabulary, words = log_probs.reshape(-1), log_probs.shape[2], rows.shape[2]
    step = vocabulary if log_probs.shape[1] > 1 else 0
    address, scores = np.uint64(rows.ctypes.data), np.uint64(table.ctypes.data)
    of_query = np.uint64(8 * rows.shape[1] * words)
    for q in range(len(live)):
        own_rows = address + np.uint64(q) * of_query
        begin = q * log_probs.shape[1] * vocabulary
        if q + 2 < len(live):
            _ask_for_tokens(
                tokens, stride * np.uint64(2 if entry[WIDE] else 1), int64_at(own_rows + np.uint64(2) * of_query),
                live[q + 2], np.uint64(words),
            )  # fmt: skip
        if q + 1 < len(live):
            following, then = int64_at(own_rows + of_query), begin + log_probs.shape[1] * vocabulary
            if entry[WIDE]:
                _ask_for_scores(
                    uint16_at(tokens), stride, following, live[q + 1], np.uint64(words), table, scores, then, step,
                    vocabulary,
                )  # fmt: skip
            else:
                _ask_for_scores(
                    uint8_at(tokens), stride, following, live[q + 1], np.uint64(words), table, scores, then, step,
                    vocabulary,
                )  # fmt: skip
        own_bits = bits[q % len(bits), level, 0]
        if entry[WIDE]:
            size = _expand_query(
                uint16_at(tokens), entry, own_bits, own_rows, np.uint64(live[q]), np.uint64(words), table,
                np.uint64(begin), np.uint64(step), np.uint64(vocabulary), np.uint64(keep), slots, reals, np.uint64(room),
                values, scratch,
            )  # fmt: skip
        else:
            size = _expand_query(
                uint8_at(tokens), entry, own_bits, own_rows, np.uint64(live[q]), np.uint64(words), table,
                np.uint64(begin), np.uint64(step), np.uint64(vocabulary), np.uint64(keep), slots, reals, np.uint64(room),
                values, scratch,
            )  # fmt: skip
        for slot in range(size):
            values[slot] = reals[slot * _SLOT]
        order_best_first(values, np.int64(size), order, other)
        found = min(np.int64(size), keep)
        next_live[q] = found
        if pointed:
            size_of = np.uint64(8 if entry[POINTERS_WIDE] else 4)
            for at in range(found):
                prefetch(np.uint64(entry[POINTERS]) + np.uint64(slots[np.uint64(order[at]) * _SLOT + _LOW]) * size_of)
        for at in range(found):
            slot = np.uint64(order[at]) * _SLOT
            parent, low, high = slots[slot + _ROW], slots[slot + _LOW], slots[slot + _HIGH]
            for word in range(LOW + 2, words):
                next_rows[q, at, word] = rows[q, parent, word]
            token = token_at(layout, level, 0, low)
            next_reals[q, at, SCORE] = reals[slot]
            next_rows[q, at, PARENT], next_rows[q, at, NODE] = parent, low
            next_rows[q, at, LOW] = child_at(layout, level, 0, low) if pointed else low
            next_rows[q, at, LOW + 1] = child_at(layout, level, 0, high) if pointed else high
            next_codes[q, at, code_at] = token
            next_probs[q, at, prob_at] = min(np.float64(table[begin + parent * step + token]), 0.0)
        next_rows[q, found:] = 0
    work[0] = 0
