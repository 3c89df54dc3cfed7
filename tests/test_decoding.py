"""Beam search: against a plain reference, over random corpora, masks and segments."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_core.config import SearchSettings
from ace_core.decoding import beam_search, one_shot_search, search_candidates, verified_search
from ace_core.errors import QueryError, StoreError
from ace_core.filters import ItemMask
from ace_core.tensor_walk import TensorWalk
from ace_core.walk import Walk
from tests.decoding_reference import (
    TableModel,
    agree,
    build,
    corpora,
    leaves,
    queries,
    reference_beam,
    reference_rows,
)

few = settings(deadline=None, max_examples=60)  # the first example may wait for the kernels to compile
beams = st.sampled_from([1, 2, 3, 7, 100])
scorings = st.sampled_from(["vocabulary", "children"])


@few
@given(corpora(), beams, scorings, st.sampled_from([0.0, 0.1, 0.7, 1.0]), st.integers(0, 2**31))
def test_equal_to_the_reference(corpus, beam, scoring, share, seed):
    codes, sizes = corpus
    index, ordered, _ = build(codes, sizes)
    allowed = np.random.default_rng(seed).random(len(codes)) < share
    model = TableModel(sizes)
    found = beam_search(
        model, queries([1, 2, 3]), [index], [ItemMask.of(allowed)], beam=beam, scoring=scoring, limit=1000
    )
    for q, number in enumerate([1, 2, 3]):
        agree(leaves(found, q), reference_beam(model, number, ordered, allowed, beam, scoring))
        rows = found.row[q][found.valid[q]]
        assert len(set(rows.tolist())) == len(rows)
        assert allowed[rows].all()
        assert (ordered[rows] == found.codes[q][found.valid[q]]).all()
        np.testing.assert_allclose(found.level_log_prob[q].sum(-1), found.log_prob[q], rtol=1e-4)
        # a leaf brings all its allowed items
        expected = {i for i in np.flatnonzero(allowed) if tuple(ordered[i]) in dict(leaves(found, q))}
        assert set(rows.tolist()) == expected


@few
@given(corpora(min_items=1), st.integers(0, 2**31))
def test_a_beam_as_wide_as_the_corpus_is_exhaustive(corpus, seed):
    codes, sizes = corpus
    index, ordered, _ = build(codes, sizes)
    model = TableModel(sizes)
    found = beam_search(model, queries([seed % 1000]), [index], beam=len(codes), limit=len(codes))
    every = [
        sum(model._log_probs(seed % 1000, tuple(c[:level]))[c[level]] for level in range(len(sizes)))
        for c in ordered.tolist()
    ]
    assert sorted(found.row[0].tolist()) == list(range(len(codes)))
    np.testing.assert_allclose(found.log_prob[0], sorted(every, reverse=True), rtol=1e-5)


@few
@given(corpora(), st.lists(st.integers(0, 3), min_size=40, max_size=40), beams, scorings, st.integers(0, 2**31))
def test_segments_together_are_one_rebuilt_index(corpus, part_of, beam, scoring, seed):
    codes, sizes = corpus
    part_of = np.array(part_of[: len(codes)], int)
    alive = np.random.default_rng(seed).random(len(codes)) < 0.8
    parts = [np.flatnonzero(part_of == p) for p in range(4)]
    segments, masks, names = [], [], []
    for part in parts:
        index, _, order = build(codes[part], sizes)
        segments.append(index)
        names.append(part[order])
        masks.append(ItemMask.of(alive[part[order]]))
    whole = np.concatenate(parts)[alive[np.concatenate(parts)]]  # equal identifiers stay in the order of segments
    rebuilt, _, order = build(codes[whole], sizes)
    model = TableModel(sizes)
    args = {"beam": beam, "scoring": scoring, "limit": 15}
    joint = beam_search(model, queries([5, 6]), segments, masks, **args)
    alone = beam_search(model, queries([5, 6]), [rebuilt], **args)
    assert joint.valid.tolist() == alone.valid.tolist()
    for q in range(2):
        ok = joint.valid[q]
        of_joint = [names[s][r] for s, r in zip(joint.segment[q][ok], joint.row[q][ok])]
        assert of_joint == whole[order][alone.row[q][ok]].tolist()
        np.testing.assert_array_equal(joint.log_prob[q], alone.log_prob[q])


@few
@given(
    corpora(), st.lists(st.integers(0, 2), min_size=40, max_size=40), beams, scorings,
    st.sampled_from([0.05, 0.3, 1.0]), st.integers(0, 2**31),
)  # fmt: skip
def test_a_branch_of_one_item_is_left_alone(corpus, part_of, beam, scoring, share, seed):
    codes, sizes = corpus
    part_of = np.array(part_of[: len(codes)], int)
    allowed = np.random.default_rng(seed).random(len(codes)) < share
    split = [build(codes[part_of == p], sizes) for p in range(3)]
    masks = [ItemMask.of(allowed[part_of == p][order]) for p, (_, _, order) in enumerate(split)]
    model = TableModel(sizes)
    found = beam_search(model, queries([1, 2]), [s for s, _, _ in split], masks, beam=beam, scoring=scoring, limit=1000)
    by_query = [list(reference_rows(model, number, codes, allowed, beam, scoring)) for number in (1, 2)]
    expected = []
    for level in range(1, len(sizes)):
        rows = [[prefix for prefix, _ in levels[level - 1]] for levels in by_query]
        below = [[(codes[allowed][:, :level] == prefix).all(1).sum() for prefix in of_query] for of_query in rows]
        if scoring == "children":
            asked = max(sum(count > 1 for count in of_query) for of_query in below)
        elif level < len(sizes) - 1 and all(count == 1 for of_query in below for count in of_query):
            break  # all that is left is scored in one pass
        else:
            asked = max(len(of_query) for of_query in rows)
        if asked:
            expected.append((level, asked))
    assert model.asked == expected
    for q in range(2):
        agree(leaves(found, q), by_query[q][-1])


@pytest.mark.parametrize(("scoring", "steps", "passes"), [("vocabulary", [(1, 1)], 1), ("children", [(1, 1)], 0)])
def test_chains_cost_no_steps(scoring, steps, passes):
    codes = np.array([[0, a, a, a, a] for a in range(30)], np.uint16)
    index, _, _ = build(codes, (3, 30, 30, 30, 30))
    model = TableModel((3, 30, 30, 30, 30))
    found = beam_search(model, queries([1]), [index], beam=5, scoring=scoring)
    agree(leaves(found, 0), reference_beam(model, 1, codes, np.ones(30, bool), 5, scoring))
    assert (model.asked, model.passes) == (steps, passes)


@few
@given(
    corpora(), st.lists(st.integers(0, 2), min_size=40, max_size=40), beams, scorings, st.integers(0, 2**31),
    st.sampled_from([0.0, 0.2, 1.0]),
)  # fmt: skip
def test_tensors_walk_as_the_kernels_do(corpus, part_of, beam, scoring, seed, share):
    codes, sizes = corpus
    part_of = np.array(part_of[: len(codes)], int)
    rng = np.random.default_rng(seed)
    segments = [build(codes[part_of == p], sizes)[0] for p in range(3)]
    masks = [[ItemMask.of(rng.random(s.items) < share) for s in segments], [None, None, None]]
    model = TableModel(sizes)
    both = (Walk(segments), TensorWalk(segments))
    pairs = [
        [beam_search(model, queries([5, 6]), walk, masks, beam=beam, scoring=scoring) for walk in both],
        [beam_search(model, queries([5, 6]), walk, masks[0], beam=beam) for walk in both],
        [one_shot_search(model, queries([5, 6]), walk, masks, draft=50) for walk in both],
        [verified_search(model, queries([5, 6]), walk, draft=50) for walk in both],
    ]
    for a, b in pairs:
        assert a.valid.tolist() == b.valid.tolist()
        assert a.segment.tolist() == b.segment.tolist()
        assert a.row.tolist() == b.row.tolist()
        assert a.codes.tolist() == b.codes.tolist()
        np.testing.assert_allclose(a.log_prob, b.log_prob, rtol=1e-5)
        np.testing.assert_allclose(a.level_log_prob, b.level_log_prob, atol=1e-5)


def test_every_search_setting_changes_the_search():
    rng = np.random.default_rng(0)
    sizes = (3, 20, 20, 20)
    codes = np.stack([rng.integers(0, s, 2000) for s in sizes], 1).astype(np.uint16)
    index, _, _ = build(codes, sizes)
    model = TableModel(sizes)

    def search(**changes):
        return search_candidates(
            model, queries([1]), [index], settings=SearchSettings(**{"mode": "beam", "pool": 0, **changes})
        )

    plain = search()
    assert len(leaves(plain, 0)) == 20
    assert len(leaves(search(beam=7), 0)) == 7
    asked = search_candidates(model, queries([1]), [index], settings=SearchSettings(mode="beam", pool=0), beam=7)
    assert leaves(asked, 0) == leaves(search(beam=7), 0)
    assert len(leaves(search(pool=50), 0)) > 40 and leaves(search(pool=50, rerank=False), 0) == leaves(plain, 0)
    assert len(leaves(search(mode="one-shot", draft=50), 0)) == len(leaves(search(mode="verify", draft=50), 0)) == 50
    assert leaves(search(mode="one-shot"), 0) != leaves(search(mode="verify"), 0)
    assert search(scoring="children").log_prob[0, 0] > plain.log_prob[0, 0]


@few
@given(corpora(min_items=1), beams, scorings)
def test_alone_or_in_any_batch_the_same(corpus, beam, scoring):
    codes, sizes = corpus
    index, _, _ = build(codes, sizes)
    model = TableModel(sizes)
    together = beam_search(model, queries([4, 5, 6]), [index], beam=beam, scoring=scoring)
    for q, number in enumerate([4, 5, 6]):
        alone = beam_search(model, queries([number]), [index], beam=beam, scoring=scoring)
        ok = together.valid[q]
        assert together.row[q][ok].tolist() == alone.row[0].tolist()
        assert together.log_prob[q][ok].tolist() == alone.log_prob[0].tolist()


@few
@given(corpora(min_items=1), beams, scorings, st.integers(0, 2**31))
def test_each_query_may_have_its_own_filter(corpus, beam, scoring, seed):
    codes, sizes = corpus
    index, _, _ = build(codes, sizes)
    rng = np.random.default_rng(seed)
    masks = [[ItemMask.of(rng.random(len(codes)) < share)] for share in (0.0, 0.3, 1.0)] + [[None]]
    masks += [list(masks[1]), masks[2]]  # or share one
    model = TableModel(sizes)
    together = beam_search(model, queries([4, 5, 6, 7, 8, 9]), [index], masks, beam=beam, scoring=scoring)
    for q, number in enumerate([4, 5, 6, 7, 8, 9]):
        alone = beam_search(model, queries([number]), [index], masks[q], beam=beam, scoring=scoring)
        assert together.row[q][together.valid[q]].tolist() == alone.row[0].tolist()
        np.testing.assert_allclose(together.log_prob[q][together.valid[q]], alone.log_prob[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scoring", ["vocabulary", "children"])
def test_nothing_allowed_is_an_empty_answer(scoring):
    codes = np.array([[0, 1, 2], [1, 1, 2]], np.uint16)
    index, _, _ = build(codes, (3, 2, 3))
    found = beam_search(
        TableModel((3, 2, 3)), queries([1, 2]), [index], [ItemMask.of(np.zeros(2, bool))], scoring=scoring
    )
    assert found.row.shape == (2, 0) and found.codes.shape == (2, 0, 3) and len(found) == 2


def test_the_one_allowed_item_of_many_is_found():
    rng = np.random.default_rng(0)
    sizes = (3, 40, 40, 40)
    codes = np.stack([rng.integers(0, s, 50_000) for s in sizes], 1).astype(np.uint16)
    index, ordered, _ = build(codes, sizes)
    allowed = np.zeros(50_000, bool)
    allowed[31_415] = True
    for scoring in ("vocabulary", "children"):
        found = beam_search(TableModel(sizes), queries([1]), [index], [ItemMask.of(allowed)], beam=1, scoring=scoring)
        assert found.row.tolist() == [[31_415]]
        assert found.codes[0, 0].tolist() == ordered[31_415].tolist()
    assert found.log_prob[0, 0] == 0  # one child a level holds the whole probability


def test_a_bucket_takes_one_place_in_the_beam():
    codes = np.array([[0, 0]] * 1000 + [[0, 1], [0, 2]], np.uint16)
    index, _, _ = build(codes, (3, 3))
    found = beam_search(TableModel((3, 3)), queries([1]), [index], beam=3, limit=5000)
    assert found.valid.sum() == 1002
    few = beam_search(TableModel((3, 3)), queries([1]), [index], beam=3, limit=7)
    assert few.row.tolist() == [found.row[0, :7].tolist()]


def test_an_impossible_token_is_never_spelled():
    class Refuses(TableModel):
        def _log_probs(self, seed, prefix):
            log_probs = super()._log_probs(seed, prefix)
            log_probs[1] = -np.inf
            return log_probs

    codes = np.array([[0, 0], [0, 1], [1, 0]], np.uint16)
    index, _, _ = build(codes, (3, 2))
    found = beam_search(Refuses((3, 2)), queries([1]), [index], beam=10)
    assert found.codes[0].tolist() == [[0, 0]]


def test_pointers_past_two_to_the_31_are_read():
    codes = np.array([[0, 1, 2], [0, 2, 1], [2, 0, 0]], np.uint16)
    index, _, _ = build(codes, (3, 3, 3), 2)
    pointers = tuple(p.astype(np.int64) for p in index.first_child)
    wide = type(index)(index.vocab_sizes, index.tokens, pointers, index.tail)
    model = TableModel((3, 3, 3))
    a = beam_search(model, queries([1]), [index], beam=5)
    b = beam_search(model, queries([1]), [wide], beam=5)
    assert a.row.tolist() == b.row.tolist()
    mixed = beam_search(model, queries([1]), [index, wide], beam=5)
    assert mixed.valid.sum() == 6


def test_parts_that_do_not_belong_together_are_refused():
    index, _, _ = build(np.array([[0, 1]], np.uint16), (3, 2))
    other, _, _ = build(np.array([[0, 1]], np.uint16), (3, 4))
    with pytest.raises(StoreError, match="different vocabularies"):
        Walk([index, other])
    with pytest.raises(StoreError, match="no segment"):
        Walk([])
    with pytest.raises(StoreError, match="belong together"):
        beam_search(TableModel((3, 4)), queries([1]), [index])
    with pytest.raises(QueryError, match="mask of 5 items"):
        beam_search(TableModel((3, 2)), queries([1]), [index], [ItemMask.of(np.ones(5, bool))])
    with pytest.raises(QueryError, match="masks for"):
        beam_search(TableModel((3, 2)), queries([1]), [index], [None, None])


def test_float32_and_float64_models_agree():
    rng = np.random.default_rng(3)
    sizes = (3, 20, 20, 20)
    codes = np.stack([rng.integers(0, s, 3000) for s in sizes], 1).astype(np.uint16)
    index, _, _ = build(codes, sizes)
    a = beam_search(TableModel(sizes, torch.float32), queries([1, 2]), [index], beam=10)
    b = beam_search(TableModel(sizes, torch.float64), queries([1, 2]), [index], beam=10)
    assert a.row.tolist() == b.row.tolist()
    np.testing.assert_allclose(a.log_prob, b.log_prob, atol=1e-5)


def test_threads_may_search_at_the_same_time():
    rng = np.random.default_rng(0)
    sizes = (3, 30, 30, 30)
    codes = np.stack([rng.integers(0, s, 5000) for s in sizes], 1).astype(np.uint16)
    index, _, _ = build(codes, sizes)
    walk = Walk([index])
    model = TableModel(sizes)
    masks = [[ItemMask.of(rng.random(5000) < 0.3)] for _ in range(4)]

    def search(number: int) -> list:
        return beam_search(model, queries([number]), walk, masks[number % 4], beam=10).row.tolist()

    alone = [search(number) for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(search, range(24))) == alone


def test_kernels_compile_where_nothing_can_be_written(monkeypatch):
    from numba.core.caching import FunctionCache

    from ace_core.kernels.compiled import compiled

    def no_place(self, function):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(FunctionCache, "__init__", no_place)
    assert compiled(lambda a: a + 1)(1) == 2
