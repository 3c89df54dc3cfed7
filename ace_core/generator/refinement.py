"""How much of the learned correction a query gets: chosen on validation queries.

On a large corpus the refined query finds more than the aligned one; on a few hundred captions it has learned those by
heart and finds less. The share under which validation queries find best is between nothing and all of it. What counts
is the rank: by likelihood, more of it was chosen than recall bears out.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ace_core.generator.model import Generator
from ace_core.query import QueryBatch
from ace_core.space import unit_query

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_ITEMS = 20_000  # items that a validation query's own competes with


@torch.inference_mode()
def choose_refinement(
    generator: Generator,
    queries: Iterable[QueryBatch],
    gold: np.ndarray,
    items: np.ndarray,
    *,
    weight: np.ndarray | None = None,
    seed: int = 0,
) -> float:
    """Set ``generator.refinement`` to the share with the best mean reciprocal rank of the queries' own items (the
    smallest of equals); returns it.

    Args:
        queries: validation queries, in batches.
        gold: (n,) rows of ``items``, each query's own.
        items: (N, D) float32 item vectors, as they are indexed; a sample of them competes where there are many.
        weight: (n,) of the queries, of mean 1; by default all weigh the same.
    """
    pairs = [(batch.vector, generator.correction(batch).float()) for batch in queries]
    if not len(gold):
        return float(generator.refinement)
    vector, correction = (torch.cat(parts) for parts in zip(*pairs))
    rows = np.unique(np.asarray(gold, np.int64))
    if len(items) > _MOST_ITEMS:
        others = np.random.default_rng(seed).choice(len(items), _MOST_ITEMS, replace=False)
        rows = np.union1d(rows, others)
    else:
        rows = np.arange(len(items))
    target = torch.from_numpy(np.searchsorted(rows, gold))
    table = torch.from_numpy(np.ascontiguousarray(items[rows], np.float32)).T
    weights = torch.ones(len(gold)).double() if weight is None else torch.from_numpy(weight)
    found = {}
    for share in _SHARES:
        similar = unit_query(vector + share * correction) @ table
        own = similar.gather(1, target[:, None])
        found[share] = float((weights / (1 + (similar > own).sum(1))).mean())
    best = max(_SHARES, key=lambda share: found[share])
    generator.refinement.fill_(best)
    return best
