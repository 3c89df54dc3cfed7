"""The ranker: mix, calibration, threshold."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ace_core.errors import StoreError
from ace_core.ranking import Ranker, even_weights, fit_ranker
from pipelines.ranking import nonsense


def queries(n: int = 400, c: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates whose right one stands out in the similarity, a little in the log-probability; some have none."""
    rng = np.random.default_rng(seed)
    right = np.zeros((n, c), bool)
    right[np.arange(n), rng.integers(0, c, n)] = rng.random(n) < 0.8
    similarity = (0.2 + 0.05 * rng.normal(size=(n, c)) + 0.10 * right).astype(np.float32)
    log_prob = (-8 + 2 * rng.normal(size=(n, c)) + 1.5 * right).astype(np.float32)
    return log_prob, similarity, right


def top_is_right(ranker: Ranker, log_prob: np.ndarray, similarity: np.ndarray, right: np.ndarray) -> float:
    best = ranker.score(log_prob, similarity).argmax(1)
    return float(right[np.arange(len(best)), best].mean())


def test_the_learned_mix_beats_either_alone_on_new_queries() -> None:
    ranker = fit_ranker(*queries(seed=0))
    log_prob, similarity, right = queries(seed=1)
    mixed = top_is_right(ranker, log_prob, similarity, right)
    assert mixed > top_is_right(Ranker(generator=0, similarity=20), log_prob, similarity, right) + 0.01
    assert mixed > top_is_right(Ranker(generator=1, similarity=0), log_prob, similarity, right) + 0.01


def test_probabilities_are_calibrated_on_new_queries() -> None:
    ranker = fit_ranker(*queries(n=1500, seed=0))
    log_prob, similarity, right = queries(n=1500, seed=1)
    score = ranker.score(log_prob, similarity)
    best = score.argmax(1)
    rows = np.arange(len(best))
    probability, hit = ranker.probability(score, similarity)[rows, best], right[rows, best]
    edges = np.quantile(probability, [0, 0.25, 0.5, 0.75, 1])
    for low, high in pairwise(edges):
        inside = (probability >= low) & (probability <= high)
        assert probability[inside].mean() == pytest.approx(hit[inside].mean(), abs=0.1)
    assert hit[probability >= edges[3]].mean() > hit[probability <= edges[1]].mean() + 0.2


def test_kinds_of_queries_weigh_the_same_however_many_there_are() -> None:
    """One query in ten has its item among the candidates nearly always, the others seldom: asked evenly, half do."""
    log_prob, similarity, right = queries(n=2000, seed=3)
    easy = np.arange(2000) % 10 == 0
    weight = even_weights(easy)
    assert weight[easy].sum() == pytest.approx(1000) and weight.mean() == pytest.approx(1)
    assert np.array_equal(even_weights(np.zeros(5, bool)), np.ones(5))
    hard = ~easy & (np.arange(2000) % 3 > 0)
    right[hard] = False
    mean = {}
    for name, w in (("as many", None), ("evenly", weight)):
        ranker = fit_ranker(log_prob, similarity, right, weight=w)
        score = ranker.score(log_prob, similarity)
        mean[name] = np.average(ranker.probability(score, similarity).max(1), weights=weight)
    best = fit_ranker(log_prob, similarity, right).score(log_prob, similarity).argmax(1)
    truth = np.average(right[np.arange(2000), best], weights=weight)
    assert abs(mean["evenly"] - truth) < abs(mean["as many"] - truth)


def test_probabilities_keep_the_order_of_scores() -> None:
    ranker = fit_ranker(*queries())
    log_prob, similarity, _ = queries(seed=2)
    similarity = np.full_like(similarity, 0.25)
    score = ranker.score(log_prob, similarity)
    assert np.array_equal(score.argmax(1), ranker.probability(score, similarity).argmax(1))


def test_the_threshold_keeps_most_answers_and_turns_noise_away() -> None:
    ranker = fit_ranker(*queries())
    log_prob, similarity, right = queries(seed=3)
    best = ranker.probability(ranker.score(log_prob, similarity), similarity).max(1)
    assert (best[right.any(1)] >= ranker.threshold).mean() > 0.9
    noise = similarity - 0.3
    quiet = ranker.probability(ranker.score(log_prob, noise), noise).max(1)
    assert (quiet < ranker.threshold).mean() > 0.5


def _stray(seed: int, nearer: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Queries without an answer: one candidate stands out as much as a right one, but all are farther away."""
    log_prob, similarity, _ = queries(seed=seed)
    similarity[:, 0] += 0.12
    return log_prob, similarity - 0.1 + np.float32(nearer)


def test_texts_that_mean_nothing_teach_what_no_match_is() -> None:
    plain, taught = (fit_ranker(*queries(), nonsense=n) for n in (None, _stray(7)[1].max(1)))
    confident = {}
    for name, ranker in (("plain", plain), ("taught", taught)):
        log_prob, similarity, right = queries(seed=3)
        best = ranker.probability(ranker.score(log_prob, similarity), similarity).max(1)
        assert (best[right.any(1)] >= ranker.threshold).mean() > 0.9  # as many answers are kept
        log_prob, similarity = _stray(8)
        stray = ranker.probability(ranker.score(log_prob, similarity), similarity).max(1)
        confident[name] = (stray >= ranker.threshold).mean()
    assert confident["plain"] > 0.7 and confident["taught"] < 0.4


def test_nonsense_that_is_as_near_as_sense_changes_nothing() -> None:
    plain = fit_ranker(*queries())
    for stray in (_stray(7, nearer=1.0)[1].max(1), _stray(7)[1].max(1)[:5]):  # nearer than any answer; too few
        assert fit_ranker(*queries(), nonsense=stray) == plain


def test_what_a_filter_leaves_is_judged_by_what_it_leaves() -> None:
    """Padding and candidates that do not pass have no say in whether a query means anything."""
    taught = fit_ranker(*queries(), nonsense=_stray(7)[1].max(1))
    log_prob, similarity, _ = queries(seed=3)
    score = taught.score(log_prob, similarity)
    few = np.where(np.arange(score.shape[1]) < 3, score, -np.inf)
    cut = taught.probability(few[:, :3], similarity[:, :3])
    np.testing.assert_allclose(taught.probability(few, similarity)[:, :3], cut, rtol=1e-9)
    assert (taught.probability(np.full_like(score, -np.inf), similarity) == 0).all()
    assert taught.probability(score[:, :0], similarity[:, :0]).shape == (len(score), 0)


def test_nonsense_has_the_letters_of_what_it_is_made_from() -> None:
    texts = ["a red fruit", "42", "ein Hund bellt", "红色的水果", "x"]
    made = nonsense(texts, 10, seed=0)
    assert made == nonsense(texts, 10, seed=0) and 2 <= len(made) <= 4 and not set(made) & set(texts)
    assert all(sorted(text) in [sorted(t) for t in texts] for text in made)
    assert len(nonsense([f"thing number {n}" for n in range(50)], 20, seed=1)) == 20


def test_candidates_that_are_not_valid_never_win() -> None:
    ranker = fit_ranker(*queries())
    log_prob, similarity, _ = queries(n=5)
    valid = np.zeros(similarity.shape, bool)
    valid[:, 3] = True
    score = ranker.score(log_prob, similarity, valid)
    assert (score.argmax(1) == 3).all() and np.isneginf(score[:, 0]).all()
    assert (ranker.probability(score, similarity)[:, :3] == 0).all()


def test_nothing_found_in_validation_leaves_the_start() -> None:
    log_prob, similarity, right = queries(n=5)
    start = Ranker(generator=0.5, similarity=10)
    assert fit_ranker(log_prob, similarity, np.zeros_like(right), start=start) == start


def test_save_and_load(tmp_path) -> None:
    for ranker in (fit_ranker(*queries()), fit_ranker(*queries(), nonsense=_stray(7)[1].max(1))):
        ranker.save(tmp_path / "ranking.json")
        assert Ranker.load(tmp_path / "ranking.json") == ranker
    before = '{"generator": 0.5, "similarity": 9.0, "calibration": [1.0, 0.0, 0.5], "threshold": 0.1}'
    (tmp_path / "ranking.json").write_text(before)  # written before nonsense was asked
    assert Ranker.load(tmp_path / "ranking.json") == Ranker(0.5, 9.0, (1.0, 0.0, 0.5), threshold=0.1)
    (tmp_path / "bad.json").write_text('{"generator": 1}')
    with pytest.raises(StoreError, match="cannot read the ranking"):
        Ranker.load(tmp_path / "bad.json")
