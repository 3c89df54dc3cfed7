"""A BART decoder spelled level by level: the same weights that `transformers.generate` runs, as a SpellingModel.

Token t of level l is token ``offset[l] + t`` of BART's vocabulary. Against ``generate``: cross-attention keys and
values are projected once for a query instead of once for a beam row, only rows that live are computed, and the head
covers one level's tokens instead of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from ace_core.query import QueryBatch

_START = 2  # BART's first decoder token
_SPECIAL = 4
_SHARPNESS = 8.0


def random_bart(vocab_sizes: Sequence[int], *, width: int = 256, layers: int = 2, seed: int = 0):
    """A BART with random weights, sharp enough that its beams differ.

    Returns:
        BartForConditionalGeneration, in evaluation mode, whose encoder is not used.
    """
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=_SPECIAL + sum(vocab_sizes), d_model=width, encoder_layers=1, decoder_layers=layers,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=width, decoder_ffn_dim=4 * width,
        max_position_embeddings=64, dropout=0.0, decoder_start_token_id=_START, forced_eos_token_id=None,
        pad_token_id=1, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 / parameter.shape[1] ** 0.5)
        model.model.shared.weight.mul_(_SHARPNESS / width**0.5 / model.model.shared.weight.std())
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model


def generate(
    model, query: QueryBatch, beam: int, levels: int, allowed: Callable[[int, torch.Tensor], list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rival: ``transformers.generate`` with a prefix function, scores renormalised over the allowed tokens.

    Returns:
        tokens (n, beam, levels) in BART's numbering, and summed log-probabilities (n, beam), best first.
    """
    assert query.hidden is not None and query.mask is not None
    out = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=query.hidden[:, -1]),
        attention_mask=query.mask.long(), num_beams=beam, num_return_sequences=beam, max_new_tokens=levels,
        min_new_tokens=levels, do_sample=False, length_penalty=0.0, prefix_allowed_tokens_fn=allowed,
        renormalize_logits=True, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    n = len(query)
    return out.sequences[:, 1:].view(n, beam, levels), out.sequences_scores.view(n, beam)


@dataclass(frozen=True)
class BartState:
    """memory and past: per layer keys, then values: memory (n, 2 heads, T, d), past (n, B, 2 heads, t, d).

    mask: (n, 1, 1, T), 0 where there is a token to attend to, else -inf.
    """

    modality_logp: torch.Tensor
    memory: tuple[torch.Tensor, ...]
    mask: torch.Tensor
    past: tuple[torch.Tensor, ...]


Map = Callable[[torch.Tensor], torch.Tensor]


def _exact(weight: torch.Tensor, bias: torch.Tensor) -> Map:
    return partial(F.linear, weight=weight, bias=bias)


def _eight_bit(weight: torch.Tensor, bias: torch.Tensor) -> Map:
    """Weights in 8 bits ahead, a scale for each output; activations as they come."""
    scale = weight.abs().amax(1) / 127
    quantised = torch.quantize_per_channel(weight, scale, torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantised, bias)
    product = torch.ops.quantized.linear_dynamic.default
    return lambda x: product(x, packed, True)


@dataclass(frozen=True)
class _Layer:
    """A decoder layer's linear maps, those of one input side by side, and its norms."""

    own: Map
    own_out: Map
    cross: Map
    memory: Map
    cross_out: Map
    widen: Map
    narrow: Map
    norms: tuple[Map, ...]

    @classmethod
    def of(cls, layer: Any, linear: Callable[[torch.Tensor, torch.Tensor], Map]) -> _Layer:
        def joined(*parts: nn.Linear) -> Map:
            return linear(
                torch.cat([part.weight.detach() for part in parts]), torch.cat([part.bias.detach() for part in parts])
            )

        own, cross = layer.self_attn, layer.encoder_attn
        return cls(
            joined(own.q_proj, own.k_proj, own.v_proj), joined(own.out_proj),
            joined(cross.q_proj), joined(cross.k_proj, cross.v_proj), joined(cross.out_proj),
            joined(layer.fc1), joined(layer.fc2),
            tuple(
                partial(F.layer_norm, normalized_shape=n.normalized_shape, weight=n.weight, bias=n.bias, eps=n.eps)
                for n in (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm)
            ),
        )  # fmt: skip


class BartSpeller:
    """A :class:`~ace_core.decoding.SpellingModel` over a BART decoder.

    Args:
        eight_bit: linear maps in 8 bits.
    """

    def __init__(
        self, model: BartForConditionalGeneration, vocab_sizes: Sequence[int], *, eight_bit: bool = False
    ) -> None:
        linear = _eight_bit if eight_bit else _exact
        self.vocab_sizes = tuple(vocab_sizes)
        self._decoder = model.model.decoder
        self._heads = cast(int, model.config.decoder_attention_heads)
        self._layers = [_Layer.of(layer, linear) for layer in self._decoder.layers]
        edges = torch.tensor([_SPECIAL, *vocab_sizes]).cumsum(0).tolist()
        self.offsets = edges[:-1]
        table, bias = model.lm_head.weight.detach(), model.final_logits_bias[0]
        self._head = [linear(table[a:b].contiguous(), bias[a:b].contiguous()) for a, b in pairwise(edges)]

    def _split(self, x: torch.Tensor, parts: int = 1) -> torch.Tensor:
        """(..., p, parts * width) -> (..., parts * heads, p, d)."""
        return x.unflatten(-1, (parts * self._heads, -1)).transpose(-2, -3)

    def _embed(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Tokens (..., p) in BART's numbering at positions position .. position + p - 1."""
        decoder = self._decoder
        x = decoder.embed_tokens(tokens)
        places = decoder.embed_positions.weight[position + 2 : position + 2 + tokens.shape[-1]]
        return decoder.layernorm_embedding(x + places)

    def _run(
        self, x: torch.Tensor, state: BartState, past: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """x (n, B, p, width) -> hidden states of its positions, and the keys and values with theirs appended."""
        n, beams, new, width = x.shape
        kept = []
        for number, layer in enumerate(self._layers):
            q, own = self._split(layer.own(x), 3).split([self._heads, 2 * self._heads], 2)
            kept.append(torch.cat([past[number], own], 3) if past else own)
            length = kept[-1].shape[3]
            causal = None
            if new > 1:
                causal = torch.ones(new, length, dtype=torch.bool, device=x.device).tril(length - new)
            keys, values = kept[-1].flatten(0, 1).chunk(2, 1)
            y = F.scaled_dot_product_attention(q.flatten(0, 1), keys, values, attn_mask=causal)
            y = y.transpose(1, 2).reshape(n, beams, new, width)
            x = layer.norms[0](x + layer.own_out(y))
            q = self._split(layer.cross(x).flatten(1, 2))  # (n, heads, B * p, d): one query's rows
            keys, values = state.memory[number].chunk(2, 1)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=state.mask)
            y = y.transpose(1, 2).reshape(n, beams, new, width)
            x = layer.norms[1](x + layer.cross_out(y))
            x = layer.norms[2](x + layer.narrow(F.gelu(layer.widen(x))))
        return x, tuple(kept)

    def start(self, query: QueryBatch) -> BartState:
        assert query.hidden is not None and query.mask is not None
        hidden = query.hidden[:, -1]
        memory = tuple(self._split(layer.memory(hidden), 2) for layer in self._layers)
        # as attention adds it: a mask of bools would be turned into this in each of its calls
        mask = torch.zeros_like(hidden[:, None, None, :, 0]).masked_fill(~query.mask[:, None, None], -torch.inf)
        empty = BartState(hidden, memory, mask, ())
        first = torch.full((len(query), 1, 1), _START, device=hidden.device)
        y, past = self._run(self._embed(first, 0), empty, ())
        return replace(empty, modality_logp=F.log_softmax(self._head[0](y[:, 0, 0]), -1), past=past)

    def _continued(self, state: BartState, rows: torch.Tensor | None, beams: int):
        if rows is None:
            return tuple(t.expand(-1, beams, -1, -1, -1) for t in state.past)
        before = state.past[0].shape[1]
        flat = (rows + before * torch.arange(len(rows), device=rows.device)[:, None]).flatten()
        return tuple(t.flatten(0, 1).index_select(0, flat).unflatten(0, rows.shape) for t in state.past)

    def step(self, state: BartState, tokens: torch.Tensor, parents: torch.Tensor | None, level: int):
        past = self._continued(state, parents, tokens.shape[1])
        y, past = self._run(self._embed(tokens[..., None] + self.offsets[level - 1], level), state, past)
        return F.log_softmax(self._head[level](y[:, :, 0]), -1), replace(state, past=past)

    def score(self, state: BartState, tokens: torch.Tensor, parents: torch.Tensor | None, level: int) -> torch.Tensor:
        offsets = torch.tensor(self.offsets[level - 1 : level - 2 + tokens.shape[2]], device=tokens.device)
        read = tokens[..., :-1] + offsets
        y, _ = self._run(self._embed(read, level), state, self._continued(state, parents, tokens.shape[1]))
        scored = [
            F.log_softmax(self._head[level + i](y[:, :, i]), -1).gather(2, tokens[..., i + 1 : i + 2])
            for i in range(tokens.shape[2] - 1)
        ]
        return torch.cat(scored, 2)
