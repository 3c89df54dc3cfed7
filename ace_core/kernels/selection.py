"""The best of many scores, which are finite and in no order.

Comparing them two by two costs a mispredicted branch at every other comparison; spreading them over equal steps
between the least and the largest first costs none, and leaves little to compare.
"""

from __future__ import annotations

import numpy as np

from ace_core.kernels.compiled import bit_count, compiled, float32_at
from ace_core.kernels.vectors import exceeding

_STEPS = 256
_HANDFUL, _AT_ONCE = 8, 64  # of more than a handful, scores up to which all are compared at once
_FEW = 128  # scores that are ordered by counting, for each of them, those that are larger


@compiled
def _step(largest, value, per_unit):
    return min(max(np.int64((largest - value) * per_unit), 0), _STEPS - 1)


@compiled
def _spread(values, count, steps):
    """Count values by step, from the largest down, in ``steps``. Returns the largest, and steps per unit."""
    least = largest = values[0]
    for i in range(count):
        least = min(least, values[i])
        largest = max(largest, values[i])
    for step in range(_STEPS):
        steps[step] = 0
    per_unit = (_STEPS - 1) / (largest - least) if largest > least else 0.0
    for i in range(count):
        steps[_step(largest, values[i], per_unit)] += 1
    return largest, per_unit


@compiled
def nth_largest(values, count, n, scratch):
    """The n-th largest (from 1) of the first ``count`` values. ``scratch``: as long as they are.

    Where some are no numbers: any of them, or -inf.
    """
    steps = np.empty(_STEPS, np.int64)
    largest, per_unit = _spread(values, count, steps)
    step = 0
    while steps[step] < n:
        n -= steps[step]
        step += 1
    inside = 0
    for i in range(count):
        scratch[inside] = values[i]
        inside += _step(largest, values[i], per_unit) == step
    return _nth_of_few(scratch, inside, n)


@compiled
def largest_few(values, count, n, best):
    """The n-th largest (from 1) of the first ``count`` values, -inf where they are fewer; for an n of a handful.

    ``best``: room for n, which are left in it by falling value.
    """
    for i in range(n):
        best[i] = -np.inf
    for i in range(count):
        value = values[i]
        if value > best[n - 1]:
            at = n - 1
            while at > 0 and best[at - 1] < value:
                best[at] = best[at - 1]
                at -= 1
            best[at] = value
    return best[n - 1]


@compiled
def _nth_of_few(values, count, n):
    """:func:`nth_largest` by partitions (quickselect); reorders the values. Branch-free inside."""
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
        if equal == low:  # nothing equals the pivot, which is no number
            return -np.inf
        if n <= equal - low:
            return pivot
        n -= equal - low
        low = equal
    return values[low]


@compiled
def _order_few(score, count, order, other):
    for i in range(count):
        rank = np.int64(0)
        for j in range(count):
            rank += np.int64(score[j] > score[i])
        other[i] = rank
    for i in range(count):
        order[i] = -1
    for i in range(count):
        at = other[i]
        while order[at] >= 0:  # of equal scores the earlier one has taken it
            at += 1
        order[at] = i


@compiled
def _order_at_once(score, count, order, other):
    """The order of 64 scores at most, each compared with all others at once in float32. Are no two alike there?"""
    address = np.uint64(other.ctypes.data)
    rounded, top = float32_at(address), score[0]
    for i in range(_AT_ONCE):
        rounded[i] = score[i] - top if i < count else -np.inf
    for i in range(count):
        order[i] = -1
    alike = False
    for i in range(count):
        at = np.int64(bit_count(exceeding(address, rounded[i])))  # type: ignore[call-arg]
        alike |= order[at] >= 0
        order[at] = i
    return not alike


@compiled
def order_best_first(score, count, order, other):
    """Fill ``order`` with the stable descending order of the first ``count`` scores.

    By steps, then a merge sort of what is nearly sorted. ``other``: room for as many, and for 32 at least.
    """
    if _HANDFUL < count <= _AT_ONCE and _order_at_once(score, count, order, other):
        return
    if count <= _FEW:
        return _order_few(score, count, order, other)
    steps = np.empty(_STEPS, np.int64)
    largest, per_unit = _spread(score, count, steps)
    begin = 0
    for step in range(_STEPS):
        begin, steps[step] = begin + steps[step], begin
    for i in range(count):
        step = _step(largest, score[i], per_unit)
        order[steps[step]] = i
        steps[step] += 1
    run = 16
    for begin in range(0, count, run):
        for i in range(begin + 1, min(begin + run, count)):
            here = order[i]
            at = i
            while at > begin and score[order[at - 1]] < score[here]:
                order[at] = order[at - 1]
                at -= 1
            order[at] = here
    while run < count:
        for begin in range(0, count - run, 2 * run):
            left, middle = begin, begin + run
            if score[order[middle - 1]] >= score[order[middle]]:
                continue
            right, end = middle, min(begin + 2 * run, count)
            for i in range(begin, end):
                if left < middle and (right >= end or score[order[left]] >= score[order[right]]):
                    other[i] = order[left]
                    left += 1
                else:
                    other[i] = order[right]
                    right += 1
            for i in range(begin, end):
                order[i] = other[i]
        run *= 2
