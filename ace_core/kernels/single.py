"""One level of a beam over one segment: :func:`~ace_core.kernels.expand.expand` where nothing is joined or shared.

The step that the search by a decoder is measured by; see :mod:`ace_core.kernels.gather` for how it is written.
"""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import likely_threshold
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
    compiled,
    float32_at,
    float64_at,
    inlined,
    int32_at,
    int64_at,
    prefetch,
    probs_word,
    uint8_at,
    uint16_at,
)
from ace_core.kernels.gather import CHILD, END, ROW, SHORT, SLOT, best_above
from ace_core.kernels.lanes import lane_threshold, lanes_by_row, lanes_room
from ace_core.kernels.selection import order_best_first

_ONE, _LOW, _HIGH = np.uint64(1), np.uint64(LOW), np.uint64(LOW + 1)


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
    slots, reals, room, values, scratch, lanes,
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
    if step == 0 and live > np.uint64(1):  # all rows of a query share these
        best = -np.inf
        for token in range(begin, begin + vocabulary):
            best = max(best, min(np.float64(table[token]), 0.0))
    threshold, known = -np.inf, np.uint64(0)
    if present != NO_BITMAP and bits == NO_BITMAP:
        known = lanes if lanes_by_row(live, vocabulary) else known
        threshold = lane_threshold(
            present, SHORT, rows, row_reals, live, words, table, begin, step, vocabulary, np.int64(keep), lanes
        )
    if threshold == -np.inf:
        threshold = likely_threshold(
            tokens, stride, np.int64(live), np.int64(words), int64_at(address + np.uint64(8) * _LOW),
            int64_at(address + np.uint64(8) * _HIGH), row_reals, bits, table, np.int64(begin), np.int64(step),
            np.int64(keep), values, np.int64(room), scratch,
        )  # fmt: skip
    while True:
        found = best_above(
            threshold, tokens, stride, flat, present, bits, rows, row_reals, live, words, table, begin, step,
            vocabulary, best, keep, slots, reals, room, values, scratch, known,
        )  # fmt: skip
        if found >= keep or threshold == -np.inf:
            return found
        threshold = -np.inf  # too few passed what the sample made likely


@inlined
def _write_row(target, source, parent, low, high, first, last, score, token, token_word, log_prob, prob_word, words):
    """Continue the row at ``source`` in ``target``, with a child of the nodes ``low`` to ``high``, whose own children
    are ``first`` to ``last``."""
    row, before = int64_at(target), int64_at(source)
    for word in range(_HIGH + _ONE, words):
        row[word] = before[word]
    row[np.uint64(PARENT)], row[np.uint64(NODE)], row[_LOW], row[_HIGH] = parent, low, first, last
    float64_at(target)[np.uint64(SCORE)] = score
    uint16_at(target)[token_word] = token
    float32_at(target)[prob_word] = min(log_prob, 0.0)


@compiled
def expand_one(layout, level, bits, rows, live, log_probs, next_rows, next_live):
    """:func:`~ace_core.kernels.expand.expand` of one segment, over the whole vocabulary; the same arguments."""
    levels = len(layout)
    # as they are counted in a row's numbers of 16 and of 32 bits
    token_word, prob_word = np.uint64(4 * (LOW + 2) + level), np.uint64(2 * probs_word(1, levels) + level)
    entry = layout[level, 0]
    wide, tokens, pointers = entry[WIDE] != 0, np.uint64(entry[TOKENS]), np.uint64(entry[POINTERS])
    far, stride = entry[POINTERS_WIDE] != 0, np.uint64(entry[STRIDE])
    bytes_each, pointer_bytes = np.uint64(entry[STRIDE] << wide), np.uint64(8 if far else 4)
    keep, words, table = next_rows.shape[1], np.uint64(rows.shape[2]), log_probs.reshape(-1)
    row_bytes = np.uint64(8) * words
    beam, vocabulary = np.uint64(log_probs.shape[1]), np.uint64(log_probs.shape[2])
    step = vocabulary if beam > np.uint64(1) else np.uint64(0)
    room = 3 * keep + 64
    # held to the end, where it is used once more: what follows are addresses in it
    work = np.empty(8 * room + lanes_room(rows.shape[1]), np.int64)
    at_work, piece = np.uint64(work.ctypes.data), np.uint64(8 * room)
    slots, reals = int64_at(at_work), float64_at(at_work)
    order, other = int64_at(at_work + np.uint64(4) * piece), int64_at(at_work + np.uint64(5) * piece)
    lanes = at_work + np.uint64(8) * piece
    values, scratch = float64_at(at_work + np.uint64(6) * piece), float64_at(at_work + np.uint64(7) * piece)
    first_row, of_query = np.uint64(rows.ctypes.data), np.uint64(rows.shape[1]) * row_bytes
    next_row = np.uint64(next_rows.ctypes.data)
    for q in range(len(live)):
        address = first_row + np.uint64(q) * of_query
        if q + 2 < len(live):
            further = address + of_query + of_query
            _ask_for_children(tokens, bytes_each, further, np.uint64(live[q + 2]), words)
        begin, here = np.uint64(q) * beam * vocabulary, np.uint64(live[q])
        then = np.uint64(live[q + 1]) if q + 1 < len(live) else np.uint64(0)
        own_bits = bits[q % len(bits), level, 0]
        if wide:
            size = _expand_query(
                uint16_at(tokens), entry, own_bits, address, here, then, of_query, words, table, begin, step,
                vocabulary, beam, np.uint64(keep), slots, reals, np.uint64(room), values, scratch, lanes,
            )  # fmt: skip
        else:
            size = _expand_query(
                uint8_at(tokens), entry, own_bits, address, here, then, of_query, words, table, begin, step,
                vocabulary, beam, np.uint64(keep), slots, reals, np.uint64(room), values, scratch, lanes,
            )  # fmt: skip
        for number in range(np.uint64(size)):
            values[number] = reals[number * SLOT]
            if pointers != 0:  # of more than will be kept, but while these are put in order
                prefetch(pointers + np.uint64(slots[number * SLOT + CHILD]) * pointer_bytes)
        order_best_first(values, np.int64(size), order, other)
        found = min(np.int64(size), keep)
        next_live[q] = found
        for at in range(found):
            slot = np.uint64(order[at]) * SLOT
            parent = np.uint64(slots[slot + ROW])
            low, high = np.uint64(slots[slot + CHILD]), np.uint64(slots[slot + END])
            token = np.uint64(uint16_at(tokens)[low * stride] if wide else uint8_at(tokens)[low * stride])
            first, last = np.int64(low), np.int64(high)
            if pointers != 0:
                first = int64_at(pointers)[low] if far else np.int64(int32_at(pointers)[low])
                last = int64_at(pointers)[high] if far else np.int64(int32_at(pointers)[high])
            _write_row(
                next_row, address + parent * row_bytes, parent, low, high, first, last, reals[slot],
                token, token_word, table[begin + parent * step + token], prob_word, words,
            )  # fmt: skip
            next_row += row_bytes
        for _ in range(np.uint64(keep - found) * words):
            int64_at(next_row)[0] = 0
            next_row += np.uint64(8)
    work[0] = 0
