"""One-shot and verified search: against a plain reference, over random corpora, masks and segments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_core.constraint import ConstraintIndex
from ace_core.decoding import beam_search, one_shot_search, verified_search
from ace_core.filters import ItemMask
from ace_core.identifiers import sort_order
from ace_core.walk import Walk, draft_widths
from tests.decoding_reference import TableModel, agree, build, corpora, leaves, queries

few = settings(deadline=None, max_examples=60)  # the first example may wait for the kernels to compile


@few
@given(corpora(), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 2**31))
def test_one_shot_and_verify_score_every_identifier_of_a_wide_draft(corpus, share, seed):
    codes, sizes = corpus
    index, ordered, _ = build(codes, sizes)
    allowed = np.random.default_rng(seed).random(len(codes)) < share
    model = TableModel(sizes)
    masks = [ItemMask.of(allowed)]
    drafted = one_shot_search(model, queries([1, 2]), [index], masks, draft=100)
    verified = verified_search(model, queries([1, 2]), [index], masks, draft=100)
    spelled = beam_search(model, queries([1, 2]), [index], masks, beam=100)
    tables = [t.numpy() for t in model.one_shot(queries([1, 2]))]
    for q in range(2):
        exist = {tuple(c) for c in ordered[allowed].tolist()}
        sums = {c: sum(tables[level][q, t] for level, t in enumerate(c)) for c in exist}
        agree(leaves(drafted, q), sorted(sums.items(), key=lambda item: -item[1]))
        agree(leaves(verified, q), leaves(spelled, q))
        assert verified.row[q].tolist() == spelled.row[q].tolist()


@few
@given(
    corpora(), st.lists(st.integers(0, 2), min_size=40, max_size=40), st.sampled_from([1, 2, 3, 7]),
    st.sampled_from([None, 0.0, 0.2, 1.0]), st.integers(0, 2**31),
)  # fmt: skip
def test_a_draft_is_a_beam_whose_tokens_do_not_depend_on_each_other(corpus, part_of, draft, share, seed):
    codes, sizes = corpus
    part_of = np.array(part_of[: len(codes)], int)
    alive = np.random.default_rng(seed).random(len(codes)) < (1.0 if share is None else share)
    whole, ordered, order = build(codes, sizes)
    split = [build(codes[part_of == p], sizes) for p in range(3)]
    masks = [ItemMask.of(alive[part_of == p][o]) for p, (_, _, o) in enumerate(split)]
    model = TableModel(sizes)
    tables = [t.numpy() for t in model.one_shot(queries([1, 2]))]
    exist = sorted({tuple(c) for c in ordered[alive[order]].tolist()})
    args = {"draft": draft, "limit": 1000}
    one = Walk([whole])
    parts = Walk([s for s, _, _ in split])
    alone = one_shot_search(model, queries([1, 2]), one, None if share is None else [ItemMask.of(alive[order])], **args)
    joint = one_shot_search(model, queries([1, 2]), parts, masks, **args)
    for q in range(2):
        for found, depth in ((alone, one.depth), (joint, parts.depth)):
            rows = [((), 0.0)] if exist else []
            for level, width in enumerate(draft_widths(draft, len(sizes), depth)):
                following = [
                    (score + tables[level][q, t], (*prefix, t))
                    for prefix, score in rows
                    for t in {i[level] for i in exist if i[:level] == prefix}
                ]
                every = depth <= level < len(sizes) - 1
                kept = sorted(following, reverse=True)[: None if every else width]
                rows = [(prefix, score) for score, prefix in kept]
            agree(leaves(found, q), rows)
            here = found.valid[q]
            assert here.sum() == sum((ordered[alive[order]] == prefix).all(1).sum() for prefix, _ in rows)
            np.testing.assert_allclose(found.level_log_prob[q].sum(-1), found.log_prob[q], rtol=1e-4)
        rows = alone.row[q][alone.valid[q]]
        spelled = dict(leaves(alone, q))
        assert set(rows.tolist()) == {i for i in np.flatnonzero(alive[order]) if tuple(ordered[i]) in spelled}


@few
@given(corpora(), st.lists(st.integers(0, 2), min_size=40, max_size=40), st.sampled_from([1, 2, 7]), st.integers(0, 9))
def test_segments_draft_what_one_rebuilt_index_does(corpus, part_of, draft, seed):
    codes, sizes = corpus
    part_of = np.array(part_of[: len(codes)], int)
    order = np.argsort(part_of, kind="stable")  # equal identifiers stay in the order of segments
    whole = ConstraintIndex.build(codes[order][sort_order(codes[order], sizes)], sizes)
    parts = [codes[part_of == p] for p in range(3)]
    segments = [ConstraintIndex.build(part[sort_order(part, sizes)], sizes) for part in parts]
    model = TableModel(sizes)
    joint = one_shot_search(model, queries([seed]), segments, draft=draft, limit=1000)
    alone = one_shot_search(model, queries([seed]), [whole], draft=draft, limit=1000)
    agree(leaves(joint, 0), leaves(alone, 0))
    assert joint.valid.sum() == alone.valid.sum()


def test_a_narrow_draft_is_what_is_verified():
    rng = np.random.default_rng(0)
    sizes = (3, 20, 20)
    codes = np.stack([rng.integers(0, s, 400) for s in sizes], 1).astype(np.uint16)
    index, _, _ = build(codes, sizes)
    model = TableModel(sizes)
    drafted = one_shot_search(model, queries([1]), [index], draft=12)
    verified = verified_search(model, queries([1]), [index], draft=12)
    assert {i for i, _ in leaves(drafted, 0)} == {i for i, _ in leaves(verified, 0)}
    assert len(leaves(drafted, 0)) == 12
    assert (np.diff(verified.log_prob[0]) <= 0).all()
    for identifier, log_prob in leaves(verified, 0):
        exact = sum(model._log_probs(1, identifier[:m])[identifier[m]] for m in range(3))
        assert log_prob == pytest.approx(exact, abs=1e-5)
