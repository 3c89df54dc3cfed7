"""What text encoders do alike: a few thousand texts of any length as batches of similar length. Loads no library of
models, so that an encoder that needs none starts fast."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ace_core.encoders.protocol import TextFeatures
from ace_core.errors import SettingsError

BATCH = 64


class BatchedText(ABC):
    """A text model behind the ``TextEncoder`` protocol.

    Args:
        layers: last layers whose token features are given.
        device: where the model is.
        pad: token that short texts of a batch are filled up with, on the right: attention masks make the side
            irrelevant but for position embeddings.
        fixed_length: tokens that every text is filled up to; None fills up to the longest of a batch.
    """

    def __init__(self, *, layers: int, device: str, pad: int, fixed_length: int | None = None) -> None:
        self.layers = layers
        self._device = device
        self._pad = pad
        self._fixed_length = fixed_length
        probe = self.encode(["a"])
        self.dim = probe.pooled.shape[1]
        self.width = probe.hidden.shape[3]

    @abstractmethod
    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, cut at the longest that is read."""

    @abstractmethod
    def _read(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled vectors (n, E_p), L2-normalised, and token features (n, S, t, E) of the last S layers, lowest first.

        Args:
            ids: (n, t) int64, padded; mask: (n, t) int64, 1 at real tokens, which come first.
        """

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Encode n texts. An empty text is encoded as its special tokens alone, as padding where
        there are none.

        The cost follows the texts' own lengths: they are sorted by length and run in batches. T is the length in
        tokens of the longest text.
        """
        if not texts:
            raise ValueError("no texts to encode")
        rows = [row or [self._pad] for row in self._tokens(list(texts))]
        if len(rows) <= BATCH:
            return self._forward(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        out: TextFeatures | None = None
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            part = self._forward([rows[i] for i in batch])
            index = torch.tensor(batch)
            _, layers, longest, width = part.hidden.shape
            if out is None:  # the longest texts come first
                out = TextFeatures(
                    torch.empty(len(rows), part.pooled.shape[1]),
                    torch.zeros(len(rows), layers, longest, width),
                    torch.zeros(len(rows), longest, dtype=torch.bool),
                )
            out.pooled[index] = part.pooled
            out.hidden[index, :, :longest] = part.hidden
            out.mask[index, :longest] = part.mask
        assert out is not None
        return out

    @torch.no_grad()  # not in inference mode: tensors born inside it cannot take part in a training step
    def _forward(self, rows: list[list[int]]) -> TextFeatures:
        """Token rows of one batch, on the CPU."""
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        width = self._fixed_length or longest
        ids = torch.tensor([row + [self._pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
        pooled, hidden = self._read(ids.to(self._device), mask.to(self._device))
        hidden, real = hidden[:, :, :longest].float().cpu(), mask[:, :longest].bool()
        if min(lengths) < longest:
            hidden = hidden * real[:, None, :, None]
        return TextFeatures(pooled.float().cpu(), hidden, real)


def mean_of_tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean (n, E) of the real tokens' states (n, t, E)."""
    weights = mask[:, :, None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def check_layers(wanted: int, depth: int, where: str) -> None:
    """Refuse to take more layers than the model has.

    Raises:
        SettingsError: says how many there are.
    """
    if wanted > depth:
        raise SettingsError(
            f"encoders.text.fusion_layers is {wanted}, the model has {depth} layers",
            where=where,
            remedy=f"Set it to {depth} or less.",
        )
