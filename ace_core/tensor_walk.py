"""Beams over the constraint index as tensor operations of fixed shapes: the form for accelerators.

The same steps as :mod:`ace_core.walk`, without a branch or a host synchronisation: shapes depend on the beam and on
the vocabularies, never on the data, so that a whole search can be queued (or captured) at once. On a CPU the compiled
walk is several times faster.

Segments are laid side by side: nodes and items are numbered through all segments. The last level holds buckets
(distinct identifiers) instead of items, and all levels have pointers: some 10 bytes an item, three times the CPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ace_core.constraint import ConstraintIndex
from ace_core.filters import ItemMask
from ace_core.rows import Rows
from ace_core.walk import Masks, Walk


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Beam rows of n queries, best first; dead rows have a score of -inf and empty intervals.

    Attributes:
        low, high: (n, B, S) int64 children of each row in each segment, as in :class:`~ace_core.rows.Rows`.
        score: (n, B); parent: (n, B) int64; codes: (n, B, level) int64; level_log_prob: (n, B, level).
    """

    low: torch.Tensor
    high: torch.Tensor
    score: torch.Tensor
    parent: torch.Tensor
    codes: torch.Tensor
    level_log_prob: torch.Tensor


@dataclass(frozen=True, eq=False)
class TensorMasks:
    """Masks of all segments side by side: words (m, W) int64, before (m, W) int64, of_query (n,) int64 mask rows."""

    words: torch.Tensor
    before: torch.Tensor
    of_query: torch.Tensor


class TensorWalk:
    """Segments on a device, searched as one.

    Args:
        segments: one or more indexes over the same vocabularies.
        device: where the tensors go, in one copy each.

    Raises:
        StoreError: as :class:`~ace_core.walk.Walk`.
    """

    def __init__(self, segments: Sequence[ConstraintIndex], device: torch.device | str = "cpu") -> None:
        self.host = Walk(segments)
        self.device = torch.device(device)
        self.vocab_sizes = self.host.vocab_sizes
        parts = [_with_buckets(segment) for segment in self.host.segments]
        self._items = _bases([s.items for s in self.host.segments])
        self._tokens: list[torch.Tensor] = []
        self._pointers: list[torch.Tensor] = []
        self._fan_out: list[int] = []  # most children of a row, by the level of the children
        fan_out = max(len(tokens[0]) for tokens, _ in parts)
        # a segment's nodes are followed by one blank, so that each node's closing pointer is the next entry
        bases = [_bases([len(tokens[level]) + 1 for tokens, _ in parts]) for level in range(self.levels)]
        bases.append(self._items)
        for level, size in enumerate(self.vocab_sizes):
            self._fan_out.append(max(1, fan_out))
            fan_out = max(int(np.diff(pointers[level]).max(initial=0)) for _, pointers in parts)
            tokens = np.concatenate([np.append(tokens[level], 0) for tokens, _ in parts])
            below = [pointers[level] + base for (_, pointers), base in zip(parts, bases[level + 1])]
            wide = bases[level + 1][-1] >= 2**31
            self._tokens.append(torch.from_numpy(tokens.astype(np.uint8 if size <= 256 else np.int32)).to(self.device))
            self._pointers.append(
                torch.from_numpy(np.concatenate(below).astype(np.int64 if wide else np.int32)).to(self.device)
            )
        nodes = np.array([len(tokens[0]) for tokens, _ in parts])
        self._root_low = torch.from_numpy(bases[0][:-1].copy()).to(self.device)
        self._root_high = torch.from_numpy(bases[0][:-1] + nodes).to(self.device)

    @property
    def levels(self) -> int:
        return len(self.vocab_sizes)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.nbytes for t in (*self._tokens, *self._pointers))

    def root(self, queries: int) -> TensorRows:
        """One row a query, before the first token."""
        blank = torch.zeros(queries, 1, 0, device=self.device)
        return TensorRows(
            low=self._root_low.expand(queries, 1, -1),
            high=self._root_high.expand(queries, 1, -1),
            score=torch.zeros(queries, 1, device=self.device),
            parent=torch.zeros(queries, 1, dtype=torch.int64, device=self.device),
            codes=blank.to(torch.int64),
            level_log_prob=blank,
        )

    def masks(self, masks: Masks | Sequence[Masks] | None, queries: int) -> TensorMasks | None:
        """Masks as tensors on the device: for all queries one mask a segment, or for every query its own.

        Raises:
            QueryError: as :meth:`~ace_core.walk.Walk.masks`.
        """
        rows = self.host.checked_masks(masks, queries)
        if all(mask is None for row in rows for mask in row):
            return None
        distinct: dict[tuple[int, ...], int] = {}
        of_query = [distinct.setdefault(tuple(id(m) for m in row), len(distinct)) for row in rows]
        chosen = [rows[of_query.index(number)] for number in range(len(distinct))]
        allowed = np.stack(
            [
                np.concatenate(
                    [np.ones(s.items, bool) if m is None else m.to_bool() for m, s in zip(row, self.host.segments)]
                )
                for row in chosen
            ]
        )
        merged = [ItemMask.of(row) for row in allowed]
        of_query = of_query * queries if len(of_query) == 1 else of_query
        return TensorMasks(
            words=torch.from_numpy(np.stack([m.words for m in merged]).view(np.int64)).to(self.device),
            before=torch.from_numpy(np.stack([m.before for m in merged]).astype(np.int32)).to(self.device),
            of_query=torch.tensor(of_query, device=self.device),
        )

    def expand(
        self, rows: TensorRows, log_probs: torch.Tensor, beam: int, masks: TensorMasks | None, *,
        renormalise: bool = False,
    ) -> TensorRows:  # fmt: skip
        """The best allowed children of each query's rows: ``min(beam, B * V)`` of them.

        Args: as :meth:`~ace_core.walk.Walk.expand`; log_probs (n, B or 1, V).
        """
        level = rows.codes.shape[2]
        queries, width, segments = rows.low.shape
        vocabulary = self.vocab_sizes[level]
        # children by token: (n, B, V) node numbers of each segment, -1 where it has none
        steps = torch.arange(self._fan_out[level], device=self.device)
        nodes = rows.low[..., None] + steps  # (n, B, S, fan-out)
        real = nodes < rows.high[..., None]
        nodes = torch.where(real, nodes, 0)
        tokens = torch.where(real, self._tokens[level][nodes].long(), vocabulary)
        usable = real if masks is None else real & self._any_allowed(level, nodes, masks)
        table = torch.full((queries, width, segments, vocabulary + 1), -1, dtype=torch.int64, device=self.device)
        table = table.scatter(3, tokens, torch.where(real, nodes, -1))[..., :vocabulary]
        open_ = torch.zeros((queries, width, segments, vocabulary + 1), dtype=torch.bool, device=self.device)
        allowed = open_.scatter(3, tokens, usable)[..., :vocabulary].any(2)

        log_probs = log_probs.expand(-1, width, -1)
        allowed = allowed & (log_probs > -torch.inf) & (rows.score > -torch.inf)[..., None]
        value = torch.where(allowed, log_probs, -torch.inf)
        if renormalise:
            total = torch.logsumexp(value, 2, keepdim=True)
            value = torch.where(allowed, (value - total).clamp(max=0), -torch.inf)
        score, best = (rows.score[..., None] + value).flatten(1).topk(min(beam, width * vocabulary), dim=1)
        parent, token = best // vocabulary, best % vocabulary
        live = (score > -torch.inf)[..., None]
        chosen = table.transpose(2, 3).flatten(1, 2).gather(1, best[..., None].expand(-1, -1, segments))
        has = live & (chosen >= 0)
        chosen = torch.where(has, chosen, 0)
        pointers = self._pointers[level]
        of_parent = parent[..., None].expand(-1, -1, level)
        newest = value.flatten(1).gather(1, best)[..., None]
        return TensorRows(
            low=torch.where(has, pointers[chosen].long(), 0),
            high=torch.where(has, pointers[chosen + 1].long(), 0),
            score=score,
            parent=parent,
            codes=torch.cat([rows.codes.gather(1, of_parent), token[..., None]], 2),
            level_log_prob=torch.cat([rows.level_log_prob.to(value.dtype).gather(1, of_parent), newest], 2),
        )

    def to_host(self, rows: TensorRows) -> Rows:
        """Complete rows as :class:`~ace_core.walk.Walk` knows them: the one transfer of a search."""
        base = self._items[:-1]
        low, high = rows.low.cpu().numpy(), rows.high.cpu().numpy()
        some = high > low
        score = rows.score.double().cpu().numpy()
        host = self.host.blank(len(score), score.shape[1], self.levels)
        host.live[:] = np.isfinite(score).sum(1)
        host.score[:], host.parent[:] = score, rows.parent.cpu().numpy()
        host.low[:], host.high[:] = np.where(some, low - base, 0), np.where(some, high - base, 0)
        host.codes[:] = rows.codes.cpu().numpy()
        host.level_log_prob[:] = rows.level_log_prob.double().cpu().numpy()
        return host

    def _any_allowed(self, level: int, nodes: torch.Tensor, masks: TensorMasks) -> torch.Tensor:
        """Does each node (n, ...) of ``level`` hold an allowed item?"""
        low, high = nodes, nodes + 1
        for pointers in self._pointers[level:]:
            low, high = pointers[low].long(), pointers[high].long()
        of_query = masks.of_query.view(-1, *([1] * (nodes.ndim - 1)))
        return _rank(masks, of_query, high) > _rank(masks, of_query, low)


def _rank(masks: TensorMasks, of_query: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Allowed items before each of ``items``: running count of words, and the bits below in the item's own word."""
    word = items >> 6
    bits = masks.words[of_query, word] & ((torch.ones_like(items) << (items & 63)) - 1)
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    return masks.before[of_query, word] + ((bits * 0x0101010101010101) >> 56)


def _bases(counts: Sequence[int]) -> np.ndarray:
    """(len + 1,) int64: where each of several arrays begins when they are laid side by side, and the end."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _with_buckets(index: ConstraintIndex) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and int64 pointers of every level, the last one's nodes being distinct identifiers."""
    codes = np.stack([index.spelled(level) for level in range(index.levels)], 1).astype(np.uint16)
    index = ConstraintIndex.build(codes, index.vocab_sizes, index.levels - 1)
    tokens = [*index.tokens, index.tail[:, 0]]
    pointers = [p.astype(np.int64) for p in index.first_child]
    last = tokens[-1]
    begins = np.ones(len(last), bool)
    begins[1:] = last[1:] != last[:-1]
    if pointers:
        begins[pointers[-1][:-1]] = True  # another parent, another bucket
        numbers = np.append(np.cumsum(begins) - 1, begins.sum())
        first_items = pointers[-1]
        pointers[-1] = numbers[first_items]
    first = np.flatnonzero(begins)
    tokens[-1] = last[first]
    return tokens, [*pointers, np.append(first, len(last))]
