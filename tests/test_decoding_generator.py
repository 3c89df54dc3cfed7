"""The decoder with the product's own generator: exhaustive, and the same in any batch."""

import numpy as np
import pytest
import torch

from ace_core.decoding import beam_search, one_shot_search, verified_search
from ace_core.filters import ItemMask
from ace_core.generator.model import Generator
from ace_core.query import QueryBatch
from ace_core.tensor_walk import TensorWalk
from tests.small_generator import ITEMS, SIZES, small_world


@pytest.fixture(scope="module")
def world():
    return small_world()


def exhaustive(generator: Generator, query: QueryBatch, ordered: np.ndarray) -> np.ndarray:
    """(n, items, levels) log-probabilities of every item, teacher-forced one query at a time."""
    codes = torch.from_numpy(ordered.astype(np.int64))
    scored = []
    with torch.inference_mode():
        for q in range(len(query)):
            logits = generator(query[torch.full((len(codes),), q)], codes)
            levels = [torch.log_softmax(t, -1).gather(1, codes[:, i : i + 1])[:, 0] for i, t in enumerate(logits)]
            scored.append(torch.stack(levels, 1))
    return torch.stack(scored).numpy()


@pytest.mark.parametrize("search", ["beam", "verify", "tensors"])
def test_as_wide_as_the_corpus_it_is_exhaustive(world, search):
    index, ordered, generator, query = world
    if search == "verify":
        found = verified_search(generator, query, [index], draft=ITEMS)
    else:
        segments = TensorWalk([index]) if search == "tensors" else [index]
        found = beam_search(generator, query, segments, beam=ITEMS, limit=ITEMS)
    oracle = exhaustive(generator, query, ordered)
    for q in range(len(query)):
        order = np.argsort(found.row[q])
        assert found.row[q][order].tolist() == list(range(ITEMS))
        np.testing.assert_allclose(found.level_log_prob[q][order], oracle[q], atol=2e-4)
        assert (np.diff(found.log_prob[q]) <= 0).all()


@pytest.mark.parametrize("scoring", ["vocabulary", "children"])
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_leaving_branches_of_one_item_alone_changes_nothing(world, scoring, share):
    index, _, generator, query = world
    masks = [ItemMask.of(np.random.default_rng(int(100 * share)).random(ITEMS) < share)]
    early, stepped = (  # on an accelerator's walk, all rows are stepped
        beam_search(generator, query, walk, masks, beam=6, limit=ITEMS, scoring=scoring)
        for walk in ([index], TensorWalk([index]))
    )
    for q in range(len(query)):
        ok = early.valid[q]
        assert early.row[q][ok].tolist() == stepped.row[q][stepped.valid[q]].tolist()
        np.testing.assert_allclose(early.level_log_prob[q][ok], stepped.level_log_prob[q][ok], atol=2e-4)


@pytest.mark.parametrize("search", [beam_search, one_shot_search, verified_search])
def test_alone_or_in_a_batch_the_same(world, search):
    index, _, generator, query = world
    width = {"beam": 7} if search is beam_search else {"draft": 7}
    mask = [ItemMask.of(np.random.default_rng(3).random(ITEMS) < 0.4)]
    together = search(generator, query, [index], mask, **width)
    for q in range(len(query)):
        alone = search(generator, query[slice(q, q + 1)], [index], mask, **width)
        assert together.row[q][together.valid[q]].tolist() == alone.row[0].tolist()
        np.testing.assert_allclose(together.log_prob[q][together.valid[q]], alone.log_prob[0], atol=1e-4)


def test_one_shot_ranks_by_the_sum_over_levels(world):
    index, ordered, generator, query = world
    found = one_shot_search(generator, query, [index], draft=ITEMS)
    with torch.inference_mode():
        tables = [t.numpy() for t in generator.one_shot(query)]
    for q in range(len(query)):
        sums = sum(tables[level][q][ordered[:, level]] for level in range(len(SIZES)))
        np.testing.assert_allclose(found.log_prob[q], sums[found.row[q]], rtol=1e-5)
        assert sorted(found.row[q].tolist()) == list(range(ITEMS))
