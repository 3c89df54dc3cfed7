"""One level of a beam over one segment: :func:`~ace_core.kernels.expand.expand` where nothing is joined or shared.

The step that the search by a decoder is measured by; see :mod:`ace_core.kernels.gather` for how it is written.
"""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import likely_threshold
from ace_core.kernels.compiled import (
    LOW,
    NODE,
    PARENT,
    POINTERS,
    POINTERS_WIDE,
    PRESENT,
    SCORE,
    STRIDE,
    TOKENS,
    WIDE,
    child_at,
    compiled,
    float64_at,
    inlined,
    int64_at,
    prefetch,
    probs_word,
    token_at,
    uint8_at,
    uint16_at,
)
from ace_core.kernels.gather import CHILD, END, ROW, SHORT, SLOT, best_above
from ace_core.kernels.selection import order_best_first

_LOW, _HIGH = np.uint64(LOW), np.uint64(LOW + 1)


@inlined
def _ask_for_children(tokens, bytes_each, address, live, words):
    """Ask for the memory of rows' children."""
    rows = int64_at(address)
    for r in range(live):
        prefetch(tokens + np.uint64(rows[r * words + _LOW]) * bytes_each)


@inlined
def _ask_for_scores(tokens, stride, address, live, words, scores, size, step):
    """Ask for the memory that the children of short rows are scored from; that of long ones is read from end to end,
    which the machine sees by itself."""
    rows = int64_at(address)
    for r in range(live):
        low, high = np.uint64(rows[r * words + _LOW]), np.uint64(rows[r * words + _HIGH])
        here = scores + r * step * size
        if high - low <= SHORT:
            for node in range(low, high):
                prefetch(here + np.uint64(tokens[node * stride]) * size)


@inlined
def _expand_query(
    tokens, entry, bits, address, live, live_then, of_query, words, table, begin, step, vocabulary, beam, keep,
    slots, reals, room, values, scratch,
):  # fmt: skip
    """Fill slots with children of the ``live`` rows at an address, the best ``keep`` among them. Returns how many.

    Meanwhile ask for what the next query's ``live_then`` rows, ``of_query`` bytes further on, are scored from.
    """
    stride, flat, present = np.uint64(entry[STRIDE]), entry[POINTERS] == 0, np.uint64(entry[PRESENT])
    each = np.uint64(table.itemsize)
    scores = np.uint64(table.ctypes.data) + (begin + beam * vocabulary) * each
    _ask_for_scores(tokens, stride, address + of_query, live_then, words, scores, each, step)
    rows, row_reals = int64_at(address), float64_at(address + np.uint64(8 * SCORE))
    best = 0.0
    if step == 0:  # all rows of a query share these
        best = -np.inf
        for token in range(begin, begin + vocabulary):
            best = max(best, min(np.float64(table[token]), 0.0))
    threshold = likely_threshold(
        tokens, stride, np.int64(live), np.int64(words), int64_at(address + np.uint64(8) * _LOW),
        int64_at(address + np.uint64(8) * _HIGH), row_reals, bits, table, np.int64(begin), np.int64(step),
        np.int64(keep), values, np.int64(room), scratch,
    )  # fmt: skip
    while True:
        found = best_above(
            threshold, tokens, stride, flat, present, bits, rows, row_reals, live, words, table, begin, step,
            vocabulary, best, keep, slots, reals, room, values, scratch,
        )  # fmt: skip
        if found >= keep or threshold == -np.inf:
            return found
        threshold = -np.inf  # too few passed what the sample made likely


@compiled
def expand_one(layout, level, bits, rows, live, log_probs, next_rows, next_live):
    """:func:`~ace_core.kernels.expand.expand` of one segment, over the whole vocabulary; the same arguments."""
    levels = len(layout)
    next_reals, next_codes, next_probs = (
        next_rows.view(np.float64), next_rows.view(np.uint16), next_rows.view(np.float32),
    )  # fmt: skip
    code_at, prob_at = 4 * (LOW + 2) + level, 2 * probs_word(1, levels) + level  # as they are counted in these views
    entry = layout[level, 0]
    wide, tokens, pointers = entry[WIDE] != 0, np.uint64(entry[TOKENS]), np.uint64(entry[POINTERS])
    bytes_each, pointer_bytes = np.uint64(entry[STRIDE] << wide), np.uint64(8 if entry[POINTERS_WIDE] else 4)
    keep, words, table = next_rows.shape[1], rows.shape[2], log_probs.reshape(-1)
    beam, vocabulary = np.uint64(log_probs.shape[1]), np.uint64(log_probs.shape[2])
    step = vocabulary if beam > np.uint64(1) else np.uint64(0)
    room = 3 * keep + 64
    work = np.empty(8 * room, np.int64)  # held to the end, where it is used once more: what follows are addresses in it
    at_work, piece = np.uint64(work.ctypes.data), np.uint64(8 * room)
    slots, reals = int64_at(at_work), float64_at(at_work)
    order, other = int64_at(at_work + np.uint64(4) * piece), int64_at(at_work + np.uint64(5) * piece)
    values, scratch = float64_at(at_work + np.uint64(6) * piece), float64_at(at_work + np.uint64(7) * piece)
    first_row, of_query = np.uint64(rows.ctypes.data), np.uint64(8 * rows.shape[1] * words)
    for q in range(len(live)):
        address = first_row + np.uint64(q) * of_query
        if q + 2 < len(live):
            further = address + of_query + of_query
            _ask_for_children(tokens, bytes_each, further, np.uint64(live[q + 2]), np.uint64(words))
        begin, here = np.uint64(q) * beam * vocabulary, np.uint64(live[q])
        then = np.uint64(live[q + 1]) if q + 1 < len(live) else np.uint64(0)
        own_bits = bits[q % len(bits), level, 0]
        if wide:
            size = _expand_query(
                uint16_at(tokens), entry, own_bits, address, here, then, of_query, np.uint64(words), table, begin, step,
                vocabulary, beam, np.uint64(keep), slots, reals, np.uint64(room), values, scratch,
            )  # fmt: skip
        else:
            size = _expand_query(
                uint8_at(tokens), entry, own_bits, address, here, then, of_query, np.uint64(words), table, begin, step,
                vocabulary, beam, np.uint64(keep), slots, reals, np.uint64(room), values, scratch,
            )  # fmt: skip
        for number in range(size):
            values[number] = reals[number * SLOT]
        order_best_first(values, np.int64(size), order, other)
        found = min(np.int64(size), keep)
        next_live[q] = found
        if pointers != 0:
            for at in range(found):
                prefetch(pointers + np.uint64(slots[np.uint64(order[at]) * SLOT + CHILD]) * pointer_bytes)
        for at in range(found):
            slot = np.uint64(order[at]) * SLOT
            parent, low, high = slots[slot + ROW], slots[slot + CHILD], slots[slot + END]
            for word in range(LOW + 2, words):
                next_rows[q, at, word] = rows[q, parent, word]
            token = token_at(layout, level, 0, low)
            log_prob = np.float64(table[begin + np.uint64(parent) * step + np.uint64(token)])
            next_reals[q, at, SCORE] = reals[slot]
            next_rows[q, at, PARENT], next_rows[q, at, NODE] = parent, low
            next_rows[q, at, LOW] = child_at(layout, level, 0, low) if pointers != 0 else low
            next_rows[q, at, LOW + 1] = child_at(layout, level, 0, high) if pointers != 0 else high
            next_codes[q, at, code_at] = token
            next_probs[q, at, prob_at] = min(log_prob, 0.0)
        next_rows[q, found:] = 0
    work[0] = 0
