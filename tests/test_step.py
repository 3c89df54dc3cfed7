"""One step over one segment against the naive one, and against the step that joins segments: ties, filters, duplicates,
rows with few children and with many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_core import kernels
from ace_core.constraint import ConstraintIndex
from ace_core.filters import ItemMask
from ace_core.identifiers import sort_order
from ace_core.kernels.compiled import LOW, NODE, SCORE, compiled
from ace_core.kernels.lanes import lane_threshold, lanes_room
from ace_core.rows import Rows
from ace_core.walk import Walk


def corpus(rng: np.random.Generator, items: int, sizes: tuple[int, ...], depth: int) -> ConstraintIndex:
    """Items of which some share an identifier, under prefixes of which some have nearly all children, some one."""
    codes = np.stack([np.minimum(rng.geometric(min(3 / v, 1), items) - 1, v - 1) for v in sizes], 1).astype(np.uint16)
    codes[items // 2 :: 7] = codes[: len(codes[items // 2 :: 7])]
    return ConstraintIndex.build(codes[sort_order(codes, sizes)], sizes, depth)


def naive(index: ConstraintIndex, allowed: np.ndarray, rows: Rows, query: int, log_probs: np.ndarray, beam: int):
    """(score, row, token) of the best children: all that exist, sorted."""
    spelled = [index.spelled(level) for level in range(rows.level + 1)]
    found = []
    for row in range(rows.live[query]):
        here = allowed.copy()
        for level in range(rows.level):
            here &= spelled[level] == rows.codes[query, row, level]
        for token in np.unique(spelled[rows.level][here]).tolist():
            log_prob = min(float(log_probs[query, row % log_probs.shape[1], token]), 0.0)
            if log_prob > -np.inf:
                found.append((rows.score[query, row] + log_prob, row, token))
    return sorted(found, key=lambda child: (-child[0], child[1], child[2]))[:beam]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    items=st.sampled_from([1, 3, 40, 700, 6000]),
    sizes=st.sampled_from([(3, 64, 128, 64), (2, 256, 64, 300), (3, 70, 9, 5), (1, 64, 1, 64)]),
    depth=st.integers(0, 3),
    beam=st.sampled_from([1, 4, 20]),
    share=st.sampled_from([None, 0.9, 0.05, 0.0]),
    kind=st.sampled_from([np.float32, np.float64]),
    steps=st.sampled_from([None, 2, 0]),
    shared=st.booleans(),
)
def test_a_step_is_the_naive_one(seed, items, sizes, depth, beam, share, kind, steps, shared):
    rng = np.random.default_rng(seed)
    index = corpus(rng, items, sizes, depth)
    walk = Walk([index])
    queries = 3
    allowed = [np.ones(items, bool) if share is None else rng.random(items) < share for _ in range(queries)]
    masks = walk.masks(None if share is None else [[ItemMask.of(a)] for a in allowed], queries)
    rows = walk.root(queries)
    for level, size in enumerate(sizes):
        log_probs = -rng.exponential(2, (queries, 1 if shared else max(rows.width, 1), size))
        if steps is not None:  # ties; zeros only
            log_probs = np.round(log_probs * steps)
        log_probs[rng.random(log_probs.shape) < 0.02] = -np.inf
        log_probs = np.ascontiguousarray(log_probs, kind)
        following = walk.expand(rows, log_probs, beam, masks)
        joined = walk.root(queries)._replace(
            level=level + 1, block=np.zeros_like(following.block), live=np.zeros_like(following.live)
        )
        kernels.expand(
            walk._layout, level, masks.bits, rows.block, rows.live, log_probs, joined.block, joined.live, False
        )
        np.testing.assert_array_equal(following.live, joined.live)
        np.testing.assert_array_equal(following.block, joined.block)
        for query in range(queries):
            expected = naive(index, allowed[query], rows, query, log_probs, beam)
            live = following.live[query]
            assert list(
                zip(
                    following.score[query, :live].tolist(),
                    following.parent[query, :live].tolist(),
                    following.codes[query, :live, level].tolist(),
                )
            ) == [(score, row, token) for score, row, token in expected]
        rows = following


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("beam", [20, 64, 100])
def test_a_step_over_many_long_rows_is_the_naive_one(kind, steps, beam):
    """Rows so many and so long that each has lanes, of which some have no child that counts, and some a single one."""
    rng, items, sizes = np.random.default_rng(beam), 20_000, (2, 64, 128, 64)
    codes = np.stack([rng.integers(0, v, items) for v in sizes], 1).astype(np.uint16)
    index = ConstraintIndex.build(codes[sort_order(codes, sizes)], sizes, 3)
    walk, queries, skipped = Walk([index]), 2, 0
    assert walk.present[2][0] is not None
    rows, masks = walk.root(queries), walk.masks(None, queries)
    for level, size in enumerate(sizes[:3]):
        log_probs = -rng.exponential(2, (queries, max(rows.width, 1), size))
        log_probs[rng.random(log_probs.shape) > 0.02] -= 3  # few children of a row that count, and they anywhere
        if steps is not None:
            log_probs = np.round(log_probs * steps)
        log_probs = np.ascontiguousarray(log_probs, kind)
        following = walk.expand(rows, log_probs, beam, masks)
        for query in range(queries):
            expected = naive(index, np.ones(items, bool), rows, query, log_probs, beam)
            found = following.score[query], following.parent[query], following.codes[query, :, level]
            assert list(zip(*(numbers.tolist() for numbers in found)))[: following.live[query]] == expected
            skipped += level == 2 and rows.live[query] - len({row for _, row, _ in expected})
        rows = following
    assert skipped > 0


@compiled
def lanes_say(there, rows, table, step, vocabulary, keep, lanes):
    return lane_threshold(
        np.uint64(there.ctypes.data), np.uint64(24), rows.reshape(-1), rows.view(np.float64).reshape(-1),
        np.uint64(len(rows)), np.uint64(rows.shape[1]), table.reshape(-1), np.uint64(0), np.uint64(step),
        np.uint64(vocabulary), keep, np.uint64(lanes.ctypes.data),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 3, 7, 20])
def test_what_the_lanes_say_is_passed_by_a_beam_and_few_more(kind, rows):
    rng = np.random.default_rng(rows)
    table = -rng.exponential(3, (rows, 256)).astype(kind)
    table[rng.random(table.shape) < 0.05] = -np.inf
    real = rng.random(table.shape) < 0.7
    real[0] = np.arange(256) < 20  # a row of few children, whose tokens the lanes leave out
    block = np.zeros((rows, LOW + 2), np.int64)
    block.view(np.float64)[:, SCORE] = base = -np.sort(rng.exponential(2, rows))
    block[:, NODE], block[:, LOW + 1] = np.arange(rows), real.sum(1)
    there, lanes = np.packbits(real, axis=1, bitorder="little").view(np.uint64), np.empty(lanes_room(rows), kind)
    threshold = lanes_say(there, block, table, 256, 256, 20, lanes)
    if rows == 1:
        return np.testing.assert_equal(threshold, -np.inf)  # nothing but the row of few
    totals = np.where(real, base[:, None] + table, -np.inf)
    assert 20 <= (totals[1:] > threshold).sum() <= 48
    if rows > 6:
        best = lanes[: 16 * rows].reshape(rows, 16)
        np.testing.assert_allclose(best[1:].max(1), totals[1:].max(1), rtol=1e-6)
        assert np.isinf(best[0]).all()


@pytest.mark.parametrize(("items", "known"), [(40, 0), (200_000, 2)])
def test_which_levels_have_bitmaps_of_children(items, known):
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, v, items) for v in (3, 128, 128, 128)], 1).astype(np.uint16)
    index = ConstraintIndex.build(codes[sort_order(codes, (3, 128, 128, 128))], (3, 128, 128, 128))
    walk = Walk([index])
    assert sum(row[0] is not None for row in walk.present) == known
    for level, (bitmaps,) in enumerate(walk.present):
        if bitmaps is not None:
            begins = index.first_child[level - 1]
            for parent in (0, len(bitmaps) - 1):
                own = index.tokens[level][begins[parent] : begins[parent + 1]]
                assert np.flatnonzero(np.unpackbits(bitmaps[parent].view(np.uint8), bitorder="little")).tolist() == (
                    own.tolist()
                )
    assert walk.nbytes > index.nbytes if known else walk.nbytes == index.nbytes
