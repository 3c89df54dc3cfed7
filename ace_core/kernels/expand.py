"""One level of a beam: the best children of its rows that exist and are allowed, joined over segments.

:mod:`ace_core.kernels.single` does the same for one segment, in a third of the time.
"""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import LOW, NODE, PARENT, POINTERS, SCORE, child_at, compiled, probs_word, token_at
from ace_core.kernels.joined import best_joined
from ace_core.kernels.selection import order_best_first


@compiled
def expand(layout, level, bits, rows, live, log_probs, next_rows, next_live, renormalise):
    """One level of the beam, for every query: the best real and allowed children of its rows.

    Children are joined over the segments by token. Best first; ties go to the earlier row, then the lower token.

    Args (S segments, L levels, n queries, B rows, V tokens at this level, C rows that result at most):
        layout: (L, S, 6) int64, see :mod:`ace_core.kernels.compiled`, where rows' words are explained, too.
        bits: (n or 1, L, S) uint64 addresses of the allowed nodes' bitmaps, 0 for all.
        rows: (n, B, W) int64; live: (n,) how many there are, first and by falling score.
        log_probs: (n, B or 1, V) of this level's tokens, none above zero; 1: the same for all rows of a query.
        renormalise: over the allowed children of each row instead of the whole vocabulary.
        next_rows, next_live: the rows that result, (n, C, W) and (n,); their intervals are of their children (of items,
            after the last level).
    """
    levels, segments = layout.shape[:2]
    high_at, codes_at = LOW + segments, LOW + 2 * segments
    code_at, prob_at = 4 * codes_at + level, 2 * probs_word(segments, levels) + level  # as they are counted in views
    reals, next_reals = rows.view(np.float64), next_rows.view(np.float64)
    next_codes, next_probs = next_rows.view(np.uint16), next_rows.view(np.float32)
    keep = next_rows.shape[1]
    room = 3 * keep + 64
    slot_score, scratch, norms = np.empty(room), np.empty(room), np.zeros(rows.shape[1])
    slot_row, order, other = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    slot_low, slot_high = np.empty((room, segments), np.int64), np.empty((room, segments), np.int64)
    cursor, run_end = np.empty(segments, np.int64), np.empty(segments, np.int64)
    for q in range(len(live)):
        count = live[q]
        own = log_probs[q]
        size = best_joined(
            layout, level, bits[q % len(bits), level], rows[q, :count, LOW:high_at], rows[q, :count, high_at:codes_at],
            reals[q, :count, SCORE], own, renormalise, keep, norms, cursor, run_end,
            slot_score, slot_row, slot_low, slot_high, scratch,
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
            next_rows[q, at, PARENT], next_rows[q, at, NODE] = parent, slot_low[slot, 0]
            next_codes[q, at, code_at] = token
            log_prob = np.float64(own[0 if len(own) == 1 else parent, token])
            next_probs[q, at, prob_at] = min(log_prob - norm, 0.0)
        next_rows[q, found:] = 0
