"""One decoder's weights searched twice: by ``transformers.generate`` with a prefix function, and by ours."""

from __future__ import annotations

import numpy as np
import torch

from ace_core.candidates import Candidates
from ace_core.query import QueryBatch
from benchmarks.bart import BartSpeller, generate, random_bart
from benchmarks.clustered import Codes
from benchmarks.rivals import DictTrie

Identifiers = list[list[tuple[int, ...]]]
"""Each query's identifiers, best first."""

_TIE = 1e-4  # of log-probabilities, that two ways to add float32 numbers may differ by


class Rival:
    """A two-layer BART with random weights over the identifiers of a corpus, queries for it, and its own search.

    Attributes:
        bart: on ``device``; speller: the same weights as a :class:`~ace_core.decoding.SpellingModel`.
        query: ``batch`` queries of 16 tokens.
    """

    def __init__(self, codes: Codes, trie: DictTrie, batch: int, beam: int, device: torch.device | str = "cpu") -> None:
        self.bart = random_bart(codes.vocab_sizes).to(device)
        self.speller = BartSpeller(self.bart, codes.vocab_sizes)
        self.beam, self._trie = beam, trie
        torch.manual_seed(1)
        hidden = torch.randn(batch, 1, 16, self.bart.config.d_model)
        self.query = QueryBatch(torch.zeros(batch, 1), hidden, torch.ones(batch, 16, dtype=torch.bool)).to(device)

    def search(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``generate`` returns: tokens (n, beam, levels) in BART's numbering, and log-probabilities (n, beam)."""
        return generate(self.bart, self.query, self.beam, len(self.speller.vocab_sizes), self._allowed)

    def _allowed(self, _: int, sent: torch.Tensor) -> list[int]:
        offsets = self.speller.offsets
        prefix = [t - o for t, o in zip(sent.tolist()[1:], offsets)]
        return [t + offsets[len(prefix)] for t in self._trie.children(prefix)]

    def check(self, found: Candidates) -> None:
        """Assert that candidates are generate's top-k in its order, but for neighbours of equal score."""
        tokens, scores = (t.cpu() for t in self.search())
        theirs = (tokens - torch.tensor(self.speller.offsets)).tolist()
        for q, (ours, expected) in enumerate(zip(identifiers(found), theirs)):
            scored = dict(zip(map(tuple, found.codes[q].tolist()), found.log_prob[q].tolist()))
            assert len(ours) == len(expected), f"query {q}: {len(ours)} identifiers, generate finds {len(expected)}"
            for mine, other, score in zip(ours, map(tuple, expected), scores[q].tolist()):
                assert mine == other or abs(scored[mine] - score) < _TIE, f"query {q}: not the same top-k"


def identifiers(found: Candidates) -> Identifiers:
    """The identifiers of candidates, each once."""
    return [list(dict.fromkeys(map(tuple, c[v].tolist()))) for c, v in zip(found.codes, found.valid)]


def in_common(a: Identifiers, b: Identifiers) -> float:
    """Share of all queries' identifiers a that are among b."""
    return sum(len(set(x) & set(y)) for x, y in zip(a, b)) / sum(map(len, a))


class TableSpeller:
    """Log-probabilities from the codebooks and the query, no decoder: what is left is the cost of the search.

    Attributes:
        tables: per level (n, V); noisy: (n, beam, V), as a decoder's scores differ between the rows of a beam.
    """

    def __init__(self, codes: Codes, queries: np.ndarray, beam: int, noise: float = 1.0) -> None:
        self.vocab_sizes = codes.vocab_sizes
        self.tables = [torch.from_numpy(t) for t in codes.tables(queries)]
        generator = torch.Generator().manual_seed(0)
        self.noisy = [
            torch.log_softmax(t[:, None] + noise * torch.randn(len(t), beam, t.shape[1], generator=generator), -1)
            for t in self.tables
        ]


def top_k(scores: torch.Tensor, log_probs: torch.Tensor, beam: int) -> torch.Tensor:
    """An unmasked step: no constraint at all."""
    return (log_probs + scores[..., None]).flatten(1).topk(beam, dim=1).values
