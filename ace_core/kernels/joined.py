"""Children of rows that are joined over several segments, or share their probability."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import cut, token_end
from ace_core.kernels.compiled import (
    NO_BITMAP,
    POINTERS,
    STRIDE,
    TOKENS,
    WIDE,
    any_bit,
    compiled,
    token_at,
    uint8_at,
    uint16_at,
    uint64_at,
)


@compiled
def _join(layout, level, cursor, ends, vocabulary, run_end):
    """The next child of a row, joined over its segments: its token (``vocabulary`` when there is none).

    Sets ``run_end`` to the end of its run in each segment, which is the cursor itself where it has none.
    """
    token = vocabulary
    for s in range(len(cursor)):
        if cursor[s] < ends[s]:
            token = min(token, token_at(layout, level, s, cursor[s]))
    for s in range(len(cursor)):
        run_end[s] = cursor[s]
        if cursor[s] < ends[s] and token_at(layout, level, s, cursor[s]) == token:
            run_end[s] = cursor[s] + 1
            if layout[level, s, POINTERS] == 0:
                tokens, stride = np.uint64(layout[level, s, TOKENS]), layout[level, s, STRIDE]
                if layout[level, s, WIDE]:
                    run_end[s] = token_end(uint16_at(tokens), stride, cursor[s], ends[s])
                else:
                    run_end[s] = token_end(uint8_at(tokens), stride, cursor[s], ends[s])
    return token


@compiled
def any_allowed(bits, low, high):
    """Does any segment's interval [low, high) of nodes hold an allowed one?"""
    for s in range(len(low)):
        if low[s] < high[s] and (bits[s] == NO_BITMAP or any_bit(uint64_at(bits[s]), low[s], high[s])):
            return True
    return False


@compiled
def _log_sum(layout, level, bits, ends, row, cursor, run_end):
    """Log of the summed probabilities of a row's allowed children; leaves ``cursor`` at their end."""
    largest = -np.inf
    total = 0.0
    while True:
        token = _join(layout, level, cursor, ends, len(row), run_end)
        if token == len(row):
            return largest + np.log(total) if total > 0 else 0.0
        value = np.float64(row[token])
        if value > -np.inf and any_allowed(bits, cursor, run_end):
            if value > largest:
                total = total * np.exp(largest - value) + 1.0
                largest = value
            else:
                total += np.exp(value - largest)
        for s in range(len(cursor)):
            cursor[s] = run_end[s]


@compiled
def best_joined(
    layout, level, bits, low, high, score, log_probs, renormalise, keep,
    norms, cursor, run_end, slot_score, slot_row, slot_low, slot_high, scratch,
):  # fmt: skip
    """:func:`best_of_one` for any number of segments, and by probabilities that a row's allowed children share
    (``norms``: the logarithms of their sums, which this sets)."""
    size = 0
    threshold = -np.inf
    for r in range(len(low)):
        if score[r] <= threshold:
            break  # rows come by falling score
        row = log_probs[0 if len(log_probs) == 1 else r]
        norms[r] = 0.0
        for s in range(len(cursor)):
            cursor[s] = low[r, s]
        if renormalise:
            norms[r] = _log_sum(layout, level, bits, high[r], row, cursor, run_end)
            for s in range(len(cursor)):
                cursor[s] = low[r, s]
        while True:
            token = _join(layout, level, cursor, high[r], len(row), run_end)
            if token == len(row):
                break
            total = score[r] + min(np.float64(row[token]) - norms[r], 0.0)
            if total > threshold and any_allowed(bits, cursor, run_end):
                if size == len(slot_score):
                    size, threshold = cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch)
                if total > threshold:
                    slot_score[size] = total
                    slot_row[size] = r
                    for s in range(len(cursor)):
                        slot_low[size, s], slot_high[size, s] = cursor[s], run_end[s]
                    size += 1
            for s in range(len(cursor)):
                cursor[s] = run_end[s]
    return size
