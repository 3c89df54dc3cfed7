"""Compiled helpers: selection and products against NumPy, drafts, and the cache of what was compiled."""

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_core import kernels
from ace_core.constraint import ConstraintIndex
from ace_core.filters import ItemMask
from ace_core.kernels import compiled
from ace_core.kernels.compiled import bits_end, next_bit
from ace_core.kernels.selection import nth_largest, order_best_first
from ace_core.scoring import Codewords, Remainders
from ace_core.walk import Walk, draft_widths

_M_PERTURB = -6  # of malloc.h


@pytest.fixture(autouse=True, scope="module")
def _freed_memory_is_overwritten():
    """What is read after it was freed, or before it was written, is wrong at once (where the C library is glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_PERTURB, 0x65)
    yield
    mallopt(_M_PERTURB, 0)


finite = st.floats(-1e12, 1e12, allow_nan=False)
scores = st.one_of(
    st.lists(finite, min_size=1, max_size=300),
    st.lists(st.sampled_from([0.0, -1.0, -1.5, -1e-310, -1e300]), min_size=1, max_size=300),  # ties, extremes
)


@settings(deadline=None)
@given(scores, st.data())
def test_the_nth_largest(values, data):
    n = data.draw(st.integers(1, len(values)))
    array = np.array(values)
    assert nth_largest(array, len(values), n, np.empty(len(values))) == sorted(values)[-n]


@pytest.mark.timeout(60)
def test_the_nth_largest_ends_where_some_are_no_numbers():
    rng = np.random.default_rng(0)
    for n in range(1, 200):
        values = rng.standard_normal(200)
        values[rng.random(200) < 0.3] = np.nan
        found = nth_largest(values.copy(), len(values), n, np.empty(len(values)))
        assert np.isnan(found) or found == -np.inf or found in values


@settings(deadline=None)
@given(scores)
def test_best_first_is_a_stable_sort(values):
    array = np.array(values)
    order, other = np.empty(len(values), np.int64), np.empty(max(32, len(values)), np.int64)
    order_best_first(array, len(values), order, other)
    assert order.tolist() == np.argsort(-array, kind="stable").tolist()


def in_integers(queries, steps, scales):
    """Products (n, m) float32 as the kernels define them, and how far they may be from those of the queries."""
    top = min(32767, (2**31 - 1) // (128 * queries.shape[1]))
    largest = np.maximum(np.abs(queries).max(1), np.float32(1e-30))
    integers = np.rint(queries * (np.float32(top) / largest)[:, None]).astype(np.int64)
    sums = integers @ steps.T.astype(np.int64)
    assert np.abs(sums).max() < 2**31
    factors = (largest / np.float32(top))[:, None]
    most = factors / 2 * np.abs(steps * scales[:, None]).sum(1)
    return sums.astype(np.float32) * (factors * scales), most + 1e-6 * np.linalg.norm(queries, axis=1)[:, None]


def extreme(queries, steps):
    """Such that all products have the same sign and are as large as they get: the sums are the largest of all."""
    return np.sign(queries).astype(np.float32), np.where(steps < 0, -128, 127).astype(np.int8)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("dim", [1, 7, 40, 64, 257, 512, 4096])
def test_products_of_chosen_rows_are_added(dim, largest):
    rng = np.random.default_rng(dim)
    stored = Remainders.of(rng.standard_normal((50, dim)).astype(np.float32))
    queries = rng.standard_normal((3, dim)).astype(np.float32)
    if largest:
        queries, steps = extreme(queries, stored.steps)
        steps[:3] = np.where(queries < 0, -128, 127)
        stored = Remainders(steps, stored.scales)
    queries = np.concatenate([queries, np.zeros((1, dim), np.float32)])
    rows = rng.integers(0, 50, (4, 30))
    rows[:, :3] = range(3)
    chosen = rng.random((4, 30)) < 0.7
    out = np.full((4, 30), 7.0, np.float32)
    stored.add_products(queries, np.where(chosen, rows, 2**40), chosen, out)  # what is not chosen is not looked at
    exact, error = (np.take_along_axis(part, rows, 1) for part in in_integers(queries, stored.steps, stored.scales))
    np.testing.assert_array_equal(out, np.where(chosen, np.float32(7.0) + exact, 7.0))
    true = np.einsum("nd,ncd->nc", queries.astype(np.float64), stored.rows(rows.ravel()).reshape(4, 30, dim))
    assert (np.abs(exact - true) <= error).all() and not exact[3].any()


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("dim", [1, 65, 384, 4096])
def test_products_with_codewords(dim, largest):
    rng = np.random.default_rng(dim)
    tables = [rng.standard_normal((m, dim)).astype(np.float32) for m in (1, 7, 30)]
    queries = rng.standard_normal((4, dim)).astype(np.float32)
    if largest:
        queries, tables = np.sign(queries), [np.sign(table) for table in tables]
        tables[1][:4] = queries
    queries = np.concatenate([queries, np.zeros((1, dim), np.float32)])
    codewords, words = Codewords(tables), np.concatenate(tables)
    rounded = np.concatenate(codewords.tables)
    scales = np.abs(words).max(1) / np.float32(127)
    assert [len(table) for table in codewords.tables] == [1, 7, 30]
    assert (np.abs(rounded - words) <= scales[:, None] / 2 * (1 + 1e-5)).all()
    found = codewords.products(queries)
    exact, error = in_integers(queries, np.rint(rounded / scales[:, None]), scales)
    np.testing.assert_array_equal(found, exact)
    assert (np.abs(found - queries.astype(np.float64) @ rounded.T) <= error).all() and not found[4].any()
    bound = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(words, axis=1) * (dim**0.5 / 254)
    assert (np.abs(found - queries @ words.T) <= bound + error).all()
    for alone in (slice(q, q + 1) for q in range(5)):
        np.testing.assert_array_equal(codewords.products(queries[alone]), found[alone])
    np.testing.assert_array_equal(codewords.products(queries[1:4]), found[1:4])  # beside others
    again = Codewords(codewords.tables)
    np.testing.assert_allclose(np.concatenate(again.tables), rounded, rtol=1e-6)
    for bad in (np.nan, np.inf):  # is not taken for a number
        queries[2, -1] = bad
        np.testing.assert_array_equal(np.isnan(codewords.products(queries)).all(1), np.arange(5) == 2)


def test_compiled_again_when_any_file_of_the_kernels_changes():
    for kernel in (kernels.expand, kernels.draft, kernels.add_products):
        cache = kernel._cache._cache_file  # type: ignore[attr-defined]
        assert cache._version.endswith(compiled._STAMP)  # what numba compares first with what it finds


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("share", [None, 0.002, 0.98])
def test_a_draft_of_more_items_than_it_looks_at_together(share, depth):
    rng = np.random.default_rng(0)
    items, sizes = 40_000, (1, 2, 8, 8, 8)  # a few hundred items share an identifier
    codes = np.stack([rng.integers(0, min(size, 4), items) for size in sizes], 1).astype(np.uint16)
    codes = codes[np.lexsort(codes.T[::-1])]
    walk = Walk([ConstraintIndex.build(codes, sizes, depth=depth)])
    allowed = np.ones(items, bool) if share is None else rng.random(items) < share
    log_probs = (rng.standard_normal((2, sum(sizes))) - 6).astype(np.float32)
    found = walk.draft_items(log_probs, 20, walk.masks(None if share is None else [ItemMask.of(allowed)], 2), items)
    for q in range(2):
        totals = log_probs[q].astype(np.float64)[codes + np.cumsum([0, *sizes[:-1]])].sum(1)
        least = np.unique(totals[allowed])[-20]  # no two identifiers score the same
        np.testing.assert_array_equal(
            np.sort(found.row[q][found.valid[q]]), np.flatnonzero(allowed & (totals >= least))
        )
        assert (np.diff(found.log_prob[q][found.valid[q]]) <= 0).all()


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("keep", [3, 60])
@pytest.mark.parametrize("sizes", [(3, 64, 64, 9), (2, 512, 64, 300), (2, 7, 300, 5, 5, 5, 5)])
def test_a_draft_keeps_the_best_at_each_level(sizes, keep, share):
    """8-bit and 16-bit tokens, by bitmaps where most tokens follow a node, with and without a filter."""
    rng = np.random.default_rng(keep)
    items, depth = 5000, 3
    codes = np.stack([rng.integers(0, size, items) for size in sizes], 1).astype(np.uint16)
    codes = codes[np.lexsort(codes.T[::-1])]
    walk = Walk([ConstraintIndex.build(codes, sizes, depth=depth)])
    assert (walk.present[1][0] is not None) == (sizes[1] % 64 == 0)
    allowed = np.ones(items, bool) if share is None else rng.random(items) < share
    log_probs = (rng.standard_normal((2, sum(sizes))) - 6).astype(np.float32)
    found = walk.draft_items(log_probs, keep, walk.masks(None if share is None else [ItemMask.of(allowed)], 2), items)
    for q in range(2):
        left, totals = np.flatnonzero(allowed), np.zeros(items)
        for level, width in enumerate(draft_widths(keep, len(sizes), depth)):
            totals += log_probs[q, sum(sizes[:level]) + codes[:, level]].astype(np.float64)
            if level < depth or level == len(sizes) - 1:
                scores = np.unique(totals[left])  # no two prefixes score the same
                left = left[totals[left] >= scores[-min(width, len(scores))]]
        here = found.valid[q]
        np.testing.assert_array_equal(np.sort(found.row[q][here]), left)
        np.testing.assert_allclose(found.log_prob[q][here], np.sort(totals[left])[::-1] - log_probs[q].max().clip(0))


@pytest.mark.parametrize("step, sizes", [(12, (3, 256, 4)), (16, (1, 3000))])
def test_a_draft_where_a_sample_promises_too_much(step, sizes):
    """The children or items that are looked at first are the best of all."""
    rng = np.random.default_rng(0)
    keep, depth = (3, 2) if len(sizes) == 3 else (200, 1)
    codes = np.stack(np.meshgrid(*map(np.arange, sizes[:2]), indexing="ij"), -1).reshape(-1, 2)
    if depth == 2:  # one item each, which says more than the child above
        codes = np.concatenate([codes, rng.integers(0, sizes[2], (len(codes), 1))], 1)
    walk = Walk([ConstraintIndex.build(codes.astype(np.uint16), sizes, depth=depth)])
    log_probs = (-20 - rng.random((1, sum(sizes)))).astype(np.float32)
    log_probs[0, 0] = -1
    log_probs[0, sizes[0] : sizes[0] + sizes[1] : step] += 10
    scores = log_probs[0].astype(np.float64)[codes + np.cumsum([0, *sizes[:-1]])]
    kept = np.argsort(-scores[:, :2].sum(1))[: 4 * keep if depth == 2 else None]
    best = kept[np.argsort(-scores[kept].sum(1))[:keep]]
    found = walk.draft_items(log_probs, keep, walk.masks(None, 1), keep)
    assert found.row[0].tolist() == best.tolist()


def test_a_draft_of_items_that_score_the_same():
    """Where a sample of scores says nothing, for many are those of others."""
    rng = np.random.default_rng(0)
    sizes, keep = (1, 4, 9, 9, 9), 50
    codes = np.stack([rng.integers(0, size, 9000) for size in sizes], 1).astype(np.uint16)
    codes = codes[np.lexsort(codes.T[::-1])]
    walk = Walk([ConstraintIndex.build(codes, sizes, depth=2)])
    log_probs = -rng.integers(1, 3, (2, sum(sizes))).astype(np.float32)
    rows = walk.draft(log_probs, keep, walk.masks(None, 2))
    for q in range(2):
        identifiers = np.unique(codes, axis=0)
        totals = log_probs[q][identifiers + np.cumsum([0, *sizes[:-1]])].sum(1)
        np.testing.assert_array_equal(rows.score[q], np.sort(totals)[::-1][:keep])
        tokens = rows.codes[q].astype(int)
        assert len(np.unique(tokens, axis=0)) == keep
        ends = [np.flatnonzero((codes == t).all(1)) for t in tokens]
        np.testing.assert_array_equal(rows.low[q, :, 0], [e[0] for e in ends])
        np.testing.assert_array_equal(rows.high[q, :, 0], [e[-1] + 1 for e in ends])


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.data())
def test_runs_of_bits(bits, data):
    words = ItemMask.of(np.array(bits)).words
    high = data.draw(st.integers(0, len(bits)))
    found, at = [], next_bit(words, 0, high)
    while at < high:
        end = bits_end(words, at, high)
        assert at < end
        found += range(at, end)
        at = next_bit(words, end, high)
    assert found == np.flatnonzero(bits[:high]).tolist()
