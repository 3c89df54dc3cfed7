"""Recall, MRR and median rank with bootstrap intervals; the dual-tower baselines on the same features.

Everything counts *items*: a query's answer is right when it is the very item that the query was written for (or one
that is declared its twin, for captions that many items share), never because two identifiers are equal. Ranks are
0-based; an item that a method did not return has rank :data:`MISSED`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import faiss
import numpy as np

MISSED = np.iinfo(np.int64).max
FEW = 50  # queries; of fewer, a figure says little
_Z = 1.96  # standard deviations of a 95 % interval
_BLOCK = 512


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Retrieval:
    """What a method found.

    Attributes:
        queries, gallery: how many queries were asked, among how many items.
        recall_1, recall_5, recall_10: share of queries whose item is among the first 1, 5, 10.
        mrr_10: mean reciprocal rank, 0 beyond the first 10.
        median_rank: 1-based, infinite when more than half of the queries missed.
    """

    queries: int
    gallery: int
    recall_1: Interval
    recall_5: Interval
    recall_10: Interval
    mrr_10: Interval
    median_rank: float

    def as_dict(self) -> dict[str, object]:
        """JSON-ready figures (an infinite median as None)."""
        out = asdict(self)
        out["median_rank"] = None if np.isinf(self.median_rank) else self.median_rank
        return out


def ranks_of(scores: np.ndarray, gold: np.ndarray, twins: np.ndarray | None = None) -> np.ndarray:
    """Rank of each query's item among scored items.

    Args:
        scores: (n, N), higher is better; -inf for items that a method did not return.
        gold: (n,) row of the right item.
        twins: (N,) group of each item; items of the right item's group are as right. None for none.

    Returns:
        (n,) int64: how many wrong items score higher, plus half of those that tie (rounded up), so that a method that
        gives everything one score gains nothing.
    """
    rows = np.arange(len(scores))
    if twins is None:
        best = scores[rows, gold]
        wrong = scores
        own_ties = 1
    else:
        right = twins[None, :] == twins[gold][:, None]
        best = np.where(right, scores, -np.inf).max(1)
        wrong = np.where(right, -np.inf, scores)
        own_ties = 0
    above = (wrong > best[:, None]).sum(1)
    ties = (wrong == best[:, None]).sum(1) - own_ties
    return np.where(np.isneginf(best), MISSED, above + (ties + 1) // 2).astype(np.int64)


def ranks_in(results: np.ndarray, gold: np.ndarray, twins: np.ndarray | None = None) -> np.ndarray:
    """Rank of each query's item in a list of results.

    Args:
        results: (n, k) item rows, best first, -1 where there were no more.
        gold, twins: as in :func:`ranks_of`.
    """
    right = results == gold[:, None] if twins is None else twins[results] == twins[gold][:, None]
    right &= results >= 0
    return np.where(right.any(1), right.argmax(1), MISSED).astype(np.int64)


def exact_ranks(
    queries: np.ndarray,
    items: np.ndarray,
    gold: np.ndarray,
    *,
    gallery: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    twins: np.ndarray | None = None,
) -> np.ndarray:
    """The dual tower: exact search by inner product.

    Args:
        queries: (n, D). items: (N, D), aligned vectors, or rebuilt ones for the ceiling of a quantizer.
        gold: (n,) rows of ``items``.
        gallery: (G,) rows that compete, the golds among them; None for all.
        bias: (N,) subtracted from each item's score.
        twins: (N,) groups of equally right items.
    """
    if gallery is not None:
        place = np.full(len(items), -1, np.int64)
        place[gallery] = np.arange(len(gallery))
        items, gold = items[gallery], place[gold]
        bias = None if bias is None else bias[gallery]
        twins = None if twins is None else twins[gallery]
    out = []
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ items.T
        if bias is not None:
            scores = scores - bias
        out.append(ranks_of(scores, gold[start : start + _BLOCK], twins))
    return np.concatenate(out) if out else np.empty(0, np.int64)


def ivf_results(queries: np.ndarray, items: np.ndarray, *, lists: int, probes: int, k: int) -> np.ndarray:
    """The approximate rival: rows (n, k) that a FAISS IVF-Flat index over ``items`` returns, -1 beyond its probes."""
    coarse = faiss.IndexFlatIP(items.shape[1])
    index = faiss.IndexIVFFlat(coarse, items.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    contiguous = np.ascontiguousarray(items, np.float32)
    index.train(contiguous)
    index.add(contiguous)
    index.nprobe = probes
    return index.search(np.ascontiguousarray(queries, np.float32), k)[1]


def _hits(ranks: np.ndarray, k: int) -> np.ndarray:
    return (ranks < k).astype(np.float64)


def _resamples(groups: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, n) weights: how often each query is drawn when its group (an item's queries) is drawn as a whole."""
    names, group = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return counts[:, group.reshape(-1)]


def _interval(values: np.ndarray, weights: np.ndarray) -> Interval:
    means = weights @ values / np.maximum(weights.sum(1), 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def _share(hits: np.ndarray, weights: np.ndarray) -> Interval:
    """A share of n queries, with the bootstrap's interval; of few queries not narrower than Wilson's (J. Am. Stat.
    Assoc. 22, 1927), since resampling cannot tell all of five from all."""
    found, n = _interval(hits, weights), len(hits)
    if n >= FEW:
        return found
    centre = (found.value + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(found.value * (1 - found.value) / n + (_Z / (2 * n)) ** 2)
    return Interval(found.value, min(found.low, max(0.0, centre - half)), max(found.high, min(1.0, centre + half)))


def summarise(
    ranks: np.ndarray, gallery: int, *, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> Retrieval:
    """Figures of a method's ranks (n,).

    Args:
        groups: (n,) what is resampled together, normally the query's item (its captions are not independent).
    """
    weights = _resamples(np.arange(len(ranks)) if groups is None else groups, resamples, seed)
    reciprocal = np.where(ranks < 10, 1 / (1.0 + np.minimum(ranks, 10)), 0.0)
    finite = np.where(ranks == MISSED, np.inf, ranks + 1.0)
    return Retrieval(
        queries=len(ranks),
        gallery=gallery,
        recall_1=_share(_hits(ranks, 1), weights),
        recall_5=_share(_hits(ranks, 5), weights),
        recall_10=_share(_hits(ranks, 10), weights),
        mrr_10=_interval(reciprocal, weights),
        median_rank=float(np.sort(finite)[len(finite) // 2]),
    )


def compare(
    ours: np.ndarray,
    theirs: np.ndarray,
    k: int,
    *,
    groups: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    difference: bool = False,
) -> Interval:
    """Recall@k of two methods on the same queries: the ratio ours / theirs (or the difference), paired bootstrap."""
    weights = _resamples(np.arange(len(ours)) if groups is None else groups, resamples, seed)
    a, b = _hits(ours, k), _hits(theirs, k)
    sums_a, sums_b, total = weights @ a, weights @ b, np.maximum(weights.sum(1), 1)
    if difference:
        values, value = (sums_a - sums_b) / total, a.mean() - b.mean()
    else:
        values, value = sums_a / np.maximum(sums_b, 1), a.sum() / max(b.sum(), 1)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def compare_unpaired(ours: np.ndarray, theirs: np.ndarray, k: int, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Difference of recall@k of two methods or item sets asked with different queries."""
    rng = np.random.default_rng(seed)
    a, b = _hits(ours, k), _hits(theirs, k)
    draws = rng.binomial(len(a), a.mean(), resamples) / len(a) - rng.binomial(len(b), b.mean(), resamples) / len(b)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(a.mean() - b.mean()), float(low), float(high))
