"""The query as the generator and the decoder see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QueryBatch:
    """A batch of n queries, from text or *virtual* (an item's own embedding in place of a text).

    Attributes:
        vector: (n, D) float32, the query in the shared space, L2-normalised.
        hidden: (n, S, T, E) float, token features of S text-encoder layers (lowest first); None for virtual queries.
        mask: (n, T) bool, True at real tokens; None for virtual queries.
    """

    vector: torch.Tensor
    hidden: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.vector.shape[0]

    def to(self, device: torch.device | str) -> QueryBatch:
        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device)

        return QueryBatch(self.vector.to(device), move(self.hidden), move(self.mask))

    def __getitem__(self, rows: slice | torch.Tensor) -> QueryBatch:
        return QueryBatch(
            self.vector[rows],
            None if self.hidden is None else self.hidden[rows],
            None if self.mask is None else self.mask[rows],
        )
