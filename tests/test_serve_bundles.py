"""Searches that wait together travel together: what leaves when, what is taken back, and who hears of a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from serve.bundles import PER_REPLICA, Bundles
from serve.calls import Options, Overloaded, Refusal, ReplicaState, Reply, TextCall, Unavailable


class Replicas:
    """Answers when it is told to, on a clock that moves when it is told to."""

    def __init__(self) -> None:
        self._now = 0.0
        asyncio.get_running_loop().time = lambda: self._now  # type: ignore[method-assign]
        self.sent: list[tuple[TextCall, ...]] = []
        self.cancelled: list[tuple[TextCall, ...]] = []
        self._answers: list[asyncio.Future[Sequence[Reply | Refusal]]] = []

    async def send(self, calls: tuple[TextCall, ...]) -> Sequence[Reply | Refusal]:
        self.sent.append(calls)
        self._answers.append(asyncio.get_running_loop().create_future())
        try:
            return await self._answers[-1]
        except asyncio.CancelledError:
            self.cancelled.append(calls)
            raise

    def later(self, seconds: float) -> None:
        self._now += seconds

    def answer(self, number: int, replica: str = "r1", but: int = 0) -> None:
        """Answer what was sent as the ``number``-th, but so many of it."""
        state = ReplicaState(replica, "first", 0.0)
        replies = [Reply(state, ((),) * len(c.texts), 0.5, {"queue": 1.0}, 1, 1) for c in self.sent[number]]
        self._answers[number].set_result(replies[but:])

    def fail(self, number: int, error: BaseException) -> None:
        self._answers[number].set_exception(error)


def _call(*texts: str) -> TextCall:
    return TextCall(texts, Options(k=1), 0.0)


def _run(test: Callable[[Replicas, Callable[[], Coroutine[Any, Any, None]]], Coroutine[Any, Any, None]]) -> None:
    async def settle() -> None:
        for _ in range(10):  # rounds of the event loop: nothing here waits for time
            await asyncio.sleep(0)

    async def run() -> None:
        await test(Replicas(), settle)

    asyncio.run(run())


def _texts(sent: Sequence[TextCall]) -> list[str]:
    return [text for call in sent for text in call.texts]


def test_what_comes_while_the_replica_is_busy_leaves_together() -> None:
    async def test(replicas: Replicas, settle: Any) -> None:
        bundles = Bundles(replicas.send, most=4)
        first = asyncio.create_task(bundles.ask(_call("a")))
        await settle()
        assert [_texts(s) for s in replicas.sent] == [["a"]]  # nothing waits: at once, alone
        rest = [asyncio.create_task(bundles.ask(_call(t))) for t in "bcdefghij"]
        await settle()
        # Ten searches, two ways to the one replica: five each, of which a bundle has room for four.
        assert [_texts(s) for s in replicas.sent] == [["a"], list("bcde")]
        assert PER_REPLICA == 2 and not first.done()
        replicas.later(5.0)  # for those that still wait here
        replicas.answer(0)
        await settle()
        assert first.done() and _texts(replicas.sent[2]) == list("fghi")
        replicas.answer(1)
        replicas.answer(2)
        await settle()
        replicas.answer(3)
        assert [_texts(s) for s in replicas.sent[3:]] == [["j"]]
        for reply in await asyncio.gather(first, *rest):
            assert isinstance(reply, Reply) and reply.stages["queue"] >= 1.0
        waited = [task.result().stages["queue"] for task in rest]  # type: ignore[union-attr]
        assert waited == [1.0] * 4 + [6.0] * 5  # the wait here counts, too

    _run(test)


def test_what_waits_is_shared_between_the_ways() -> None:
    async def test(replicas: Replicas, settle: Any) -> None:
        bundles = Bundles(replicas.send, most=16)
        asked = [asyncio.create_task(bundles.ask(_call(str(n)))) for n in range(8)]
        await settle()
        assert [len(s) for s in replicas.sent] == [4, 4]
        replicas.answer(0, "r1")
        replicas.answer(1, "r2")
        await settle()
        assert bundles.replicas == 2
        asked += [asyncio.create_task(bundles.ask(_call(str(n)))) for n in range(8)]
        await settle()
        assert [len(s) for s in replicas.sent[2:]] == [2, 2, 2, 2]  # both replicas work on it
        for number in range(2, 6):
            replicas.answer(number)
        assert len(await asyncio.gather(*asked)) == 16

    _run(test)


def test_a_call_of_many_texts_goes_by_itself() -> None:
    async def test(replicas: Replicas, settle: Any) -> None:
        bundles = Bundles(replicas.send, most=4)
        calls = [_call(*"abcdef"), _call("g", "h", "i"), _call("j", "k")]
        asked = [asyncio.create_task(bundles.ask(call)) for call in calls]
        await settle()
        assert replicas.sent == [(calls[0],), (calls[1],)]
        replicas.answer(0)
        replicas.answer(1)
        await settle()
        replicas.answer(2)
        replies = await asyncio.gather(*asked)
        assert [len(r.results) for r in replies if isinstance(r, Reply)] == [6, 3, 2]

    _run(test)


def test_nobody_decodes_for_those_who_left() -> None:
    async def test(replicas: Replicas, settle: Any) -> None:
        bundles = Bundles(replicas.send, most=2)
        a, b, c, d, e, f = (asyncio.create_task(bundles.ask(_call(t))) for t in "abcdef")
        await settle()
        assert [_texts(s) for s in replicas.sent] == [["a", "b"], ["c", "d"]]
        a.cancel()  # b still waits for the same bundle
        e.cancel()  # not sent yet
        await settle()
        assert not replicas.cancelled and a.cancelled()
        c.cancel()
        d.cancel()
        await settle()
        assert [_texts(s) for s in replicas.cancelled] == [["c", "d"]]
        assert _texts(replicas.sent[2]) == ["f"]
        replicas.answer(0)
        replicas.answer(2)
        assert isinstance(await b, Reply) and isinstance(await f, Reply)
        assert len(replicas.sent) == 3

    _run(test)


def test_a_failure_is_everybodys_in_its_bundle_and_nobody_elses() -> None:
    async def test(replicas: Replicas, settle: Any) -> None:
        bundles = Bundles(replicas.send, most=2)
        asked = [asyncio.create_task(bundles.ask(_call(t))) for t in "abcde"]
        await settle()
        replicas.fail(0, Overloaded())
        replicas.answer(1)
        await settle()
        replicas.answer(2)
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(r) for r in results] == [Overloaded, Overloaded, Reply, Reply, Reply]
        with pytest.raises(asyncio.CancelledError):
            late = asyncio.create_task(bundles.ask(_call("f")))
            late.cancel()  # before it could leave
            await late
        assert len(replicas.sent) == 3

    _run(test)


def test_a_replica_that_stops_or_miscounts_leaves_nobody_waiting() -> None:
    async def test(replicas: Replicas, settle: Any) -> None:
        bundles = Bundles(replicas.send, most=2)
        asked = [asyncio.create_task(bundles.ask(_call(t))) for t in "abcd"]
        await settle()
        replicas.fail(0, asyncio.CancelledError())  # as Ray says that an actor goes away
        replicas.answer(1, but=1)
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(r) for r in results] == [Unavailable] * 4
        last = asyncio.create_task(bundles.ask(_call("e")))
        await settle()
        replicas.answer(2)
        assert isinstance(await last, Reply)

    _run(test)
