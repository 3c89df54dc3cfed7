"""One level of a beam: the best children of its rows that exist and are allowed, joined over segments."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import best_of_one
from ace_core.kernels.compiled import (
    LOW,
    PARENT,
    POINTERS,
    SCORE,
    STRIDE,
    TOKENS,
    WIDE,
    child_at,
    compiled,
    prefetch,
    token_at,
    uint8_at,
    uint16_at,
)
from ace_core.kernels.joined import best_joined
from ace_core.kernels.selection import order_best_first


@compiled
def _ask_for_tokens(entry, rows, live):
    """Ask for the memory of rows' children."""
    tokens, step = np.uint64(entry[TOKENS]), np.uint64(entry[STRIDE] * (2 if entry[WIDE] else 1))
    for r in range(live):
        prefetch(tokens + np.uint64(rows[r, LOW]) * step)


@compiled
def _ask_for_scores(entry, rows, live, high_at, log_probs):
    """Ask for the memory that rows' children are scored from: all of it where they are many."""
    tokens, stride = np.uint64(entry[TOKENS]), entry[STRIDE]
    scores, size = np.uint64(log_probs.ctypes.data), np.uint64(log_probs.itemsize)
    row_bytes = np.uint64(log_probs.shape[1]) * size
    for r in range(live):
        begin, end = rows[r, LOW], rows[r, high_at]
        here = scores + np.uint64(r if r < len(log_probs) else 0) * row_bytes
        if end - begin > 16:
            for at in range(np.uint64(0), row_bytes, np.uint64(64)):
                prefetch(here + at)
        else:
            for node in range(begin, end):
                token = uint16_at(tokens)[node * stride] if entry[WIDE] else np.uint16(uint8_at(tokens)[node * stride])
                prefetch(here + np.uint64(token) * size)


@compiled
def expand(layout, level, bits, rows, live, log_probs, renormalise, next_rows, next_live):
    """One level of the beam, for every query: the best real and allowed children of its rows.

    Children are joined over the segments by token. Best first; ties go to the earlier row, then the lower token.

    Args (S segments, L levels, n queries, B rows, V tokens at this level, C rows that result at most):
        layout: (L, S, 5) int64, see :mod:`ace_core.kernels.compiled`, where rows' words are explained, too.
        bits: (n or 1, L, S) uint64 addresses of the allowed nodes' bitmaps, 0 for all.
        rows: (n, B, W) int64; live: (n,) how many there are, first and by falling score.
        log_probs: (n, B or 1, V) of this level's tokens, none above zero; 1: the same for all rows of a query.
        renormalise: over the allowed children of each row instead of the whole vocabulary.
        next_rows, next_live: the rows that result, (n, C, W) and (n,); their intervals are of their children (of items,
            after the last level).
    """
    levels, segments = layout.shape[:2]
    high_at, codes_at = LOW + segments, LOW + 2 * segments
    probs_at = codes_at + levels
    reals, next_reals = rows.view(np.float64), next_rows.view(np.float64)
    keep = next_rows.shape[1]
    room = 3 * keep + 64
    slot_score, scratch, norms = np.empty(room), np.empty(room), np.zeros(rows.shape[1])
    slot_row, order, other = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    slot_low, slot_high = np.empty((room, segments), np.int64), np.empty((room, segments), np.int64)
    cursor, run_end = np.empty(segments, np.int64), np.empty(segments, np.int64)
    one = segments == 1 and not renormalise
    tokens, stride, flat = (
        np.uint64(layout[level, 0, TOKENS]),
        layout[level, 0, STRIDE],
        layout[level, 0, POINTERS] == 0,
    )
    for q in range(len(live)):
        if q + 2 < len(live):
            _ask_for_tokens(layout[level, 0], rows[q + 2], live[q + 2])
        if q + 1 < len(live):
            _ask_for_scores(layout[level, 0], rows[q + 1], live[q + 1], high_at, log_probs[q + 1])
        count = live[q]
        own_bits, own, score = bits[q % len(bits), level], log_probs[q], reals[q, :count, SCORE]
        if one and layout[level, 0, WIDE]:
            size = best_of_one(
                uint16_at(tokens), stride, flat, own_bits[0], rows[q, :count, LOW], rows[q, :count, high_at], score,
                own, keep, slot_score, slot_row, slot_low, slot_high, scratch,
            )  # fmt: skip
        elif one:
            size = best_of_one(
                uint8_at(tokens), stride, flat, own_bits[0], rows[q, :count, LOW], rows[q, :count, high_at], score,
                own, keep, slot_score, slot_row, slot_low, slot_high, scratch,
            )  # fmt: skip
        else:
            size = best_joined(
                layout, level, own_bits, rows[q, :count, LOW:high_at], rows[q, :count, high_at:codes_at], score,
                own, renormalise, keep, norms, cursor, run_end, slot_score, slot_row, slot_low, slot_high, scratch,
            )  # fmt: skip
        order_best_first(slot_score, size, order, other)
        found = min(size, keep)
        next_live[q] = found
        for at in range(found):
            slot = order[at]
            parent = slot_row[slot]
            for word in range(codes_at, rows.shape[2]):
                next_rows[q, at, word] = rows[q, parent, word]
            token = np.int64(0)
            for s in range(segments):
                begin, end = slot_low[slot, s], slot_high[slot, s]
                if begin < end:
                    token = token_at(layout, level, s, begin)
                if layout[level, s, POINTERS] != 0:
                    begin, end = child_at(layout, level, s, begin), child_at(layout, level, s, end)
                next_rows[q, at, LOW + s], next_rows[q, at, high_at + s] = begin, end
            norm = norms[parent] if renormalise else 0.0
            next_reals[q, at, SCORE] = slot_score[slot]
            next_rows[q, at, PARENT] = parent
            next_rows[q, at, codes_at + level] = token
            log_prob = np.float64(own[0 if len(own) == 1 else parent, token])
            next_reals[q, at, probs_at + level] = min(log_prob - norm, 0.0)
        next_rows[q, found:] = 0
