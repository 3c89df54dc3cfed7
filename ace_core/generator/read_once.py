"""A generator with one batch of queries that it reads at most once: a search asks for them up to three times (to draft,
to spell, to rank)."""

from __future__ import annotations

import torch

from ace_core.generator.decoder import DecoderState, Reading
from ace_core.generator.model import Generator
from ace_core.query import QueryBatch


class ReadOnce:
    """A :class:`~ace_core.decoding.SpellingModel` for one batch of queries.

    Args:
        vector: the refined queries, where they are known.

    Attributes:
        vector: (n, D) float32, the refined queries q'.
    """

    def __init__(self, generator: Generator, query: QueryBatch, vector: torch.Tensor | None = None) -> None:
        self.vocab_sizes = generator.vocab_sizes
        self.step, self.score = generator.step, generator.score
        self._generator = generator
        self._query = query
        self._known: Reading | None = None
        self.vector = self._reading().vector if vector is None else vector

    def _reading(self) -> Reading:
        if self._known is None:
            with torch.inference_mode():
                self._known = self._generator.read(self._query)
        return self._known

    def start(self, query: QueryBatch) -> DecoderState:
        """See :class:`~ace_core.decoding.SpellingModel`."""
        assert query is self._query
        return self._generator.start_of(self._reading())

    def one_shot(self, query: QueryBatch) -> list[torch.Tensor]:
        """See :class:`~ace_core.decoding.SpellingModel`."""
        assert query is self._query
        return self._generator.one_shot_of(self.vector)
