"""Constraint steps as others do them, on the same identifiers: rivals for the benchmark of the constraint step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PrefixConstrainedLogitsProcessor

from ace_core.constraint import ConstraintIndex


class DictTrie:
    """The nested-dict trie of GENRE and its descendants."""

    def __init__(self, codes: np.ndarray) -> None:
        self.root: dict[int, Any] = {}
        for row in codes.tolist():
            node = self.root
            for token in row:
                node = node.setdefault(token, {})

    def children(self, prefix: Sequence[int]) -> list[int]:
        node = self.root
        for token in prefix:
            node = node[token]
        return list(node)

    @property
    def nbytes(self) -> int:
        total, stack = 0, [self.root]
        while stack:
            node = stack.pop()
            total += sys.getsizeof(node)
            stack.extend(node.values())
        return total


def prefix_function_step(trie: DictTrie, beam: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """transformers' processor, called as its beam search calls it.

    Returns:
        step(prefixes (n * B, l) int64, scores (n, B), log_probs (n, B, V)) -> top (n, beam) scores and flat indices.
    """

    def step(prefixes: torch.Tensor, scores: torch.Tensor, log_probs: torch.Tensor):
        n, rows, vocabulary = log_probs.shape
        processor = PrefixConstrainedLogitsProcessor(lambda _, sent: trie.children(sent.tolist()), rows)
        masked = processor(prefixes, log_probs.reshape(n * rows, vocabulary))
        total = masked.view(n, rows, vocabulary) + scores[..., None]
        return total.flatten(1).topk(beam, dim=1)

    return step


class StaticIndex:
    """STATIC (arXiv 2602.22647): a dense table for the first two levels, then rows of (token, next state) in CSR
    gathered to the level's widest row."""

    def __init__(self, index: ConstraintIndex, device: torch.device | str = "cpu") -> None:
        """Of an index of distinct identifiers (STATIC has no buckets) with pointers on all levels but the last."""
        first, second = index.vocab_sizes[:2]
        self.levels = index.levels
        tokens = [torch.from_numpy(index.level_tokens(level).astype(np.int32)) for level in range(index.levels)]
        pointers = [torch.from_numpy(np.asarray(p).astype(np.int32)) for p in index.first_child]
        self.dense = torch.full((first, second), -1, dtype=torch.int32)
        parent = np.repeat(np.arange(len(tokens[0])), np.diff(index.first_child[0]))
        self.dense[tokens[0][parent].long(), tokens[1].long()] = torch.arange(len(tokens[1]), dtype=torch.int32)
        self.dense = self.dense.to(device)
        self.rows = [p.to(device) for p in pointers[1:]]
        self.edges = [torch.stack([t, torch.arange(len(t), dtype=torch.int32)], 1).to(device) for t in tokens[2:]]
        self.widest = [int(np.diff(p).max()) for p in index.first_child[1:]]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.dense, *self.rows, *self.edges))

    def step(self, level: int, states: torch.Tensor, scores: torch.Tensor, log_probs: torch.Tensor, beam: int):
        """States (n, B): first tokens at level 1, nodes after. Returns top scores, parents, tokens, states."""
        if level == 1:
            following = self.dense[states].long()
            total = torch.where(following >= 0, log_probs, -torch.inf) + scores[..., None]
            best, at = total.flatten(1).topk(min(beam, total[0].numel()), dim=1)
            return best, at // log_probs.shape[2], at % log_probs.shape[2], following.flatten(1).gather(1, at)
        begin, end = self.rows[level - 2][states].long(), self.rows[level - 2][states + 1].long()
        window = begin[..., None] + torch.arange(self.widest[level - 2], device=begin.device)
        real = window < end[..., None]
        edges = self.edges[level - 2][torch.where(real, window, 0)]
        tokens = edges[..., 0].long()
        total = torch.where(real, log_probs.gather(2, tokens), -torch.inf) + scores[..., None]
        best, at = total.flatten(1).topk(min(beam, total[0].numel()), dim=1)
        parent = at // self.widest[level - 2]
        return best, parent, tokens.flatten(1).gather(1, at), edges[..., 1].long().flatten(1).gather(1, at)
