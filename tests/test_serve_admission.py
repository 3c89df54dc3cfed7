"""How many searches may wait: by how fast they are answered, longer for a burst than in an overload."""

from __future__ import annotations

from serve.gate import Admission


def _rush(admission: Admission, now: float, seconds: float) -> int:
    """How many are admitted at once, when each then takes ``seconds`` for everyone before it and itself."""
    places = []
    while (place := admission.enter(now)) is not None:
        places.append(place)
    for place in places:
        admission.leave(place, seconds * place)
    return len(places)


def test_admission_follows_how_fast_searches_are_answered() -> None:
    admission = Admission(100, always=4, max_wait_seconds=1.0)
    assert _rush(admission, 0, 0.1) == 100  # nothing is known yet
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


def test_a_burst_may_wait_and_a_standing_queue_is_kept_short() -> None:
    admission = Admission(100, always=1, max_wait_seconds=1.2)
    _rush(admission, 0, 0.1)
    assert 12 <= _rush(admission, 10, 0.1) <= 13
    assert 4 <= _rush(admission, 10.5, 0.1) <= 5  # more came than could be answered, half a second ago
    assert 4 <= _rush(admission, 11.4, 0.1) <= 5  # and again
    assert 12 <= _rush(admission, 20, 0.1) <= 13
