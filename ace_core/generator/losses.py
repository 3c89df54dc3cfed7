"""Losses of the generator: soft-target cross-entropy, R-Drop, and the targets themselves."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits (n, V) against distributions (n, V)."""
    return -(target * F.log_softmax(logits.float(), -1)).sum(-1).mean()


def r_drop(first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
    """Bidirectional KL divergence between two dropout passes (Liang et al. 2021), summed over levels, mean over rows.

    Args:
        first, second: logits (n, V_l) of each level.
    """
    total = torch.zeros((), device=first[0].device)
    for a, b in zip(first, second):
        p, q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
        total = total + 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    return total


def item_targets(own: torch.Tensor, similarity: torch.Tensor, scale: float, share: float) -> torch.Tensor:
    """What a query should find: its own items, and (``share`` of the mass) the items that a teacher finds similar.

    Args:
        own: (n, C) bool, candidates that the query describes; at least one a row.
        similarity: (n, C) the teacher's similarities.
        scale: the teacher's inverse temperature.
        share: 0..1, mass of the teacher's distribution.

    Returns:
        (n, C) distributions.
    """
    hard = own.float()
    hard = hard / hard.sum(1, keepdim=True)
    if share == 0:
        return hard
    return (1 - share) * hard + share * torch.softmax(scale * similarity.float(), -1)


def level_targets(
    target: torch.Tensor, codes: torch.Tensor, path: torch.Tensor, vocab_sizes: tuple[int, ...]
) -> list[torch.Tensor]:
    """Distributions over each level's tokens, given the tokens before: the target over items, seen by prefix.

    Args:
        target: (n, C) each query's distribution over its candidates; positive where the identifier is ``path``.
        codes: (n, C, levels) int64, the candidates' identifiers.
        path: (n, levels) int64, the identifiers that teacher forcing follows.

    Returns:
        (n, V_l) for every level l: P(token_l | path[:l]).
    """
    weight = target
    out = []
    for level, size in enumerate(vocab_sizes):
        mass = torch.zeros(len(target), size, device=target.device)
        mass.scatter_add_(1, codes[:, :, level], weight)
        out.append(mass / mass.sum(1, keepdim=True).clamp_min(1e-20))
        weight = weight * (codes[:, :, level] == path[:, level, None])
    return out
