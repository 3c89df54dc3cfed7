"""Beams over the constraint index as tensor operations of fixed shapes: the form for accelerators.

The same steps as :mod:`ace_core.walk`, without a branch, a host synchronisation or a copy from the host: shapes depend
on the beam and on the index, never on the data, so that a whole search can be queued, or captured and replayed
(:mod:`ace_core.replay`). A step looks at as many children of a row as the level's widest row has, not at the level's
vocabulary. On a CPU the compiled walk is several times faster.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ace_core.constraint import ConstraintIndex
from ace_core.merged import MergedIndex
from ace_core.rows import Rows
from ace_core.walk import Masks, Walk

_SLOTS = 64  # masks that a device keeps


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Beam rows of n queries, best first; dead rows have a score of -inf, and all else of them means nothing.

    Attributes:
        low, high: (n, B) whole numbers: children of each row, in the numbering of the walk's merged index.
        score: (n, B); parent: (n, B) int64; codes: (n, B, level) int64; level_log_prob: (n, B, level).
    """

    low: torch.Tensor
    high: torch.Tensor
    score: torch.Tensor
    parent: torch.Tensor
    codes: torch.Tensor
    level_log_prob: torch.Tensor

    def packed(self) -> torch.Tensor:
        """(n, B, 3 + 2 level) float64, exact: what :meth:`TensorWalk.to_host` takes in one transfer."""
        columns = torch.stack([self.score.double(), self.low.double(), self.high.double()], 2)
        return torch.cat([columns, self.level_log_prob.double(), self.codes.double()], 2)


@dataclass(frozen=True, eq=False)
class TensorMasks:
    """Masks on a device: bitmaps (m, bytes) uint8 of :meth:`MergedIndex.bitmap`; of_query (n,) whole numbers, the byte
    of them all at which each query's begins."""

    bitmaps: torch.Tensor
    of_query: torch.Tensor


class TensorWalk:
    """Segments on a device, searched as one. For one caller at a time.

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
        self._merged = merged = MergedIndex.of(self.host.segments)
        self._roots = len(merged.tokens[0])
        # A row's children are looked at up to the widest row's number of them: past its own, and the last row past the
        # end, where there is room to look at.
        beyond = [np.arange(width) for width in (*merged.fan_out, 0)]
        self._steps = [self._put(steps, _narrow(len(t) + len(steps))) for t, steps in zip(merged.tokens, beyond)]
        self._tokens = [self._put(np.pad(t, (0, len(b))), _token_type(t)) for t, b in zip(merged.tokens, beyond)]
        self._pointers = [
            self._put(np.pad(p, (0, len(b)), mode="edge"), _narrow(int(p[-1]) + len(after)))
            for p, b, after in zip(merged.pointers, beyond, beyond[1:])
        ]
        self._intervals = [p.as_strided((len(p) - 1, 2), (1, 1)) for p in self._pointers]  # each with the next
        self._never = torch.tensor(-torch.inf, device=self.device)
        self._bitmaps: torch.Tensor | None = None  # (slots, bytes); the first allows everything
        self._slots: OrderedDict[tuple[int, ...], tuple[int, Masks]] = OrderedDict()  # by the masks' identities

    def _put(self, array: np.ndarray, dtype: type) -> torch.Tensor:
        return torch.from_numpy(array.astype(dtype)).to(self.device)

    @property
    def levels(self) -> int:
        return len(self.vocab_sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the index on the device; a mask takes :attr:`mask_bytes` more."""
        return sum(t.nbytes for t in (*self._tokens, *self._pointers))

    @property
    def mask_bytes(self) -> int:
        """Bytes that a mask takes on the device, where there is room for 64 as soon as there is one."""
        return self._merged.bitmap_offsets[-1] + max(self._merged.fan_out) // 8 + 1  # a step looks past the end

    def root(self, queries: int) -> TensorRows:
        """One row a query, before the first token."""
        blank = torch.zeros(queries, 1, 0, device=self.device)
        first = torch.zeros(queries, 1, dtype=self._steps[0].dtype, device=self.device)
        return TensorRows(
            low=first,
            high=first + self._roots,
            score=torch.zeros(queries, 1, device=self.device),
            parent=torch.zeros(queries, 1, dtype=torch.int64, device=self.device),
            codes=blank.to(torch.int64),
            level_log_prob=blank,
        )

    @torch.inference_mode()  # what one search makes, another changes
    def masks(self, masks: Masks | Sequence[Masks] | None, queries: int) -> TensorMasks | None:
        """Masks on the device: for all queries one mask a segment, or for every query its own; None where all items are
        allowed. A mask that is still there from an earlier search costs nothing.

        The bitmaps lie where they always lie, and hold for this search and those before it only.

        Raises:
            QueryError: as :meth:`~ace_core.walk.Walk.masks`.
        """
        rows = self.host.checked_masks(masks, queries)
        if all(mask is None for row in rows for mask in row):
            return None
        distinct = {tuple(map(id, row)): row for row in rows}
        if len(distinct) < _SLOTS:
            table, place = self._kept(distinct)
        else:
            table = torch.stack([self._bitmap(row) for row in distinct.values()])
            place = {key: number for number, key in enumerate(distinct)}
        begins = [place[tuple(map(id, row))] * table.shape[1] for row in rows]
        begins = begins * queries if len(begins) == 1 else begins
        return TensorMasks(table, torch.tensor(begins, dtype=_torch_type(table.numel()), device=self.device))

    def _kept(self, wanted: dict[tuple[int, ...], Masks]) -> tuple[torch.Tensor, dict[tuple[int, ...], int]]:
        """The table of the masks that are kept, those wanted among them, and their rows in it."""
        if self._bitmaps is None:
            self._bitmaps = torch.full((_SLOTS, self.mask_bytes), 255, dtype=torch.uint8, device=self.device)
        place = {}
        for key in wanted:
            if all(mask is None for mask in wanted[key]):
                place[key] = 0
            elif key in self._slots:
                self._slots.move_to_end(key)
        for key, row in wanted.items():
            if key in place:
                continue
            if key not in self._slots:
                full = len(self._slots) == _SLOTS - 1
                slot = self._slots.popitem(last=False)[1][0] if full else len(self._slots) + 1
                self._bitmaps[slot] = self._bitmap(row)
                self._slots[key] = slot, row  # held: an identity is another mask's as soon as this one is gone
            place[key] = self._slots[key][0]
        return self._bitmaps, place

    def _bitmap(self, row: Masks) -> torch.Tensor:
        bitmap = self._merged.bitmap(row)
        return self._put(np.pad(bitmap, (0, self.mask_bytes - len(bitmap))), np.uint8)

    def expand(
        self, rows: TensorRows, log_probs: torch.Tensor, beam: int, masks: TensorMasks | None, *,
        renormalise: bool = False,
    ) -> TensorRows:  # fmt: skip
        """The best allowed children of each query's rows: ``beam`` of them, or as many as there is room to look at.

        Args: as :meth:`~ace_core.walk.Walk.expand`; log_probs (n, B or 1, V).
        """
        level = rows.codes.shape[2]
        queries, width = rows.low.shape
        given, vocabulary = log_probs.shape[1:]
        steps, tokens, intervals = self._steps[level], self._tokens[level], self._intervals[level]
        looked_at = len(steps)
        node = rows.low[..., None] + steps  # (n, B, fan-out)
        open_ = node < rows.high[..., None]
        if masks is not None:
            open_ = open_ & self._allowed(level, node, masks)
        flat = queries * given * vocabulary
        first = torch.arange(0, flat, vocabulary, dtype=_torch_type(flat), device=self.device).view(queries, given, 1)
        value = torch.where(open_, _at(log_probs.reshape(-1), first + _at(tokens, node)), self._never)
        if renormalise:
            total = torch.logsumexp(value, 2, keepdim=True)
            value = torch.where(value > -torch.inf, (value - total).clamp(max=0), self._never)
        sums = (rows.score[..., None] + value).flatten(1)
        score, best = sums.topk(min(beam, width * looked_at), dim=1)
        parent = best // looked_at
        chosen = rows.low.gather(1, parent) + best % looked_at
        interval = intervals.index_select(0, chosen.flatten()).view(*chosen.shape, 2)
        of_parent = parent[..., None].expand(-1, -1, level)
        newest = value.flatten(1).gather(1, best)[..., None]
        token = _at(tokens, chosen).long()[..., None]
        return TensorRows(
            low=interval[..., 0],
            high=interval[..., 1],
            score=score,
            parent=parent,
            codes=torch.cat([rows.codes.gather(1, of_parent), token], 2),
            level_log_prob=torch.cat([rows.level_log_prob.to(value.dtype).gather(1, of_parent), newest], 2),
        )

    def to_host(self, packed: torch.Tensor) -> Rows:
        """Complete rows, :meth:`TensorRows.packed`, as :class:`~ace_core.walk.Walk` knows them: one transfer."""
        block = packed.cpu().numpy()
        live = np.isfinite(block[..., 0])
        host = self.host.blank(len(block), block.shape[1], self.levels)
        host.live[:], host.block[:], host.score[:] = live.sum(1), 0, block[..., 0]
        low, high = block[..., 1].astype(np.int64), block[..., 2].astype(np.int64)
        host.low[:], host.high[:] = self._merged.items_between(low, high)
        host.level_log_prob[:] = block[..., 3 : 3 + self.levels]
        host.codes[:] = block[..., 3 + self.levels :]
        host.block[~live] = 0
        return host

    def _allowed(self, level: int, nodes: torch.Tensor, masks: TensorMasks) -> torch.Tensor:
        """Does each node (n, B, fan-out) of ``level`` hold an allowed item? Undefined past the level's nodes."""
        first = (masks.of_query + self._merged.bitmap_offsets[level]).view(-1, 1, 1)
        byte = _at(masks.bitmaps.view(-1), first + (nodes >> 3))
        return ((byte >> (nodes & 7)) & 1).bool()


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """values (m,) at places (...), int32 or int64."""
    return values.index_select(0, places.reshape(-1)).view(places.shape)


def _narrow(numbers: int) -> type:
    """For numbers below this: int64 moves twice the bytes."""
    return np.int32 if numbers < 2**31 else np.int64


def _torch_type(numbers: int) -> torch.dtype:
    return torch.int32 if numbers < 2**31 else torch.int64


def _token_type(tokens: np.ndarray) -> type:
    return np.uint8 if tokens.dtype == np.uint8 else np.int32
