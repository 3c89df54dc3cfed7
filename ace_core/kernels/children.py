"""The best children of the rows of one segment."""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import NO_MASK, any_bit, compiled, uint64_at
from ace_core.kernels.selection import nth_largest

_MANY, _SHARE = 24, 12  # children for each row that is kept, from which on one of so many is looked at first


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
def cut_nodes(node, parent, score, size, keep, scratch):
    """:func:`cut` for nodes or items of one segment."""
    if size < keep:
        return size, -np.inf
    threshold = nth_largest(score, size, keep, scratch)
    ties = keep
    for i in range(size):
        ties -= score[i] > threshold
    left = 0
    for i in range(size):
        value = score[i]
        tie = (value == threshold) & (ties > 0)
        ties -= tie
        node[left] = node[i]
        parent[left] = parent[i]
        score[left] = value
        left += (value > threshold) | tie
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
def token_end(tokens, stride, node, end):
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
                stop = token_end(tokens, stride, node, end) if flat else node + 1
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
            stop = token_end(tokens, stride, node, end) if flat else node + 1
            total = score[r] + min(np.float64(log_probs[0 if shared else r, tokens[node * stride]]), 0.0)
            slot_score[size] = total
            slot_row[size] = r
            slot_low[size, 0] = node
            slot_high[size, 0] = stop
            size += (total > -np.inf) and (bits == NO_MASK or any_bit(allowed, node, stop))
            node = stop
    return size


@compiled
def best_of_one(
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
