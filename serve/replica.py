"""The decoding replica as a Ray Serve deployment: batches calls for the engine, and watches ``CURRENT``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from ace_core.config import Settings
from serve.calls import ExampleCall, Options, Refusal, ReplicaState, Reply, TextCall

if TYPE_CHECKING:
    from serve.engine import Waiting

_MAX_BATCH = 16
BATCHES = 32  # so many batches of searches may be with a replica: decoded, or waiting for the engine to join them
_PROBE_SECONDS = 5.0


class LightSettings(BaseModel):
    """What may change while replicas serve (Ray Serve's ``user_config``)."""

    model_config = ConfigDict(extra="forbid")
    max_batch: int = Field(_MAX_BATCH, ge=1)
    batch_wait_seconds: float = Field(0.0, ge=0)
    watch_seconds: float = Field(2.0, gt=0)


class Searcher:
    """Holds one snapshot and answers batches of calls from it."""

    def __init__(self, settings: Settings, device: str) -> None:
        # Here, because the ingress imports this module too, and needs neither models nor torch.
        from serve.engine import Engine

        self._engine = Engine(
            settings.store,
            replica=serve.get_replica_context().replica_id.unique_id,
            settings=settings.search,
            limits=settings.limits,
            device=device,
            threads=settings.serve.threads,
        )
        self._light = LightSettings()
        self._watching: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict) -> None:
        """Take changed light settings; called by Ray Serve at the start and on every change.

        Raises:
            pydantic.ValidationError: a setting is unknown or malformed; the deployment says so and keeps the old ones.
        """
        self._light = LightSettings.model_validate(user_config)
        self._engine.max_batch = self._light.max_batch
        self._batched.set_max_batch_size(self._light.max_batch)  # type: ignore[attr-defined]
        self._batched.set_batch_wait_timeout_s(self._light.batch_wait_seconds)  # type: ignore[attr-defined]
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def search(self, calls: Sequence[TextCall | ExampleCall]) -> list[Reply | Refusal]:
        """Answer calls (a bundle of the ingress), together with others that wait."""
        prepared = [await self._engine.prepare(call) for call in calls]
        waiting = [w for w in prepared if not isinstance(w, Refusal)]
        try:
            answers = iter(await (await self._batched(waiting)) if waiting else ())
        except asyncio.CancelledError:  # nobody listens any more: they need not be decoded
            for one in waiting:
                one.cancelled = True
            raise
        return [w if isinstance(w, Refusal) else next(answers) for w in prepared]

    async def probe(self) -> ReplicaState | Refusal:
        """Answer a small query through the same queue as every other, and say what is served."""
        call = TextCall(("a",), Options(k=1), time.time() + _PROBE_SECONDS)
        [answer] = await self.search([call])
        return answer if isinstance(answer, Refusal) else answer.state

    async def state(self) -> ReplicaState:
        """What is served."""
        return self._engine.state()

    @serve.batch(max_batch_size=_MAX_BATCH, batch_wait_timeout_s=0.0)
    async def _batched(self, bundles: Sequence[Sequence[Waiting]]) -> list[asyncio.Task[list[Reply | Refusal]]]:
        # Handed to the engine together, answered each by itself: those of another ingress may be decoded later.
        return [asyncio.create_task(self._engine.answer(bundle)) for bundle in bundles]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._light.watch_seconds)
            await self._engine.refresh()
