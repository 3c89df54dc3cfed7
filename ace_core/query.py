"""Queries and answers: as a user asks, as the generator and the decoder see it, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from ace_core.attributes import FilterValue
from ace_core.items import AttributeValue, Modality

if TYPE_CHECKING:  # the server's ingress passes queries on and holds no model
    import torch

Mode = Literal["beam", "one-shot", "verify"]


@dataclass(frozen=True)
class QueryBatch:
    """A batch of n queries, from text or *virtual* (an item's own embedding in place of a text).

    Attributes:
        vector: (n, D) float32, the query in the shared space (:mod:`ace_core.space`).
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


@dataclass(frozen=True)
class Example:
    """What to search by in place of a text.

    Attributes:
        vector: (D,) float32 query vector in the shared space.
        items: the items of the snapshot that it is of, as (segment, row); none for a file that is not in the corpus.
    """

    vector: np.ndarray
    items: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class SearchRequest:
    """One query, with its own choices; requests of one batch may differ in all of them.

    Attributes:
        text: what to look for; or
        vector: (D,) float32 query vector in the shared space (search by example).
        k: results wanted. None takes the setting, as do ``mode`` and ``beam``.
        examples: the items that ``vector`` is of, as (segment, row): they are what was asked for, and come first.
        modalities: search these only; empty for all.
        filters: attribute filters, see :data:`ace_core.attributes.FilterValue`.
    """

    text: str | None = None
    vector: np.ndarray | None = None
    examples: tuple[tuple[int, int], ...] = ()
    k: int | None = None
    modalities: tuple[Modality, ...] = ()
    filters: Mapping[str, FilterValue] = field(default_factory=dict)
    mode: Mode | None = None
    beam: int | None = None


@dataclass(frozen=True)
class Hit:
    """A found item.

    Attributes:
        score: calibrated probability that this is the item looked for.
        log_prob: log-probability of its identifier under the generator.
        similarity: cosine of the refined query and the item's vector (stored, or rebuilt from its codes), -1 .. 1. An
            item that lies near many queries has to be nearer to score as much, so it need not fall with the score.
        level_probs: probability of each token given the ones before it, coarse to fine: the beam's path.
    """

    item_id: str
    score: float
    modality: Modality
    uri: str
    mime: str
    captions: tuple[str, ...]
    attributes: dict[str, AttributeValue]
    identifier: tuple[int, ...]
    log_prob: float
    similarity: float
    level_probs: tuple[float, ...]
    start_seconds: float | None = None
    end_seconds: float | None = None
