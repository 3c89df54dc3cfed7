"""What a replica does, without Ray: hold a snapshot, answer batches, change to another snapshot between two batches.

Three threads share the work. *Search* owns the retriever: every batch, and the warm-up of a new one, runs there, so a
snapshot can only change between two batches. *Media* decodes and encodes uploaded files. *Load* opens and verifies a
new snapshot beside the one that serves. A published snapshot that fails its checks is refused and said so; the one
before serves on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from ace_core.config import LimitSettings, SearchSettings
from ace_core.errors import AceError, MediaError, ModelError, QueryError, StoreError
from ace_core.items import Modality
from ace_core.query import Example, Hit, SearchRequest
from ace_core.retriever import Retriever
from ace_core.segment import finds_less, found_less
from ace_store.store import Store
from serve.calls import ExampleCall, Options, Refusal, ReplicaState, Reply, TextCall

_log = logging.getLogger("ace.serve")
_MAX_BATCH = 16
_RETRY_SECONDS = 30.0
_SEND = "Send a whole picture, sound or clip that a viewer or player opens."


@dataclass(frozen=True)
class _Prepared:
    """An example as a query, and the snapshot whose aligner made it: vectors of two aligners must not mix."""

    snapshot: str
    example: Example


@dataclass
class Waiting:
    """A call in the queue: when it came (monotonic seconds), its query if it is a search by example, what that cost,
    and whether the caller went away."""

    call: TextCall | ExampleCall
    since: float
    prepared: _Prepared | None = None
    example_seconds: float = 0.0
    cancelled: bool = False

    @property
    def queries(self) -> int:
        """How many queries it adds to a batch."""
        return len(self.call.texts) if isinstance(self.call, TextCall) else 1


class Engine:
    """One replica's snapshot and threads.

    Attributes:
        max_batch: queries that are decoded together; may be changed at any time.
    """

    def __init__(
        self,
        store: str,
        *,
        replica: str,
        settings: SearchSettings,
        device: str,
        threads: int,
        limits: LimitSettings | None = None,
    ) -> None:
        """Open the current snapshot.

        Raises:
            StoreError: nothing is published, or it fails its checks.
            ModelError: a model that it needs cannot be had here.
        """
        torch.set_num_threads(threads)
        self._store = Store.open(store)
        self._settings = settings
        self._limits = limits
        self._device = device
        self._replica = replica
        self._refused: str | None = None
        self._reason: str | None = None
        self._tried_at = 0.0
        self.max_batch = _MAX_BATCH
        self._waiting: deque[tuple[Sequence[Waiting], asyncio.Future[list[Reply | Refusal]]]] = deque()
        self._draining: asyncio.Task[None] | None = None
        self._search, self._media, self._load = (ThreadPoolExecutor(1, name) for name in ("search", "media", "load"))
        current = self._store.current().snapshot
        if current is None:
            raise StoreError("nothing has been published here", where=store, remedy="Run `ace publish` first.")
        self._live = self._open(current, None)
        self._live.warm()
        self._loaded_at = time.time()

    # -- answering -------------------------------------------------------------------------------------------

    async def prepare(self, call: TextCall | ExampleCall) -> Waiting | Refusal:
        """Make a call ready for a batch: an uploaded file becomes a vector, on the media thread."""
        since = time.monotonic()
        if isinstance(call, TextCall):
            return Waiting(call, since)
        if time.time() > call.deadline:
            return _late()
        try:
            prepared = await asyncio.get_running_loop().run_in_executor(self._media, self._prepare, self._live, call)
        except AceError as e:
            return refusal_of(e)
        if prepared is None:
            return _missing(call)
        spent = time.monotonic() - since
        return Waiting(call, time.monotonic(), prepared, spent)

    async def answer(self, batch: Sequence[Waiting]) -> list[Reply | Refusal]:
        """Answer a batch, every call from the same snapshot, together with the batches that wait with it.

        Ray Serve closes a batch as soon as its short wait is over, also while the one before is being decoded; under
        load that makes many small ones. What waits when the search thread becomes free is decoded as one.
        """
        done: asyncio.Future[list[Reply | Refusal]] = asyncio.get_running_loop().create_future()
        self._waiting.append((batch, done))
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
        return await done

    async def _drain(self) -> None:
        while self._waiting:
            together = [self._waiting.popleft()]
            queries = sum(w.queries for w in together[0][0])
            while self._waiting and queries + (more := sum(w.queries for w in self._waiting[0][0])) <= self.max_batch:
                together.append(self._waiting.popleft())
                queries += more
            batch = [waiting for part, _ in together for waiting in part]
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self._search, self._answer, batch)
            except Exception as e:
                for _, done in together:
                    if not done.done():
                        done.set_exception(e)
                continue
            for part, done in together:
                mine, answers = answers[: len(part)], answers[len(part) :]
                if not done.done():
                    done.set_result(mine)

    def _answer(self, batch: Sequence[Waiting]) -> list[Reply | Refusal]:
        live, started, now = self._live, time.monotonic(), time.time()
        answers: list[Reply | Refusal] = [_late()] * len(batch)
        timely = [n for n, waiting in enumerate(batch) if waiting.call.deadline >= now and not waiting.cancelled]
        try:
            found = self._find(live, [batch[n] for n in timely])
        except Exception:
            # One call cannot be answered as asked. Alone, each says so for itself.
            found = [self._find_alone(live, batch[n]) for n in timely]
        spent = time.monotonic() - started
        queries = sum(batch[n].queries for n in timely)
        for n, hits in zip(timely, found):
            waiting = batch[n]
            if isinstance(hits, Refusal):
                answers[n] = hits
                continue
            stages = {"queue": started - waiting.since, "search": spent}
            if waiting.prepared is not None:
                stages["example"] = waiting.example_seconds
            answers[n] = Reply(
                state=self.state(live),
                results=hits,
                threshold=live.threshold,
                stages=stages,
                batch=queries,
                beam=max(self._settings.beam, waiting.call.options.k),
                note="" if any(hits) else _why_nothing(live, waiting.call.options),
            )
        return answers

    def _find(self, live: Retriever, batch: Sequence[Waiting]) -> list[tuple[tuple[Hit, ...], ...] | Refusal]:
        requests: list[SearchRequest] = []
        spans: list[slice | Refusal] = []
        for waiting in batch:
            first = len(requests)
            if isinstance(waiting.call, TextCall):
                requests += [_request(waiting.call.options, text=text) for text in waiting.call.texts]
            else:
                prepared = waiting.prepared
                if prepared is None or prepared.snapshot != live.snapshot.id:
                    prepared = self._prepare(live, waiting.call)
                if prepared is None:  # the item went with the snapshot before
                    spans.append(_missing(waiting.call))
                    continue
                requests.append(_request(waiting.call.options, example=prepared.example))
            spans.append(slice(first, len(requests)))
        hits = live.search_batch(requests)
        return [s if isinstance(s, Refusal) else tuple(map(tuple, hits[s])) for s in spans]

    def _find_alone(self, live: Retriever, waiting: Waiting) -> tuple[tuple[Hit, ...], ...] | Refusal:
        try:
            return self._find(live, [waiting])[0]
        except AceError as e:
            return refusal_of(e)
        except Exception:  # whatever is wrong with one call must not fail those that travelled with it
            _log.exception("a search failed")
            return Refusal("failed", "the search failed in the server", remedy="The server's log says why.")

    @staticmethod
    def _prepare(live: Retriever, call: ExampleCall) -> _Prepared | None:
        """An example as a query; None when there is no such item."""
        if call.item_id is not None:
            example = live.queries.example_of_item(call.item_id)
        else:
            example = live.queries.example_of_file(Modality(call.modality or ""), call.media or b"")
        return None if example is None else _Prepared(live.snapshot.id, example)

    # -- snapshots -------------------------------------------------------------------------------------------

    def state(self, live: Retriever | None = None) -> ReplicaState:
        """What this replica serves."""
        snapshot = (live or self._live).snapshot.id
        return ReplicaState(self._replica, snapshot, self._loaded_at, self._refused, self._reason)

    async def refresh(self) -> None:
        """Look at ``CURRENT``; load, verify and warm another snapshot, and change to it. Never raises: a replica that
        cannot change serves on."""
        loop = asyncio.get_running_loop()
        wanted: str | None = None
        try:
            wanted = (await loop.run_in_executor(self._load, self._store.current)).snapshot
            if wanted is None or wanted == self._live.snapshot.id:
                self._refused = None
                self._reason = None if wanted else "the store names no snapshot any more"
                return
            if wanted == self._refused and time.monotonic() - self._tried_at < _RETRY_SECONDS:
                return
            self._tried_at = time.monotonic()
            fresh = await loop.run_in_executor(self._load, self._open, wanted, self._live)
            for piece in fresh.warming():  # between two batches each
                await loop.run_in_executor(self._search, piece)
            await loop.run_in_executor(self._search, self._change, fresh)
        except Exception as e:
            # Whatever is wrong with a snapshot must not stop the replica that serves another.
            self._refused, self._reason = wanted, e.found if isinstance(e, AceError) else type(e).__name__
            _log.error("snapshot %s is not served: %s", wanted, e)

    def _open(self, snapshot_id: str, before: Retriever | None) -> Retriever:
        opened = Retriever.open(
            self._store.mirror(snapshot_id),
            snapshot_id,
            settings=self._settings,
            limits=self._limits,
            device=self._device,
            text_encoder=before.queries.text_encoder if before else None,
        )
        if older := sum(finds_less(segment.manifest) for segment in opened.snapshot.segments):
            _log.warning("of snapshot %s, %s", snapshot_id, found_less(older))
        return opened

    def _change(self, fresh: Retriever) -> None:
        self._live, self._loaded_at = fresh, time.time()
        self._refused = self._reason = None


def _request(options: Options, *, text: str | None = None, example: Example | None = None) -> SearchRequest:
    return SearchRequest(
        text=text,
        vector=None if example is None else example.vector,
        examples=() if example is None else example.items,
        k=options.k,
        modalities=_modalities(options),
        filters=options.filters,
        mode=options.mode,
    )


def _modalities(options: Options) -> tuple[Modality, ...]:
    return tuple(Modality(m) for m in options.modalities)


def _why_nothing(live: Retriever, options: Options) -> str:
    try:
        return live.why_nothing(_modalities(options), options.filters)
    except Exception:  # an empty answer stands without a note, and the others of its batch do
        _log.exception("an empty answer cannot be explained")
        return ""


def _missing(call: ExampleCall) -> Refusal:
    return Refusal("missing", f"the snapshot has no item {call.item_id!r}", "item_id", "Take an id from a search.")


def _late() -> Refusal:
    return Refusal("deadline", "the search waited past its deadline", remedy="Try again when the server is less busy.")


def refusal_of(error: AceError) -> Refusal:
    """What a replica answers in place of an error."""
    if isinstance(error, MediaError):
        return Refusal("media", error.found, "file", _SEND)  # the error's own remedy speaks of a corpus
    if isinstance(error, QueryError):
        return Refusal("query", error.found, error.where, error.remedy)
    # Paths of the server stay in its log.
    _log.error("a search failed: %s", error)
    kind: Literal["model", "store"] = "model" if isinstance(error, ModelError) else "store"
    return Refusal(kind, error.found, remedy="The server's log says where.")
