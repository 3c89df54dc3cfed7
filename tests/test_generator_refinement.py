"""How much of the learned correction queries get."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ace_core.config import GeneratorSettings, QuantizerSettings
from ace_core.generator.data import TrainingData
from ace_core.generator.model import Generator
from ace_core.generator.refinement import choose_refinement
from ace_core.generator.training import fit_generator
from ace_core.quantize.fit import fit_quantizer
from ace_core.query import QueryBatch
from ace_core.space import unit_query

DIM, ITEMS = 16, 200


@pytest.fixture
def made() -> tuple[Generator, torch.Tensor, list[QueryBatch], np.ndarray]:
    """A generator, items, and queries at some distance from theirs."""
    rng = np.random.default_rng(0)
    x = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(ITEMS, DIM)).astype(np.float32)), dim=-1)
    settings = QuantizerSettings(coarse=8, fine_levels=2, fine_codes=16, epochs=0)
    quantizer, _ = fit_quantizer(x.numpy(), np.zeros(ITEMS, int), settings)
    torch.manual_seed(0)
    model = Generator(GeneratorSettings(width=16, heads=2, layers=1, epochs=1, batch_size=50), quantizer, 8, 2).eval()
    gold = rng.permutation(ITEMS)[:90]
    queries = unit_query(x[gold] + 0.5 * torch.from_numpy(rng.normal(size=(90, DIM)).astype(np.float32)))
    return model, x, [QueryBatch(queries[i : i + 40]) for i in range(0, 90, 40)], gold


@pytest.mark.parametrize("size, chosen", [(0.7, {0.75, 1.0}), (-0.7, {0.0})])
def test_a_correction_is_followed_as_far_as_it_helps(made, monkeypatch, size, chosen) -> None:
    model, x, queries, gold = made
    own = {tuple(q.tolist()): x[g] for q, g in zip(torch.cat([b.vector for b in queries]), gold)}

    def towards_its_item(batch: QueryBatch) -> torch.Tensor:
        return size * torch.stack([own[tuple(q.tolist())] for q in batch.vector])

    monkeypatch.setattr(model, "correction", towards_its_item)
    assert choose_refinement(model, queries, gold, x.numpy()) in chosen
    assert float(model.refinement) in chosen


def test_what_is_chosen_is_what_is_searched_with_and_kept(made, tmp_path) -> None:
    model, _, queries, _ = made
    with torch.no_grad():
        model._refine_out.weight.normal_(std=0.2)
        full = model.refine(queries[0])
        torch.testing.assert_close(full, unit_query(queries[0].vector + model.correction(queries[0])))
        model.refinement.fill_(0.25)
        some = model.refine(queries[0])
        torch.testing.assert_close(some, unit_query(queries[0].vector + 0.25 * model.correction(queries[0])))
        model.save(tmp_path)
        torch.testing.assert_close(Generator.load(tmp_path).refine(queries[0]), some)
    assert not torch.allclose(full, some, atol=1e-3)


def test_without_validation_nothing_is_chosen(made) -> None:
    model, x, _, _ = made
    assert choose_refinement(model, [], np.empty(0, np.int64), x.numpy()) == 1.0


def test_without_captions_queries_stay_as_they_are_aligned(made) -> None:
    model, x, queries, _ = made
    none = TrainingData(
        x.numpy(), np.zeros((ITEMS, 4), np.uint16), np.zeros((0, DIM), np.float32), np.zeros((0, 2, 3, 8), np.float16),
        np.zeros((0, 3), bool), np.zeros(0, np.int64), 15.0,
    )  # fmt: skip
    trained, _ = fit_generator(model, none, model.settings)
    with torch.no_grad():
        assert trained.correction(queries[0]).abs().max() > 1e-4
        torch.testing.assert_close(trained.refine(queries[0]), queries[0].vector)
