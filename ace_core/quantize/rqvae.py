"""The RQ-VAE that turns what is left after the coarse token into fine tokens.

Linear encoder and decoder around residual codebooks (Lee et al. 2022; Rajput et al. 2023): latent z = r E, residual
quantisation z ≈ e_1[v_1] + ... + e_M[v_M] with each v_m nearest to what the levels before left, r̂ = (sum of e) D.

    loss = |r - r̂|²  +  commitment * sum_m |sg(e_m[v_m]) - (what level m sees)|²

The reconstruction term reaches the decoder, the codebooks (directly, all levels jointly) and the encoder (straight
through); the commitment term reaches the encoder alone. Codebooks start as residual K-Means and the two linear maps
as the identity, so the first loss is that of residual K-Means; the epoch with the lowest reconstruction error over
all items is kept, so training can only lower it.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from ace_core.collective import Collective, average_gradients, broadcast_parameters
from ace_core.config import QuantizerSettings
from ace_core.fitting import FitHooks, Progress, generator_for, warmup_cosine
from ace_core.quantize.kmeans import Shard, fit_kmeans, gather_rows, nearest

_BLOCK = 8192
_ENCODER_FACTOR = 0.1  # its gradient is a straight-through estimate: at full rate the tokens drift


class RQVAE(nn.Module):
    """Linear residual-quantised autoencoder of vectors (n, D).

    Args:
        dim: width D; the latent has the same width.
        levels: number of fine levels M.
        codes: codes V of a level.
    """

    def __init__(self, dim: int, levels: int, codes: int) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.eye(dim))
        self.decoder = nn.Parameter(torch.eye(dim))
        self.codebooks = nn.ParameterList([nn.Parameter(torch.zeros(codes, dim)) for _ in range(levels)])

    def tokens(self, r: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Greedy tokens (n, M) int64 of vectors (n, D), and what each level saw (M tensors (n, D))."""
        left = r @ self.encoder
        chosen, seen = [], []
        for book in self.codebooks:
            token = nearest(left.detach(), book.detach())[0]
            chosen.append(token)
            seen.append(left)
            left = left - book[token].detach()
        return torch.stack(chosen, 1), seen

    def losses(self, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruction and commitment losses (scalars, mean squared element) and the tokens (n, M)."""
        chosen, seen = self.tokens(r)
        picked = [book[chosen[:, m]] for m, book in enumerate(self.codebooks)]
        quantised = torch.stack(picked).sum(0)
        through = quantised + (seen[0] - seen[0].detach())
        reconstruction = (r - through @ self.decoder).square().mean()
        commitment = torch.stack([(s - p.detach()).square().mean() for s, p in zip(seen, picked)]).sum()
        return reconstruction, commitment, chosen

    @torch.no_grad()
    def start_as_kmeans(self, shard: Shard, iterations: int, collective: Collective, seed: int) -> None:
        """Fill the codebooks level by level with K-Means of what the levels before left."""
        left = shard.points @ self.encoder
        for level, book in enumerate(self.codebooks):
            result = fit_kmeans(
                shard.with_points(left), len(book), iterations=iterations, collective=collective, seed=seed + 1 + level
            )
            book.copy_(result.centroids)
            left = left - result.centroids[nearest(left, result.centroids)[0]]

    @torch.no_grad()
    def revive(self, counts: torch.Tensor, shard: Shard, collective: Collective, seed: int) -> int:
        """Move codes that nobody used in an epoch onto what random items leave at their level; returns how many.

        Args:
            counts: (M, V) uses of each code over all workers.
        """
        dead = counts == 0
        if not bool(dead.any()):
            return 0
        seen = self.tokens(shard.points)[1]
        for level, book in enumerate(self.codebooks):
            missing = dead[level].nonzero().squeeze(1)
            if len(missing):
                drawn = torch.randint(shard.total, (len(missing),), generator=generator_for(seed, level))
                book[missing] = gather_rows(shard.with_points(seen[level]), drawn, collective)
        return int(dead.sum())


def fit_rqvae(
    shard: Shard,
    codes: int,
    settings: QuantizerSettings,
    *,
    collective: Collective,
    hooks: FitHooks,
    seed: int = 0,
) -> tuple[RQVAE, dict[str, float]]:
    """Fit to the residuals of a shard; every worker returns the same model and its reconstruction error."""
    device, dim = shard.points.device, shard.points.shape[1]
    model = RQVAE(dim, settings.fine_levels, codes).to(device)
    model.start_as_kmeans(shard, settings.kmeans_iterations, collective, seed)
    broadcast_parameters(model, collective)
    steps = max(1, shard.total // settings.batch_size)
    local = max(1, min(settings.batch_size, shard.total) // collective.world_size)
    total = steps * settings.epochs
    groups = [
        {"params": [model.decoder, *model.codebooks], "factor": 1.0},
        {"params": [model.encoder], "factor": _ENCODER_FACTOR},
    ]
    optimizer = torch.optim.Adam(groups, settings.learning_rate)
    metrics = {"reconstruction": _error(model, shard, collective)}
    best, kept = metrics["reconstruction"], copy.deepcopy(model.state_dict())
    for epoch in range(settings.epochs):
        counts = torch.zeros(settings.fine_levels, codes, device=device)
        order = torch.randperm(len(shard.points), generator=generator_for(seed, 11, epoch, collective.rank))
        order = order.repeat(1 + steps * local // max(1, len(order))).to(device)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * group["factor"] * warmup_cosine(epoch * steps + step, total)
            rows = shard.points[order[step * local : (step + 1) * local]]
            reconstruction, commitment, chosen = model.losses(rows)
            optimizer.zero_grad(set_to_none=True)
            (reconstruction + settings.commitment * commitment).backward()
            average_gradients(model.parameters(), collective)
            optimizer.step()
            for level in range(settings.fine_levels):
                counts[level] += torch.bincount(chosen[:, level], minlength=codes)
        revived = model.revive(collective.all_reduce(counts), shard, collective, seed + epoch)
        metrics = {"reconstruction": _error(model, shard, collective), "revived": float(revived)}
        if metrics["reconstruction"] < best:
            best, kept = metrics["reconstruction"], copy.deepcopy(model.state_dict())
        hooks.on_progress(Progress("rq-vae", (epoch + 1) * steps, total, metrics))
    model.load_state_dict(kept)
    return model, metrics | {"reconstruction": best}


@torch.no_grad()
def _error(model: RQVAE, shard: Shard, collective: Collective) -> float:
    """Mean squared element of r - r̂ over all workers' points."""
    losses = [
        model.losses(shard.points[i : i + _BLOCK])[0] * len(shard.points[i : i + _BLOCK])
        for i in range(0, len(shard.points), _BLOCK)
    ]
    local = torch.stack(losses).sum()[None] if losses else torch.zeros(1, device=shard.points.device)
    return float(collective.all_reduce(local)[0]) / shard.total
