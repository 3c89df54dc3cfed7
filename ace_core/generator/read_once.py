"""A generator with one batch of queries that it has read: a search asks for them up to three times (to draft, to spell,
to rank)."""

from __future__ import annotations

import torch

from ace_core.generator.decoder import DecoderState
from ace_core.generator.model import Generator
from ace_core.query import QueryBatch


class ReadOnce:
    """A :class:`~ace_core.decoding.SpellingModel` for one batch of queries.

    Attributes:
        vector: (n, D) float32, the refined queries q'.
    """

    def __init__(self, generator: Generator, query: QueryBatch) -> None:
        self.vocab_sizes = generator.vocab_sizes
        self.step, self.score = generator.step, generator.score
        self._generator = generator
        self._query = query
        with torch.inference_mode():
            self._reading = generator.read(query)
        self.vector = self._reading.vector

    def start(self, query: QueryBatch) -> DecoderState:
        """See :class:`~ace_core.decoding.SpellingModel`."""
        assert query is self._query
        return self._generator.start_of(self._reading)

    def one_shot(self, query: QueryBatch) -> list[torch.Tensor]:
        """See :class:`~ace_core.decoding.SpellingModel`."""
        assert query is self._query
        return self._generator.one_shot_of(self.vector)
