"""BERT's forward pass without transformers' bookkeeping, which is a third of a short query's time.

For the family that most sentence encoders are of (MiniLM, BGE, E5, GTE): learned absolute positions, post-norm, GELU.
The weights and the result are transformers' own; a test holds them together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ace_core.encoders.packed import SideBySide


class _Layer:
    """One encoder layer over states (n, t, width)."""

    def __init__(self, layer: Any) -> None:
        own, mixed = layer.attention.self, layer.attention.output
        self._heads: int = own.num_attention_heads
        self._query_key_value = SideBySide([own.query, own.key, own.value])
        self._mix = SideBySide([mixed.dense])
        self._mix_norm: nn.LayerNorm = mixed.LayerNorm
        self._widen = SideBySide([layer.intermediate.dense])
        self._narrow = SideBySide([layer.output.dense])
        self._narrow_norm: nn.LayerNorm = layer.output.LayerNorm

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        n, t, width = x.shape
        parts = self._query_key_value(x).view(n, t, 3, self._heads, width // self._heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self._mix_norm(x + self._mix(read.transpose(1, 2).reshape(n, t, width)))
        return self._narrow_norm(x + self._narrow(F.gelu(self._widen(x))))


class LeanBert:
    """A loaded ``BertModel``'s encoder.

    Args:
        model: one that :meth:`fits`. Its linear layers are copied, the rest is shared.
    """

    def __init__(self, model: Any) -> None:
        embeddings = model.embeddings
        self._words: nn.Embedding = embeddings.word_embeddings
        # all tokens are of the first type
        self._places = (
            embeddings.position_embeddings.weight.detach() + embeddings.token_type_embeddings.weight[0].detach()
        )
        self._norm: nn.LayerNorm = embeddings.LayerNorm
        self._layers = [_Layer(layer) for layer in model.encoder.layer]

    @staticmethod
    def fits(model: Any) -> bool:
        """Is this a plain BERT encoder?"""
        config = model.config
        return (
            config.model_type == "bert"
            and config.hidden_act == "gelu"
            and not (config.is_decoder or config.add_cross_attention)
            and getattr(config, "position_embedding_type", "absolute") in (None, "absolute")
        )

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hidden states (n, t, width) of every layer, lowest first.

        Args:
            ids: (n, t) int64.
            mask: (n, t), not zero at real tokens.
        """
        seen = None if bool(mask.all()) else mask.bool()[:, None, None]
        x = self._norm(self._words(ids) + self._places[: ids.shape[1]])
        states = []
        for layer in self._layers:
            x = layer(x, seen)
            states.append(x)
        return tuple(states)
