"""The shared space of queries and items: D coordinates, the last of which carries an item's popularity.

    item = [x ; -popularity]      query = [q ; 1]      query · item = q · x - popularity

with x and q L2-normalised in the first D - 1 coordinates. See :mod:`ace_core.aligner` for why.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F


def unit_query(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., D) as queries: float32, L2-normalised without their last coordinate, which becomes 1.

    Also what makes an item's own vector a query (search by example).
    """
    head = F.normalize(vectors[..., :-1].float(), dim=-1)
    return torch.cat((head, torch.ones_like(head[..., :1])), -1)


def cosine(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Cosines (n,) of queries (n, D) and items (n, D) without the last coordinate: what a person may compare, where
    what ranks also counts an item's popularity and, of a rebuilt one, its length."""
    q, x = queries[:, :-1], items[:, :-1]
    norms = np.linalg.norm(q, axis=1) * np.linalg.norm(x, axis=1)
    return np.clip(np.einsum("nd,nd->n", q, x) / np.maximum(norms, 1e-12), -1, 1)
