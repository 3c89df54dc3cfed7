"""The read path against plain loops over all items, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ace_core.config import SearchSettings
from ace_core.errors import QueryError, StoreError
from ace_core.identifiers import prefix_interval
from ace_core.items import Modality
from ace_core.query import Hit, SearchRequest
from ace_core.replay import BATCHES, Replay
from ace_core.retriever import Retriever
from ace_core.walk import Walk
from tests.tiny_store import TinyStore, content_of, vectors_of

TEXTS = ["a red fruit", "a dog barks", "slow piano", "something that moves to the left, quite fast, and then stops"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyStore:
    torch.set_num_threads(1)
    store = TinyStore(tmp_path_factory.mktemp("store"))
    store.segment("whole", 0, 300)
    store.segment("main", 0, 240)
    store.segment("delta", 240, 60)
    store.segment("stored", 0, 300, stored=True)
    store.publish("split", ["main", "delta"])
    store.publish("int8", ["stored"])
    store.publish("one", ["whole"])
    return store


def _open(tiny: TinyStore, snapshot_id: str = "one", **settings) -> Retriever:
    return Retriever.open(
        tiny.path,
        snapshot_id,
        settings=SearchSettings(**{"k": 10, "mode": "beam", "beam": 300, **settings}),
        text_encoder=tiny.text,
    )


def _oracle(tiny: TinyStore, text: str, numbers: np.ndarray, mode: str) -> dict[str, float]:
    """log p(identifier) + 5 * similarity of every item, as the untrained generator must score it."""
    query = tiny.aligner.text_vectors(tiny.text.encode([text]).pooled.numpy())[0]
    codes = tiny.quantizer.assign(vectors_of(tiny.aligner, 0, 300), np.arange(300) % 3)
    scales = tiny.generator.log_scales.detach().exp().numpy()
    if mode == "one-shot":
        scales = [scales[0]] + [float(tiny.generator.item_scale.detach())] * (tiny.quantizer.levels - 1)
    total = np.zeros(300)
    for level in range(tiny.quantizer.levels):
        logits = scales[level] * (tiny.quantizer.codewords(level) @ query)
        total += (logits - np.logaddexp.reduce(logits))[codes[:, level]]
    total += 5.0 * tiny.quantizer.reconstruct(codes) @ query
    return {f"item-{n:04d}": float(total[n]) for n in numbers}


def _score(tiny: TinyStore, hit: Hit) -> float:
    """What ranked a hit, from what it shows: its similarity is a cosine, and the query's vector has length 1."""
    item = tiny.quantizer.reconstruct(np.array([hit.identifier]))[0]
    return hit.log_prob + 5.0 * float(hit.similarity * np.linalg.norm(item[:-1]) + item[-1])


def _check(tiny: TinyStore, text: str, hits: list[Hit], numbers: np.ndarray, mode: str = "beam") -> None:
    expected = _oracle(tiny, text, numbers, mode)
    assert len(hits) == min(10, len(numbers))
    best = sorted(expected.values(), reverse=True)[: len(hits)]
    np.testing.assert_allclose([_score(tiny, h) for h in hits], best, atol=2e-3)
    for hit in hits:
        assert _score(tiny, hit) == pytest.approx(expected[hit.item_id], abs=2e-3)


@pytest.mark.parametrize("mode", ["beam", "one-shot", "verify"])
def test_wide_search_equals_a_loop_over_all_items(tiny: TinyStore, mode: str) -> None:
    retriever = _open(tiny, mode=mode, draft=300)
    for text, hits in zip(TEXTS, retriever.search(TEXTS)):
        _check(tiny, text, hits, np.arange(300), mode)
        assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)


def test_two_segments_answer_as_one(tiny: TinyStore) -> None:
    one, split = _open(tiny, "one"), _open(tiny, "split")
    for a, b in zip(one.search(TEXTS, beam=20), split.search(TEXTS, beam=20)):
        np.testing.assert_allclose([_score(tiny, h) for h in a], [_score(tiny, h) for h in b], atol=1e-4)
        assert {h.item_id for h in a} == {h.item_id for h in b}


@pytest.mark.parametrize("mode", ["beam", "one-shot", "verify"])
def test_the_accelerators_walk_answers_the_same(tiny: TinyStore, mode: str) -> None:
    settings = SearchSettings(k=10, mode=mode, beam=30, draft=400)  # type: ignore[arg-type]
    plain = Retriever.open(tiny.path, "split", settings=settings, text_encoder=tiny.text)
    tensors = Retriever.open(tiny.path, "split", settings=settings, text_encoder=tiny.text, device="cpu:0")
    assert isinstance(plain._walk, Walk) and isinstance(tensors._walk, Replay)
    tensors.warm()
    assert tensors._walk.captures == len(BATCHES)
    none = {"number": {"exists": False}}
    for filters, expected in (({}, 10), ({"parity": "odd"}, 10), ({"number": 123}, 1), (none, 0)):
        for a, b in zip(plain.search(TEXTS, filters=filters), tensors.search(TEXTS, filters=filters)):
            assert len(a) == len(b) == expected
            np.testing.assert_allclose([_score(tiny, h) for h in a], [_score(tiny, h) for h in b], atol=1e-3)
            assert {h.item_id for h in a} == {h.item_id for h in b}


def test_a_batch_of_different_requests_equals_each_alone(tiny: TinyStore) -> None:
    retriever = _open(tiny)
    vector = retriever.queries.example_of_item("item-0007").vector
    requests = [
        SearchRequest(text=TEXTS[0]),
        SearchRequest(vector=vector, k=3),
        SearchRequest(text=TEXTS[3], filters={"parity": "odd"}),
        SearchRequest(text=TEXTS[1], mode="one-shot", k=4),
        SearchRequest(text=TEXTS[2], modalities=(TinyModality := retriever.item("item-0001").modality,)),
    ]
    together = retriever.search_batch(requests)
    for request, hits in zip(requests, together):
        alone = retriever.search_batch([request])[0]
        assert [h.item_id for h in hits] == [h.item_id for h in alone]
        np.testing.assert_allclose([_score(tiny, h) for h in hits], [_score(tiny, h) for h in alone], atol=1e-3)
    assert [len(hits) for hits in together] == [10, 3, 10, 4, 10]
    assert {h.modality for h in together[4]} == {TinyModality}


def test_an_item_finds_itself(tiny: TinyStore) -> None:
    retriever = _open(tiny, "int8")
    for item_id in ("item-0000", "item-0001", "item-0299"):
        example = retriever.queries.example_of_item(item_id)
        assert example is not None and np.linalg.norm(example.vector[:-1]) == pytest.approx(1, abs=1e-3)
        plain = retriever.search_batch([SearchRequest(vector=example.vector, k=300)])[0]
        hit = max(plain, key=lambda h: h.similarity)
        assert hit.item_id == item_id and hit.similarity == pytest.approx(1, abs=3e-3)
        asked = SearchRequest(vector=example.vector, examples=example.items, k=300)
        hits = retriever.search_batch([SearchRequest(text=TEXTS[0]), asked])[1]
        assert hits[0].item_id == item_id and hits[0].score == 1.0  # known to be what was asked for, however it ranks
        assert [h.item_id for h in hits[1:]] == [h.item_id for h in plain if h.item_id != item_id]
        other = retriever.search_batch([replace(asked, k=3, filters={"number": 5})])[0]
        assert [h.item_id for h in other] == ["item-0005"] and other[0].score < 1
    assert retriever.queries.example_of_item("nobody") is None


@pytest.mark.parametrize("mode", ["beam", "one-shot", "verify"])
def test_an_example_comes_first_though_the_search_missed_it(tiny: TinyStore, mode: str) -> None:
    retriever = _open(tiny, "split", mode=mode, beam=1, draft=1, pool=0, k=2)
    numbers = range(0, 300, 5)
    examples = [retriever.queries.example_of_item(f"item-{n:04d}") for n in numbers]
    plain = [SearchRequest(vector=e.vector) for e in examples]
    asked = [replace(r, examples=e.items) for r, e in zip(plain, examples)]
    missed = 0
    for n, without, hits in zip(numbers, retriever.search_batch(plain), retriever.search_batch(asked)):
        missed += f"item-{n:04d}" not in {h.item_id for h in without}
        assert hits[0].item_id == f"item-{n:04d}" and hits[0].score == 1.0
        assert hits[0].log_prob == pytest.approx(np.log(hits[0].level_probs).sum(), abs=1e-4)
        rest = [h.item_id for h in without if h.item_id != hits[0].item_id]
        assert [h.item_id for h in hits[1:]] == rest[:1]
    assert missed > 5
    odd = retriever.search_batch([replace(r, filters={"parity": "odd"}) for r in asked])
    for n, hits in zip(numbers, odd):
        assert all(h.attributes["parity"] == "odd" for h in hits)
        assert (hits[0].item_id == f"item-{n:04d}") == (n % 2 == 1) == (hits[0].score == 1.0)
    # Beside a text, and where the filter leaves nothing at all.
    none = replace(asked[0], filters={"number": {"exists": False}})
    assert [len(hits) for hits in retriever.search_batch([SearchRequest(text=TEXTS[0]), none])] == [2, 0]


def test_a_file_of_the_corpus_is_its_own_item(tiny: TinyStore) -> None:
    """Found by its bytes in any segment, unless it was removed; a file that was cut is the mean of its parts."""
    retriever = _open(tiny, "split")
    for number in (7, 250):
        found = retriever.queries.example_of_file(Modality.AUDIO, content_of(number))
        same = retriever.queries.example_of_item(f"item-{number:04d}")
        np.testing.assert_array_equal(found.vector, same.vector)
        assert found.items == same.items and len(found.items) == 1
    parts = [retriever.snapshot.find(f"item-{number:04d}") for number in (298, 299)]
    mean = np.mean([retriever._galleries[n].vectors(np.array([r]), tiny.quantizer)[0, :-1] for n, r in parts], 0)
    found = retriever.queries.example_of_file(Modality.IMAGE, content_of(299))
    assert sorted(found.items) == sorted(parts)
    np.testing.assert_allclose(found.vector[:-1], mean / np.linalg.norm(mean), atol=1e-6)
    tiny.publish("removed", ["main", "delta"], {"main": np.array([retriever.snapshot.find("item-0007")[1]])})
    for number in (7, 300):
        with pytest.raises(QueryError, match="names no image encoder"):  # not there: to be encoded
            _open(tiny, "removed").queries.example_of_file(Modality.IMAGE, content_of(number))
    tiny.publish("one", ["whole"])


def test_filters_and_modalities_are_exact(tiny: TinyStore) -> None:
    retriever = _open(tiny, beam=10)
    numbers = np.arange(300)
    wide = _open(tiny)
    _check(tiny, TEXTS[0], wide.search(TEXTS[:1], filters={"parity": "odd"})[0], numbers[numbers % 2 == 1])
    _check(tiny, TEXTS[0], wide.search(TEXTS[:1], modality="audio")[0], numbers[numbers % 3 == 1])
    only = retriever.search(TEXTS[:1], filters={"number": 123})[0]
    assert [h.item_id for h in only] == ["item-0123"]
    assert retriever.search(TEXTS[:1], filters={"number": 123}, modality="audio")[0] == []
    assert retriever.search(TEXTS[:1], filters={"number": {"exists": False}}) == [[]]
    with pytest.raises(QueryError, match="no item has an attribute 'nothing'"):
        retriever.search(TEXTS[:1], filters={"nothing": "here"})
    assert len(wide.search(TEXTS[:1], filters={"nothing": {"exists": False}})[0]) == 10


@pytest.mark.parametrize("mode", ["beam", "one-shot"])
def test_being_the_only_one_left_makes_no_better_match(tiny: TinyStore, mode: str) -> None:
    retriever = _open(tiny, mode=mode, draft=300, k=300)
    everything = retriever.search(TEXTS[:1])[0]
    scores = {h.item_id: h.score for h in everything}
    alone = {}
    for number in (int(everything[0].item_id[-4:]), 7, 123, 250, int(everything[-1].item_id[-4:])):
        (only,) = retriever.search(TEXTS[:1], filters={"number": number})[0]
        alone[only.item_id] = only.score
        assert only.score > scores[only.item_id] - 2e-2  # what is left out for certain is no rival
    by_score = sorted(alone, key=scores.__getitem__, reverse=True)
    assert [alone[i] for i in by_score] == sorted(alone.values(), reverse=True)
    assert alone[by_score[0]] > scores[by_score[0]] + 0.1 and alone[by_score[-1]] < 0.1
    # together with a search that has no filter
    two = retriever.search_batch([SearchRequest(text=TEXTS[0], filters={"number": 7}), SearchRequest(text=TEXTS[0])])
    assert two[0][0].score == pytest.approx(alone["item-0007"], abs=1e-6)
    assert [h.score for h in two[1]] == pytest.approx(list(scores.values()), abs=1e-6)


def test_removed_items_are_gone(tiny: TinyStore) -> None:
    retriever = _open(tiny)
    best = retriever.search(TEXTS[:1])[0][0].item_id
    row = retriever.snapshot.find(best)[1]
    tiny.publish("removed", ["whole"], {"whole": np.array([row])})
    after = _open(tiny, "removed")
    assert after.item(best) is None and after.queries.example_of_item(best) is None
    found = after.search(TEXTS[:1], k=300)[0]
    assert len(found) == 299 and best not in {h.item_id for h in found}
    tiny.publish("empty", ["whole"], {"whole": np.arange(300)})
    assert _open(tiny, "empty").search(TEXTS) == [[], [], [], []]
    tiny.publish("one", ["whole"])


def test_a_replaced_item_is_found_in_its_newest_segment(tiny: TinyStore) -> None:
    tiny.segment("again", 239, 1)
    main = _open(tiny, "split")
    old = main.snapshot.segments[0].row_of("item-0239")
    tiny.publish("replaced", ["main", "again"], {"main": np.array([old])})
    assert _open(tiny, "replaced").snapshot.find("item-0239") == (1, 0)
    tiny.publish("one", ["whole"])


def test_rerank_off_is_the_generators_own_order(tiny: TinyStore) -> None:
    for alone, mixed in zip(_open(tiny, rerank=False, k=100).search(TEXTS), _open(tiny, k=100).search(TEXTS)):
        assert [h.log_prob for h in alone] == sorted((h.log_prob for h in alone), reverse=True)
        assert [_score(tiny, h) for h in mixed] == sorted((_score(tiny, h) for h in mixed), reverse=True)
        assert [h.item_id for h in alone] != [h.item_id for h in mixed]


def test_a_prefix_is_an_interval_of_items(tiny: TinyStore) -> None:
    codes = _open(tiny).snapshot.segments[0].gallery.codes
    for row in (0, 41, 299):
        for length in range(codes.shape[1] + 1):
            low, high = prefix_interval(codes, codes[row, :length])
            same = (codes[:, :length] == codes[row, :length]).all(axis=1)
            assert low <= row < high and high - low == same.sum() and same[low:high].all()
    with pytest.raises(QueryError, match="identifiers have 4"):
        prefix_interval(codes, [0] * 5)


def test_bad_queries(tiny: TinyStore) -> None:
    retriever = _open(tiny)
    assert retriever.search([]) == []
    with pytest.raises(QueryError, match="empty"):
        retriever.search(["  "])
    with pytest.raises(QueryError, match="no UTF-8"):
        retriever.search(["dog \udc80"])
    with pytest.raises(QueryError, match="unknown modality"):
        retriever.search(["x"], modality="smell")
    with pytest.raises(QueryError, match="names no image encoder"):
        retriever.queries.encode_media(retriever.item("item-0000").modality, b"")


def test_parts_that_do_not_belong_together_are_refused_by_name(tiny: TinyStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing has been published"):
        Retriever.open(tmp_path)
    store = tmp_path / "store"
    shutil.copytree(tiny.path, store)
    with pytest.raises(StoreError, match="no finished snapshot"):
        Retriever.open(store, "nosuch")

    codes = store / "segments" / "whole" / "identifiers.safetensors"
    good = codes.read_bytes()
    codes.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(StoreError, match="does not match its SHA-256"):
        Retriever.open(store, "one")
    codes.write_bytes(good)

    manifest = store / "segments" / "whole" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"q1"', '"q2"'))
    with pytest.raises(StoreError, match="segments/whole is not the one"):
        Retriever.open(store, "one")
    manifest.write_text(text)

    snapshot = store / "snapshots" / "one" / "manifest.json"
    text = snapshot.read_text()
    snapshot.write_text(text.replace(tiny.text.identity, "someone-else"))
    with pytest.raises(StoreError, match="made with text encoder someone-else"):
        Retriever.open(store, "one", text_encoder=tiny.text)
    snapshot.write_text(text)

    shutil.rmtree(store / "quantizer")
    with pytest.raises(StoreError, match="needs quantizer/q1"):
        Retriever.open(store, "one")


def test_a_segment_of_another_quantizer_is_refused_by_name(tiny: TinyStore) -> None:
    tiny.inputs = {"aligner": "a1", "quantizer": "q9"}
    try:
        tiny.segment("foreign", 0, 30)
    finally:
        tiny.inputs = {"aligner": "a1", "quantizer": "q1"}
    tiny.publish("foreign", ["foreign"])
    with pytest.raises(
        StoreError, match="segment foreign was made with quantizer q9, snapshot foreign has quantizer q1"
    ):
        Retriever.open(tiny.path, "foreign", text_encoder=tiny.text)
    tiny.publish("one", ["whole"])
