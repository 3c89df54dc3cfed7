"""Beams over the constraint index: what the compiled kernels read and write, as typed arrays.

A :class:`Walk` joins the segments of a snapshot (the main one and its small additions). A beam row holds an interval
in every segment, so that the answer is the one a single rebuilt index would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from ace_core import kernels
from ace_core.candidates import Candidates
from ace_core.constraint import ConstraintIndex, pointer_levels
from ace_core.errors import QueryError, StoreError
from ace_core.filters import ItemMask
from ace_core.kernels.compiled import row_words
from ace_core.rows import Rows

_DENSE = 8  # of so many tokens one must follow a node, in the mean, for a bitmap of them
_SPREAD, _MORE = 4, 450  # prefixes for each row of a draft, and how many more there may be than rows

Masks = Sequence[ItemMask | None]
"""One mask for each segment; None allows all its items."""


class Walk:
    """Segments that are searched as one.

    Args:
        segments: one or more indexes over the same vocabularies.

    Raises:
        StoreError: no segment, or segments of different vocabularies.
    """

    def __init__(self, segments: Sequence[ConstraintIndex]) -> None:
        self.segments = tuple(segments)  # held: the kernels see addresses only
        if not self.segments:
            raise StoreError("there is no segment to search", remedy="Publish a snapshot first.")
        self.vocab_sizes = self.segments[0].vocab_sizes
        if any(s.vocab_sizes != self.vocab_sizes for s in self.segments):
            raise StoreError(
                f"segments have different vocabularies: {[s.vocab_sizes for s in self.segments]}",
                remedy="All segments of a snapshot must come from one quantizer: publish again.",
            )
        self.items = sum(s.items for s in self.segments)
        # by level and segment: which tokens follow each node of the level above, where these are many
        self.present = [[_present(s, level) for s in self.segments] for level in range(self.levels)]
        self._layout = _layout(self.segments, self.present)
        # a draft expands prefixes of so many tokens, and looks at all items below those that are left; as many for
        # segments as for the index that they would make together
        self.depth = max(s.depth for s in self.segments)
        if len(self.segments) > 1:
            self.depth = max(self.depth, pointer_levels(self.vocab_sizes, self.items))
        # for each segment: bitmaps of the masks that someone still holds
        self._masks: list[WeakKeyDictionary[ItemMask, tuple[np.ndarray, ...]]] = [
            WeakKeyDictionary() for _ in self.segments
        ]
        self._row_words = row_words(len(self.segments), len(self.vocab_sizes))
        self._roots = np.array([len(s.level_tokens(0)) for s in self.segments], np.int64)
        self._offsets = np.cumsum([0, *self.vocab_sizes])
        self._plans: dict[int, np.ndarray] = {}  # by the identifiers that a draft keeps

    @property
    def levels(self) -> int:
        return len(self.vocab_sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the segments' indexes, and of what is added to them here."""
        added = [bitmaps.nbytes for level in self.present for bitmaps in level if bitmaps is not None]
        return sum(s.nbytes for s in self.segments) + sum(added)

    def root(self, queries: int) -> Rows:
        """One row a query, before the first token."""
        rows = self.blank(queries, 1, 0)
        rows.live[:], rows.block[:], rows.high[:] = 1, 0, self._roots
        return rows

    def expand(
        self, rows: Rows, log_probs: np.ndarray, beam: int, masks: MaskAddresses, *, renormalise: bool = False
    ) -> Rows:
        """The ``beam`` best allowed children of each query's rows.

        Args:
            rows: at most levels - 1 tokens long.
            log_probs: (n, B, V) of the next level, none above zero, C-contiguous; (n, 1, V) where all rows of a query
                share them.
            masks: from :meth:`masks`.
            renormalise: share the probability among a row's allowed children.
        """
        level, levels, segments, live, block = rows
        queries, room, words = block.shape
        given_queries, given_rows, vocabulary = log_probs.shape
        if given_queries != queries or vocabulary != self.vocab_sizes[level]:
            raise _foreign_model(log_probs.shape, self.vocab_sizes)
        if given_rows != room and given_rows != 1 and not rows.width <= given_rows <= room:
            raise ValueError(f"log_probs {log_probs.shape} for {rows.width} live rows")
        next_live, next_block = np.empty(queries, np.int64), np.empty((queries, beam, words), np.int64)
        arrays = self._layout, level, masks.bits, block, live, log_probs, next_block, next_live
        if segments == 1 and not renormalise:
            kernels.expand_one(*arrays)
        else:
            kernels.expand(*arrays, renormalise)
        return Rows(level + 1, levels, segments, next_live, next_block)

    def blank(self, queries: int, beam: int, level: int) -> Rows:
        """Room for rows of ``level`` tokens; what is in it is undefined."""
        live, block = np.empty(queries, np.int64), np.empty((queries, beam, self._row_words), np.int64)
        return Rows(level, len(self.vocab_sizes), len(self.segments), live, block)

    def draft(self, log_probs: np.ndarray, keep: int, masks: MaskAddresses) -> Rows:
        """Complete rows by tokens that do not depend on each other: :meth:`expand` for the first ``depth`` tokens, with
        the widths of :func:`draft_widths`, then all that is below, of which the best rows stay.

        Args:
            log_probs: (n, sum of V_l) float32 or float64, of all levels' tokens side by side; where a query's largest
                is above zero, all are lowered by it.
            keep: rows that result.
        """
        queries = len(log_probs)
        self._check_width(log_probs)
        done = self.blank(queries, keep, self.levels)
        if len(self.segments) == 1:
            kernels.draft(self._layout, self._plan(keep), masks.bits, log_probs, done.block, done.live)
            return done
        rows = self.root(queries)
        log_probs = log_probs - np.maximum(log_probs.max(1, keepdims=True), 0)
        for level, width in enumerate(draft_widths(keep, self.levels, self.depth)[: self.depth]):
            own = log_probs[:, None, self._offsets[level] : self._offsets[level + 1]]
            rows = self.expand(rows, np.ascontiguousarray(own), width, masks)
        kernels.complete(
            self._layout, self.depth, masks.bits, log_probs, self._offsets, rows.block, rows.live, done.block, done.live
        )
        return done

    def _check_width(self, log_probs: np.ndarray) -> None:
        if log_probs.shape[1] != self._offsets[-1]:
            raise _foreign_model(log_probs.shape, self.vocab_sizes)

    def _plan(self, keep: int) -> np.ndarray:
        """What :func:`ace_core.kernels.draft` is to do, for one segment."""
        plan = self._plans.get(keep)
        if plan is None:
            widths = draft_widths(keep, self.levels, self.depth)
            plan = self._plans[keep] = np.array([self.depth, self._roots[0], *widths, *self._offsets], np.int64)
        return plan

    def collect(self, rows: Rows, masks: MaskAddresses, limit: int) -> Candidates:
        """The allowed items of complete rows: best row first, inside a row by segment and item; at most ``limit``."""
        outputs = self._candidates(len(rows.live), limit)
        return _trimmed(outputs, kernels.collect(masks.bits, rows.block, rows.live, *outputs))

    def draft_items(self, log_probs: np.ndarray, keep: int, masks: MaskAddresses, limit: int) -> Candidates:
        """:meth:`collect` of a :meth:`draft`, in one go."""
        if len(self.segments) > 1:
            return self.collect(self.draft(log_probs, keep, masks), masks, limit)
        self._check_width(log_probs)
        outputs = self._candidates(len(log_probs), limit)
        width = kernels.draft_items(self._layout, self._plan(keep), keep, masks.bits, log_probs, *outputs)
        return _trimmed(outputs, width)

    def _candidates(self, queries: int, limit: int) -> tuple[np.ndarray, ...]:
        """Room for what a search finds, in the order of :class:`~ace_core.candidates.Candidates`."""
        shape = queries, min(limit, self.items)
        tokens = *shape, self.levels
        return (
            np.empty(shape, bool), np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.float32),
            np.empty(tokens, np.float32), np.empty(tokens, np.uint16),
        )  # fmt: skip

    def masks(self, masks: Masks | Sequence[Masks] | None, queries: int) -> MaskAddresses:
        """Masks as the kernels read them: for all queries one mask a segment, or for every query its own.

        Raises:
            QueryError: their number or lengths do not fit the segments.
        """
        per_query = self.checked_masks(masks, queries)
        held = tuple(tuple(self._node_bits(s, m) for s, m in enumerate(row)) for row in per_query)
        addresses = [[[_address(a) for a in level] for level in zip(*row)] for row in held]
        return MaskAddresses(np.array(addresses, np.uint64), held)

    def checked_masks(self, masks: Masks | Sequence[Masks] | None, queries: int) -> list[Masks]:
        """Masks by query: a list of one, for all queries, or of one for each.

        Raises:
            QueryError: their number or lengths do not fit the segments.
        """
        if masks is None:
            masks = [None] * len(self.segments)
        shared = all(m is None or isinstance(m, ItemMask) for m in masks)
        per_query: list[Masks] = [masks] if shared else list(masks)  # type: ignore[list-item, arg-type]
        if len(per_query) not in (1, queries) or any(len(m) != len(self.segments) for m in per_query):
            raise QueryError(
                f"masks for {len(per_query)} queries x {[len(m) for m in per_query]} segments",
                remedy=f"Give one for each of {len(self.segments)} segments, once or for each of {queries} queries.",
            )
        for row in per_query:
            for mask, segment in zip(row, self.segments):
                if mask is not None and mask.items != segment.items:
                    raise QueryError(
                        f"a mask of {mask.items} items for a segment of {segment.items}",
                        remedy="Build the mask over the segment's sorted items.",
                    )
        return per_query

    def _node_bits(self, segment: int, mask: ItemMask | None) -> tuple[np.ndarray | None, ...]:
        """Per level the bitmap of nodes that have an allowed item below them: made once for a mask, then one look-up
        a child instead of a walk down to its items."""
        if mask is None:
            return (None,) * self.levels
        known = self._masks[segment].get(mask)
        if known is None:
            below = mask.words
            index = self.segments[segment]
            bits = [below] * (self.levels - index.depth)
            for pointers in reversed(index.first_child):
                nodes = np.zeros((len(pointers) - 1) // 64 + 1, np.uint64)
                kernels.mark_parents(below, pointers, nodes)
                below = nodes
                bits.append(below)
            known = tuple(reversed(bits))
            self._masks[segment][mask] = known
        return known


@dataclass(frozen=True, eq=False)
class MaskAddresses:
    """Addresses of node bitmaps, (n or 1, levels, S) uint64, 0 for no mask; ``held`` keeps the bitmaps alive."""

    bits: np.ndarray
    held: tuple[tuple[tuple[np.ndarray | None, ...], ...], ...]


def draft_widths(keep: int, levels: int, depth: int) -> list[int]:
    """Rows kept at each level of a draft whose first ``depth`` levels are prefixes, below which all items are looked at
    (on a CPU; on an accelerator these widths go on).

    More in the middle than at the end, because what a coarse prefix promises is a poor guide to its best item, and
    looking at more prefixes costs less than re-ranking more items. Fewer at the beginning, where what is below half as
    many prefixes fills the middle as well.
    """
    narrow, wide = min(2, depth - 1), min(_SPREAD * keep, keep + _MORE)
    widths = [(keep + 1) // 2 if level < narrow else wide for level in range(levels - 1)]
    return [*widths, keep]


def _trimmed(outputs: tuple[np.ndarray, ...], width: int) -> Candidates:
    """Candidates of as many columns as the fullest query has."""
    if width < outputs[0].shape[1]:
        outputs = tuple(array[:, :width] for array in outputs)
    return Candidates(*outputs)


def _foreign_model(found: Sequence[int], vocab_sizes: tuple[int, ...]) -> StoreError:
    return StoreError(
        f"the model gives log-probabilities {tuple(found)}, the index has the vocabularies {vocab_sizes}",
        remedy="Snapshot and generator must belong together: publish again.",
    )


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]


def _layout(segments: Sequence[ConstraintIndex], present: Sequence[Sequence[np.ndarray | None]]) -> np.ndarray:
    """(L, S, 6) int64 as the kernels read it: :mod:`ace_core.kernels.compiled`."""
    return np.array(
        [[_entry(segment, level, known) for segment, known in zip(segments, row)] for level, row in enumerate(present)],
        np.int64,
    )


def _present(segment: ConstraintIndex, level: int) -> np.ndarray | None:
    """(parents, V / 64) uint64: which tokens of a level follow each node above it. None where too few do for looking at
    all of them to be worth it, or where children are items."""
    size = segment.vocab_sizes[level]
    if not 0 < level < segment.depth or size % 64:
        return None
    tokens, begins = segment.tokens[level], segment.first_child[level - 1]
    parents = len(begins) - 1
    if len(tokens) * _DENSE < parents * size:
        return None
    there = np.zeros((parents, size), bool)
    there[np.repeat(np.arange(parents), np.diff(begins)), tokens] = True
    return np.packbits(there, axis=1, bitorder="little").view("<u8")


def _entry(segment: ConstraintIndex, level: int, present: np.ndarray | None) -> list[int]:
    tokens = segment.level_tokens(level)
    pointers = segment.first_child[level] if level < segment.depth else None
    wide = pointers is not None and pointers.dtype == np.int64
    stride = tokens.strides[0] // tokens.itemsize
    return [_address(tokens), tokens.itemsize == 2, stride, _address(pointers), wide, _address(present)]
