"""BERT's forward pass on a CPU, compiled: what :class:`~ace_core.encoders.bert.LeanBert` computes, in one call.

Of a short query's time PyTorch spends a third between the matrix products, and FBGEMM's are not as fast as the machine
for a dozen rows. Weights are in half precision and arithmetic in float32, as in FBGEMM's packed layers: the states are
the same to 1e-5. Texts are not padded, so a batch pays for its real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ace_core.encoders.bert import Weights
from ace_core.errors import ModelError
from ace_core.kernels.bert import Linear, Model, Norm, forward
from ace_core.kernels.linear import packed

_TOGETHER = 96  # tokens: enough for weights to be read seldom, few enough for what lies between layers to stay cached


class CompiledBert:
    """The encoder of a BERT, on a CPU that :func:`~ace_core.encoders.packed.can_pack` names.

    Args:
        weights: by the names of transformers' ``BertModel``; copied.
        config: its configuration, one that ``LeanBert.fits``.
    """

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        arrays = {name: weight.detach().float().numpy() for name, weight in weights.items()}
        layers = [f"encoder.layer.{number}" for number in range(int(config["num_hidden_layers"]))]

        def linears(*names: str) -> Linear:
            """One layer of several that read the same input, for each of the model's."""
            parts = [[f"{layer}.{name}" for name in names] for layer in layers]
            weight = np.stack([packed(np.concatenate([arrays[f"{n}.weight"] for n in some])) for some in parts])
            bias = np.zeros((len(layers), weight.shape[1] * weight.shape[3]), np.float32)
            for number, some in enumerate(parts):
                joined = np.concatenate([arrays[f"{n}.bias"] for n in some])
                bias[number, : len(joined)] = joined
            return Linear(weight, bias)

        def norms(*names: str) -> Norm:
            return Norm(*(np.stack([arrays[f"{name}.{part}"] for name in names]) for part in ("weight", "bias")))

        places = arrays["embeddings.position_embeddings.weight"]
        self._model = Model(
            words=np.ascontiguousarray(arrays["embeddings.word_embeddings.weight"]),
            places=places + arrays["embeddings.token_type_embeddings.weight"][0],  # all tokens are of the first type
            first_norm=norms("embeddings.LayerNorm"),
            joined=linears(*(f"attention.self.{part}" for part in ("query", "key", "value"))),
            mix=linears("attention.output.dense"),
            mix_norm=norms(*(f"{layer}.attention.output.LayerNorm" for layer in layers)),
            widen=linears("intermediate.dense"),
            narrow=linears("output.dense"),
            narrow_norm=norms(*(f"{layer}.output.LayerNorm" for layer in layers)),
            heads=int(config["num_attention_heads"]),
            eps=np.float32(config["layer_norm_eps"]),
        )

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean (n, width) of the last layer's real tokens, L2-normalised, and the hidden states
        (n, layers, t, width) of the last layers, lowest first, zero at padding.

        Args:
            ids: (n, t) int64.
            mask: (n, t) int64, 1 at real tokens, which come first.
            layers: how many layers' states are wanted.

        Raises:
            ModelError: the tokenizer has tokens that the model has not, or texts are longer than it reads.
        """
        tokens, lengths = ids.numpy(), mask.numpy().sum(1)
        (words, width), places = self._model.words.shape, len(self._model.places)
        count, longest = tokens.shape
        if tokens.min() < 0 or tokens.max() >= words or longest > places:
            raise ModelError(
                f"tokens {tokens.min()} to {tokens.max()} of {words}, {longest} places of {places}",
                where="the text encoder",
                remedy="Its tokenizer does not belong to its model, or encoders.text.max_tokens is too large.",
            )
        states = np.zeros((count, layers, longest, width), np.float32)
        pooled = np.zeros((count, width), np.float32)

        def run(some: slice) -> None:
            forward(tokens[some], lengths[some], self._model, states[some], pooled[some])

        groups = list(_groups(lengths))
        if len(groups) == 1:
            run(groups[0])
        else:
            with ThreadPoolExecutor(min(torch.get_num_threads(), len(groups))) as pool:  # the kernel releases the GIL
                list(pool.map(run, groups))
        return torch.from_numpy(pooled), torch.from_numpy(states)


def _groups(lengths: np.ndarray) -> Iterator[slice]:
    """Texts that follow each other, of about ``_TOGETHER`` tokens a group."""
    first = total = 0
    for text, length in enumerate(lengths.tolist()):
        total += length
        if total >= _TOGETHER or text == len(lengths) - 1:
            yield slice(first, text + 1)
            first, total = text + 1, 0
