"""How much of the learned correction queries get."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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


TOKENS = np.arange(ITEMS) % 2


def along(x: torch.Tensor, queries: list[QueryBatch], gold: np.ndarray, size: np.ndarray):
    """A correction that moves each query towards its item (``size`` > 0) or away from it."""
    asked = torch.cat([batch.vector for batch in queries])
    own = {tuple(q.tolist()): x[g] * float(s) for q, g, s in zip(asked, gold, size)}
    return lambda batch: torch.stack([own[tuple(q.tolist())] for q in batch.vector])


@pytest.mark.parametrize("size, chosen", [(0.7, {0.75, 1.0}), (-0.7, {0.0})])
def test_a_correction_is_followed_as_far_as_it_helps(made, monkeypatch, size, chosen) -> None:
    model, x, queries, gold = made
    monkeypatch.setattr(model, "correction", along(x, queries, gold, np.full(90, size)))
    shares = choose_refinement(model, queries, gold, x.numpy(), np.zeros(ITEMS, int))
    assert shares.keys() == {"image"} and shares["image"] in chosen
    assert float(model.refinement[0]) in chosen


def test_each_modality_gets_its_own_share(made, monkeypatch) -> None:
    model, x, queries, gold = made
    size = np.where(TOKENS[gold] == 0, 0.7, -0.7)
    monkeypatch.setattr(model, "correction", along(x, queries, gold, size))
    shares = choose_refinement(model, queries, gold, x.numpy(), TOKENS)
    assert shares["image"] >= 0.75 and shares["audio"] == 0


def test_no_kind_of_query_pays_for_the_other(made, monkeypatch) -> None:
    model, x, queries, gold = made
    trained = np.arange(90) < 60
    monkeypatch.setattr(model, "correction", along(x, queries, gold, np.where(trained, 0.7, -0.7)))
    arguments = (model, queries, gold, x.numpy(), np.zeros(ITEMS, int))
    assert choose_refinement(*arguments)["image"] > 0, "most queries gain"
    assert choose_refinement(*arguments, trained=trained)["image"] == 0
    assert choose_refinement(*arguments, trained=np.ones(90, bool))["image"] == 0, "nobody asks for the other kind"


def test_a_query_gets_the_share_of_the_modality_that_it_asks_for(made) -> None:
    model, _, queries, _ = made
    query = queries[0]
    with torch.no_grad():
        model._refine_out.weight.normal_(std=0.2)
        model._modality.weight.normal_(std=50.0)
        says = model._modality_logits(query.vector).argmax(1)
        assert len(says.unique()) > 1
        model.refinement.copy_(torch.tensor([0.0, 0.5, 1.0]))
        expected = unit_query(query.vector + model.refinement[says][:, None] * model.correction(query))
        sure = model._modality_logits(query.vector).softmax(1).amax(1) > 1 - 1e-6
        assert sure.sum() > 5
        torch.testing.assert_close(model.refine(query)[sure], expected[sure])


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


def test_without_validation_queries_stay_as_they_are_aligned(made) -> None:
    model, x, _, _ = made
    assert choose_refinement(model, [], np.empty(0, np.int64), x.numpy(), TOKENS) == {"image": 0.0, "audio": 0.0}
    assert not model.refinement.any()


def test_a_generator_with_one_share_for_all_is_still_read(made, tmp_path) -> None:
    model = made[0]
    model.save(tmp_path)
    file = tmp_path / "generator.safetensors"
    save_file(load_file(str(file)) | {"refinement": torch.tensor(0.5)}, str(file))
    assert Generator.load(tmp_path).refinement.tolist() == [0.5, 0.5, 0.5]


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
