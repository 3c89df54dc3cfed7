"""How many searches may wait: by how fast they are answered, longer for a burst than in an overload."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serve.auth import KeyRing
from serve.gate import Admission, Gate
from serve.metrics import Metrics


def _rush(admission: Admission, now: float, seconds: float, shared: float = 0.0) -> int:
    """How many are admitted at once, when each then takes ``seconds`` for everyone before it and itself, and ``shared``
    however many there are."""
    places = []
    while (place := admission.enter(now)) is not None:
        places.append(place)
    for place in places:
        admission.leave(place, shared + seconds * place)
    return len(places)


def test_admission_follows_how_fast_searches_are_answered() -> None:
    admission = Admission(100, always=4, max_wait_seconds=1.0)
    assert _rush(admission, 0, 0.1) == 4  # nothing is known yet
    assert 10 <= _rush(admission, 10, 0.1) <= 11  # a tenth of a second each: so many wait no longer than one second
    assert 10 <= _rush(admission, 20, 0.02) <= 11
    assert 15 < _rush(admission, 30, 0.02) < 35  # it became faster
    for _ in range(100):
        place = admission.enter(40)
        assert place == 1
        admission.leave(place, 0.4)  # alone it takes long, but that says nothing of a batch
    assert 20 < _rush(admission, 50, 30.0) < 60
    place = admission.enter(60)
    assert place == 1 and admission.retry_after() >= 10
    admission.leave(place, 30.0)
    assert _rush(admission, 70, 30.0) == 4  # and never fewer than one batch


def test_a_growing_queue_does_not_look_fast() -> None:
    admission = Admission(1000, always=4, max_wait_seconds=1.0)
    _rush(admission, 0, 0.1)
    first = [admission.enter(10) or 0 for _ in range(8)]
    for place in first:  # two come for each one that is answered
        admission.enter(10)
        admission.enter(10)
        admission.leave(place, 0.1 * place)
    assert admission.in_flight <= 11


def test_a_burst_may_wait_and_in_an_overload_nobody_waits_much_longer_than_a_search_takes_alone() -> None:
    admission = Admission(100, always=8, max_wait_seconds=2.0)
    for now in range(20):
        _rush(admission, 2 * now, 0.05, shared=0.2)  # a quarter of a second alone, of which a batch shares 0.2
    burst = _rush(admission, 100, 0.05, shared=0.2)
    assert 28 <= burst <= 38
    for now in (100.5, 101.4, 102.3):  # more came than could be answered, less than a second ago
        overloaded = _rush(admission, now, 0.05, shared=0.2)
        assert 13 <= overloaded <= 22
        assert 0.2 + 0.05 * overloaded <= 5.5 * 0.25  # the last one of them
    admission.leave(admission.enter(103) or 0, 30.0)  # one upload that was slow
    assert _rush(admission, 103.2, 0.05, shared=0.2) <= burst
    for now in range(104, 110):
        admission.leave(admission.enter(now) or 0, 0.25)
    assert burst - 2 <= _rush(admission, 120, 0.05, shared=0.2) <= burst + 2
    assert _rush(admission, 130, 1.0) >= 8  # however slow: so many at once
    assert _rush(admission, 130.5, 1.0) == 4  # but not in an overload


def test_the_first_burst_of_a_fresh_server_is_admitted_by_what_a_probe_took() -> None:
    admission = Admission(100, always=2, max_wait_seconds=1.0)
    assert len([1 for _ in range(50) if admission.enter(0)]) == 2  # nobody knows how fast it is
    probed = Admission(100, always=2, max_wait_seconds=1.0)
    probed.took_alone(0.1)
    assert 10 <= len([1 for _ in range(50) if probed.enter(0)]) <= 11  # as if each took as long as it does alone
    for place in range(11, 0, -1):
        probed.leave(place, 0.1 + 0.01 * place)  # but they share batches
    assert 11 < len([1 for _ in range(50) if probed.enter(5)]) < 50


def test_an_overload_before_anything_was_alone() -> None:
    admission = Admission(100, always=20, max_wait_seconds=1.0)
    places = [admission.enter(0) or 0 for _ in range(20)]
    assert admission.enter(0) is None
    for place in places[1:]:
        admission.leave(place, 0.1 * place)
    assert 10 <= len([1 for _ in range(50) if admission.enter(0.5)]) <= 11  # nothing better is known than the limit


@pytest.mark.parametrize("status, learned", [(200, True), (422, False), (503, False)])
def test_only_what_was_searched_tells_what_a_search_takes(status: int, learned: bool) -> None:
    admission = Admission(100, always=2, max_wait_seconds=2.0)
    admission.took_alone(0.4)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        for _ in range(20):  # until all have come
            await asyncio.sleep(0)
        await Response(status_code=status)(scope, receive, send)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Message) -> None:
        pass

    async def ask() -> None:
        gate = Gate(app, keys=KeyRing(None), admission=admission, metrics=Metrics("one"), max_body_bytes=100)
        scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": [], "query_string": b""}
        for _ in range(20):
            await asyncio.gather(*(gate(dict(scope), receive, send) for _ in range(5)))

    asyncio.run(ask())
    assert admission.in_flight == 0
    admitted = len([1 for _ in range(50) if admission.enter(1e9)])
    assert admitted > 6 if learned else admitted == 6
