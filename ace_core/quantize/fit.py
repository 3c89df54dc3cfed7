"""Fits the whole quantizer: modality means, metric, K-Means, RQ-VAE."""

from __future__ import annotations

import numpy as np
import torch

from ace_core.collective import Collective, LocalCollective
from ace_core.config import QuantizerSettings
from ace_core.errors import CorpusError
from ace_core.fitting import FitHooks
from ace_core.items import MODALITIES
from ace_core.quantize.kmeans import Shard, fit_kmeans, nearest
from ace_core.quantize.quantizer import Quantizer
from ace_core.quantize.rqvae import fit_rqvae

_RIDGE = 0.1
_ITEMS_PER_CODE = 4
MIN_ITEMS = 2 * _ITEMS_PER_CODE


def fit_quantizer(
    x: np.ndarray,
    modality_tokens: np.ndarray,
    settings: QuantizerSettings,
    *,
    index: np.ndarray | None = None,
    queries: np.ndarray | None = None,
    collective: Collective | None = None,
    hooks: FitHooks | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Quantizer, dict[str, float]]:
    """Fit to item vectors, of all of a corpus: captions are not needed.

    Args:
        x: (n_r, D) float32, this worker's item vectors.
        modality_tokens: (n_r,) ints 0..2.
        index: (n_r,) the items' global indices, over all workers each of 0..total-1 once; by default one worker's
            0..n-1. The result does not depend on how items are dealt to workers, up to rounding.
        queries: (m, D) float32 query vectors, the same on every worker; the metric is their second moment. Without
            any, the items' own is taken in their place.

    Returns:
        The quantizer (the same on every worker) and figures: inertia, reconstruction, code counts used.

    Raises:
        CorpusError: fewer than eight items.
    """
    collective = collective or LocalCollective()
    hooks = hooks or FitHooks()
    points = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)
    tokens = torch.from_numpy(np.asarray(modality_tokens, np.int64)).to(device)
    total = int(collective.all_reduce(torch.tensor([len(points)]))[0])
    if total < MIN_ITEMS:
        raise CorpusError(f"{total} items are too few to fit a quantizer", remedy=f"Index at least {MIN_ITEMS} items.")
    where = torch.arange(total) if index is None else torch.from_numpy(np.asarray(index, np.int64))
    shard = Shard(points, where.to(device), total)

    means = _modality_means(points, tokens, collective)
    centred = points - means[tokens]
    metric, inverse = _metric(_second_moment(centred, queries, total, collective), centred, total, collective)
    projected = shard.with_points(centred @ metric)
    most = total // _ITEMS_PER_CODE
    coarse = fit_kmeans(
        projected,
        min(settings.coarse, most),
        iterations=settings.kmeans_iterations,
        collective=collective,
        seed=seed,
        on_progress=hooks.on_progress,
    )
    labels = nearest(projected.points, coarse.centroids)[0]
    left = projected.with_points(projected.points - coarse.centroids[labels])
    model, metrics = fit_rqvae(
        left, min(settings.fine_codes, most), settings, collective=collective, hooks=hooks, seed=seed
    )

    back = model.decoder.detach() @ inverse
    latents = tuple(b.detach().cpu().numpy() for b in model.codebooks)
    quantizer = Quantizer(
        modality_means=means.cpu().numpy(),
        metric=metric.cpu().numpy(),
        coarse=coarse.centroids.cpu().numpy(),
        encoder=model.encoder.detach().cpu().numpy(),
        latents=latents,
        codebooks=(
            (coarse.centroids @ inverse).cpu().numpy(),
            *((b.detach() @ back).cpu().numpy() for b in model.codebooks),
        ),
        beam=settings.beam,
    )
    sizes = {"coarse_codes": float(len(coarse.centroids)), "fine_codes": float(len(latents[0]))}
    return quantizer, {"inertia": coarse.inertia, **sizes, **metrics}


def _modality_means(points: torch.Tensor, tokens: torch.Tensor, collective: Collective) -> torch.Tensor:
    sums = torch.zeros(len(MODALITIES), points.shape[1] + 1, dtype=torch.float64, device=points.device)
    sums[:, :-1].index_add_(0, tokens, points.double())
    sums[:, -1] = torch.bincount(tokens, minlength=len(MODALITIES)).double()
    sums = collective.all_reduce(sums)
    return (sums[:, :-1] / sums[:, -1:].clamp_min(1)).float()


def _second_moment(
    centred: torch.Tensor, queries: np.ndarray | None, total: int, collective: Collective
) -> torch.Tensor:
    """(D, D) float64: E[q q'] of the queries, or of the centred items."""
    if queries is not None and len(queries):
        q = torch.from_numpy(np.asarray(queries, np.float32)).to(centred.device).double()
        return q.T @ q / len(q)
    local = centred.double()
    return collective.all_reduce(local.T @ local) / total


def _metric(
    moment: torch.Tensor, centred: torch.Tensor, total: int, collective: Collective
) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric root A of the moment (with a ridge, so that it can be inverted) and its inverse.

    Scaled so that the mean squared element of the projected items is 1, which makes learning rates portable.
    """
    dim = len(moment)
    values, vectors = torch.linalg.eigh(moment.cpu())
    root = (values.clamp_min(0) + _RIDGE * values.clamp_min(0).mean() + 1e-12).sqrt().to(centred.device)
    vectors = vectors.to(centred.device)
    projected = centred.double() @ vectors * root
    square = float(collective.all_reduce(projected.square().sum()[None])[0]) / (total * dim)
    root = root / max(square, 1e-24) ** 0.5
    return ((vectors * root) @ vectors.T).float(), ((vectors / root) @ vectors.T).float()
