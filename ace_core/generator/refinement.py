"""How much of the learned correction a query gets: chosen for each modality on validation queries.

On a large corpus the refined query finds more than the aligned one; on a few hundred captions it has learned those by
heart and finds less. One generator may serve pictures of the first kind and clips of the second. So the share is chosen
for the queries of each modality by itself: what counts is that queries of neither kind (for items that were trained on,
for others) find less than by the aligned query, and then the geometric mean of what both find. What counts is the rank:
by likelihood, more of it was chosen than recall bears out.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ace_core.generator.model import Generator
from ace_core.items import MODALITIES
from ace_core.query import QueryBatch
from ace_core.space import unit_query

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_FEWEST_QUERIES = 10  # of a kind: fewer say nothing
_MOST_ITEMS = 20_000  # items that a validation query's own competes with


@torch.inference_mode()
def choose_refinement(
    generator: Generator,
    queries: Iterable[QueryBatch],
    gold: np.ndarray,
    items: np.ndarray,
    modality: np.ndarray,
    *,
    trained: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Set ``generator.refinement``; returns each modality's share by name.

    Where queries of a kind are missing, it is 0: queries stay as they are aligned.

    Args:
        queries: validation queries, in batches.
        gold: (n,) rows of ``items``, each query's own.
        items: (N, D) float32 item vectors, as they are indexed; a sample of them competes where there are many.
        modality: (N,) modality token of each item.
        trained: (n,) bool, asks for an item that was trained on; by default all queries are of one kind.
    """
    generator.refinement.zero_()
    if len(gold):
        pairs = [(batch.vector, generator.correction(batch).float()) for batch in queries]
        vector, correction = (torch.cat(parts) for parts in zip(*pairs))
        rows = np.unique(np.asarray(gold, np.int64))
        if len(items) > _MOST_ITEMS:
            others = np.random.default_rng(seed).choice(len(items), _MOST_ITEMS, replace=False)
            rows = np.union1d(rows, others)
        else:
            rows = np.arange(len(items))
        target = torch.from_numpy(np.searchsorted(rows, gold))
        table = torch.from_numpy(np.ascontiguousarray(items[rows], np.float32)).T
        found = {}
        for share in _SHARES:
            similar = unit_query(vector + share * correction) @ table
            own = similar.gather(1, target[:, None])
            found[share] = (1 / (1 + (similar > own).sum(1))).numpy()
        asked = modality[gold]
        of_kind = [np.ones(len(gold), bool)] if trained is None else [trained, ~trained]
        for m in MODALITIES:
            kinds = [(asked == m.token) & kind for kind in of_kind]
            if min(k.sum() for k in kinds) >= _FEWEST_QUERIES:
                means = {share: [float(f[k].mean()) for k in kinds] for share, f in found.items()}
                generator.refinement[m.token] = _best(means)
    return {m.value: float(generator.refinement[m.token]) for m in MODALITIES if (modality == m.token).any()}


def _best(found: dict[float, list[float]]) -> float:
    """The share under which no kind finds less than without the correction, then all find most; the smallest of
    equals."""

    def merit(share: float) -> tuple[float, float]:
        ratios = [ours / max(own, 1e-6) for ours, own in zip(found[share], found[0.0])]
        return round(min(1.0, *ratios), 2), round(float(np.log(np.maximum(ratios, 1e-6)).sum()), 6)

    return max(found, key=merit)
