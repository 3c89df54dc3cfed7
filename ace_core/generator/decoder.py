"""One layer of the generator's decoder, and what is kept of a query while it is spelled."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ace_core.config import GeneratorSettings
from ace_core.generator.attention import Attention, KeysValues
from ace_core.generator.fusion import CoarseToFineFusion, FusionMemory


@dataclass(frozen=True)
class Reading:
    """What was read of n queries.

    Attributes:
        vector: (n, D) float32, the refined query q'.
        z: (n, t, width), the blend of the memories, None without coarse fusion.
        memories: S tensors (n, t, width).
        mask: (n, 1, 1, t) bool, True at positions that are there.
    """

    vector: torch.Tensor
    z: torch.Tensor | None
    memories: tuple[torch.Tensor, ...]
    mask: torch.Tensor


@dataclass(frozen=True)
class DecoderState:
    """A batch of n queries in the middle of being spelled, B beam rows each.

    Attributes:
        vector: (n, D) float32, the refined query q', L2-normalised.
        modality_logp: (n, 3) log-probabilities of the first token.
        memory: keys and values of the query for each decoder layer, projected once.
        mask: (n, 1, 1, t) bool.
        past: self-attention keys and values of each layer, (n * B, heads, positions, .); empty before the first step.
    """

    vector: torch.Tensor
    modality_logp: torch.Tensor
    memory: tuple[FusionMemory, ...]
    mask: torch.Tensor
    past: tuple[KeysValues, ...] = ()

    def select(self, rows: torch.Tensor) -> DecoderState:
        """Some of the queries (rows (m,) int64); before the first step only."""
        return replace(
            self,
            vector=self.vector[rows],
            modality_logp=self.modality_logp[rows],
            memory=tuple(m.select(rows) for m in self.memory),
            mask=self.mask[rows],
        )


class DecoderLayer(nn.Module):
    """One decoder layer: causal self-attention, fusion, feed-forward; pre-norm."""

    def __init__(self, settings: GeneratorSettings, memories: int) -> None:
        super().__init__()
        width = settings.width
        self.own_norm, self.read_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.own = Attention(width, settings.heads, settings.dropout)
        self.fusion = CoarseToFineFusion(
            width, settings.heads, settings.dropout, memories,
            coarse=settings.coarse_fusion, fine=settings.fine_fusion,
        )  # fmt: skip
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(settings.dropout), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(settings.dropout)

    def own_keys_values(self, y: torch.Tensor) -> KeysValues:
        """Self-attention keys and values of states y (n, p, width)."""
        return self.own.project(self.own_norm(y))

    def forward(
        self, y: torch.Tensor, past: KeysValues, memory: FusionMemory, mask: torch.Tensor, beams: int
    ) -> torch.Tensor:
        """y (rows, p, width); ``past`` includes y's own; rows = n * beams share the n queries' memories."""
        y = y + self.drop(self.own(self.own_norm(y), past, causal=y.shape[1] > 1))
        read = self.read_norm(y)
        if beams > 1:
            read = read.reshape(len(read) // beams, -1, read.shape[-1])
        y = y + self.drop(self.fusion(read, memory, mask).reshape(y.shape))
        return y + self.drop(self.feed(self.feed_norm(y)))
