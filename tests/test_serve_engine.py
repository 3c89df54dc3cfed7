"""A replica's engine on a real (untrained) snapshot: batches, deadlines, changing snapshot without a wrong answer."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs

from ace_core.config import SearchSettings
from ace_core.errors import StoreError
from ace_core.replay import BATCHES, Replay
from ace_core.retriever import Retriever
from ace_core.snapshot import Snapshot
from ace_store.store import Store
from serve.calls import ExampleCall, Options, Refusal, Reply, TextCall
from serve.catalog import View, cluster_name
from serve.engine import Engine
from tests.tiny_store import TinyStore

TEXTS = ("a red fruit", "a dog barks", "slow piano")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyStore:
    torch.set_num_threads(1)
    store = TinyStore(tmp_path_factory.mktemp("store"))
    store.segment("main", 0, 240)
    store.segment("delta", 240, 60)
    return store


@pytest.fixture
def engine(tiny: TinyStore) -> Engine:
    tiny.publish("first", ["main"])
    return Engine(str(tiny.path), replica="r1", settings=SearchSettings(), device="cpu", threads=1)


def _call(*texts: str, k: int = 5, seconds: float = 60, **options) -> TextCall:
    return TextCall(texts, Options(k=k, **options), time.time() + seconds)


def _like(item_id: str, **options) -> ExampleCall:
    return ExampleCall(Options(k=3, **options), time.time() + 60, item_id=item_id)


def _answer(engine: Engine, *calls: TextCall | ExampleCall) -> list[Reply | Refusal]:
    async def ask() -> list[Reply | Refusal]:
        waiting = [await engine.prepare(call) for call in calls]
        ready = [w for w in waiting if not isinstance(w, Refusal)]
        answers = iter(await engine.answer(ready))
        return [w if isinstance(w, Refusal) else next(answers) for w in waiting]

    return asyncio.run(ask())


def _ids(reply: Reply | Refusal) -> list[list[str]]:
    assert isinstance(reply, Reply), reply
    return [[hit.item_id for hit in hits] for hits in reply.results]


def test_a_batch_answers_each_call_as_if_alone(engine: Engine, tiny: TinyStore) -> None:
    calls = [_call(*TEXTS), _like("item-0007"), _call(TEXTS[0], k=2, filters={"parity": "odd"}, modalities=("audio",))]
    together = _answer(engine, *calls)
    assert [_ids(r) for r in together] == [_ids(_answer(engine, call)[0]) for call in calls]
    retriever = Retriever.open(tiny.path, text_encoder=tiny.text)
    assert _ids(together[0]) == [[h.item_id for h in hits] for hits in retriever.search(TEXTS, k=5)]
    assert _ids(together[1])[0][0] == "item-0007"
    first = together[0]
    assert isinstance(first, Reply)
    assert first.batch == 5 and first.beam == 20 and first.state.snapshot == "first"
    assert first.threshold == pytest.approx(retriever.threshold)
    assert set(first.stages) == {"queue", "search"} and all(s >= 0 for s in first.stages.values())
    example = together[1]
    assert isinstance(example, Reply) and "example" in example.stages
    hit = first.results[0][0]
    assert len(hit.level_probs) == len(hit.identifier) and 0 <= hit.score <= 1


def test_a_bad_call_does_not_spoil_its_neighbours(engine: Engine) -> None:
    alone = _ids(_answer(engine, _call(TEXTS[0]))[0])
    good, bad, gone = _answer(
        engine, _call(TEXTS[0]), _call("x", filters={"number": {"near": 3}}), _like("no such item")
    )
    assert _ids(good) == alone
    assert isinstance(bad, Refusal) and bad.kind == "query" and "near" in bad.found and bad.remedy
    assert isinstance(gone, Refusal) and gone.kind == "missing"


def test_an_answer_that_filters_leave_empty_says_why(engine: Engine) -> None:
    none, some, half = _answer(
        engine,
        _call(*TEXTS, filters={"parity": "ood"}),
        _call(TEXTS[0]),
        _call(TEXTS[0], filters={"number": "\ud800"}),
    )
    assert isinstance(none, Reply) and _ids(none) == [[], [], []] and 'did you mean "odd"?' in none.note
    assert isinstance(some, Reply) and some.note == ""
    assert isinstance(half, Refusal) and half.kind == "query"


def test_what_nobody_foresaw_fails_one_call(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = _ids(_answer(engine, _call(TEXTS[0]))[0])
    search_batch = engine._live.search_batch

    def fragile(requests: list) -> list:
        if any(request.text == "boom" for request in requests):
            raise ZeroDivisionError
        return search_batch(requests)

    monkeypatch.setattr(engine._live, "search_batch", fragile)
    good, bad = _answer(engine, _call(TEXTS[0]), _call("boom"))
    assert _ids(good) == alone
    assert isinstance(bad, Refusal) and bad.kind == "failed" and bad.remedy


def test_an_empty_answer_that_cannot_be_explained_is_an_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(engine._live, "why_nothing", failing)
    none, some = _answer(engine, _call(TEXTS[0], filters={"parity": "ood"}), _call(TEXTS[0]))
    assert isinstance(none, Reply) and _ids(none) == [[]] and none.note == ""
    assert isinstance(some, Reply) and _ids(some) != [[]]


def test_calls_past_their_deadline_leave_the_batch(engine: Engine) -> None:
    late, timely = _answer(engine, _call("x", "y", seconds=-1), _call(TEXTS[0]))
    assert isinstance(late, Refusal) and late.kind == "deadline"
    assert isinstance(timely, Reply) and timely.batch == 1
    example = ExampleCall(Options(k=1), time.time() - 1, item_id="item-0000")
    [refused] = _answer(engine, example)
    assert isinstance(refused, Refusal) and refused.kind == "deadline"


def test_what_waits_is_decoded_together(engine: Engine) -> None:
    """Ray Serve closes many small batches while one is being decoded; the engine joins them."""
    engine.max_batch = 4

    async def ask() -> list[Reply | Refusal]:
        prepared = [await engine.prepare(_call(f"thing {n}")) for n in range(6)]
        waiting = [w for w in prepared if not isinstance(w, Refusal)]
        waiting[1].cancelled = True  # its caller went away
        answers = await asyncio.gather(*(engine.answer([w]) for w in waiting))
        return [answer for [answer] in answers]

    replies = asyncio.run(ask())
    assert isinstance(replies[1], Refusal)
    assert [r.batch for r in replies if isinstance(r, Reply)] == [3, 3, 3, 2, 2]
    for n in (0, 2, 5):
        assert _ids(replies[n]) == _ids(_answer(engine, _call(f"thing {n}"))[0])


def test_media_that_no_encoder_can_read_is_refused(engine: Engine) -> None:
    call = ExampleCall(Options(k=1), time.time() + 60, media=b"\x89PNG nonsense", modality="image")
    [refused] = _answer(engine, call)
    # The tiny snapshot names no image encoder: that, too, is an answer and not a crash.
    assert isinstance(refused, Refusal) and refused.kind in ("query", "media") and "image" in refused.found


def test_a_published_snapshot_is_taken_and_rolled_back(engine: Engine, tiny: TinyStore) -> None:
    filters = {"number": {"gte": 240}}
    assert _ids(_answer(engine, _call("x", filters=filters))[0]) == [[]]
    tiny.publish("second", ["main", "delta"])
    asyncio.run(engine.refresh())
    assert engine.state().snapshot == "second" and engine.state().refused is None
    assert len(_ids(_answer(engine, _call("x", filters=filters))[0])[0]) == 5
    tiny.publish("first", ["main"])
    asyncio.run(engine.refresh())
    assert engine.state().snapshot == "first"
    assert _ids(_answer(engine, _call("x", filters=filters))[0]) == [[]]


def test_an_example_is_encoded_again_when_the_snapshot_changed_meanwhile(engine: Engine, tiny: TinyStore) -> None:
    async def ask() -> list[Reply | Refusal]:
        tiny.publish("second", ["main", "delta"])
        await engine.refresh()
        waiting = [await engine.prepare(_like(item)) for item in ("item-0010", "item-0250")]
        tiny.publish("first", ["main"])
        await engine.refresh()
        return await engine.answer([w for w in waiting if not isinstance(w, Refusal)])

    stayed, went = asyncio.run(ask())
    assert isinstance(stayed, Reply) and stayed.state.snapshot == "first"
    assert _ids(stayed) == _ids(_answer(engine, _like("item-0010"))[0])
    # The vector that was made for it belongs to a snapshot that is not served any more.
    assert isinstance(went, Refusal) and went.kind == "missing"


def test_answers_never_mix_snapshots_while_they_change(engine: Engine, tiny: TinyStore) -> None:
    """Asking while CURRENT goes back and forth: what an answer holds agrees with the snapshot that it names."""
    tiny.publish("second", ["main", "delta"])
    filters = {"number": {"gte": 240}}

    async def ask() -> None:
        seen: list[str] = []

        async def turn() -> None:
            for n in range(6):
                tiny.publish(*(("first", ["main"]) if n % 2 else ("second", ["main", "delta"])))
                await engine.refresh()
                asked = len(seen)  # answers that were on their way may be of the one before: wait for some of this one
                while seen[asked:][-1:] != [engine.state().snapshot]:
                    await asyncio.sleep(0.001)

        turning = asyncio.create_task(turn())
        while not turning.done():
            waiting = [await engine.prepare(_call("x", "y", filters=filters)) for _ in range(3)]
            for reply in await engine.answer([w for w in waiting if not isinstance(w, Refusal)]):
                assert isinstance(reply, Reply)
                expected = 5 if reply.state.snapshot == "second" else 0
                assert [len(hits) for hits in reply.results] == [expected, expected]
                seen.append(reply.state.snapshot)
        await turning
        assert set(seen) == {"first", "second"}

    asyncio.run(ask())


@pytest.mark.parametrize("damage", ["flip", "missing", "gone"])
def test_a_snapshot_that_fails_its_checks_is_refused(engine: Engine, tiny: TinyStore, damage: str) -> None:
    tiny.segment(f"bad-{damage}", 0, 60)
    tiny.publish(f"bad-{damage}", [f"bad-{damage}"])
    path: Path = tiny.path / "segments" / f"bad-{damage}" / "identifiers.safetensors"
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    else:
        (tiny.path / "CURRENT").write_text('{"snapshot": "bad-gone-altogether"}')
    asyncio.run(engine.refresh())
    state = engine.state()
    assert state.snapshot == "first" and state.refused and state.refused.startswith(f"bad-{damage}") and state.reason
    assert str(tiny.path) not in state.reason
    assert len(_ids(_answer(engine, _call("x"))[0])[0]) == 5
    tiny.publish("first", ["main"])
    asyncio.run(engine.refresh())
    assert engine.state().refused is None and engine.state().reason is None


def test_the_log_says_that_an_older_segment_finds_less(
    tiny: TinyStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.segment("whole", 0, 60, stored=True)
    monkeypatch.setattr("ace_core.segment_writer.FORMAT", 3)
    tiny.segment("older", 60, 60, stored=True)
    tiny.publish("mixed", ["whole", "older"])
    Engine(str(tiny.path), replica="r1", settings=SearchSettings(), device="cpu", threads=1)
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("of snapshot mixed, a segment was written by an earlier ACE") and "`ace publish`" in said


def test_a_store_that_cannot_be_read_does_not_stop_the_replica(engine: Engine, tiny: TinyStore) -> None:
    current = tiny.path / "CURRENT"
    kept = current.read_text()
    current.write_text("{nonsense")
    asyncio.run(engine.refresh())
    assert engine.state().snapshot == "first" and engine.state().reason
    assert len(_ids(_answer(engine, _call("x"))[0])[0]) == 5
    current.write_text(kept)
    asyncio.run(engine.refresh())
    assert engine.state().reason is None


def test_on_an_accelerator_a_snapshot_serves_with_its_own_captures(tiny: TinyStore) -> None:
    tiny.publish("first", ["main"])
    engine = Engine(str(tiny.path), replica="r1", settings=SearchSettings(), device="cpu:0", threads=1)
    before = engine._live._walk
    assert isinstance(before, Replay) and before.captures == len(BATCHES)
    added = {"number": {"gte": 240}}
    first = _ids(_answer(engine, _call(*TEXTS))[0])
    assert first == _ids(_answer(engine, _call(*TEXTS))[0])
    assert [_ids(_answer(engine, _call("x", filters=added))[0]) for _ in range(3)] == [[[]]] * 3
    tiny.publish("second", ["main", "delta"])
    asyncio.run(engine.refresh())
    after = engine._live._walk
    assert isinstance(after, Replay) and after is not before and after.captures == len(BATCHES)
    plain = Engine(str(tiny.path), replica="r2", settings=SearchSettings(), device="cpu", threads=1)
    for _ in range(3):
        calls = _call(*TEXTS), _call("x", filters=added), _like("item-0250")
        for mine, other in zip(_answer(engine, *calls), _answer(plain, *calls)):
            assert [set(ids) for ids in _ids(mine)] == [set(ids) for ids in _ids(other)]
    assert len(_ids(_answer(engine, _call("x", filters=added))[0])[0]) == 5


def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="ace publish"):
        Engine(str(tmp_path), replica="r1", settings=SearchSettings(), device="cpu", threads=1)


def test_a_store_on_s3_is_served_through_an_outage(
    tiny: TinyStore, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    uri = f"s3://bucket/served{s3}"
    remote = Store.open(uri)

    def upload() -> None:
        fs.copy_files(str(tiny.path), remote.path(), destination_filesystem=remote.filesystem)

    tiny.publish("first", ["main"])
    upload()
    engine = Engine(uri, replica="r1", settings=SearchSettings(), device="cpu", threads=1)
    filters = {"number": {"gte": 240}}
    assert _ids(_answer(engine, _call("x", filters=filters))[0]) == [[]]
    tiny.publish("second", ["main", "delta"])
    upload()
    asyncio.run(engine.refresh())
    assert engine.state().snapshot == "second"
    assert len(_ids(_answer(engine, _call("x", filters=filters))[0])[0]) == 5
    remote.filesystem.delete_dir(remote.path())  # what was mirrored serves on
    asyncio.run(engine.refresh())
    assert engine.state().snapshot == "second" and engine.state().reason
    assert len(_ids(_answer(engine, _call("x", filters=filters))[0])[0]) == 5


def test_clusters_of_several_segments_list_each_live_item_once(tiny: TinyStore) -> None:
    gone = {"main": np.array([0, 1, 57, 239]), "delta": np.array([3])}
    tiny.publish("holes", ["main", "delta"], gone)
    view = View(Snapshot.open(tiny.path, "holes"))
    live: dict[str, tuple[int, ...]] = {}
    for segment, removed in zip(view.snapshot.segments, view.snapshot.removed):
        for row in set(range(len(segment))) - set(removed.tolist()):
            item = segment.item(row)
            live[item.item_id] = item.identifier
    prefixes = {identifier[:level] for identifier in live.values() for level in (1, 2, 3, 4)}
    for prefix in sorted(prefixes):
        expected = {item for item, identifier in live.items() if identifier[: len(prefix)] == prefix}
        pages = [view.cluster(prefix, offset=at, k=7) for at in range(0, len(expected) + 7, 7)]
        listed = [item.item_id for page in pages for item in page.items]
        assert sorted(listed) == sorted(expected) and {page.total for page in pages} == {len(expected)}
        finer = dict(pages[0].children)
        assert sum(finer.values()) == (len(expected) if len(prefix) < view.levels else 0)
        assert set(finer) == {cluster_name(p) for p in prefixes if p[:-1] == prefix and len(p) == len(prefix) + 1}
