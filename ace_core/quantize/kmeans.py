"""Distributed K-Means: Lloyd's iterations with summed statistics, k-means++ on a sample.

Each worker holds some of the points (whichever: they are named by their global index) and every step is a sum over
workers, so the result does not depend on how many there are, up to rounding of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ace_core.collective import Collective
from ace_core.errors import CorpusError
from ace_core.fitting import Progress, generator_for

_BLOCK = 8192
_SAMPLE_PER_CENTRE = 64
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class KMeansResult:
    """Centroids (k, D) float32, the number of points of each (k,) float64, and the mean squared distance."""

    centroids: torch.Tensor
    counts: torch.Tensor
    inertia: float


@dataclass(frozen=True)
class Shard:
    """This worker's points.

    Attributes:
        points: (n_r, D) float32.
        index: (n_r,) int64, their global indices; over all workers each of ``range(total)`` once.
        total: number of points over all workers.
    """

    points: torch.Tensor
    index: torch.Tensor
    total: int

    @classmethod
    def whole(cls, points: torch.Tensor) -> Shard:
        """All points on one worker."""
        return cls(points, torch.arange(len(points), device=points.device), len(points))

    def with_points(self, points: torch.Tensor) -> Shard:
        """The same items in another space (residuals, latents)."""
        return Shard(points, self.index, self.total)


def nearest(points: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centre of each point: (indices (n,) int64, squared distances (n,) float32)."""
    half_norm = 0.5 * centres.square().sum(1)
    labels = torch.empty(len(points), dtype=torch.int64, device=points.device)
    distances = torch.empty(len(points), device=points.device)
    for i in range(0, len(points), _BLOCK):
        block = points[i : i + _BLOCK]
        best, at = (block @ centres.T - half_norm).max(1)
        labels[i : i + _BLOCK] = at
        distances[i : i + _BLOCK] = (block.square().sum(1) - 2 * best).clamp_min(0)
    return labels, distances


def gather_rows(shard: Shard, wanted: torch.Tensor, collective: Collective) -> torch.Tensor:
    """The points of some global indices (m,), on every worker: each fills in those it holds, and they are summed."""
    place = torch.full((shard.total,), -1, dtype=torch.int64, device=shard.points.device)
    place[shard.index] = torch.arange(len(shard.index), device=shard.points.device)
    local = place[wanted.to(place.device)]
    out = torch.zeros(len(wanted), shard.points.shape[1], device=shard.points.device)
    held = local >= 0
    out[held] = shard.points[local[held]]
    return collective.all_reduce(out)


def plus_plus(sample: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """k-means++ seeding (Arthur & Vassilvitskii 2007) of k centres from a sample (m, D), m >= k."""
    draws = torch.rand(k, generator=generator_for(seed, 7), dtype=torch.float64)
    norms = sample.square().sum(1)
    chosen = [int(draws[0] * len(sample))]
    distance = (norms - 2 * sample @ sample[chosen[0]] + norms[chosen[0]]).clamp_min(0)
    for i in range(1, k):
        total = distance.double().cumsum(0)
        at = int(torch.searchsorted(total, draws[i].to(total.device) * total[-1]).clamp_max(len(sample) - 1))
        chosen.append(at)
        distance = torch.minimum(distance, (norms - 2 * sample @ sample[at] + norms[at]).clamp_min(0))
    return sample[chosen].clone()


def fit_kmeans(
    shard: Shard,
    k: int,
    *,
    iterations: int,
    collective: Collective,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> KMeansResult:
    """Lloyd's algorithm until ``iterations`` or until the inertia improves by less than 1e-5 of itself.

    Empty clusters move to the points that are farthest from their centre.

    Raises:
        CorpusError: fewer points than clusters.
    """
    if shard.total < k:
        raise CorpusError(
            f"{shard.total} items cannot make {k} clusters",
            where="quantizer.coarse / quantizer.fine_codes",
            remedy=f"Set it to {max(2, shard.total // 4)} or less, or add items.",
        )
    size = min(shard.total, max(k * _SAMPLE_PER_CENTRE, 1024))
    wanted = torch.randperm(shard.total, generator=generator_for(seed, 3))[:size].sort().values
    centres = collective.broadcast(plus_plus(gather_rows(shard, wanted, collective), k, seed))
    previous = float("inf")
    counts = torch.zeros(k, dtype=torch.float64)
    for iteration in range(iterations):
        labels, distances = nearest(shard.points, centres)
        sums, counts, inertia = _statistics(shard, labels, distances, k, collective)
        filled = counts > 0
        centres = torch.where(filled[:, None], sums / counts.clamp_min(1)[:, None], centres.double()).float()
        if not bool(filled.all()):
            centres[~filled] = _farthest(shard, distances, int((~filled).sum()), collective)
        if on_progress is not None:
            on_progress(Progress("kmeans", iteration + 1, iterations, {"inertia": inertia}))
        if bool(filled.all()) and previous - inertia < _TOLERANCE * inertia:
            break
        previous = inertia
    labels, distances = nearest(shard.points, centres)
    _, counts, inertia = _statistics(shard, labels, distances, k, collective)
    return KMeansResult(centres, counts, inertia)


def _statistics(
    shard: Shard, labels: torch.Tensor, distances: torch.Tensor, k: int, collective: Collective
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Sums (k, D) and counts (k,) in float64 and the mean squared distance, over all workers, in one all-reduce."""
    device, dim = shard.points.device, shard.points.shape[1]
    flat = torch.zeros(k + 1, dim + 1, dtype=torch.float64, device=device)
    flat[:k, :dim].index_add_(0, labels, shard.points.double())
    flat[:k, dim] = torch.bincount(labels, minlength=k).double()
    flat[k, 0] = distances.double().sum()
    flat = collective.all_reduce(flat)
    return flat[:k, :dim], flat[:k, dim], float(flat[k, 0]) / shard.total


def _farthest(shard: Shard, distances: torch.Tensor, wanted: int, collective: Collective) -> torch.Tensor:
    """The ``wanted`` points farthest from their centre over all workers, ties by global index: (wanted, D)."""
    device = shard.points.device
    mine = min(wanted, len(distances))
    slots = torch.zeros(collective.world_size, wanted, 2, dtype=torch.float64, device=device)
    slots[collective.rank, :, 0] = -1.0
    far = distances.topk(mine)
    slots[collective.rank, :mine, 0] = far.values.double()
    slots[collective.rank, :mine, 1] = shard.index[far.indices].double()
    found = collective.all_reduce(slots).reshape(-1, 2).tolist()
    best = sorted((-distance, index) for distance, index in found if distance >= 0)[:wanted]
    picked = torch.tensor([int(index) for _, index in best], dtype=torch.int64)
    picked = picked.repeat(-(-wanted // len(picked)))[:wanted]
    return gather_rows(shard, picked, collective)
