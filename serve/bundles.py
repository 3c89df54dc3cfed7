"""Searches that wait together travel together: one message to a replica and one back, for up to a batch of them.

A message between two processes costs more CPU than a search among sixteen does (docs/LOG.md), on the loops of ingress
and replica, which also answer everybody else. So a replica gets two bundles at a time: one that it decodes, and one
that is there when it has done so. What comes meanwhile waits here, where it can still be taken back, and leaves
together. Where little comes, every search leaves at once, and alone.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from serve.calls import Refusal, Reply, TextCall, Unavailable

PER_REPLICA = 2
_HEARD_SECONDS = 10.0


@dataclass(eq=False)
class _Waiting:
    call: TextCall
    since: float
    answer: asyncio.Future[Reply | Refusal]


class Bundles:
    """What is sent to the replicas, and what waits to be."""

    def __init__(
        self, send: Callable[[tuple[TextCall, ...]], Awaitable[Sequence[Reply | Refusal]]], *, most: int
    ) -> None:
        """Nothing runs before the first search.

        Args:
            send: asks a replica, and gives an answer to each call.
            most: queries of a bundle; a single call with more goes by itself.
        """
        self._send = send
        self._most = most
        self._queue: deque[_Waiting] = deque()
        self._on_the_way: dict[asyncio.Task[None], list[_Waiting]] = {}
        self._heard: dict[str, float] = {}
        self._leaving = False

    async def ask(self, call: TextCall) -> Reply | Refusal:
        """Answer a call; raises what ``send`` does."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(call, loop.time(), loop.create_future())
        self._queue.append(waiting)
        if not self._leaving:  # in the next round of the event loop: others arrive in this one
            self._leaving = True
            loop.call_soon(self._leave)
        try:
            return await waiting.answer
        except asyncio.CancelledError:  # nobody waits for it any more: one that is still here never leaves
            for task, bundle in self._on_the_way.items():
                if waiting in bundle and all(other.answer.cancelled() for other in bundle):
                    task.cancel()
            raise

    @property
    def replicas(self) -> int:
        """How many have answered lately, at least one."""
        now = asyncio.get_running_loop().time()
        self._heard = {name: at for name, at in self._heard.items() if now - at < _HEARD_SECONDS}
        return max(1, len(self._heard))

    def _leave(self) -> None:
        self._leaving = False
        while self._queue and len(self._on_the_way) < (ways := PER_REPLICA * self.replicas):
            # An even share: a large bundle behind a small one would leave ingress and replicas idle in turns.
            searches = len(self._queue) + sum(map(len, self._on_the_way.values()))
            share = math.ceil(searches / ways)
            bundle: list[_Waiting] = []
            room = self._most
            while self._queue and len(bundle) < share and (not bundle or len(self._queue[0].call.texts) <= room):
                waiting = self._queue.popleft()
                if not waiting.answer.done():
                    bundle.append(waiting)
                    room -= len(waiting.call.texts)
            if bundle:
                self._on_the_way[asyncio.create_task(self._travel(bundle))] = bundle

    async def _travel(self, bundle: list[_Waiting]) -> None:
        task = asyncio.current_task()
        assert task is not None
        left = asyncio.get_running_loop().time()
        open_ = [waiting.answer for waiting in bundle]
        try:
            answers = await self._send(tuple(waiting.call for waiting in bundle))
            if len(answers) != len(bundle):
                raise Unavailable(f"a replica gave {len(answers)} answers to {len(bundle)} searches")
        except asyncio.CancelledError:
            left_by_all = task.cancelling() > 0
            for answer in open_:
                if left_by_all:
                    answer.cancel()
                elif not answer.done():  # not by those who asked: the replica went away
                    answer.set_exception(Unavailable("the replicas stopped while they answered"))
            raise
        except Exception as e:
            for answer in open_:
                if not answer.done():
                    answer.set_exception(e)
        else:
            for waiting, found in zip(bundle, answers):
                if isinstance(found, Reply):
                    self._heard[found.state.replica] = left
                    here = left - waiting.since
                    found = replace(found, stages={**found.stages, "queue": found.stages.get("queue", 0.0) + here})
                if not waiting.answer.done():
                    waiting.answer.set_result(found)
        finally:
            del self._on_the_way[task]
            self._leave()
