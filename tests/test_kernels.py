"""Compiled helpers: selection against NumPy, and the cache of what was compiled."""

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


@settings(deadline=None)
@given(scores)
def test_best_first_is_a_stable_sort(values):
    array = np.array(values)
    order, other = np.empty((2, len(values)), np.int64)
    order_best_first(array, len(values), order, other)
    assert order.tolist() == np.argsort(-array, kind="stable").tolist()


@pytest.mark.parametrize("dim", [1, 7, 64, 257])
def test_products_of_chosen_rows_are_added(dim):
    rng = np.random.default_rng(dim)
    stored = Remainders.of(rng.standard_normal((50, dim)).astype(np.float32))
    queries = rng.standard_normal((3, dim)).astype(np.float32)
    rows = rng.integers(0, 50, (3, 9))
    chosen = rng.random((3, 9)) < 0.7
    out = np.full((3, 9), 7.0, np.float32)
    stored.add_products(queries, rows, chosen, out)
    exact = np.einsum("nd,ncd->nc", queries.astype(np.float64), stored.rows(rows.ravel()).reshape(3, 9, dim))
    np.testing.assert_allclose(out, np.where(chosen, 7.0 + exact, 7.0), rtol=1e-5, atol=1e-5)


def test_products_with_short_codewords():
    rng = np.random.default_rng(0)
    tables = [rng.standard_normal((m, 65)).astype(np.float32) for m in (1, 7, 30)]
    queries = rng.standard_normal((5, 65)).astype(np.float32)
    codewords, words = Codewords(tables), np.concatenate(tables)
    found = codewords.products(queries)
    bound = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(words, axis=1) * (65**0.5 / 65534)
    assert (np.abs(found - queries @ words.T) <= bound + 1e-5).all()
    assert np.abs(found - queries @ words.T).max() > 0
    for q in range(5):
        assert (codewords.products(queries[q : q + 1]) == found[q]).all()


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
