"""One level of a beam: the best children of its rows that exist and are allowed, joined over segments."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import NO_MASK, any_bit, child_at, compiled, token_at, uint8_at, uint16_at, uint64_at
from ace_core.kernels.selection import nth_largest, order_best_first

_MANY, _SHARE = 24, 12  # children for each row that is kept, from which on one of so many is looked at first


@compiled
def _run_end(address, wide, stride, node, end, flat):
    """End of the run of children with the token of ``node``: longer than one where nodes are items only."""
    if not flat or node + 1 == end:
        return node + 1
    token = token_at(address, wide, stride, node)
    if token_at(address, wide, stride, node + 1) != token:
        return node + 1
    low, high = node + 2, end
    while low < high:
        middle = (low + high) >> 1
        if token_at(address, wide, stride, middle) == token:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _join(tokens, wide, strides, pointers, cursor, ends, vocabulary, run_end):
    """The next child of a row, joined over its segments: its token (``vocabulary`` when there is none).

    Sets ``run_end`` to the end of its run in each segment, which is the cursor itself where it has none.
    """
    token = vocabulary
    for s in range(len(cursor)):
        if cursor[s] < ends[s]:
            token = min(token, token_at(tokens[s], wide[s], strides[s], cursor[s]))
    for s in range(len(cursor)):
        run_end[s] = cursor[s]
        if cursor[s] < ends[s] and token_at(tokens[s], wide[s], strides[s], cursor[s]) == token:
            run_end[s] = _run_end(tokens[s], wide[s], strides[s], cursor[s], ends[s], pointers[s] == 0)
    return token


@compiled
def any_allowed(bits, low, high):
    """Does any segment's interval [low, high) of nodes hold an allowed one?"""
    for s in range(len(low)):
        if low[s] < high[s] and (bits[s] == NO_MASK or any_bit(uint64_at(bits[s]), low[s], high[s])):
            return True
    return False


@compiled
def _log_sum(tokens, wide, strides, pointers, bits, ends, row, cursor, run_end):
    """Log of the summed probabilities of a row's allowed children; leaves ``cursor`` at their end."""
    largest = -np.inf
    total = 0.0
    while True:
        token = _join(tokens, wide, strides, pointers, cursor, ends, len(row), run_end)
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
def _scan(
    tokens, stride, at, first, end, flat, bits, base, row, norm, threshold,
    slot_score, slot_row, slot_low, slot_high, size, r,
):  # fmt: skip
    """Put the children at .. end - 1 of row r that pass the threshold and the mask into slots, until there is no room.

    The loop that a search's time is spent in: nearly all children end at its first comparison. Of children with one
    token (where nodes are items) the first stands for all; ``first`` is the row's first child. Returns the next child
    and slot.
    """
    margin = threshold - base + norm
    margin -= 1e-5 + 1e-6 * abs(margin)  # a bound that float32 cannot round past; the exact comparison follows
    bound = row.dtype.type(margin)
    allowed = uint64_at(bits)
    step = np.uint64(stride)
    for i in range(np.uint64(at), np.uint64(end)):
        value = row[tokens[i * step]]
        if value > bound:
            total = base + min(np.float64(value) - norm, 0.0)
            node = np.int64(i)
            token = tokens[i * step]
            if total > threshold and (not flat or node == first or token != tokens[(i - np.uint64(1)) * step]):
                stop = node + 1
                if flat and stop < end and tokens[stop * stride] == token:
                    low, high = stop + 1, end
                    while low < high:
                        middle = (low + high) >> 1
                        if tokens[middle * stride] == token:
                            low = middle + 1
                        else:
                            high = middle
                    stop = low
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
def _fill(
    threshold, tokens, wide, strides, pointers, bits, low, high, score, rows, log_probs, renormalise, best, keep,
    norms, cursor, run_end, slot_score, slot_row, slot_low, slot_high, scratch,
):  # fmt: skip
    """Fill slots with the best ``keep`` children above a threshold. Returns how many there are.

    Children whose score passes the threshold gather in slots, of which only the best are kept whenever they are full;
    the threshold is then the worst score kept.
    """
    segments = low.shape[1]
    room = slot_score.shape[0]
    vocabulary = log_probs.shape[1]
    shared = log_probs.shape[0] == 1
    narrow_tokens, wide_tokens = uint8_at(tokens[0]), uint16_at(tokens[0])
    size = 0
    for r in range(rows):
        base = score[r]
        if base + best <= threshold:
            break  # rows come by falling score
        row = log_probs[0 if shared else r]
        norm = 0.0
        if renormalise:
            for s in range(segments):
                cursor[s] = low[r, s]
            norm = _log_sum(tokens, wide, strides, pointers, bits, high[r], row, cursor, run_end)
            norms[r] = norm
        for s in range(segments):
            cursor[s] = low[r, s]
        while True:
            if segments == 1:
                if wide[0]:
                    cursor[0], size = _scan(
                        wide_tokens, strides[0], cursor[0], low[r, 0], high[r, 0], pointers[0] == 0, bits[0], base,
                        row, norm, threshold, slot_score, slot_row, slot_low, slot_high, size, r,
                    )  # fmt: skip
                else:
                    cursor[0], size = _scan(
                        narrow_tokens, strides[0], cursor[0], low[r, 0], high[r, 0], pointers[0] == 0, bits[0], base,
                        row, norm, threshold, slot_score, slot_row, slot_low, slot_high, size, r,
                    )  # fmt: skip
                done = cursor[0] == high[r, 0]
            else:
                done = False
                while size < room:
                    token = _join(tokens, wide, strides, pointers, cursor, high[r], vocabulary, run_end)
                    if token == vocabulary:
                        done = True
                        break
                    total = base + min(np.float64(row[token]) - norm, 0.0)
                    if total > threshold and any_allowed(bits, cursor, run_end):
                        slot_score[size] = total
                        slot_row[size] = r
                        for s in range(segments):
                            slot_low[size, s] = cursor[s]
                            slot_high[size, s] = run_end[s]
                        size += 1
                    for s in range(segments):
                        cursor[s] = run_end[s]
            if done:
                break
            size, threshold = cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch)
    return cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch)[0]


@compiled
def _expand_query(
    tokens, wide, strides, pointers, pointers_wide, level, bits,
    low, high, score, codes, level_log_prob, rows, log_probs, renormalise,
    slot_score, slot_row, slot_low, slot_high, scratch, order, other,
    next_parent, next_low, next_high, next_score, next_codes, next_level_log_prob,
):  # fmt: skip
    """:func:`expand` for one query: the same arrays without their first axis, the layout's of one level. Returns the
    number of rows."""
    segments = low.shape[1]
    keep = next_score.shape[0]
    shared = log_probs.shape[0] == 1
    cursor = np.empty(segments, np.int64)
    run_end = np.empty(segments, np.int64)
    norms = np.zeros(rows if renormalise else 1)
    best = 0.0  # no child scores above its row by more than this
    likely = -np.inf
    if not renormalise:
        if shared:
            best = -np.inf
            for token in range(log_probs.shape[1]):
                best = max(best, np.float64(log_probs[0, token]))
        if segments == 1:
            begin, end = low[:, 0], high[:, 0]
            if wide[0]:
                wide_tokens = uint16_at(tokens[0])
                likely = likely_threshold(
                    wide_tokens, strides[0], rows, begin, end, score, bits[0], log_probs, keep, slot_score, scratch
                )
            else:
                narrow_tokens = uint8_at(tokens[0])
                likely = likely_threshold(
                    narrow_tokens, strides[0], rows, begin, end, score, bits[0], log_probs, keep, slot_score, scratch
                )
    size = _fill(
        likely, tokens, wide, strides, pointers, bits, low, high, score, rows, log_probs, renormalise, best, keep,
        norms, cursor, run_end, slot_score, slot_row, slot_low, slot_high, scratch,
    )  # fmt: skip
    if size < keep and likely > -np.inf:
        size = _fill(
            -np.inf, tokens, wide, strides, pointers, bits, low, high, score, rows, log_probs, renormalise, best, keep,
            norms, cursor, run_end, slot_score, slot_row, slot_low, slot_high, scratch,
        )  # fmt: skip
    order_best_first(slot_score, size, order, other)
    for at in range(size):
        slot = order[at]
        own = slot_row[slot]
        spelled = np.int64(0)
        for s in range(segments):
            begin = slot_low[slot, s]
            end = slot_high[slot, s]
            if begin < end:
                spelled = token_at(tokens[s], wide[s], strides[s], begin)
            if pointers[s] != 0:
                begin = child_at(pointers[s], pointers_wide[s], begin)
                end = child_at(pointers[s], pointers_wide[s], end)
            next_low[at, s] = begin
            next_high[at, s] = end
        for done_level in range(level):
            next_codes[at, done_level] = codes[own, done_level]
            next_level_log_prob[at, done_level] = level_log_prob[own, done_level]
        norm = norms[own if renormalise else 0]
        next_codes[at, level] = spelled
        next_level_log_prob[at, level] = min(np.float64(log_probs[0 if shared else own, spelled]) - norm, 0.0)
        next_score[at] = slot_score[slot]
        next_parent[at] = own
    return size


@compiled
def expand(
    layout, level, bits, low, high, score, codes, level_log_prob, rows, log_probs, renormalise,
    next_parent, next_low, next_high, next_score, next_codes, next_level_log_prob, next_rows,
):  # fmt: skip
    """One level of the beam, for every query: the best real and allowed children of its rows.

    Children are joined over the segments by token. Best first; ties go to the earlier row, then the lower token.

    Args (S segments, L levels, n queries, B rows, V tokens at this level, C rows that result at most):
        layout: a :class:`~ace_core.kernels.compiled.Layout`.
        bits: (n or 1, L, S) uint64 addresses of the allowed nodes' bitmaps, 0 for all.
        low, high: (n, B, S) int64, the interval of children of each row, in nodes of this level.
        score: (n, B) float64; codes, level_log_prob: (n, B, L) uint16 and float64, up to this level.
        rows: (n,) live rows, which come first and by falling score.
        log_probs: (n, B or 1, V) of this level's tokens, none above zero; 1: the same for all rows of a query.
        renormalise: over the allowed children of each row instead of the whole vocabulary.
        next_*: the rows that result, (n, C, ...); next_low and next_high are intervals of their children (of items,
            after the last level).
    """
    queries, _, segments = low.shape
    room = 3 * next_score.shape[1] + 64
    slot_score, scratch = np.empty(room), np.empty(room)
    slot_row, order, other = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    slot_low, slot_high = np.empty((room, segments), np.int64), np.empty((room, segments), np.int64)
    for q in range(queries):
        next_rows[q] = _expand_query(
            layout.tokens[level], layout.wide[level], layout.strides[level], layout.pointers[level],
            layout.pointers_wide, level, bits[q % bits.shape[0], level],
            low[q], high[q], score[q], codes[q], level_log_prob[q], rows[q], log_probs[q], renormalise,
            slot_score, slot_row, slot_low, slot_high, scratch, order, other,
            next_parent[q], next_low[q], next_high[q], next_score[q], next_codes[q], next_level_log_prob[q],
        )  # fmt: skip
