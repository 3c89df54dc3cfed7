"""The shared space of queries and items: D coordinates, the last of which carries an item's popularity.

    item = [x ; -popularity]      query = [q ; 1]      query · item = q · x - popularity

with x and q L2-normalised in the first D - 1 coordinates. See :mod:`ace_core.aligner` for why.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def unit_query(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., D) as queries: float32, L2-normalised without their last coordinate, which becomes 1.

    Also what makes an item's own vector a query (search by example).
    """
    head = F.normalize(vectors[..., :-1].float(), dim=-1)
    return torch.cat((head, torch.ones_like(head[..., :1])), -1)
