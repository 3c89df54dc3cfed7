"""Coarse-to-fine feature fusion, the part of the method that reads the query.

E_1..E_S are the query's memories: one per text-encoder layer, lowest first. With y the decoder's state:

    coarse:  Z = W [E_1; ...; E_S] + b,   c = Attention(y, Z),     c * sigmoid(W_g c)
    fine:    f_i = Attention(y, E_i),     sum_i sigmoid(W_i [y; f_i] + b_i) * f_i   (Cornia et al. 2020)

The sum of the two enters the next part of the decoder layer. Each can be switched off; with neither, the layer is a
plain decoder layer that attends to E_S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from ace_core.generator.attention import Attention, KeysValues


@dataclass(frozen=True)
class FusionMemory:
    """What one decoder layer keeps of a query: keys and values of Z (or None) and of each E_i that it reads."""

    coarse: KeysValues | None
    fine: tuple[KeysValues, ...]

    def select(self, rows: torch.Tensor) -> FusionMemory:
        """Rows of the batch, in the given order."""
        return FusionMemory(
            None if self.coarse is None else self.coarse.select(rows), tuple(m.select(rows) for m in self.fine)
        )


class CoarseToFineFusion(nn.Module):
    """The fusion of one decoder layer.

    Args:
        width, heads, dropout: of the attention.
        memories: number S of memories.
        coarse, fine: the switches.
    """

    def __init__(self, width: int, heads: int, dropout: float, memories: int, *, coarse: bool, fine: bool) -> None:
        super().__init__()
        self.memories = memories
        self.coarse = Attention(width, heads, dropout) if coarse else None
        self.self_gate = nn.Linear(width, width) if coarse else None
        self.fine = nn.ModuleList(Attention(width, heads, dropout) for _ in range(memories if fine else 0))
        self.gates = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(memories if fine else 0))
        self.plain = None if coarse or fine else Attention(width, heads, dropout)

    def project(self, z: torch.Tensor | None, memories: list[torch.Tensor]) -> FusionMemory:
        """Keys and values of Z (n, t, width) and of the memories (S tensors (n, t, width))."""
        if self.plain is not None:
            return FusionMemory(None, (self.plain.project(memories[-1]),))
        coarse = None if self.coarse is None or z is None else self.coarse.project(z)
        fine = cast(list[Attention], list(self.fine))
        return FusionMemory(coarse, tuple(a.project(m) for a, m in zip(fine, memories)))

    def forward(self, y: torch.Tensor, memory: FusionMemory, mask: torch.Tensor | None) -> torch.Tensor:
        """y (n, p, width) -> what the query adds to it (n, p, width)."""
        if self.plain is not None:
            return self.plain(y, memory.fine[0], mask)
        out = torch.zeros_like(y)
        if self.coarse is not None and self.self_gate is not None and memory.coarse is not None:
            seen = self.coarse(y, memory.coarse, mask)
            out = out + seen * torch.sigmoid(self.self_gate(seen))
        for attention, gate, kept in zip(self.fine, self.gates, memory.fine):
            seen = attention(y, kept, mask)
            out = out + seen * torch.sigmoid(gate(torch.cat((y, seen), -1)))
        return out
