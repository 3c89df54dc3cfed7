"""BERT's forward pass without transformers' bookkeeping, which is a third of a short query's time; on most CPUs it is
compiled (compiled_bert.py).

For the family that most sentence encoders are of (MiniLM, BGE, E5, GTE): learned absolute positions, post-norm, GELU.
The weights and the result are transformers' own; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ace_core.encoders.packed import SideBySide, can_pack
from ace_core.encoders.text_batches import mean_of_tokens

Weights = Mapping[str, torch.Tensor]
Bert = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Token ids and mask to pooled vectors and token features, as :class:`LeanBert` gives them."""


def lean_bert(weights: Weights, config: Mapping[str, Any]) -> Bert:
    """A BERT in the form that is fastest where its weights are."""
    if not can_pack(weights["embeddings.word_embeddings.weight"].device):
        return LeanBert(weights, config)
    from ace_core.encoders.compiled_bert import CompiledBert

    return CompiledBert(weights, config)


class _Layer:
    """One encoder layer over states (n, t, width); its weights begin with ``name``."""

    def __init__(self, weights: Weights, name: str, heads: int, eps: float) -> None:
        self._heads = heads
        self._query_key_value = _linears(
            weights, *(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))
        )
        self._mix = _linears(weights, f"{name}.attention.output.dense")
        self._mix_norm = _norm(weights, f"{name}.attention.output.LayerNorm", eps)
        self._widen = _linears(weights, f"{name}.intermediate.dense")
        self._narrow = _linears(weights, f"{name}.output.dense")
        self._narrow_norm = _norm(weights, f"{name}.output.LayerNorm", eps)

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        n, t, width = x.shape
        parts = self._query_key_value(x).view(n, t, 3, self._heads, width // self._heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self._mix_norm(x + self._mix(read.transpose(1, 2).reshape(n, t, width)))
        return self._narrow_norm(x + self._narrow(F.gelu(self._widen(x))))


class LeanBert:
    """The encoder of a BERT.

    Args:
        weights: by the names of transformers' ``BertModel``. Linear layers are copied, the rest is shared.
        config: its configuration, one that :meth:`fits`.
    """

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        eps = float(config["layer_norm_eps"])
        self._words = weights["embeddings.word_embeddings.weight"]
        # all tokens are of the first type
        self._places = (
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        )
        self._norm = _norm(weights, "embeddings.LayerNorm", eps)
        self._layers = [
            _Layer(weights, f"encoder.layer.{number}", int(config["num_attention_heads"]), eps)
            for number in range(int(config["num_hidden_layers"]))
        ]

    @staticmethod
    def fits(config: Mapping[str, Any]) -> bool:
        """Is this the configuration of a plain BERT encoder?"""
        return (
            config.get("model_type") == "bert"
            and config.get("hidden_act") == "gelu"
            and not (config.get("is_decoder") or config.get("add_cross_attention"))
            and config.get("position_embedding_type") in (None, "absolute")
        )

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean (n, width) of the last layer's real tokens, L2-normalised, and the hidden states
        (n, layers, t, width) of the last layers, lowest first.

        Args:
            ids: (n, t) int64.
            mask: (n, t) int64, 1 at real tokens.
            layers: how many layers' states are wanted.
        """
        seen = None if bool(mask.all()) else mask.bool()[:, None, None]
        x = self._norm(F.embedding(ids, self._words) + self._places[: ids.shape[1]])
        states = []
        for layer in self._layers:
            x = layer(x, seen)
            states.append(x)
        pooled = F.normalize(mean_of_tokens(x, mask).float(), dim=-1)
        return pooled, torch.stack(states[-layers:], dim=1)


def _linears(weights: Weights, *names: str) -> SideBySide:
    linears = []
    for name in names:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
        linears.append(linear)
    return SideBySide(linears)


def _norm(weights: Weights, name: str, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(weights[f"{name}.weight"]), eps, device="meta")
    norm.weight, norm.bias = nn.Parameter(weights[f"{name}.weight"]), nn.Parameter(weights[f"{name}.bias"])
    return norm
