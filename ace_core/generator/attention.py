"""Attention over a query's memories, with keys and values computed once per query and shared by all beams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class KeysValues:
    """Keys and values (n, heads, t, width / heads)."""

    keys: torch.Tensor
    values: torch.Tensor

    def append(self, other: KeysValues) -> KeysValues:
        """These followed by others along the sequence."""
        return KeysValues(torch.cat((self.keys, other.keys), 2), torch.cat((self.values, other.values), 2))

    def select(self, rows: torch.Tensor) -> KeysValues:
        """Rows of the batch, in the given order."""
        return KeysValues(self.keys[rows], self.values[rows])


class Attention(nn.Module):
    """Multi-head attention whose key-value side is separate, so that it can be kept."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        n, t, width = x.shape
        return x.view(n, t, self.heads, width // self.heads).transpose(1, 2)

    def project(self, memory: torch.Tensor) -> KeysValues:
        """Memory (n, t, width) -> its keys and values."""
        keys, values = self.key_value(memory).chunk(2, -1)
        return KeysValues(self._split(keys), self._split(values))

    def forward(
        self, y: torch.Tensor, memory: KeysValues, mask: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        """Attend from y (n, p, width) to a memory of t positions.

        Args:
            mask: (n, 1, 1, t) bool, True where attention may look; None for everywhere.
            causal: the p positions are the memory's last ones, and look at themselves and what is before them.
        """
        dropout = self.dropout if self.training else 0.0
        p, t = y.shape[1], memory.keys.shape[2]
        if causal and p != t:
            mask, causal = torch.ones(p, t, dtype=torch.bool, device=y.device).tril(t - p), False
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(y)), memory.keys, memory.values, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
        return self.out(mixed.transpose(1, 2).reshape(y.shape))
