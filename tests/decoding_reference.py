"""Plain references for the decoder's tests: no index, no kernels, one item at a time."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from ace_core.constraint import ConstraintIndex
from ace_core.identifiers import sort_order
from ace_core.query import QueryBatch


@dataclass(frozen=True)
class TableState:
    seed: torch.Tensor  # (n,) int64, one number a query
    modality_logp: torch.Tensor
    prefixes: torch.Tensor | None = None  # (n, B, level)


class TableModel:
    """Log-probabilities that are a fixed pseudo-random function of the query and the whole prefix."""

    def __init__(self, vocab_sizes, dtype=torch.float64, sharpness=2.0):
        self.vocab_sizes = tuple(vocab_sizes)
        self.dtype = dtype
        self.sharpness = sharpness
        self.asked: list[tuple[int, int]] = []  # (level, rows of a query) of each step
        self.passes = 0  # calls of score

    def _log_probs(self, seed: int, prefix: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng((seed, len(prefix), *prefix))
        logits = rng.standard_normal(self.vocab_sizes[len(prefix)]) * self.sharpness
        return logits - np.log(np.exp(logits).sum())

    def start(self, query: QueryBatch) -> TableState:
        seed = (query.vector[:, 0] * 1000).round().to(torch.int64)
        first = np.stack([self._log_probs(int(s), ()) for s in seed])
        return TableState(seed, torch.tensor(first, dtype=self.dtype))

    def _prefixes(self, state, tokens, parents):
        if parents is None:
            return tokens[..., None]
        old = torch.gather(state.prefixes, 1, parents[..., None].expand(-1, -1, state.prefixes.shape[2]))
        return torch.cat([old, tokens[..., None]], 2)

    def step(self, state, tokens, parents, level):
        self.asked.append((level, tokens.shape[1]))
        prefixes = self._prefixes(state, tokens, parents)
        assert prefixes.shape[2] == level
        rows = [
            [self._log_probs(int(s), tuple(p.tolist())) for p in of_query] for s, of_query in zip(state.seed, prefixes)
        ]
        return torch.tensor(np.array(rows), dtype=self.dtype), TableState(state.seed, state.modality_logp, prefixes)

    def one_shot(self, query):
        seed = (query.vector[:, 0] * 1000).round().to(torch.int64)
        levels = range(len(self.vocab_sizes))
        return [
            torch.tensor(np.stack([self._log_probs(int(s), (0,) * level) for s in seed]), dtype=self.dtype)
            for level in levels
        ]

    def score(self, state, tokens, parents, level):
        self.passes += 1
        prefixes = self._prefixes(state, tokens[..., 0], parents)
        scored = []
        for at in range(1, tokens.shape[2]):
            rows = [
                [self._log_probs(int(s), tuple(p.tolist()))[int(t)] for p, t in zip(of_query, now)]
                for s, of_query, now in zip(state.seed, prefixes, tokens[..., at])
            ]
            scored.append(torch.tensor(np.array(rows), dtype=self.dtype))
            prefixes = torch.cat([prefixes, tokens[..., at : at + 1]], 2)
        return torch.stack(scored, 2)


def queries(seeds) -> QueryBatch:
    return QueryBatch(torch.tensor([[s / 1000, 0.0] for s in seeds], dtype=torch.float64))


def reference_rows(model: TableModel, seed: int, codes: np.ndarray, allowed: np.ndarray, beam: int, scoring: str):
    """After each token [(prefix, log-probability)], best first: a beam over a Python set of prefixes."""
    exist = {tuple(c) for c in codes[allowed].tolist()}
    rows = [((), 0.0)] if exist else []
    for level in range(codes.shape[1]):
        following = []
        for order, (prefix, score) in enumerate(rows):
            log_probs = model._log_probs(seed, prefix)
            children = sorted({i[level] for i in exist if i[:level] == prefix})
            norm = np.log(np.exp(log_probs[children]).sum()) if scoring == "children" else 0.0
            following += [(-(score + log_probs[t] - norm), order, t, prefix) for t in children]
        rows = [((*prefix, t), -cost) for cost, _, t, prefix in sorted(following)[:beam]]
        yield rows


def reference_beam(model: TableModel, seed: int, codes: np.ndarray, allowed: np.ndarray, beam: int, scoring: str):
    """[(identifier, log-probability)], best first."""
    return list(reference_rows(model, seed, codes, allowed, beam, scoring))[-1]


def leaves(candidates, q):
    """[(identifier, log-probability)] without repeats, in order."""
    seen = {}
    for codes, log_prob, valid in zip(candidates.codes[q].tolist(), candidates.log_prob[q], candidates.valid[q]):
        if valid:
            seen.setdefault(tuple(codes), float(log_prob))
    return list(seen.items())


def agree(found, expected):
    assert [i for i, _ in found] == [i for i, _ in expected]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in expected], rtol=1e-5, atol=1e-5)


def build(codes: np.ndarray, vocab_sizes, depth=None) -> tuple[ConstraintIndex, np.ndarray, np.ndarray]:
    """Index, sorted codes, and the order that sorted them.

    Small corpora would have pointers on no level or on one, so any number of levels has some, by the corpus.
    """
    order = sort_order(codes, vocab_sizes)
    depth = (len(codes) + int(codes.sum())) % len(vocab_sizes) if depth is None else depth
    return ConstraintIndex.build(codes[order], vocab_sizes, depth), codes[order], order


@st.composite
def corpora(draw, min_items=0, max_items=40, max_levels=5):
    """(codes (items, levels) uint16 unsorted, vocab_sizes): depths, duplicates, chains, narrow and wide levels."""
    levels = draw(st.integers(1, max_levels))
    sizes = (3, *(draw(st.sampled_from([1, 2, 5, 300])) for _ in range(levels - 1)))
    items = draw(st.integers(min_items, max_items))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = np.stack([rng.integers(0, size, items) for size in sizes], 1).astype(np.uint16)
    if items and draw(st.booleans()):  # many share an identifier, or a prefix of it
        codes = codes[rng.integers(0, max(1, items // 4), items)]
        codes[:, -1] = np.where(rng.random(items) < 0.3, rng.integers(0, sizes[-1], items), codes[:, -1])
    return codes, sizes
