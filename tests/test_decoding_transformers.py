"""Beam search equals `transformers.generate` with a prefix function, on the same weights."""

import copy

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from ace_core.decoding import beam_search
from ace_core.filters import ItemMask
from ace_core.query import QueryBatch
from ace_core.tensor_walk import TensorWalk
from benchmarks.bart import BartSpeller, generate, random_bart
from benchmarks.rivals import DictTrie
from tests.decoding_reference import build

SIZES = (3, 12, 12, 12)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, s, 600) for s in SIZES], 1).astype(np.uint16)
    index, ordered, _ = build(codes, SIZES)
    bart = random_bart(SIZES, width=32)
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    query = QueryBatch(torch.zeros(3, 4), torch.randn(3, 1, 7, 32), mask)
    return index, ordered, bart, BartSpeller(bart, SIZES), query


def _allowed_by(trie, offsets):
    def allowed(_, sent):
        prefix = [t - o for t, o in zip(sent.tolist()[1:], offsets)]
        return [t + offsets[len(prefix)] for t in trie.children(prefix)]

    return allowed


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_the_same_identifiers_in_the_same_order(world, share):
    index, ordered, bart, speller, query = world
    allowed = np.random.default_rng(1).random(len(ordered)) < share
    trie = DictTrie(ordered[allowed])
    with torch.inference_mode():
        tokens, scores = generate(bart, query, 6, len(SIZES), _allowed_by(trie, speller.offsets))
    found = beam_search(speller, query, [index], [ItemMask.of(allowed)], beam=6, scoring="children", limit=1000)
    for q in range(3):
        ours = {tuple(c): p for c, p in zip(found.codes[q].tolist(), found.log_prob[q]) if np.isfinite(p)}
        theirs = [tuple((row - torch.tensor(speller.offsets)).tolist()) for row in tokens[q]]
        assert list(ours) == theirs
        np.testing.assert_allclose(list(ours.values()), scores[q].numpy(), atol=1e-4)


@pytest.mark.parametrize("scoring", ["vocabulary", "children"])
@pytest.mark.parametrize("share", [0.02, 0.2, 1.0])
def test_leaving_branches_of_one_item_alone_changes_nothing(world, scoring, share):
    index, ordered, _, speller, query = world
    masks = [ItemMask.of(np.random.default_rng(2).random(len(ordered)) < share)]
    early, stepped = (  # on an accelerator's walk, all rows are stepped
        beam_search(speller, query, walk, masks, beam=6, limit=600, scoring=scoring)
        for walk in ([index], TensorWalk([index]))
    )
    for q in range(3):
        ok = early.valid[q]
        assert early.row[q][ok].tolist() == stepped.row[q][stepped.valid[q]].tolist()
        np.testing.assert_allclose(early.log_prob[q][ok], stepped.log_prob[q][ok], atol=1e-4)


def test_in_double_precision_it_is_transformers_own_forward_pass(world):
    index, ordered, bart, _, query = world
    double = copy.deepcopy(bart).double()
    speller = BartSpeller(double, SIZES)
    exact = QueryBatch(query.vector.double(), query.hidden.double(), query.mask)
    found = beam_search(speller, exact, [index], beam=600, limit=600)
    tokens = torch.from_numpy(ordered.astype(np.int64)) + torch.tensor(speller.offsets)
    read = torch.cat([torch.full((len(tokens), 1), bart.config.decoder_start_token_id), tokens[:, :-1]], 1)
    for q in range(3):
        repeated = exact.hidden[q, -1].expand(len(tokens), -1, -1)
        with torch.inference_mode():
            logits = double(
                encoder_outputs=BaseModelOutput(last_hidden_state=repeated), decoder_input_ids=read,
                attention_mask=exact.mask[q].long().expand(len(tokens), -1),
            ).logits  # fmt: skip
        total = np.zeros(len(tokens))
        for level, (offset, size) in enumerate(zip(speller.offsets, SIZES)):
            own = torch.log_softmax(logits[:, level, offset : offset + size], -1)
            total += own.gather(1, tokens[:, level : level + 1] - offset)[:, 0].numpy()
        np.testing.assert_allclose(found.log_prob[q], np.sort(total)[::-1], rtol=1e-6)
        np.testing.assert_allclose(total[found.row[q]], np.sort(total)[::-1], rtol=1e-9)


def test_eight_bits_score_nearly_the_same(world):
    index, _, bart, speller, query = world
    exact = beam_search(speller, query, [index], beam=600, limit=600)
    rounded = beam_search(BartSpeller(bart, SIZES, eight_bit=True), query, [index], beam=600, limit=600)
    for q in range(3):
        a, b = np.argsort(exact.row[q]), np.argsort(rounded.row[q])
        difference = exact.log_prob[q][a] - rounded.log_prob[q][b]
        assert 0 < np.abs(difference).max() < 0.25 * exact.log_prob[q].std()
