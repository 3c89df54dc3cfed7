"""The best identifiers below prefixes that are joined over several segments."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import compiled, token_at
from ace_core.kernels.expand import any_allowed, cut
from ace_core.kernels.selection import order_best_first


@compiled
def _compare(layout, depth, s, item, other_s, other_item):
    """Order of two items by their tokens from ``depth`` on: negative, 0 or positive."""
    for level in range(depth, len(layout.tokens)):
        a = token_at(layout.tokens[level, s], layout.wide[level, s], layout.strides[level, s], item)
        b = token_at(
            layout.tokens[level, other_s], layout.wide[level, other_s], layout.strides[level, other_s], other_item
        )
        if a != b:
            return a - b
    return 0


@compiled
def _identifier_end(layout, depth, s, item, end):
    """End of the run of items up to ``end`` with the tokens of ``item`` from ``depth`` on."""
    if item + 1 == end or _compare(layout, depth, s, item, s, item + 1) != 0:
        return item + 1
    low, high = item + 2, end
    while low < high:
        middle = (low + high) >> 1
        if _compare(layout, depth, s, item, s, middle) == 0:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _complete_query(
    layout, depth, bits, table, offsets, rows, low, high, base, codes,
    slot_score, slot_row, slot_low, slot_high, scratch, order, other,
    done_low, done_high, done_score, done_codes, done_level_log_prob,
):  # fmt: skip
    """:func:`complete` for one query. Returns the number of rows."""
    levels, segments = layout.tokens.shape
    keep, room = len(done_score), len(slot_score)
    cursor, run_end = np.empty(segments, np.int64), np.empty(segments, np.int64)
    size = 0
    threshold = -np.inf
    for r in range(rows):
        for s in range(segments):
            cursor[s] = low[r, s]
        while True:
            least = -1
            for s in range(segments):
                if cursor[s] < high[r, s] and (
                    least < 0 or _compare(layout, depth, s, cursor[s], least, cursor[least]) < 0
                ):
                    least = s
            if least < 0:
                break
            total = base[r]
            for level in range(depth, levels):
                address, wide, stride = (
                    layout.tokens[level, least],
                    layout.wide[level, least],
                    layout.strides[level, least],
                )
                total += table[offsets[level] + token_at(address, wide, stride, cursor[least])]
            for s in range(segments):
                run_end[s] = cursor[s]
                if cursor[s] < high[r, s] and _compare(layout, depth, s, cursor[s], least, cursor[least]) == 0:
                    run_end[s] = _identifier_end(layout, depth, s, cursor[s], high[r, s])
            if total > threshold and any_allowed(bits, cursor, run_end):
                slot_score[size] = total
                slot_row[size] = r
                for s in range(segments):
                    slot_low[size, s] = cursor[s]
                    slot_high[size, s] = run_end[s]
                size += 1
                if size == room:
                    size, threshold = cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch)
            for s in range(segments):
                cursor[s] = run_end[s]
    size, threshold = cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch)
    order_best_first(slot_score, size, order, other)
    for at in range(size):
        slot = order[at]
        done_score[at] = slot_score[slot]
        for s in range(segments):
            begin, end = slot_low[slot, s], slot_high[slot, s]
            done_low[at, s] = begin
            done_high[at, s] = end
            for level in range(depth, levels if begin < end else depth):
                address, wide, stride = layout.tokens[level, s], layout.wide[level, s], layout.strides[level, s]
                done_codes[at, level] = token_at(address, wide, stride, begin)
        for level in range(levels):
            if level < depth:
                done_codes[at, level] = codes[slot_row[slot], level]
            done_level_log_prob[at, level] = table[offsets[level] + done_codes[at, level]]
    return size


@compiled
def complete(
    layout, depth, bits, log_probs, offsets, rows, low, high, base, codes,
    done_low, done_high, done_score, done_codes, done_level_log_prob, done_rows,
):  # fmt: skip
    """The best identifiers below prefixes of ``depth`` tokens, for every query.

    Args (as in :func:`~ace_core.kernels.expand.expand`, and):
        log_probs: (n, sum of V) of all levels' tokens side by side; offsets: (L + 1,) where each level begins.
        rows: (n,) prefixes of each query; low, high: (n, B, S) int64 their items; base: (n, B) float64 their scores;
            codes: (n, B, L) uint16 their tokens.
        done_*: (n, C, ...) the complete rows that result, at most C of each query.
    """
    queries, keep, segments = done_low.shape
    room = 2 * keep + 256
    slot_score, scratch = np.empty(room), np.empty(room)
    slot_row, order, other = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    slot_low, slot_high = np.empty((room, segments), np.int64), np.empty((room, segments), np.int64)
    table = np.empty(log_probs.shape[1])
    for q in range(queries):
        for i in range(len(table)):
            table[i] = min(np.float64(log_probs[q, i]), 0.0)
        done_rows[q] = _complete_query(
            layout, depth, bits[q % bits.shape[0], len(layout.tokens) - 1], table, offsets,
            rows[q], low[q], high[q], base[q], codes[q],
            slot_score, slot_row, slot_low, slot_high, scratch, order, other,
            done_low[q], done_high[q], done_score[q], done_codes[q], done_level_log_prob[q],
        )  # fmt: skip
