"""The best identifiers below prefixes that are joined over several segments."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.children import cut
from ace_core.kernels.compiled import LOW, PARENT, SCORE, compiled, probs_word, token_at
from ace_core.kernels.joined import any_allowed
from ace_core.kernels.selection import order_best_first


@compiled
def _compare(layout, depth, s, item, other_s, other_item):
    """Order of two items by their tokens from ``depth`` on: negative, 0 or positive."""
    for level in range(depth, len(layout)):
        a, b = token_at(layout, level, s, item), token_at(layout, level, other_s, other_item)
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
    layout, depth, bits, table, offsets, rows, live,
    slot_score, slot_row, slot_low, slot_high, scratch, order, other, done,
):  # fmt: skip
    """:func:`complete` for one query. Returns the number of rows."""
    levels, segments = layout.shape[:2]
    high_at, codes_at = LOW + segments, LOW + 2 * segments
    reals, done_reals = rows.view(np.float64), done.view(np.float64)
    keep, room = len(done), len(slot_score)
    cursor, run_end = np.empty(segments, np.int64), np.empty(segments, np.int64)
    size = 0
    threshold = -np.inf
    for r in range(live):
        for s in range(segments):
            cursor[s] = rows[r, LOW + s]
        ends = rows[r, high_at:codes_at]
        while True:
            least = -1
            for s in range(segments):
                if cursor[s] < ends[s] and (
                    least < 0 or _compare(layout, depth, s, cursor[s], least, cursor[least]) < 0
                ):
                    least = s
            if least < 0:
                break
            total = reals[r, SCORE]
            for level in range(depth, levels):
                total += table[offsets[level] + token_at(layout, level, least, cursor[least])]
            for s in range(segments):
                run_end[s] = cursor[s]
                if cursor[s] < ends[s] and _compare(layout, depth, s, cursor[s], least, cursor[least]) == 0:
                    run_end[s] = _identifier_end(layout, depth, s, cursor[s], ends[s])
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
    codes, done_codes, done_probs = rows.view(np.uint16), done.view(np.uint16), done.view(np.float32)
    code_at, prob_at = 4 * codes_at, 2 * probs_word(segments, levels)
    for at in range(size):
        slot = order[at]
        done_reals[at, SCORE] = slot_score[slot]
        done[at, PARENT] = slot_row[slot]
        for level in range(depth):
            done_codes[at, code_at + level] = codes[slot_row[slot], code_at + level]
        for s in range(segments):
            begin, end = slot_low[slot, s], slot_high[slot, s]
            done[at, LOW + s], done[at, high_at + s] = begin, end
            for level in range(depth, levels if begin < end else depth):
                done_codes[at, code_at + level] = token_at(layout, level, s, begin)
        for level in range(levels):
            done_probs[at, prob_at + level] = table[offsets[level] + done_codes[at, code_at + level]]
    done[size:] = 0
    return size


@compiled
def complete(layout, depth, bits, log_probs, offsets, rows, live, done, done_live):
    """The best identifiers below prefixes of ``depth`` tokens, for every query.

    Args (as in :func:`~ace_core.kernels.expand.expand`, and):
        log_probs: (n, sum of V) of all levels' tokens side by side; offsets: (L + 1,) where each level begins.
        rows: (n, B, W) prefixes, whose intervals are of items; live: (n,) how many there are.
        done, done_live: (n, C, W) the complete rows that result, and (n,) how many.
    """
    keep, segments = done.shape[1], layout.shape[1]
    room = 2 * keep + 256
    slot_score, scratch = np.empty(room), np.empty(room)
    slot_row, order, other = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    slot_low, slot_high = np.empty((room, segments), np.int64), np.empty((room, segments), np.int64)
    table = np.empty(log_probs.shape[1])
    for q in range(len(live)):
        for i in range(len(table)):
            table[i] = min(np.float64(log_probs[q, i]), 0.0)
        done_live[q] = _complete_query(
            layout, depth, bits[q % bits.shape[0], len(layout) - 1], table, offsets, rows[q], live[q],
            slot_score, slot_row, slot_low, slot_high, scratch, order, other, done[q],
        )  # fmt: skip
