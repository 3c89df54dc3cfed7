"""Ranking of what the generator proposed: mix, probability, no-match threshold.

An item's score is a mix of what the generator thought of its identifier and how similar it is to the refined query,

    score = w_g * log p(identifier | query) + w_s * (q' · item),

where the item is its stored 8-bit vector or the one rebuilt from its codes. The weights, the calibration of scores to
probabilities and the threshold are learned on validation queries, and on texts that mean nothing: those find something,
too, but nothing that is near.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ace_core.errors import StoreError

_STEPS = 200
_FOUND_WITHIN = 10
_KEPT_SHARE = 0.95
_LOWEST = -1e30
_MIN_NONSENSE = 20  # texts; of fewer, nothing is learned


@dataclass(frozen=True)
class Ranker:
    """Frozen weights. All arrays below are (n, c): c candidates of each of n queries.

    Attributes:
        generator, similarity: the weights w_g, w_s >= 0.
        calibration: (a, b, c): a candidate's probability of being right is
            sigmoid(a * logit of the posterior among the candidates + b * similarity + c).
        answerable: (u, v, typical): that times the probability that the query means anything here, sigmoid(u * the
            similarity of its best candidate + v), as a share of what it typically is where the right item is found, at
            most 1. None where it was not learned.
        threshold: probability below which a query's best candidate is no confident match.
    """

    generator: float = 0.0
    similarity: float = 20.0
    calibration: tuple[float, float, float] = (1.0, 0.0, 0.0)
    answerable: tuple[float, float, float] | None = None
    threshold: float = 0.0

    def score(self, log_prob: np.ndarray, similarity: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """Scores (n, c) float32, higher is better; -inf where not ``valid``."""
        out = self.similarity * np.asarray(similarity, np.float32)
        if self.generator:
            out = out + self.generator * np.asarray(log_prob, np.float32)
        return out if valid is None else np.where(valid, out, np.float32(-np.inf))

    def probability(self, score: np.ndarray, similarity: np.ndarray, best: np.ndarray | None = None) -> np.ndarray:
        """Calibrated probabilities (n, c) of being the right item, from :meth:`score`'s (0 where a score is -inf).

        Args:
            best: (n,) the best score without filters, where these candidates are but those that pass one: what is
                much worse than that is improbable, however few it is among.
        """
        a, b, c = self.calibration
        out = _sigmoid(a * _posterior_logit(score, best) + b * similarity + c)
        if self.answerable is not None:
            u, v, typical = self.answerable
            out = out * np.minimum(1.0, _sigmoid(u * _nearest(score, similarity) + v) / typical)[:, None]
        return np.where(np.isneginf(score), 0.0, out)

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Ranker:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: the file is missing or holds something else.
        """
        try:
            raw = json.loads(path.read_text())
            answerable = raw.get("answerable")  # not in files of before it was learned
            tuples = {"calibration": tuple(raw["calibration"]), "answerable": answerable and tuple(answerable)}
            return cls(**raw | tuples)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise StoreError(f"cannot read the ranking ({e})", where=path, remedy="Fit the generator again.") from None


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))


def _nearest(score: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """(n,) the similarity of each query's most similar candidate, of those (n, c) with a score."""
    return np.where(np.isneginf(score), -np.inf, similarity).max(axis=1, initial=-np.inf)


def _posterior_logit(score: np.ndarray, best: np.ndarray | None = None) -> np.ndarray:
    """Logit of the softmax of scores (n, c) over the candidates, whose mass is at least that of the
    ``best`` without filters; within -30 .. 10."""
    filled = np.where(np.isneginf(score), _LOWEST, score).astype(np.float64)
    mass = np.logaddexp.reduce(filled, axis=1, keepdims=True)
    if best is not None:
        mass = np.maximum(mass, best[:, None])
    log_p = np.clip(filled - mass, -30, -1e-9)
    return np.minimum(log_p - np.log(-np.expm1(log_p)), 10.0)


def even_weights(kind: np.ndarray) -> np.ndarray:
    """(n,) weights of mean 1 under which queries of each kind (n,) bool weigh the same in all; ones where there is
    one kind only."""
    share = kind.mean() if len(kind) else 0.0
    return np.ones(len(kind)) if share in (0.0, 1.0) else np.where(kind, 0.5 / share, 0.5 / (1 - share))


def fit_ranker(
    log_prob: np.ndarray,
    similarity: np.ndarray,
    right: np.ndarray,
    *,
    valid: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    start: Ranker | None = None,
    nonsense: np.ndarray | None = None,
) -> Ranker:
    """Learn the weights, the calibration and the threshold on validation queries.

    The weights maximise the likelihood of the right candidate among the candidates, over queries that have one; the
    calibration is a logistic regression over the ten best candidates of every query; whether a query means anything is
    one over the best similarities of these queries and of nonsense; the threshold keeps 95 % of the queries whose item
    is among those ten.

    Args:
        log_prob, similarity: (n, c) as in :class:`Ranker`.
        right, valid: (n, c) bool.
        weight: (n,) of the queries, of mean 1; by default all weigh the same.
        start: weights to start from; returned unchanged when no query has its item among its candidates.
        nonsense: (m,) similarity of the most similar candidate of texts that mean nothing.
    """
    start = start or Ranker()
    valid = np.ones(right.shape, bool) if valid is None else valid
    weight = np.ones(len(right)) if weight is None else weight
    right = right & valid
    usable = right.any(1)
    if not usable.any():
        return start
    columns = [np.where(valid, f, 0.0)[usable] for f in (log_prob, similarity)]
    x = torch.from_numpy(np.stack(columns, -1)).double()
    mask = torch.from_numpy(valid[usable])
    target = torch.from_numpy(right[usable]).double()
    target = target / target.sum(1, keepdim=True) * torch.from_numpy(weight[usable])[:, None]
    spread = x[mask].std(0).clamp_min(1e-6)
    first = torch.tensor([max(start.generator, 0.1), max(start.similarity, 1.0)], dtype=torch.float64)
    raw = (first * spread).log().requires_grad_()

    def loss() -> torch.Tensor:
        mixed = (x / spread * raw.exp()).sum(-1).masked_fill(~mask, _LOWEST)
        return -(target * F.log_softmax(mixed, -1)).sum(-1).mean()

    _minimise([raw], loss)
    weights = (raw.detach().exp() / spread).tolist()
    ranker = replace(start, generator=weights[0], similarity=weights[1])
    return _calibrated(ranker, log_prob, similarity, right, valid, weight, nonsense)


def _calibrated(
    ranker: Ranker,
    log_prob: np.ndarray,
    similarity: np.ndarray,
    right: np.ndarray,
    valid: np.ndarray,
    weight: np.ndarray,
    nonsense: np.ndarray | None,
) -> Ranker:
    scores = ranker.score(log_prob, similarity, valid)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :_FOUND_WITHIN]
    kept = np.take_along_axis(valid, order, 1)
    columns = [np.take_along_axis(f, order, 1)[kept] for f in (_posterior_logit(scores), similarity)]
    y = np.take_along_axis(right, order, 1)[kept]
    weights = np.broadcast_to(weight[:, None], kept.shape)[kept]
    (a, b), c = _logistic(np.stack(columns, -1), y, weights)
    ranker = replace(ranker, calibration=(a, b, c))
    found = np.asarray(np.take_along_axis(right, order, 1).any(1))
    if nonsense is not None and len(nonsense) >= _MIN_NONSENSE:
        ranker = replace(ranker, answerable=_answerable(_nearest(scores, similarity), weight, found, nonsense))
    best = ranker.probability(scores, similarity).max(1)
    return replace(ranker, threshold=float(np.quantile(best[found], 1 - _KEPT_SHARE)))


def _answerable(
    nearest: np.ndarray, weight: np.ndarray, found: np.ndarray, nonsense: np.ndarray
) -> tuple[float, float, float] | None:
    """See :attr:`Ranker.answerable`; queries (n,) and nonsense (m,) weigh the same. None where nonsense is as near."""
    x = np.concatenate([nearest, nonsense])
    weights = np.concatenate([weight, np.full(len(nonsense), len(nearest) / len(nonsense))])
    (u,), v = _logistic(x[:, None], np.arange(len(x)) < len(nearest), weights)
    return (u, v, float(np.median(_sigmoid(u * nearest[found] + v)))) if u > 0 else None


def _logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[list[float], float]:
    """Slopes and offset of a logistic regression of y (n,) bool on x (n, d), rows weighing ``weight`` (n,)."""
    columns, target, weights = (torch.from_numpy(np.array(array, np.float64)) for array in (x, y, weight))
    centre, spread = columns.mean(0), columns.std(0).clamp_min(1e-6)
    z = (columns - centre) / spread
    slope = torch.ones(x.shape[1], dtype=torch.float64, requires_grad=True)
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def loss() -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(z @ slope + offset, target, weights) + 1e-4 * slope.square().sum()

    _minimise([slope, offset], loss)
    slopes = slope.detach() / spread
    return slopes.tolist(), float(offset.detach() - (slopes * centre).sum())


def _minimise(parameters: list[torch.Tensor], loss: Callable[[], torch.Tensor]) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
