"""Compiled walks over the constraint index (CPU).

Why numba: the walk is a data-dependent loop over a few hundred real children a row, which tensor operations can only
do by padding every row to its level's vocabulary; a compiled loop looks at the children alone and rejects most of
them with one comparison. A C++ torch operator would need a compiler on the user's machine.

Arrays of the index are passed as addresses, so one compilation serves any number of segments, 8- and 16-bit tokens,
32- and 64-bit pointers, memory-mapped (read-only) or not. Compiling costs about 10 s once a machine (``cache=True``
keeps it on disk). The kernels are serial and release the GIL: threads that search at the same time share nothing but
the read-only index (numba's own thread pool is not used; its default layer is not thread-safe).

They stay in one file although it is long: numba's cache notices a change only in the file of the function that is
called, so kernels that call helpers of another module would go on running their old code.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

NO_MASK = np.uint64(0)


def _compiled(function: Callable) -> Callable:
    """Compile on first use, and keep the result on disk where there is a place for it."""
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy")(function)


@intrinsic
def _pointer(typingctx, address):
    """An address (uint64) as a C pointer for ``numba.carray``."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@_compiled
def _uint8(address):
    return numba.carray(_pointer(address), (1,), np.uint8)  # type: ignore[call-arg]


@_compiled
def _uint16(address):
    return numba.carray(_pointer(address), (1,), np.uint16)  # type: ignore[call-arg]


@_compiled
def _uint64(address):
    return numba.carray(_pointer(address), (1,), np.uint64)  # type: ignore[call-arg]


@_compiled
def _int32(address):
    return numba.carray(_pointer(address), (1,), np.int32)  # type: ignore[call-arg]


@_compiled
def _int64(address):
    return numba.carray(_pointer(address), (1,), np.int64)  # type: ignore[call-arg]


@_compiled
def _any_bit(words, low, high):
    """Is any of bits low .. high - 1 set?"""
    if low >= high:
        return False
    first, last = low >> 6, (high - 1) >> 6
    head = words[first] >> np.uint64(low & 63)
    if first == last:
        return (head << np.uint64(63 - ((high - 1) & 63) + (low & 63))) != np.uint64(0)
    if head != np.uint64(0):
        return True
    for word in range(first + 1, last):
        if words[word] != np.uint64(0):
            return True
    return (words[last] << np.uint64(63 - ((high - 1) & 63))) != np.uint64(0)


@_compiled
def mark_parents(children, pointers, parents):
    """Set the bit of every node that has a child whose bit is set.

    Args:
        children, parents: (nodes // 64 + 1,) uint64 bitmaps of two levels, ``parents`` all zero; pointers: first_child.
    """
    for node in range(len(pointers) - 1):
        if _any_bit(children, pointers[node], pointers[node + 1]):
            parents[node >> 6] |= np.uint64(1) << np.uint64(node & 63)


@_compiled
def _token(address, wide, node):
    return np.int64(_uint16(address)[node]) if wide else np.int64(_uint8(address)[node])


@_compiled
def _child(address, wide, node):
    return _int64(address)[node] if wide else np.int64(_int32(address)[node])


@_compiled
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


@_compiled
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


@_compiled
def _any_allowed(bits, low, high):
    """Does any segment's interval [low, high) of nodes hold an allowed one?"""
    for s in range(len(low)):
        if low[s] < high[s] and (bits[s] == NO_MASK or _any_bit(_uint64(bits[s]), low[s], high[s])):
            return True
    return False


@_compiled
def _log_sum(tokens, tokens_wide, last, bits, ends, row, cursor, run_end):
    """Log of the summed probabilities of a row's allowed children; leaves ``cursor`` at their end."""
    largest = -np.inf
    total = 0.0
    while True:
        token = _join(tokens, tokens_wide, cursor, ends, last, len(row), run_end)
        if token == len(row):
            return largest + np.log(total) if total > 0 else 0.0
        value = np.float64(row[token])
        if value > -np.inf and _any_allowed(bits, cursor, run_end):
            if value > largest:
                total = total * np.exp(largest - value) + 1.0
                largest = value
            else:
                total += np.exp(value - largest)
        for s in range(len(cursor)):
            cursor[s] = run_end[s]


@_compiled
def _nth_largest(values, count, n):
    """The n-th largest (from 1) of the first ``count`` values, which it reorders. Branch-free inside: the order is
    random, and a mispredicted branch costs more than the swap."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) >> 1
        pivot = max(min(values[low], values[middle]), min(max(values[low], values[middle]), values[high]))
        above = low  # values above the pivot go first, then those equal to it
        for i in range(low, high + 1):
            value = values[i]
            values[i] = values[above]
            values[above] = value
            above += value > pivot
        if n <= above - low:
            high = above - 1
            continue
        equal = above
        for i in range(above, high + 1):
            value = values[i]
            values[i] = values[equal]
            values[equal] = value
            equal += value == pivot
        if n <= equal - low:
            return pivot
        n -= equal - low
        low = equal
    return values[low]


@_compiled
def _cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch):
    """Drop all slots but the best ``keep``.

    Order is kept, so that of equal scores the earlier row and the lower token stay. Returns how many are left, and
    the score that another must exceed.
    """
    if size < keep:
        return size, -np.inf
    segments = slot_low.shape[1]
    for i in range(size):
        scratch[i] = slot_score[i]
    threshold = _nth_largest(scratch, size, keep)
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


@_compiled
def _order_best_first(score, count, order, other):
    """Fill ``order`` with the stable descending order of the first ``count`` scores (merge sort of short runs)."""
    run = 16
    for begin in range(0, count, run):
        for i in range(begin, min(begin + run, count)):
            at = i
            while at > begin and score[order[at - 1]] < score[i]:
                order[at] = order[at - 1]
                at -= 1
            order[at] = i
    while run < count:
        for begin in range(0, count, 2 * run):
            left, middle = begin, min(begin + run, count)
            right, end = middle, min(begin + 2 * run, count)
            for i in range(begin, end):
                if left < middle and (right >= end or score[order[left]] >= score[order[right]]):
                    other[i] = order[left]
                    left += 1
                else:
                    other[i] = order[right]
                    right += 1
        for i in range(count):
            order[i] = other[i]
        run *= 2


@_compiled
def _scan(
    tokens, at, first, end, last, bits, base, row, norm, threshold,
    slot_score, slot_row, slot_low, slot_high, size, r,
):  # fmt: skip
    """Put the children at .. end - 1 of row r that pass the threshold and the mask into slots, until there is no room.

    The loop that a search's time is spent in: nearly all children end at its first comparison. Of children with one
    token (a bucket) the first stands for all; ``first`` is the row's first child. Returns the next child and slot.
    """
    margin = threshold - base + norm
    margin -= 1e-5 + 1e-6 * abs(margin)  # a bound that float32 cannot round past; the exact comparison follows
    cut = row.dtype.type(margin)
    allowed = _uint64(bits)
    for i in range(np.uint64(at), np.uint64(end)):
        value = row[tokens[i]]
        if value > cut:
            total = base + min(np.float64(value) - norm, 0.0)
            node = np.int64(i)
            if total > threshold and (node == first or tokens[i] != tokens[i - np.uint64(1)]):
                stop = node + 1
                if last and stop < end and tokens[stop] == tokens[i]:
                    low, high = stop + 1, end
                    while low < high:
                        middle = (low + high) >> 1
                        if tokens[middle] == tokens[i]:
                            low = middle + 1
                        else:
                            high = middle
                    stop = low
                if bits == NO_MASK or _any_bit(allowed, node, stop):
                    if size == len(slot_score):
                        return node, size
                    slot_score[size] = total
                    slot_row[size] = r
                    slot_low[size, 0] = node
                    slot_high[size, 0] = stop
                    size += 1
    return end, size


@_compiled
def _expand_query(
    tokens, tokens_wide, pointers, pointers_wide, level, bits,
    low, high, score, codes, level_log_prob, rows, log_probs, renormalise,
    slot_score, slot_row, slot_low, slot_high, scratch, order, other,
    next_parent, next_low, next_high, next_score, next_codes, next_level_log_prob,
):  # fmt: skip
    """:func:`expand` for one query: the same arrays without their first axis. Returns the number of rows.

    Children whose score passes the threshold gather in slots, of which only the best are kept whenever they are full;
    the threshold is the worst score kept.
    """
    segments = low.shape[1]
    keep = next_score.shape[0]
    room = slot_score.shape[0]
    vocabulary = log_probs.shape[1]
    shared = log_probs.shape[0] == 1
    last = level == pointers.shape[1]
    cursor = np.empty(segments, np.int64)
    run_end = np.empty(segments, np.int64)
    norms = np.zeros(rows if renormalise else 1)
    best = 0.0  # no child scores above its row by more than this
    if shared and not renormalise:
        best = -np.inf
        for token in range(vocabulary):
            best = max(best, np.float64(log_probs[0, token]))
    size = 0
    threshold = -np.inf
    narrow, wide = _uint8(tokens[0]), _uint16(tokens[0])
    for r in range(rows):
        base = score[r]
        if base + best <= threshold:
            break  # rows come by falling score
        row = log_probs[0 if shared else r]
        norm = 0.0
        if renormalise:
            for s in range(segments):
                cursor[s] = low[r, s]
            norm = _log_sum(tokens, tokens_wide, last, bits, high[r], row, cursor, run_end)
            norms[r] = norm
        for s in range(segments):
            cursor[s] = low[r, s]
        while True:
            if segments == 1:
                if tokens_wide:
                    cursor[0], size = _scan(
                        wide, cursor[0], low[r, 0], high[r, 0], last, bits[0], base, row, norm,
                        threshold, slot_score, slot_row, slot_low, slot_high, size, r,
                    )  # fmt: skip
                else:
                    cursor[0], size = _scan(
                        narrow, cursor[0], low[r, 0], high[r, 0], last, bits[0], base, row, norm,
                        threshold, slot_score, slot_row, slot_low, slot_high, size, r,
                    )  # fmt: skip
                done = cursor[0] == high[r, 0]
            else:
                done = False
                while size < room:
                    token = _join(tokens, tokens_wide, cursor, high[r], last, vocabulary, run_end)
                    if token == vocabulary:
                        done = True
                        break
                    total = base + min(np.float64(row[token]) - norm, 0.0)
                    if total > threshold and _any_allowed(bits, cursor, run_end):
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
            size, threshold = _cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch)
    size, threshold = _cut(slot_score, slot_row, slot_low, slot_high, size, keep, scratch)
    _order_best_first(slot_score, size, order, other)
    for at in range(size):
        slot = order[at]
        own = slot_row[slot]
        spelled = np.int64(0)
        for s in range(segments):
            begin = slot_low[slot, s]
            end = slot_high[slot, s]
            if begin < end:
                spelled = _token(tokens[s], tokens_wide, begin)
            if not last:
                begin = _child(pointers[s, level], pointers_wide[s], begin)
                end = _child(pointers[s, level], pointers_wide[s], end)
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


@_compiled
def expand(
    tokens, tokens_wide, pointers, pointers_wide, level, bits,
    low, high, score, codes, level_log_prob, rows, log_probs, renormalise,
    next_parent, next_low, next_high, next_score, next_codes, next_level_log_prob, next_rows,
):  # fmt: skip
    """One level of the beam, for every query: the best real and allowed children of its rows.

    Children are joined over the segments by token. Best first; ties go to the earlier row, then the lower token.

    Args (S segments, L levels, n queries, B rows, V tokens at this level, C rows that result at most):
        tokens: (L, S) uint64 addresses of tokens; tokens_wide: (L,) bool, 16-bit instead of 8-bit.
        pointers: (S, L - 1) uint64 addresses of first_child; pointers_wide: (S,) bool, 64-bit instead of 32-bit.
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
            tokens[level], tokens_wide[level], pointers, pointers_wide, level, bits[q % bits.shape[0], level],
            low[q], high[q], score[q], codes[q], level_log_prob[q], rows[q], log_probs[q], renormalise,
            slot_score, slot_row, slot_low, slot_high, scratch, order, other,
            next_parent[q], next_low[q], next_high[q], next_score[q], next_codes[q], next_level_log_prob[q],
        )  # fmt: skip


@_compiled
def _cut_nodes(node, parent, score, size, keep, scratch):
    """:func:`_cut` for nodes of one segment."""
    if size < keep:
        return size, -np.inf
    for i in range(size):
        scratch[i] = score[i]
    threshold = _nth_largest(scratch, size, keep)
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


@_compiled
def _gather(tokens, at, first, end, last, bits, base, table, threshold, r, node, parent, score, size):
    """Append the children at .. end - 1 of row r that pass the threshold and the mask, until there is no room.

    The loop that a draft's time is spent in. Of children with one token (a bucket) the first stands for all; ``first``
    is the row's first child. Returns the next child and the new size.
    """
    room = len(score)
    if bits == NO_MASK and not last:
        stop = min(end, at + room - size)
        for i in range(np.uint64(at), np.uint64(stop)):
            total = base + table[tokens[i]]
            node[size] = i
            parent[size] = r
            score[size] = total
            size += total > threshold
        return stop, size
    allowed = _uint64(bits)
    for i in range(at, end):
        total = base + table[tokens[i]]
        if total > threshold and (not last or i == first or tokens[i] != tokens[i - 1]):
            if bits != NO_MASK:
                stop = i + 1
                while last and stop < end and tokens[stop] == tokens[i]:
                    stop += 1
                if not _any_bit(allowed, i, stop):
                    continue
            if size == room:
                return i, size
            node[size] = i
            parent[size] = r
            score[size] = total
            size += 1
    return end, size


@_compiled
def draft(
    tokens, tokens_wide, pointers, pointers_wide, roots, bits, log_probs, offsets, widths,
    low, high, score, codes, level_log_prob, live,
):  # fmt: skip
    """All levels at once over one segment, where a token's log-probability does not depend on the tokens before it.

    What :func:`expand` finds level by level, in a fraction of its time: a row here is one node, not an interval in
    each segment, and identifiers are read back from the nodes' parents for the rows that are left at the end.

    Args (as in :func:`expand`, with S = 1, and):
        roots: nodes of the first level.
        log_probs: (n, sum of V) of all levels' tokens side by side; offsets: (L + 1,) where each level begins.
        widths: (L,) rows kept at each level.
        low, high, score, codes, level_log_prob, live: the complete rows that result.
    """
    queries, keep, levels = codes.shape
    most = keep
    for level in range(levels):
        most = max(most, widths[level])
    room = 2 * most + 512
    node, parent = np.empty((levels, room), np.int64), np.empty((levels, room), np.int64)
    scores, scratch = np.empty((2, room)), np.empty(room)
    order, other = np.empty(room, np.int64), np.empty(room, np.int64)
    table = np.empty(log_probs.shape[1])
    for q in range(queries):
        for i in range(len(table)):
            table[i] = min(np.float64(log_probs[q, i]), 0.0)
        size = 1
        scores[1, 0] = 0.0
        for level in range(levels):
            last = level == levels - 1
            own = table[offsets[level] : offsets[level + 1]]
            before, now = scores[1 - (level & 1)], scores[level & 1]
            allowed = bits[q % bits.shape[0], level, 0]
            narrow, wide = _uint8(tokens[level, 0]), _uint16(tokens[level, 0])
            best = -np.inf
            for i in range(len(own)):
                best = max(best, own[i])
            count = 0
            threshold = -np.inf
            for r in range(size):
                base = before[r]
                if base + best <= threshold:
                    continue
                at, end = np.int64(0), np.int64(roots)
                if level:
                    above = node[level - 1, r]
                    at = _child(pointers[0, level - 1], pointers_wide[0], above)
                    end = _child(pointers[0, level - 1], pointers_wide[0], above + 1)
                first = at
                while True:
                    if tokens_wide[level]:
                        at, count = _gather(
                            wide, at, first, end, last, allowed, base, own, threshold, r,
                            node[level], parent[level], now, count,
                        )  # fmt: skip
                    else:
                        at, count = _gather(
                            narrow, at, first, end, last, allowed, base, own, threshold, r,
                            node[level], parent[level], now, count,
                        )  # fmt: skip
                    if at == end:
                        break
                    count, threshold = _cut_nodes(node[level], parent[level], now, count, widths[level], scratch)
            size, threshold = _cut_nodes(node[level], parent[level], now, count, widths[level], scratch)
        ending = scores[(levels - 1) & 1]
        _order_best_first(ending, size, order, other)
        for i in range(size):
            at = order[i]
            end = np.int64(roots)
            if levels > 1:
                above = node[levels - 2, parent[levels - 1, at]]
                end = _child(pointers[0, levels - 2], pointers_wide[0], above + 1)
            item = node[levels - 1, at]
            low[q, i, 0] = item
            high[q, i, 0] = _run_end(tokens[levels - 1, 0], tokens_wide[levels - 1], item, end, True)
            score[q, i] = ending[at]
            for level in range(levels - 1, -1, -1):
                token = _token(tokens[level, 0], tokens_wide[level], node[level, at])
                codes[q, i, level] = token
                level_log_prob[q, i, level] = table[offsets[level] + token]
                at = parent[level, at]
        live[q] = size


@_compiled
def collect(bits, low, high, rows, segment, item, leaf, found):
    """The allowed items of each query's leaves, in the order of leaf, segment, item, up to C a query.

    Args:
        bits: (n or 1, L, S) uint64 addresses of the bitmaps, 0 for all.
        low, high: (n, B, S) int64 intervals of items; rows: (n,) live leaves.
        segment, item, leaf: (n, C) int64 outputs; found: (n,) int64, how many of each query.
    """
    capacity = item.shape[1]
    for q in range(low.shape[0]):
        count = 0
        for r in range(rows[q]):
            for s in range(low.shape[2]):
                address = bits[q % bits.shape[0], bits.shape[1] - 1, s]
                allowed = _uint64(address)
                for i in range(low[q, r, s], high[q, r, s]):
                    if count == capacity:
                        break
                    if address == NO_MASK or (allowed[i >> 6] >> np.uint64(i & 63)) & np.uint64(1):
                        segment[q, count] = s
                        item[q, count] = i
                        leaf[q, count] = r
                        count += 1
        found[q] = count
