"""Figures count items, never identifiers, and ties gain nothing."""

from __future__ import annotations

import numpy as np
import pytest

from ace_core.evaluation import (
    FEW,
    MISSED,
    compare,
    compare_unpaired,
    exact_ranks,
    ivf_results,
    ranks_in,
    ranks_of,
    summarise,
)
from pipelines.evaluate import as_table, few_queries


def test_ranks_count_wrong_items_that_score_higher() -> None:
    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, -np.inf]])
    assert ranks_of(scores, np.array([0, 2, 2])).tolist() == [0, 2, MISSED]


def test_a_constant_score_gains_nothing() -> None:
    ranks = ranks_of(np.zeros((4, 101)), np.array([0, 3, 50, 100]))
    assert ranks.tolist() == [50] * 4


def test_items_that_share_an_identifier_are_still_two_items() -> None:
    """Two items rebuilt to the same vector tie: the right one is not counted as found first for free."""
    items = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert exact_ranks(np.array([[1.0, 0.0]]), items, np.array([0])).tolist() == [1]
    assert ranks_in(np.array([[1, 0, 2]]), np.array([0])).tolist() == [1]


def test_twins_are_right_too() -> None:
    twins = np.array([0, 0, 1, 1])
    scores = np.array([[0.1, 0.9, 0.5, 0.2]])
    assert ranks_of(scores, np.array([0])).tolist() == [3]
    assert ranks_of(scores, np.array([0]), twins).tolist() == [0]
    assert ranks_of(scores, np.array([3]), twins).tolist() == [1]
    assert ranks_in(np.array([[1, 2, -1]]), np.array([3]), twins).tolist() == [1]
    assert ranks_in(np.array([[1, -1, -1]]), np.array([3]), twins).tolist() == [MISSED]


def test_exact_search_in_a_gallery_and_with_a_bias() -> None:
    rng = np.random.default_rng(0)
    items, queries = rng.normal(size=(50, 8)), rng.normal(size=(20, 8))
    gold = rng.integers(0, 10, 20)
    gallery = np.arange(10)
    scores = queries @ items[:10].T
    expected = [int((s > s[g]).sum()) for s, g in zip(scores, gold)]
    assert exact_ranks(queries, items, gold, gallery=gallery).tolist() == expected
    shuffled = gallery[::-1].copy()
    assert exact_ranks(queries, items, gold, gallery=shuffled).tolist() == expected
    bias = np.zeros(50)
    bias[gold[0]] = -100
    assert exact_ranks(queries[:1], items, gold[:1], bias=bias).tolist() == [0]


def test_ivf_with_every_probe_is_exact() -> None:
    rng = np.random.default_rng(0)
    items, queries = (rng.normal(size=(n, 8)).astype(np.float32) for n in (400, 10))
    found = ivf_results(queries, items, lists=8, probes=8, k=5)
    assert np.array_equal(found, np.argsort(-queries @ items.T, 1)[:, :5])
    few = ivf_results(queries, items, lists=8, probes=1, k=5)
    assert not np.array_equal(found, few)


def test_figures_and_their_intervals() -> None:
    ranks = np.array([0, 0, 3, 7, 20, MISSED])
    r = summarise(ranks, 100)
    assert (r.recall_1.value, r.recall_5.value, r.recall_10.value) == (2 / 6, 3 / 6, 4 / 6)
    assert r.mrr_10.value == pytest.approx((1 + 1 + 1 / 4 + 1 / 8) / 6)
    assert r.median_rank == 8 and r.queries == 6 and r.gallery == 100
    assert r.recall_1.low <= r.recall_1.value <= r.recall_1.high
    lost = summarise(np.full(3, MISSED), 10)
    assert np.isinf(lost.median_rank) and lost.as_dict()["median_rank"] is None


def test_queries_of_one_item_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    item = np.repeat(np.arange(100), 5)
    ranks = np.where(rng.random(100) < 0.5, 0, 99)[item]
    apart, together = summarise(ranks, 100), summarise(ranks, 100, groups=item)
    width = together.recall_1.high - together.recall_1.low
    assert width > 1.8 * (apart.recall_1.high - apart.recall_1.low)


def test_comparisons() -> None:
    ours, theirs = np.array([0, 0, 0, 5]), np.array([0, 0, 9, 9])
    assert compare(ours, theirs, 1).value == 1.5
    assert compare(ours, theirs, 1, difference=True).value == 0.25
    rng = np.random.default_rng(0)
    base = rng.integers(0, 20, 2000)
    ratio = compare(base, base, 10)
    assert ratio.low == ratio.high == 1.0  # paired: the same ranks are no difference at all
    other = compare_unpaired(base, rng.integers(0, 20, 2000), 10)
    assert other.low < 0 < other.high and abs(other.value) < 0.05


def test_few_queries_have_wide_intervals() -> None:
    """All of five found says no more than that half of all are; resampling five ones gives nothing but ones."""
    all_of_five, none_of_five = summarise(np.zeros(5, int), 100), summarise(np.full(5, MISSED), 100)
    assert all_of_five.recall_1.value == 1 and all_of_five.recall_1.low == pytest.approx(0.566, abs=1e-3)
    assert none_of_five.recall_1.value == 0 and none_of_five.recall_1.high == pytest.approx(0.434, abs=1e-3)
    assert all_of_five.recall_1.high == 1 and none_of_five.recall_1.low == 0
    three = summarise(np.array([0, 0, 0, 9, 9]), 100)
    assert three.recall_1.low <= 0.231 and three.recall_1.high >= 0.882  # Wilson's of 3 of 5
    many = summarise(np.zeros(FEW, int), 100)
    assert many.recall_1.low == many.recall_1.high == 1


def test_what_few_queries_gave_is_said_to_be_wide() -> None:
    def line(queries: str, gallery: str, ranks: np.ndarray) -> dict:
        result = summarise(ranks, 20)
        names = {"queries": queries, "gallery": gallery, "method": "beam"}
        return {**result.as_dict(), "queries_count": result.queries, "gallery_count": result.gallery, **names}

    many, few = line("seen", "all", np.arange(200) % 7), line("seen", "audio", np.arange(6) % 2)
    measured = {"snapshot": "s", "lines": [many, few]}
    assert few_queries({"snapshot": "s", "lines": [many]}) == ""
    assert "seen in audio: 6" in few_queries(measured) and "seen in all" not in few_queries(measured)
    low, high = (few["recall_1"][end] for end in ("low", "high"))
    assert "may lie 39 points" in few_queries(measured)  # all six are among the first five: down to 0.61, says Wilson
    cells = list(as_table(measured).columns[3].cells)
    assert cells[0] == "14.5" and cells[1] == f"50.0 [{100 * low:.0f}, {100 * high:.0f}]"
