"""Compiled walks over the constraint index (CPU).

Why numba: the walk is a data-dependent loop over a few hundred real children a row, which tensor operations can only
do by padding every row to its level's vocabulary; a compiled loop looks at the children alone and rejects most of
them with one comparison. A C++ torch operator would need a compiler on the user's machine.

Arrays of the index are passed as addresses, so one compilation serves any number of segments, 8- and 16-bit tokens,
32- and 64-bit pointers, memory-mapped (read-only) or not. Compiling costs about 4 s once a machine (``cache=True``
keeps it on disk). The kernels are serial and release the GIL: threads that search at the same time share nothing but
the read-only index (numba's own thread pool is not used; its default layer is not thread-safe).
"""

from __future__ import annotations

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

NO_MASK = np.uint64(0)


@intrinsic
def _pointer(typingctx, address):
    """An address (uint64) as a C pointer for ``numba.carray``."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _uint64(address):
    return numba.carray(_pointer(address), (1,), np.uint64)  # type: ignore[call-arg]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _uint32(address):
    return numba.carray(_pointer(address), (1,), np.uint32)  # type: ignore[call-arg]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _popcount(word):
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _rank(words, before, item):
    word = item >> 6
    below = (np.uint64(1) << np.uint64(item & 63)) - np.uint64(1)
    return np.int64(before[word]) + _popcount(words[word] & below)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _token(address, wide, node):
    if wide:
        return np.int64(numba.carray(_pointer(address), (1,), np.uint16)[node])  # type: ignore[call-arg]
    return np.int64(numba.carray(_pointer(address), (1,), np.uint8)[node])  # type: ignore[call-arg]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _child(address, wide, node):
    if wide:
        return np.int64(numba.carray(_pointer(address), (1,), np.int64)[node])  # type: ignore[call-arg]
    return np.int64(numba.carray(_pointer(address), (1,), np.int32)[node])  # type: ignore[call-arg]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _copy(source, target):
    for s in range(len(source)):  # array assignment would compile numba's general broadcasting
        target[s] = source[s]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _run_end(address, wide, node, end, last):
    """End of the run of children with the token of ``node``: longer than one on the last level only."""
    if not last or node + 1 == end:
        return node + 1
    token = _token(address, wide, node)
    if _token(address, wide, node + 1) != token:
        return node + 1
    low, high = node + 2, end
    while low < high:
        middle = (low + high) >> 1
        if _token(address, wide, middle) == token:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _join(tokens, wide, cursor, ends, last, vocabulary, run_end):
    """The next child of a row, joined over its segments: its token (``vocabulary`` when there is none).

    Sets ``run_end`` to the end of its run in each segment, which is the cursor itself where it has none.
    """
    token = vocabulary
    for s in range(len(cursor)):
        if cursor[s] < ends[s]:
            token = min(token, _token(tokens[s], wide, cursor[s]))
    for s in range(len(cursor)):
        run_end[s] = cursor[s]
        if cursor[s] < ends[s] and _token(tokens[s], wide, cursor[s]) == token:
            run_end[s] = _run_end(tokens[s], wide, cursor[s], ends[s], last)
    return token


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _any_allowed(pointers, pointers_wide, level, words, before, low, high):
    """Does any segment's node interval [low, high) of ``level`` hold an allowed item?"""
    for s in range(len(low)):
        begin = low[s]
        end = high[s]
        if end <= begin:
            continue
        if words[s] == NO_MASK:
            return True
        for deeper in range(level, pointers.shape[1]):
            begin = _child(pointers[s, deeper], pointers_wide[s], begin)
            end = _child(pointers[s, deeper], pointers_wide[s], end)
        bits = _uint64(words[s])
        counts = _uint32(before[s])
        if _rank(bits, counts, end) > _rank(bits, counts, begin):
            return True
    return False


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _log_sum(
    tokens, tokens_wide, pointers, pointers_wide, level, words, before, ends, row, cursor, run_end
):  # fmt: skip
    """Log of the summed probabilities of a row's allowed children; leaves ``cursor`` at their end."""
    largest = -np.inf
    total = 0.0
    while True:
        token = _join(tokens, tokens_wide, cursor, ends, level == pointers.shape[1], len(row), run_end)
        if token == len(row):
            return largest + np.log(total) if total > 0 else 0.0
        value = np.float64(row[token])
        if value > -np.inf and _any_allowed(
            pointers, pointers_wide, level, words, before, cursor, run_end
        ):  # fmt: skip
            if value > largest:
                total = total * np.exp(largest - value) + 1.0
                largest = value
            else:
                total += np.exp(value - largest)
        _copy(run_end, cursor)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _worse(score, order, a, b):
    return score[a] < score[b] or (score[a] == score[b] and order[a] > order[b])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _sift_down(heap, size, score, order):
    """Restore the heap (worst slot at the root) after its root changed."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and _worse(score, order, heap[child + 1], heap[child]):
            child += 1
        if not _worse(score, order, heap[child], heap[at]):
            return
        heap[at], heap[child] = heap[child], heap[at]
        at = child


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _sift_up(heap, at, score, order):
    """Restore the heap after its last slot was added."""
    while at > 0:
        above = (at - 1) >> 1
        if not _worse(score, order, heap[at], heap[above]):
            return
        heap[at], heap[above] = heap[above], heap[at]
        at = above


@numba.njit(nogil=True, cache=True, error_model="numpy")
def expand(
    tokens, tokens_wide, pointers, pointers_wide, level, words, before,
    low, high, score, rows, log_probs, renormalise,
    next_parent, next_token, next_low, next_high, next_score, next_log_prob, next_rows,
):  # fmt: skip
    """One level of the beam, for every query: the best real and allowed children of its rows.

    Children are joined over the segments by token. Best first; ties go to the earlier row, then the lower token.

    Args (S segments, L levels, n queries, B rows, V tokens at this level, C rows that result at most):
        tokens: (S,) uint64 addresses of this level's tokens; tokens_wide: 16-bit instead of 8-bit.
        pointers: (S, L - 1) uint64 addresses of first_child; pointers_wide: (S,) bool, 64-bit instead of 32-bit.
        words, before: (n or 1, S) uint64 addresses of the masks' arrays, 0 for none.
        low, high: (n, B, S) int64, the interval of children of each row, in nodes of this level.
        score: (n, B) float64; rows: (n,) live rows, which come first and by falling score.
        log_probs: (n, B or 1, V) of this level's tokens, none above zero; 1: the same for all rows of a query.
        renormalise: over the allowed children of each row instead of the whole vocabulary.
        next_*: the rows that result, (n, C, ...); next_low and next_high are intervals of their children (of items,
            after the last level), next_log_prob the chosen token's log-probability.
    """
    queries, _, segments = low.shape
    beam = next_score.shape[1]
    vocabulary = log_probs.shape[2]
    last = level == pointers.shape[1]
    slot_score = np.empty(beam, np.float64)
    slot_order = np.empty(beam, np.int64)
    slot_log_prob = np.empty(beam, np.float64)
    slot_low = np.empty((beam, segments), np.int64)
    slot_high = np.empty((beam, segments), np.int64)
    heap = np.empty(beam, np.int64)
    cursor = np.empty(segments, np.int64)
    run_end = np.empty(segments, np.int64)
    for q in range(queries):
        bits = words[q if words.shape[0] > 1 else 0]
        counts = before[q if words.shape[0] > 1 else 0]
        size = 0
        threshold = -np.inf
        for r in range(rows[q]):
            base = score[q, r]
            ends = high[q, r]
            row = log_probs[q, r if log_probs.shape[1] > 1 else 0]
            if size == beam and base <= threshold:
                break  # rows come by falling score, and no log-probability is above zero
            norm = 0.0
            if renormalise:
                _copy(low[q, r], cursor)
                norm = _log_sum(
                    tokens, tokens_wide, pointers, pointers_wide, level, bits, counts, ends, row, cursor, run_end
                )
            _copy(low[q, r], cursor)
            while True:
                if segments == 1:
                    # nearly all children end here: the loop that the search's time is spent in
                    at = cursor[0]
                    while at < ends[0] and not base + (row[_token(tokens[0], tokens_wide, at)] - norm) > threshold:
                        at += 1
                    cursor[0] = at
                token = _join(tokens, tokens_wide, cursor, ends, last, vocabulary, run_end)
                if token == vocabulary:
                    break
                log_prob = min(np.float64(row[token]) - norm, 0.0)  # rounding can lift an only child above zero
                total = base + log_prob
                if total > threshold and _any_allowed(
                    pointers, pointers_wide, level, bits, counts, cursor, run_end
                ):  # fmt: skip
                    slot = size if size < beam else heap[0]
                    slot_score[slot] = total
                    slot_order[slot] = np.int64(r) * vocabulary + token
                    slot_log_prob[slot] = log_prob
                    _copy(cursor, slot_low[slot])
                    _copy(run_end, slot_high[slot])
                    if size < beam:
                        heap[size] = slot
                        _sift_up(heap, size, slot_score, slot_order)
                        size += 1
                    else:
                        _sift_down(heap, size, slot_score, slot_order)
                    if size == beam:
                        threshold = slot_score[heap[0]]
                _copy(run_end, cursor)
        next_rows[q] = size
        for at in range(size - 1, -1, -1):  # taking the worst each time leaves them best first
            slot = heap[0]
            heap[0] = heap[at]
            _sift_down(heap, at, slot_score, slot_order)
            next_parent[q, at] = slot_order[slot] // vocabulary
            next_token[q, at] = slot_order[slot] % vocabulary
            next_score[q, at] = slot_score[slot]
            next_log_prob[q, at] = slot_log_prob[slot]
            for s in range(segments):
                begin = slot_low[slot, s]
                end = slot_high[slot, s]
                if not last:
                    begin = _child(pointers[s, level], pointers_wide[s], begin)
                    end = _child(pointers[s, level], pointers_wide[s], end)
                next_low[q, at, s] = begin
                next_high[q, at, s] = end


@numba.njit(nogil=True, cache=True, error_model="numpy")
def collect(words, low, high, rows, segment, item, leaf, found):
    """The allowed items of each query's leaves, in the order of leaf, segment, item, up to C a query.

    Args:
        words: (n or 1, S) uint64 addresses of the masks' bitmaps, 0 for none.
        low, high: (n, B, S) int64 intervals of items; rows: (n,) live leaves.
        segment, item, leaf: (n, C) int64 outputs; found: (n,) int64, how many of each query.
    """
    capacity = item.shape[1]
    for q in range(low.shape[0]):
        count = 0
        for r in range(rows[q]):
            for s in range(low.shape[2]):
                address = words[q if words.shape[0] > 1 else 0, s]
                bits = _uint64(address)
                for i in range(low[q, r, s], high[q, r, s]):
                    if count == capacity:
                        break
                    if address == NO_MASK or (bits[i >> 6] >> np.uint64(i & 63)) & np.uint64(1):
                        segment[q, count] = s
                        item[q, count] = i
                        leaf[q, count] = r
                        count += 1
        found[q] = count
