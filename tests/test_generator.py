"""The generator spells from the codebooks at first, and step by step exactly as all at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ace_core.config import GeneratorSettings, QuantizerSettings
from ace_core.errors import StoreError
from ace_core.generator.model import Generator
from ace_core.quantize.fit import fit_quantizer
from ace_core.quantize.quantizer import Quantizer
from ace_core.query import QueryBatch
from ace_core.space import unit_query

DIM, WIDTH, LAYERS, TOKENS = 16, 24, 3, 7
torch.set_num_threads(1)


def unit(rng: np.random.Generator, n: int) -> np.ndarray:
    x = rng.normal(size=(n, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def quantizer() -> Quantizer:
    rng = np.random.default_rng(0)
    x = unit(rng, 300) + 0.3 * np.eye(3, DIM, dtype=np.float32)[np.arange(300) % 3]
    settings = QuantizerSettings(coarse=8, fine_levels=2, fine_codes=16, epochs=1)
    return fit_quantizer(x, np.arange(300) % 3, settings)[0]


def queries(n: int, seed: int = 1) -> QueryBatch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, TOKENS + 1, n)
    return QueryBatch(
        unit_query(torch.from_numpy(unit(rng, n))),
        torch.from_numpy(rng.normal(size=(n, LAYERS, TOKENS, 24)).astype(np.float32)),
        torch.from_numpy(np.arange(TOKENS) < lengths[:, None]),
    )


def make(quantizer: Quantizer, *, trained: bool, **changes: object) -> Generator:
    torch.manual_seed(0)
    settings = GeneratorSettings(width=WIDTH, heads=4, layers=2).model_copy(update=changes)
    model = Generator(settings, quantizer, 24, LAYERS).eval()
    if trained:  # as after training: nothing left at its zero start
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p))
    return model


def random_codes(quantizer: Quantizer, n: int) -> torch.Tensor:
    rng = np.random.default_rng(5)
    return torch.from_numpy(np.stack([rng.integers(0, v, n) for v in quantizer.vocab_sizes], 1))


@torch.no_grad()
def test_before_training_spelling_is_exact_search_over_rebuilt_items(quantizer: Quantizer) -> None:
    model = make(quantizer, trained=False)
    query, codes = queries(4), random_codes(quantizer, 50)
    rebuilt = torch.from_numpy(quantizer.reconstruct(codes.numpy().astype(np.uint16)))
    expected = 20.0 * query.vector @ rebuilt.T
    one_shot = model.one_shot(query)
    spelled = sum(level[:, codes[:, i]] for i, level in enumerate(one_shot))
    forward = torch.stack(
        [
            sum(
                torch.log_softmax(logits, -1)[torch.arange(50), codes[:, i]]
                for i, logits in enumerate(model(query[torch.full((50,), q)], codes))
            )
            for q in range(4)
        ]
    )
    for scores in (spelled, forward):
        difference = scores - expected
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-3, rtol=0)


def test_searching_spells_as_training_does(quantizer: Quantizer) -> None:
    model, query = make(quantizer, trained=True), queries(4)
    trained = model.one_shot(query)
    with torch.no_grad():
        searched = model.one_shot(query)
    assert trained[1].requires_grad and not searched[1].requires_grad
    for a, b in zip(trained, searched, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("fine", [True, False])
@torch.no_grad()
def test_steps_equal_the_teacher_forced_pass(quantizer: Quantizer, coarse: bool, fine: bool) -> None:
    model = make(quantizer, trained=True, coarse_fusion=coarse, fine_fusion=fine)
    query, beams = queries(3), 5
    codes = random_codes(quantizer, 3 * beams).view(3, beams, -1)
    flat = query[torch.arange(3).repeat_interleave(beams)]
    expected = [torch.log_softmax(x, -1) for x in model(flat, codes.view(3 * beams, -1))]
    state = model.start(query)
    torch.testing.assert_close(state.modality_logp, expected[0].view(3, beams, -1)[:, 0])
    for level in range(1, model.levels):
        scores, state = model.step(state, codes[:, :, level - 1], None, level)
        torch.testing.assert_close(scores, expected[level].view(3, beams, -1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_parents_reorder_the_kept_keys_and_values(quantizer: Quantizer) -> None:
    model = make(quantizer, trained=True)
    query = queries(2)
    first = torch.tensor([[0, 1, 2], [0, 1, 2]])
    parents = torch.tensor([[2, 2, 0, 1], [1, 0, 0, 2]])
    second = random_codes(quantizer, 8)[:, 1].view(2, 4)
    _, state = model.step(model.start(query), first, None, 1)
    scores, _ = model.step(state, second, parents, 2)
    _, direct = model.step(model.start(query), first.gather(1, parents), None, 1)
    expected, _ = model.step(direct, second, None, 2)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    unordered, _ = model.step(_resized(model, query, first), second, None, 2)
    assert not torch.allclose(scores, unordered, atol=1e-3)


def _resized(model: Generator, query: QueryBatch, first: torch.Tensor):
    return model.step(model.start(query), first[:, [0, 1, 2, 0]], None, 1)[1]


@torch.no_grad()
def test_padding_is_never_read(quantizer: Quantizer) -> None:
    model = make(quantizer, trained=True)
    query = queries(3)
    assert query.hidden is not None and query.mask is not None
    noisy = QueryBatch(
        query.vector, torch.where(query.mask[:, None, :, None], query.hidden, torch.tensor(99.0)), query.mask
    )
    torch.testing.assert_close(model.refine(query), model.refine(noisy))
    other = QueryBatch(query.vector, query.hidden + 1.0, query.mask)
    assert not torch.allclose(model.refine(query), model.refine(other), atol=1e-3)


@torch.no_grad()
def test_virtual_queries_need_no_tokens(quantizer: Quantizer) -> None:
    model = make(quantizer, trained=True)
    query = QueryBatch(queries(3).vector)
    state = model.start(query)
    assert state.vector.shape == (3, DIM)
    scores, _ = model.step(state, torch.zeros(3, 2, dtype=torch.int64), None, 1)
    assert scores.shape == (3, 2, quantizer.vocab_sizes[1])
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(3, 2))


@torch.no_grad()
@pytest.mark.parametrize("switch", ["coarse_fusion", "fine_fusion"])
def test_each_fusion_switch_changes_the_model(quantizer: Quantizer, switch: str) -> None:
    full, without = make(quantizer, trained=True), make(quantizer, trained=True, **{switch: False})
    assert sum(p.numel() for p in without.parameters()) < sum(p.numel() for p in full.parameters())
    assert not torch.allclose(full.refine(queries(3)), without.refine(queries(3)), atol=1e-4)


@torch.no_grad()
def test_steering_takes_the_decoder_back_to_the_heads_in_a_search_only(quantizer: Quantizer) -> None:
    query, codes = queries(4), random_codes(quantizer, 4)
    followed, half, unsteered = (make(quantizer, trained=True, dropout=0.0, steering=s) for s in (1.0, 0.5, 0.0))
    for level in range(1, followed.levels):
        full, halved, none = (model(query, codes)[level] for model in (followed, half, unsteered))
        torch.testing.assert_close(halved, (full + none) / 2, atol=1e-3, rtol=1e-3)
        heads = unsteered.refine(query) @ torch.from_numpy(quantizer.codewords(level)).T
        scale = none[:, :1] / heads[:, :1]
        torch.testing.assert_close(none, scale * heads, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(full, none, atol=1e-2)
    for model in (followed, unsteered):  # what is trained is the whole correction
        model.train()
    for a, b in zip(followed(query, codes), unsteered(query, codes)):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_save_and_load_keep_every_score(quantizer: Quantizer, tmp_path) -> None:
    model = make(quantizer, trained=True)
    model.save(tmp_path)
    loaded = Generator.load(tmp_path)
    query, codes = queries(4), random_codes(quantizer, 4)
    for a, b in zip(model(query, codes), loaded(query, codes)):
        torch.testing.assert_close(a, b)
    assert loaded.vocab_sizes == quantizer.vocab_sizes
    (tmp_path / "generator.json").unlink()
    with pytest.raises(StoreError, match="cannot read the generator"):
        Generator.load(tmp_path)


def test_a_text_encoder_with_other_layers_is_refused(quantizer: Quantizer) -> None:
    query = queries(2)
    assert query.hidden is not None
    with pytest.raises(StoreError, match="text-encoder layers"):
        make(quantizer, trained=False).start(QueryBatch(query.vector, query.hidden[:, :2], query.mask))
