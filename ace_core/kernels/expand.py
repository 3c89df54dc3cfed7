"""One level of a beam: the best children of its rows that exist and are allowed, joined over segments."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import (
    LOW,
    NO_MASK,
    PARENT,
    POINTERS,
    SCORE,
    STRIDE,
    TOKENS,
    WIDE,
    any_bit,
    child_at,
    compiled,
    prefetch,
    token_at,
    uint8_at,
    uint16_at,
    uint64_at,
)
from ace_core.kernels.selection import nth_largest, order_best_first

_MANY, _SHARE = 24, 12  # children for each row that is kept, from which on one of so many is looked at first


@compiled
def _run_end(tokens, stride, node, end):
    """End of the run of children with the token of ``node``: where nodes are items, equal tokens are one child."""
    token = tokens[node * stride]
    if node + 1 == end or tokens[(node + 1) * stride] != token:
        return node + 1
    low, high = node + 2, end
    while low < high:
        middle = (low + high) >> 1
        if tokens[middle * stride] == token:
            low = middle + 1
        else:
            high = middle
    return low


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
                    run_end[s] = _run_end(uint16_at(tokens), stride, cursor[s], ends[s])
                else:
                    run_end[s] = _run_end(uint8_at(tokens), stride, cursor[s], ends[s])
    return token


@compiled
def any_allowed(bits, low, high):
    """Does any segment's interval [low, high) of nodes hold an allowed one?"""
    for s in range(len(low)):
        if low[s] < high[s] and (bits[s] == NO_MASK or any_bit(uint64_at(bits[s]), low[s], high[s])):
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
def cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch):
    """Drop all slots but the best ``keep``.

    Order is kept, so that of equal scores the earlier row and the lower token stay. Returns how many are left, and
    the score that another must exceed.
    """
    if size < keep:
        return size, -np.inf
    segments = slot_low.shape[1]
    threshold = nth_largest(slot_score, size, keep, scratch)
    ties = keep
    for i in range(size):
        ties -= slot_score[i] > threshold
    left = 0
    for i in range(size):
        score = slot_score[i]
        tie = (score == threshold) & (ties > 0)
        ties -= tie
        slot_score[left] = score
        slot_row[left] = slot_row[i]
        for s in range(segments):
            slot_low[left, s] = slot_low[i, s]
            slot_high[left, s] = slot_high[i, s]
        left += (score > threshold) | tie
    return left, threshold


@compiled
def likely_threshold(tokens, stride, rows, low, high, score, bits, log_probs, keep, values, scratch):
    """A score that somewhat more than ``keep`` allowed children of rows are likely to pass, from a sample of them; -inf
    where they are few.

    Args:
        tokens: of the children, ``stride`` apart; low, high, score: of the rows; bits: address of the bitmap of allowed
            children, 0 for all; log_probs: (1 or rows, V), none above zero.
        values, scratch: room for the sample.
    """
    children = 0
    for r in range(rows):
        children += high[r] - low[r]
    if children < _MANY * keep:
        return -np.inf
    share = max(_SHARE, children // len(values) + 1)  # one child of so many is looked at
    allowed = uint64_at(bits)
    count = at = 0
    for r in range(rows):
        row = log_probs[0 if log_probs.shape[0] == 1 else r]
        while at < high[r] - low[r]:
            node = low[r] + at
            if bits == NO_MASK or (allowed[node >> 6] >> np.uint64(node & 63)) & np.uint64(1):
                values[count] = score[r] + min(np.float64(row[tokens[np.uint64(node * stride)]]), 0.0)
                count += 1
            at += share
        at -= high[r] - low[r]
    expected = keep / share
    n = np.int64(expected + 3.0 * np.sqrt(expected)) + 1
    return nth_largest(values, count, n, scratch) if n <= count else -np.inf


@compiled
def _scan(
    tokens, stride, at, first, end, flat, bits, base, row, threshold, slot_score, slot_row, slot_low, slot_high, size, r
):  # fmt: skip
    """Put the children at .. end - 1 of row r that pass the threshold and the mask into slots, until there is no room.

    The loop that a search's time is spent in: nearly all children end at its first comparison. Of children with one
    token (where nodes are items) the first stands for all; ``first`` is the row's first child. Returns the next child
    and slot.
    """
    margin = threshold - base
    margin -= 1e-5 + 1e-6 * abs(margin)  # a bound that float32 cannot round past; the exact comparison follows
    bound = row.dtype.type(margin)
    allowed = uint64_at(bits)
    step = np.uint64(stride)
    for i in range(np.uint64(at), np.uint64(end)):
        value = row[tokens[i * step]]
        if value > bound:
            total = base + min(np.float64(value), 0.0)
            node = np.int64(i)
            if total > threshold and (
                not flat or node == first or tokens[i * step] != tokens[(i - np.uint64(1)) * step]
            ):
                stop = _run_end(tokens, stride, node, end) if flat else node + 1
                if bits == NO_MASK or any_bit(allowed, node, stop):
                    if size == len(slot_score):
                        return node, size
                    slot_score[size] = total
                    slot_row[size] = r
                    slot_low[size, 0] = node
                    slot_high[size, 0] = stop
                    size += 1
    return end, size


@compiled
def _best_of_many(
    threshold, tokens, stride, flat, bits, low, high, score, log_probs, best, keep,
    slot_score, slot_row, slot_low, slot_high, scratch,
):  # fmt: skip
    """Fill slots with the best ``keep`` children of rows above a threshold. Returns how many there are.

    Children whose score passes the threshold gather in slots, of which only the best are kept whenever they are full;
    the threshold is then the worst score kept. No child scores above its row by more than ``best``.
    """
    size = 0
    for r in range(len(low)):
        if score[r] + best <= threshold:
            break  # rows come by falling score
        row = log_probs[0 if len(log_probs) == 1 else r]
        at = low[r]
        while True:
            at, size = _scan(
                tokens, stride, at, low[r], high[r], flat, bits, score[r], row, threshold,
                slot_score, slot_row, slot_low, slot_high, size, r,
            )  # fmt: skip
            if at == high[r]:
                break
            size, threshold = cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch)
    return size


@compiled
def _all_of_few(
    tokens, stride, flat, bits, low, high, score, log_probs, slot_score, slot_row, slot_low, slot_high
):  # fmt: skip
    """Put all allowed children of rows into slots, for which there is room. Returns how many there are."""
    shared = len(log_probs) == 1
    allowed = uint64_at(bits)
    size = 0
    for r in range(len(low)):
        node, end = low[r], high[r]
        while node < end:
            stop = _run_end(tokens, stride, node, end) if flat else node + 1
            total = score[r] + min(np.float64(log_probs[0 if shared else r, tokens[node * stride]]), 0.0)
            slot_score[size] = total
            slot_row[size] = r
            slot_low[size, 0] = node
            slot_high[size, 0] = stop
            size += (total > -np.inf) and (bits == NO_MASK or any_bit(allowed, node, stop))
            node = stop
    return size


@compiled
def _best_of_one(
    tokens, stride, flat, bits, low, high, score, log_probs, keep,
    slot_score, slot_row, slot_low, slot_high, scratch,
):  # fmt: skip
    """Fill slots with children of the rows of one segment, the best ``keep`` among them. Returns how many there are."""
    children = 0
    for r in range(len(low)):
        children += high[r] - low[r]
    if children < len(slot_score):
        return _all_of_few(
            tokens, stride, flat, bits, low, high, score, log_probs, slot_score, slot_row, slot_low, slot_high
        )
    best = 0.0
    if len(log_probs) == 1:
        best = -np.inf
        for token in range(log_probs.shape[1]):
            best = max(best, min(np.float64(log_probs[0, token]), 0.0))
    threshold = likely_threshold(tokens, stride, len(low), low, high, score, bits, log_probs, keep, slot_score, scratch)
    size = _best_of_many(
        threshold, tokens, stride, flat, bits, low, high, score, log_probs, best, keep,
        slot_score, slot_row, slot_low, slot_high, scratch,
    )  # fmt: skip
    if size < keep and threshold > -np.inf:
        size = _best_of_many(
            -np.inf, tokens, stride, flat, bits, low, high, score, log_probs, best, keep,
            slot_score, slot_row, slot_low, slot_high, scratch,
        )  # fmt: skip
    return size


@compiled
def _best_joined(
    layout, level, bits, low, high, score, log_probs, renormalise, keep,
    norms, cursor, run_end, slot_score, slot_row, slot_low, slot_high, scratch,
):  # fmt: skip
    """:func:`_best_of_one` for any number of segments, and by probabilities that a row's allowed children share
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
            _ask_for_scores(layout[level, 0], rows[q + 1], live[q + 1], LOW + segments, log_probs[q + 1])
        count = live[q]
        own_bits, own, score = bits[q % len(bits), level], log_probs[q], reals[q, :count, SCORE]
        if one and layout[level, 0, WIDE]:
            size = _best_of_one(
                uint16_at(tokens), stride, flat, own_bits[0], rows[q, :count, LOW], rows[q, :count, high_at], score,
                own, keep, slot_score, slot_row, slot_low, slot_high, scratch,
            )  # fmt: skip
        elif one:
            size = _best_of_one(
                uint8_at(tokens), stride, flat, own_bits[0], rows[q, :count, LOW], rows[q, :count, high_at], score,
                own, keep, slot_score, slot_row, slot_low, slot_high, scratch,
            )  # fmt: skip
        else:
            size = _best_joined(
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
