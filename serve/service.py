"""What the routes work with: the replicas, the catalog of what they serve, keys, metrics and deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence

from ace_core.config import Settings
from ace_core.errors import AceError, MediaError, QueryError, StoreError
from ace_core.items import Modality
from ace_core.query import Hit
from ace_core.segment import StoredItem
from ace_store.store import Store
from serve.auth import KeyRing
from serve.calls import (
    Backend,
    ExampleCall,
    Options,
    Overloaded,
    Refusal,
    ReplicaState,
    Reply,
    TextCall,
    Unavailable,
)
from serve.catalog import Catalog, cluster_name
from serve.gate import Admission
from serve.metrics import Metrics
from serve.problems import ProblemError, overloaded, refused
from serve.schema import HitOut, ItemOut, PathStep, ReplicaOut, Result, SearchOptions, SearchResponse
from serve.thumbs import Thumbnail, Thumbnails, ThumbSize

_log = logging.getLogger("ace.serve")
_PROBE_SECONDS = 5.0
_PROBE_KEPT_SECONDS = 1.0
_FORGET_SECONDS = 120.0


class Service:
    """One ingress."""

    def __init__(self, settings: Settings, backend: Backend, keys: KeyRing, ingress: str) -> None:
        self.settings = settings
        self.backend = backend
        self.keys = keys
        self.metrics = Metrics(ingress)
        self.admission = Admission(
            settings.serve.max_queued,
            always=2 * settings.serve.max_batch,  # one batch is decoded while the next one fills
            max_wait_seconds=settings.serve.max_wait_seconds,
        )
        self.catalog = Catalog(settings.store)
        self._thumbnails = Thumbnails(settings.limits)
        self._states: dict[str, tuple[ReplicaState, float]] = {}
        self._ready_until = 0.0
        self._following: set[asyncio.Task[None]] = set()

    # -- searching -------------------------------------------------------------------------------------------

    def options(self, wanted: SearchOptions) -> Options:
        """A request's options within the server's limits.

        Raises:
            ProblemError: k is above the limit.
        """
        k = wanted.k or min(self.settings.search.k, self.settings.serve.max_k)
        if k > self.settings.serve.max_k:
            most = self.settings.serve.max_k
            remedy = f"Ask for {most} or fewer, or raise serve.max_k."
            raise ProblemError(422, "bad query", f"k is {k}, this server gives up to {most}", where="k", remedy=remedy)
        return Options(
            k=k,
            modalities=tuple(dict.fromkeys(m.value for m in wanted.modality)),
            filters=wanted.filter_values(),
            mode=wanted.mode,
        )

    def deadline(self) -> float:
        return time.time() + self.settings.serve.request_seconds

    async def search(
        self, call: TextCall | ExampleCall, wanted: SearchOptions, queries: Sequence[str]
    ) -> SearchResponse:
        """Ask the replicas, and put their answer in the shape of the API.

        Raises:
            ProblemError: refused, overloaded, unavailable or too late.
        """
        started = time.perf_counter()
        reply = await self._ask(call)
        seconds = time.perf_counter() - started
        self._note(reply.state)
        self.metrics.answered(reply, seconds)
        threshold = reply.threshold if wanted.threshold is None else wanted.threshold
        results = []
        for query, hits in zip(queries, reply.results):
            confident = bool(hits) and hits[0].score >= threshold
            kept = [h for h in hits if wanted.threshold is None or h.score >= wanted.threshold]
            results.append(Result(query=query, confident=confident, hits=[self._hit(h, wanted.explain) for h in kept]))
        return SearchResponse(
            snapshot=reply.state.snapshot,
            threshold=threshold,
            took_ms=round(seconds * 1000, 2),
            note=reply.note or None,
            results=results,
        )

    async def _ask(self, call: TextCall | ExampleCall) -> Reply:
        try:
            async with asyncio.timeout(max(0.0, call.deadline - time.time())):
                answer = await self.backend.search(call)
        except Overloaded:
            self.metrics.rejected("replicas")
            raise overloaded(self.admission.retry_after()) from None
        except Unavailable as e:
            raise _unavailable(str(e)) from None
        except TimeoutError:
            answer = Refusal(
                "deadline",
                f"the search took more than {self.settings.serve.request_seconds:g} s",
                remedy="Ask for fewer results or texts, or try again when the server is less busy.",
            )
        if isinstance(answer, Refusal):
            if answer.kind == "deadline":
                self.metrics.rejected("deadline")
            raise refused(answer)
        return answer

    async def thumbnail(self, item: StoredItem, size: ThumbSize, unless: str | None) -> Thumbnail:
        """See :meth:`serve.thumbs.Thumbnails.of`.

        Raises:
            ProblemError: too many thumbnails are being made.
            MediaError, StoreError: it has none, or its original cannot be read.
        """
        try:
            return await self._thumbnails.of(item, size, unless)
        except Overloaded:
            self.metrics.rejected("thumbnails")
            raise overloaded(1) from None

    # -- what is served --------------------------------------------------------------------------------------

    async def ready(self) -> ReplicaState:
        """The state of a replica that answered a probe query within the last second.

        Raises:
            ProblemError: none did.
        """
        now = time.monotonic()
        newest = max(self._states.values(), key=lambda pair: pair[1], default=None)
        if newest is not None and now < self._ready_until:
            return newest[0]
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                if newest is None:
                    await self.backend.probe()  # finds the replicas first: what that takes says nothing of a search
                state = await self._probe()
                self._note(state)
                await self.catalog.follow(state.snapshot)
        except Overloaded:
            # A full queue is not a fault: the replicas are up, and a load balancer must not take them out.
            if newest is not None:
                return newest[0]
            raise _unavailable("the replicas' queues are full") from None
        except (Unavailable, TimeoutError, AceError) as e:
            raise _unavailable(str(e) or "no replica answered in time") from None
        self._ready_until = now + _PROBE_KEPT_SECONDS
        return state

    async def _probe(self) -> ReplicaState:
        started, idle = time.perf_counter(), not self.admission.in_flight
        state = await self.backend.probe()
        if idle and not self.admission.in_flight:
            self.admission.took_alone(time.perf_counter() - started)
        return state

    def replicas(self) -> list[ReplicaOut]:
        """What each replica was last heard to serve."""
        now = time.monotonic()
        return [
            ReplicaOut(
                replica=s.replica,
                snapshot=s.snapshot,
                loaded_at=s.loaded_at,
                refused=s.refused,
                reason=s.reason,
                seen_seconds_ago=round(now - seen, 1),
            )
            for s, seen in self._states.values()
        ]

    def _note(self, state: ReplicaState) -> None:
        now = time.monotonic()
        self._states[state.replica] = (state, now)
        for name in [n for n, (_, seen) in self._states.items() if now - seen > _FORGET_SECONDS]:
            del self._states[name]
        if state.snapshot != self.catalog.newest_id:
            task = asyncio.ensure_future(self._follow(state.snapshot))
            self._following.add(task)
            task.add_done_callback(self._following.discard)

    async def _follow(self, snapshot_id: str) -> None:
        try:
            await self.catalog.follow(snapshot_id)
        except AceError as e:
            _log.error("the ingress cannot open snapshot %s: %s", snapshot_id, e)

    def exposition(self) -> bytes:
        """Metrics, with what is served now."""
        items = self.catalog.newest.snapshot.manifest.items if self.catalog.newest_id else {}
        self.metrics.replicas([state for state, _ in self._states.values()], items)
        return self.metrics.exposition()

    async def move_current(self, snapshot_id: str) -> str | None:
        """Publish another snapshot of the store (a rollback, for one); returns the one before.

        Raises:
            ProblemError: the store has no such snapshot.
            StoreError: the store cannot be written.
        """

        def move() -> str | None:
            store = Store.open(self.settings.store)
            seen = store.current()
            if store.find("snapshot", snapshot_id) is None:
                raise ProblemError(
                    404,
                    "not found",
                    f"the store has no snapshot {snapshot_id}",
                    where="snapshot",
                    remedy="`ace status` lists those it has.",
                )
            store.move_current(snapshot_id, seen)
            return seen.snapshot

        return await asyncio.to_thread(move)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep in touch with the replicas, so that an idle server too shows a changed snapshot."""

        async def watch() -> None:
            while True:
                try:
                    async with asyncio.timeout(_PROBE_SECONDS):
                        self._note(await self.backend.state())
                except (Overloaded, Unavailable, TimeoutError):
                    pass  # searches and /readyz say so
                except Exception:  # whatever it is, the next look may find it gone
                    _log.exception("the replicas could not be asked what they serve")
                await asyncio.sleep(self.settings.serve.watch_seconds)

        watching = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            watching.cancel()
            self._thumbnails.close()

    # -- shapes ----------------------------------------------------------------------------------------------

    def item(self, item: StoredItem) -> ItemOut:
        """An item as the API shows it."""
        return ItemOut(
            item_id=item.item_id,
            modality=item.modality,
            media_url=self.keys.sign(f"/media/{item.item_id}"),
            thumb_url=self._thumb_url(item.item_id, item.modality),
            mime=item.mime,
            captions=list(item.captions),
            attributes=item.attributes,
            identifier=cluster_name(item.identifier),
            tokens=list(item.identifier),
            start_seconds=item.start_seconds,
            end_seconds=item.end_seconds,
        )

    def _thumb_url(self, item_id: str, modality: Modality) -> str | None:
        return None if modality is Modality.AUDIO else self.keys.sign(f"/thumb/{item_id}")

    def _hit(self, found: Hit, explain: bool) -> HitOut:
        path = None
        if explain:
            path = [
                PathStep(name=cluster_name(found.identifier[: level + 1]), token=token, probability=probability)
                for level, (token, probability) in enumerate(zip(found.identifier, found.level_probs))
            ]
        return HitOut(
            item_id=found.item_id,
            modality=found.modality,
            media_url=self.keys.sign(f"/media/{found.item_id}"),
            thumb_url=self._thumb_url(found.item_id, found.modality),
            mime=found.mime,
            captions=list(found.captions),
            attributes=found.attributes,
            identifier=cluster_name(found.identifier),
            tokens=list(found.identifier),
            start_seconds=found.start_seconds,
            end_seconds=found.end_seconds,
            score=found.score,
            similarity=found.similarity,
            log_prob=found.log_prob,
            path=path,
        )


def _unavailable(detail: str) -> ProblemError:
    return ProblemError(503, "unavailable", detail, remedy="Try again in 2 s.", headers={"Retry-After": "2"})


def problem_of(error: AceError) -> ProblemError:
    """The problem document of an error that the ingress itself met."""
    status = 422 if isinstance(error, QueryError | MediaError) else 503 if isinstance(error, StoreError) else 500
    return ProblemError(status, error.title, error.found, where=error.where, remedy=error.remedy)
