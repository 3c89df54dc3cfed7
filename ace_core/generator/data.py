"""What the generator is trained on, and how batches are drawn from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ace_core.errors import CorpusError
from ace_core.fitting import generator_for
from ace_core.query import QueryBatch
from ace_core.space import unit_query

_SORT_WINDOW = 16


@dataclass(frozen=True)
class TrainingData:
    """A corpus and its training captions, with cached text features.

    Attributes:
        vectors: (N, D) float32, item vectors of the whole corpus, captioned or not.
        codes: (N, levels) uint16, their identifiers.
        query_vectors: (P, D) float32, the aligner's vectors of the training captions; P may be 0.
        hidden: (P, S, T, E) float16, the captions' token features (a memory-map is fine).
        mask: (P, T) bool.
        rows: (P,) int64, each caption's item.
        teacher_scale: inverse temperature of the aligned space (``Aligner.scale``).
        plain_vectors: (N, D) float32, the items' vectors without their captions' share. An indexed vector contains the
            very captions that are trained on, so finding it is no lesson; the refined query learns from these, and
            without them only keeps the aligned similarities.
    """

    vectors: np.ndarray
    codes: np.ndarray
    query_vectors: np.ndarray
    hidden: np.ndarray
    mask: np.ndarray
    rows: np.ndarray
    teacher_scale: float
    plain_vectors: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.codes) or not len(self.vectors):
            raise CorpusError(
                f"there are {len(self.vectors)} item vectors and {len(self.codes)} identifiers",
                remedy="Fit the quantizer on the corpus that the generator is trained on.",
            )
        captions = {len(self.query_vectors), len(self.hidden), len(self.mask), len(self.rows)}
        if len(captions) != 1 or (len(self.rows) and int(self.rows.max()) >= len(self.vectors)):
            raise CorpusError(
                f"the captions' arrays do not fit together (lengths {sorted(captions)})",
                remedy="Extract the text features again.",
            )


def epoch_batches(data: TrainingData, batch: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Caption indices (at most ``batch``,) of one epoch, every caption once.

    Captions are shuffled, then sorted by length inside windows of a few batches, then the batches are shuffled: a
    batch pads to its own longest caption, and few are long.
    """
    draw = generator_for(seed, 21, epoch)
    order = torch.randperm(len(data.rows), generator=draw).numpy()
    lengths = data.mask.sum(1)
    batches = []
    for start in range(0, len(order), batch * _SORT_WINDOW):
        window = order[start : start + batch * _SORT_WINDOW]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[i : i + batch] for i in range(0, len(window), batch)]
    for i in torch.randperm(len(batches), generator=draw).tolist():
        yield batches[i]


def caption_queries(data: TrainingData, chosen: np.ndarray, device: torch.device | str) -> QueryBatch:
    """The captions ``chosen`` (n,) as queries, padded to the longest of them."""
    mask = data.mask[chosen]
    longest = max(1, int(mask.sum(1).max()))
    hidden = np.asarray(data.hidden[np.sort(chosen)])[np.argsort(np.argsort(chosen))][:, :, :longest]
    return QueryBatch(
        torch.from_numpy(data.query_vectors[chosen]).to(device),
        torch.from_numpy(np.ascontiguousarray(hidden)).to(device).float(),
        torch.from_numpy(mask[:, :longest].copy()).to(device),
    )


def virtual_queries(
    vectors: torch.Tensor, rows: torch.Tensor, gaps: torch.Tensor | None, noise: float, draw: torch.Generator
) -> QueryBatch:
    """Items' own vectors with noise, in place of queries.

    Args:
        vectors: (N, D) item vectors.
        rows: (n,) the items.
        gaps: (G, D) differences query - item of real captions. Where there are some, the noise is one of them: so far
            and in such directions do real queries lie from their item. Otherwise it is an isotropic direction.
        noise: norm of an isotropic noise, or the factor on a gap.
    """
    x = vectors[rows]
    if gaps is not None and len(gaps):
        shift = gaps[torch.randint(len(gaps), (len(rows),), generator=draw).to(x.device)]
    else:
        shift = F.normalize(torch.randn(x.shape, generator=draw), dim=-1).to(x.device)
    return QueryBatch(unit_query(x + noise * shift))
