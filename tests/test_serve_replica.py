"""A replica's way from calls to the engine: bundles come together, and are answered each by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from serve.calls import Options, Refusal, ReplicaState, Reply, TextCall
from serve.engine import Waiting
from serve.replica import LightSettings, Searcher


class Engine:
    """Answers a bundle when it is told to."""

    max_batch = 16

    def __init__(self) -> None:
        self.asked: dict[str, asyncio.Future[None]] = {}

    async def prepare(self, call: TextCall) -> Waiting:
        return Waiting(call, 0.0)

    async def answer(self, batch: Sequence[Waiting]) -> list[Reply | Refusal]:
        texts = [text for waiting in batch for text in waiting.call.texts]  # type: ignore[union-attr]
        self.asked[" ".join(texts)] = told = asyncio.get_running_loop().create_future()
        await told
        return [Reply(ReplicaState("r1", "first", 0.0), ((),), 0.5, {}, 1, 1)] * len(batch)

    async def refresh(self) -> None:
        pass


@pytest.fixture(autouse=True)
def context(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray Serve's batching asks of the replica that it runs in."""
    config = SimpleNamespace(max_ongoing_requests=1000)
    names = {"app_name": "ace", "deployment": "Searcher", "replica_tag": "r1", "replica_id": "r1"}
    known = SimpleNamespace(_deployment_config=config, **names)
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: known)


def _searcher(engine: Engine) -> Searcher:
    searcher = Searcher.__new__(Searcher)  # without a snapshot
    searcher.__dict__ |= {"_engine": engine, "_light": LightSettings(), "_watching": None}
    return searcher


def _call(text: str) -> TextCall:
    return TextCall((text,), Options(k=1), 0.0)


def test_a_bundle_does_not_wait_for_those_that_came_with_it_and_can_be_taken_back() -> None:
    async def test() -> None:  # in one event loop: Ray Serve's queue belongs to the first
        engine = Engine()
        searcher = _searcher(engine)
        await searcher.reconfigure({"batch_wait_seconds": 0.05})  # so that they come together
        calls = ([_call("a"), _call("b")], [_call("c")], [_call("d")])
        first, second, third = (asyncio.create_task(searcher.search(bundle)) for bundle in calls)
        while len(engine.asked) < 3:
            await asyncio.sleep(0.01)
        third.cancel()
        await asyncio.wait([third])
        assert third.cancelled() and engine.asked["d"].cancelled()
        engine.asked["a b"].set_result(None)
        assert len(await first) == 2 and not second.done()
        engine.asked["c"].set_result(None)
        assert len(await second) == 1

    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())
