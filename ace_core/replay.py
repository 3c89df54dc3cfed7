"""Searches on an accelerator captured once and replayed: the device is told once what to do, not a thousand times.

A search is a few hundred small operations, which take longer to queue than to run. Their shapes depend on the number of
queries, the length of the texts and the plan of the search only (:mod:`ace_core.tensor_search`), so that queries are
padded to one of a few sizes, copied to where a captured search of that size reads, and it is replayed (CUDA graphs;
elsewhere it is simply run there). Rows of a batch do not see each other, and positions of a text that are not there are
not looked at: what is cut off afterwards changes nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from ace_core.candidates import Candidates
from ace_core.decoding import SpellingModel, candidates
from ace_core.plan import Plan
from ace_core.pool import pooled
from ace_core.query import QueryBatch
from ace_core.tensor_search import spelled
from ace_core.tensor_walk import TensorMasks, TensorWalk
from ace_core.walk import Masks

BATCHES = (1, 2, 4, 8, 16, 32)
"""Sizes that batches are padded to; larger ones are searched in parts."""

_SHORTEST = 16  # positions of a text; longer ones are padded to the next power of two
_LIMIT = 64  # captures that are kept
_TOLERANCE = 1e-3  # of log-probabilities: another batch may get other kernels
T = TypeVar("T")
_log = logging.getLogger("ace.replay")


class ReadQueries(SpellingModel, Protocol):
    """A model that has read a batch; ``vector`` (n, D) float32 are the queries as it refined them."""

    vector: torch.Tensor


@dataclass(frozen=True)
class Found:
    """A search's results on the device: refined queries (n, D), and packed rows of every spelling of its plan."""

    vector: torch.Tensor
    rows: tuple[torch.Tensor, ...]


Run = Callable[[], Found]
Capture = Callable[[Run], Run]
"""From a search that reads and writes the same memory whenever it is run, one that is cheaper to run."""


@dataclass(frozen=True)
class _Key:
    batch: int
    positions: int  # 0: the queries have no texts
    dtype: torch.dtype | None  # of the texts' features
    bitmaps: int  # address of the masks' table, 0 without masks
    plan: Plan


class Replay:
    """Searches of one model over one walk. For one caller at a time.

    The first search of its kind runs as it comes, the second is captured. Where capturing fails, or a replay does not
    find what the search itself finds, that is said once and all searches run as they come from then on.

    Args:
        read: gives a model that has read its argument.
        walk: on the device of the model and the queries.
        capture: by default CUDA graphs on a CUDA device, and elsewhere nothing.
        limit: captures kept, those not used for the longest time go.
    """

    def __init__(
        self, read: Callable[[QueryBatch], ReadQueries], walk: TensorWalk, *, capture: Capture | None = None,
        limit: int = _LIMIT,
    ) -> None:  # fmt: skip
        self._read, self.walk, self._limit = read, walk, limit
        on_cuda = walk.device.type == "cuda"
        self._capture: Capture | None = capture or (CudaGraphs(walk.device) if on_cuda else _as_it_comes)
        self._captured: OrderedDict[_Key, _Captured | None] = OrderedDict()  # None: seen once

    @property
    def captures(self) -> int:
        """Captured searches that are kept."""
        return sum(captured is not None for captured in self._captured.values())

    def search(
        self, query: QueryBatch, masks: Masks | Sequence[Masks] | None, plan: Plan
    ) -> tuple[torch.Tensor, Candidates]:
        """Refined queries (n, D) and candidates, as :func:`~ace_core.decoding.search_candidates` finds them.

        Args:
            query: n queries, on the device.
            masks: as in :func:`~ace_core.decoding.beam_search`.
            plan: see :func:`~ace_core.plan.spellings`.
        """
        rows = self.walk.host.checked_masks(masks, len(query))
        vectors, packed = [], []
        with torch.inference_mode():
            for begin in range(0, len(query), BATCHES[-1]):
                part = slice(begin, begin + BATCHES[-1])
                found = self._found(query[part], rows if len(rows) == 1 else rows[part], plan)
                vectors.append(found.vector.clone())  # the next replay writes there again
                packed.append([rows.cpu() for rows in found.rows])
        each = [
            candidates(self.walk.host, self.walk.to_host(torch.cat(parts)), masks, how.limit)
            for how, parts in zip(plan, zip(*packed))
        ]
        return torch.cat(vectors), each[0] if len(each) == 1 else pooled(*each)

    def warm(self, query: QueryBatch, masks: Masks | None, plan: Plan, size: int) -> None:
        """Capture searches for batches of ``size`` such queries; the largest first, whose memory serves the others.

        Args:
            query: one query.
            masks: one for each segment.
            size: of :data:`BATCHES`.
        """
        with torch.inference_mode():
            batch = query[torch.zeros(size, dtype=torch.int64, device=query.vector.device)]
            self._captured.setdefault(self._key(batch, self.walk.masks(masks, size), plan), None)
            self._found(batch, masks, plan)

    def _found(self, query: QueryBatch, masks: Masks | Sequence[Masks] | None, plan: Plan) -> Found:
        on_device = self.walk.masks(masks, len(query))
        key = self._key(query, on_device, plan)
        seen, captured = key in self._captured, self._captured.get(key)
        if self._capture and seen and captured is None:
            captured = self._try_to_capture(key, query, on_device)
        self._captured[key] = captured
        self._captured.move_to_end(key)
        if len(self._captured) > self._limit:
            self._captured.popitem(last=False)
        return captured(query, on_device) if captured else self._run(query, on_device, plan)

    def _try_to_capture(self, key: _Key, query: QueryBatch, masks: TensorMasks | None) -> _Captured | None:
        """A capture that finds what the search itself finds, or None."""
        assert self._capture is not None
        try:
            reads = _room(key, query), None if masks is None else _room_of_masks(key.batch, masks)
            own = _Captured(*reads, lambda: self._run(*reads, key.plan))
            expected = own(query, masks)
            captured = _Captured(*reads, self._capture(own.run))
            if _same(captured(query, masks), expected):
                return captured
            reason = "a replay found something else"
        except RuntimeError as e:  # as torch reports all that CUDA refuses, and too little memory
            reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"  # CUDA adds advice to debug kernels
        self._capture = None
        self._captured.clear()
        _log.warning("searches cannot be captured on %s and run slower, one by one (%s)", self.walk.device, reason)
        return None

    def _run(self, query: QueryBatch, masks: TensorMasks | None, plan: Plan) -> Found:
        model = self._read(query)
        rows = tuple(spelled(model, query, self.walk, masks, how).packed() for how in plan)
        return Found(model.vector, rows)

    @staticmethod
    def _key(query: QueryBatch, masks: TensorMasks | None, plan: Plan) -> _Key:
        positions = 0 if query.hidden is None else max(_SHORTEST, _power_of_two(query.hidden.shape[2]))
        return _Key(
            _power_of_two(len(query)),
            positions,
            None if query.hidden is None else query.hidden.dtype,
            0 if masks is None else masks.bitmaps.data_ptr(),
            plan,
        )


@dataclass(frozen=True, eq=False)
class _Captured:
    """A search that reads its queries and masks where these attributes lie."""

    query: QueryBatch
    masks: TensorMasks | None
    run: Run

    def __call__(self, query: QueryBatch, masks: TensorMasks | None) -> Found:
        _fill(self.query.vector, query.vector)
        if self.query.hidden is not None and self.query.mask is not None:
            assert query.hidden is not None and query.mask is not None
            _fill(self.query.hidden, query.hidden)
            _fill(self.query.mask, query.mask)
        if self.masks is not None and masks is not None:
            _fill(self.masks.of_query, masks.of_query)
        found = self.run()
        return Found(found.vector[: len(query)], tuple(rows[: len(query)] for rows in found.rows))


class CudaGraphs:
    """Captures as CUDA graphs. They share their memory: one runs at a time, and none reads what another left."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], T]) -> Callable[[], T]:
        before = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                run()  # libraries choose kernels and take their workspaces, which a capture may not
            before.wait_stream(self._stream)
            # other threads may use the device meanwhile: to encode a file, to load a snapshot
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                found = run()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own

        def replay() -> T:
            graph.replay()
            return found

        return replay


def _as_it_comes(run: Run) -> Run:
    return run


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _room(key: _Key, query: QueryBatch) -> QueryBatch:
    vector = query.vector.new_zeros(key.batch, query.vector.shape[1])
    if query.hidden is None:
        return QueryBatch(vector)
    _, layers, _, width = query.hidden.shape
    mask = torch.zeros(key.batch, key.positions, dtype=torch.bool, device=vector.device)
    return QueryBatch(vector, query.hidden.new_zeros(key.batch, layers, key.positions, width), mask)


def _room_of_masks(batch: int, masks: TensorMasks) -> TensorMasks:
    return TensorMasks(masks.bitmaps, masks.of_query.new_zeros(batch))


def _fill(room: torch.Tensor, with_: torch.Tensor) -> None:
    """Copy to the beginning of every dimension; zeros elsewhere."""
    room.zero_()
    room[tuple(slice(0, size) for size in with_.shape)] = with_


def _same(found: Found, expected: Found) -> bool:
    pairs = [(found.vector, expected.vector), *((a[..., 0], b[..., 0]) for a, b in zip(found.rows, expected.rows))]
    return all(torch.allclose(a, b, atol=_TOLERANCE, equal_nan=True) for a, b in pairs)
