"""A beam's candidates and drafted ones as one list."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_core.candidates import Candidates
from ace_core.config import SearchSettings
from ace_core.decoding import beam_search, one_shot_search, search_candidates
from ace_core.filters import ItemMask
from ace_core.pool import pooled
from tests.decoding_reference import TableModel, build, corpora, queries

FIELDS = ("segment", "row", "log_prob", "level_log_prob", "codes")


def found(candidates: Candidates, q: int) -> dict[tuple[int, int], tuple]:
    """What is known of each item of a query: {(segment, row): (log-probability, of each level, identifier)}."""
    out = {}
    for column in np.flatnonzero(candidates.valid[q]):
        segment, row, *known = (getattr(candidates, name)[q, column] for name in FIELDS)
        assert (segment, row) not in out  # no item twice
        out[int(segment), int(row)] = (float(known[0]), tuple(known[1].tolist()), tuple(known[2].tolist()))
    return out


@settings(deadline=None, max_examples=40)
@given(corpora(min_items=1), st.sampled_from([1, 3, 50]), st.sampled_from([1, 5, 200]), st.integers(0, 99))
def test_a_pool_is_the_union_with_the_beams_own_figures(corpus, beam, draft, seed):
    codes, sizes = corpus
    middle = len(codes) // 2
    indexes = [build(part, sizes)[0] for part in (codes[:middle], codes[middle:]) if len(part)]
    model, asked = TableModel(sizes), queries([seed, seed + 1])
    spelled = beam_search(model, asked, indexes, beam=beam)
    drafted = one_shot_search(model, asked, indexes, draft=draft)
    together = pooled(spelled, drafted)
    for q in range(2):
        assert found(together, q) == {**found(drafted, q), **found(spelled, q)}
        count = int(together.valid[q].sum())
        assert together.valid[q, :count].all()  # what is there comes first
        assert (np.diff(together.log_prob[q, :count]) <= 0).all()
        assert np.isneginf(together.log_prob[q, count:]).all()


def test_a_narrow_beam_holds_what_a_wide_draft_finds():
    rng = np.random.default_rng(0)
    sizes = (3, 20, 20, 20)
    codes = np.stack([rng.integers(0, s, 2000) for s in sizes], 1).astype(np.uint16)
    index, _, _ = build(codes, sizes)
    model, asked = TableModel(sizes), queries([1, 2, 3])
    wide = one_shot_search(model, asked, [index], draft=200)
    narrow = search_candidates(model, asked, [index], settings=SearchSettings(mode="beam", beam=2))
    for q in range(3):
        assert set(found(narrow, q)) >= set(found(wide, q))


def test_nothing_and_nothing_is_nothing():
    codes = np.array([[0, 1], [0, 2]], np.uint16)
    index, _, _ = build(codes, (3, 4))
    nobody = [ItemMask.of(np.zeros(2, bool))]
    none = beam_search(TableModel((3, 4)), queries([1]), [index], nobody, beam=2)
    assert pooled(none, none).valid.shape == (1, 0)
    one = beam_search(TableModel((3, 4)), queries([1]), [index], beam=2)
    assert pooled(one, one).log_prob == pytest.approx(one.log_prob)
    assert found(pooled(none, one), 0) == found(pooled(one, none), 0) == found(one, 0)
