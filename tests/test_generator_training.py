"""Training of the generator: targets, signals, resume, workers."""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ace_core.collective import LocalCollective, TorchCollective, average_gradients, share
from ace_core.config import GeneratorSettings, QuantizerSettings
from ace_core.errors import CorpusError, SettingsError
from ace_core.fitting import Checkpoint, FitHooks, Progress, warmup_cosine
from ace_core.generator.data import TrainingData, caption_queries, epoch_batches, virtual_queries
from ace_core.generator.losses import item_targets, level_targets, r_drop, soft_cross_entropy
from ace_core.generator.model import Generator
from ace_core.generator.training import fit_generator
from ace_core.quantize.fit import fit_quantizer
from ace_core.quantize.quantizer import Quantizer
from ace_core.space import unit_query

DIM, TEXT, LAYERS, TOKENS = 16, 12, 2, 5
SMALL = GeneratorSettings(width=16, heads=2, layers=1, epochs=2, batch_size=80, r_drop=0.1, learning_rate=3e-3)
torch.set_num_threads(1)


def corpus(items: int = 120, captions: int = 160, seed: int = 0) -> tuple[Quantizer, TrainingData]:
    """Items, and captions whose tokens say which item they mean while their vectors are poor."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(items, DIM)).astype(np.float32)
    x[:, :-1] /= np.linalg.norm(x[:, :-1], axis=1, keepdims=True)
    x[:, -1] *= 0.05
    quantizer, _ = fit_quantizer(
        x, np.zeros(items, int), QuantizerSettings(coarse=8, fine_levels=2, fine_codes=16, epochs=0)
    )
    rows = rng.integers(0, items // 2, captions)
    queries = x[rows] + rng.normal(size=(captions, DIM)).astype(np.float32) * 0.4
    read = rng.normal(size=(DIM, TEXT)).astype(np.float32)
    lengths = rng.integers(2, TOKENS + 1, captions)
    hidden = np.repeat(np.repeat((x[rows] @ read)[:, None, None], LAYERS, 1), TOKENS, 2).astype(np.float16)
    return quantizer, TrainingData(
        vectors=x,
        codes=quantizer.assign(x, np.zeros(items, int)),
        query_vectors=unit_query(torch.from_numpy(queries)).numpy(),
        hidden=hidden,
        mask=np.arange(TOKENS) < lengths[:, None],
        rows=rows.astype(np.int64),
        teacher_scale=15.0,
        plain_vectors=x,
    )


def fresh(quantizer: Quantizer, settings: GeneratorSettings = SMALL) -> Generator:
    torch.manual_seed(0)
    return Generator(settings, quantizer, TEXT, LAYERS)


def weights(model: Generator) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


# -- targets --------------------------------------------------------------------------------------------------------


def test_item_targets_split_their_mass() -> None:
    own = torch.tensor([[True, False, True, False]])
    similarity = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    hard = item_targets(own, similarity, 10.0, 0.0)
    torch.testing.assert_close(hard, torch.tensor([[0.5, 0.0, 0.5, 0.0]]))
    mixed = item_targets(own, similarity, 10.0, 0.5)
    torch.testing.assert_close(mixed, 0.5 * hard + 0.5 * torch.softmax(10 * similarity, -1))


def test_level_targets_are_the_conditional_distributions() -> None:
    codes = torch.tensor([[[0, 1, 2], [0, 1, 3], [0, 2, 2], [1, 0, 0]]])
    target = torch.tensor([[0.1, 0.3, 0.4, 0.2]])
    first, second, third = level_targets(target, codes, torch.tensor([[0, 1, 3]]), (2, 3, 4))
    torch.testing.assert_close(first, torch.tensor([[0.8, 0.2]]))
    torch.testing.assert_close(second, torch.tensor([[0.0, 0.5, 0.5]]))
    torch.testing.assert_close(third, torch.tensor([[0.0, 0.0, 0.25, 0.75]]))


def test_soft_cross_entropy_and_r_drop() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]])
    hard = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(
        soft_cross_entropy(logits, hard), torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]))
    )
    p, q = (torch.softmax(torch.tensor([[a, 0.0]]), -1) for a in (1.0, -1.0))
    expected = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    torch.testing.assert_close(r_drop([a], [b]), expected)
    assert float(r_drop([a], [a])) == 0


# -- data -----------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_caption_once_in_batches_of_like_length() -> None:
    _, data = corpus()
    batches = list(epoch_batches(data, 16, seed=1, epoch=0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(160))
    spread = np.mean([np.ptp(data.mask[b].sum(1)) for b in batches])
    assert spread < np.ptp(data.mask.sum(1)) / 2
    again, other = list(epoch_batches(data, 16, 1, 0)), list(epoch_batches(data, 16, 1, 1))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again))
    assert not all(np.array_equal(a, b) for a, b in zip(batches, other))


def test_caption_queries_keep_the_order_asked_for() -> None:
    _, data = corpus()
    chosen = np.array([7, 3, 150, 3])
    query = caption_queries(data, chosen, "cpu")
    longest = int(data.mask[chosen].sum(1).max())
    assert query.hidden is not None and query.mask is not None and query.hidden.shape[2] == longest
    np.testing.assert_array_equal(query.hidden.numpy(), data.hidden[chosen][:, :, :longest].astype(np.float32))
    np.testing.assert_array_equal(query.vector.numpy(), data.query_vectors[chosen])


def test_virtual_queries_lie_as_far_as_told() -> None:
    x = unit_query(torch.randn(50, DIM))
    rows, draw = torch.arange(50), torch.Generator().manual_seed(0)
    exact = virtual_queries(x, rows, None, 0.0, draw).vector
    torch.testing.assert_close(exact, x)
    near, far = (virtual_queries(x, rows, None, noise, draw).vector for noise in (0.3, 2.0))
    assert float((near * x).sum(1).mean()) > float((far * x).sum(1).mean()) + 0.3
    gaps = torch.zeros(1, DIM)
    gaps[0, 0] = 100.0
    shifted = virtual_queries(x, rows, gaps, 1.0, draw).vector
    torch.testing.assert_close(shifted[:, 0], torch.ones(50), atol=1e-3, rtol=0)
    torch.testing.assert_close(shifted[:, -1], torch.ones(50))


def test_arrays_that_do_not_fit_are_refused() -> None:
    _, data = corpus()
    with pytest.raises(CorpusError, match="do not fit together"):
        TrainingData(data.vectors, data.codes, data.query_vectors[:5], data.hidden, data.mask, data.rows, 10.0)
    with pytest.raises(CorpusError, match="identifiers"):
        TrainingData(data.vectors[:5], data.codes, data.query_vectors, data.hidden, data.mask, data.rows, 10.0)


# -- the fit --------------------------------------------------------------------------------------------------------


def test_training_reads_the_tokens_and_finds_better_than_the_vectors() -> None:
    quantizer, data = corpus()
    settings = SMALL.model_copy(update={"epochs": 25, "dropout": 0.0, "r_drop": 0.0, "virtual_queries": 0.1})
    seen: list[Progress] = []
    model, report = fit_generator(fresh(quantizer), data, settings, hooks=FitHooks(on_progress=seen.append))
    assert report.final < 0.8 * np.mean(report.losses[:5])
    assert seen[-1].step == seen[-1].total == len(report.losses)
    query = caption_queries(data, np.arange(160), "cpu")
    with torch.inference_mode():
        refined = model.refine(query)
    gold = torch.from_numpy(data.rows)
    items = torch.from_numpy(data.vectors)

    def recall(vectors: torch.Tensor) -> float:
        return float(((vectors @ items.T).argmax(1) == gold).float().mean())

    assert recall(refined) > recall(query.vector) + 0.1


def test_resume_continues_with_an_equal_loss_curve() -> None:
    quantizer, data = corpus()
    saved: list[Checkpoint] = []
    hooks = FitHooks(save_checkpoint=saved.append, checkpoint_seconds=0)
    whole, report = fit_generator(fresh(quantizer), data, SMALL, hooks=hooks)
    assert len(saved) == len(report.losses)
    middle = saved[len(saved) // 2]
    torch.manual_seed(99)
    resumed, again = fit_generator(
        Generator(SMALL, quantizer, TEXT, LAYERS), data, SMALL, hooks=FitHooks(resume=middle)
    )
    np.testing.assert_allclose(again.losses, report.losses, rtol=1e-5)
    torch.testing.assert_close(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    "change",
    [
        {"r_drop": 0.0},
        {"virtual_queries": 0.0},
        {"virtual_noise": 0.0},
        {"soft_targets": 0.0},
        {"item_smoothing": 0.9},
        {"item_loss": 0.0},
        {"sharpness": 3.0},
        {"candidates": 16},
        {"batch_size": 40},
        {"learning_rate": 1e-4},
        {"weight_decay": 5.0},
        {"dropout": 0.5},
        {"epochs": 1},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_setting_changes_the_fit(change: dict[str, float], reference_fit) -> None:
    quantizer, data, reference = reference_fit
    settings = SMALL.model_copy(update=change)
    model, _ = fit_generator(fresh(quantizer, settings), data, settings)
    assert not torch.allclose(weights(model), reference, atol=1e-5)


@pytest.fixture(scope="module")
def reference_fit() -> tuple[Quantizer, TrainingData, torch.Tensor]:
    quantizer, data = corpus()
    model, _ = fit_generator(fresh(quantizer), data, SMALL)
    return quantizer, data, weights(model)


def test_accumulated_parts_equal_one_batch() -> None:
    quantizer, data = corpus()
    plain = SMALL.model_copy(update={"dropout": 0.0, "r_drop": 0.0, "virtual_queries": 0.0, "soft_targets": 0.0})
    _, whole = fit_generator(fresh(quantizer), data, plain)
    _, parts = fit_generator(fresh(quantizer), data, plain.model_copy(update={"accumulate": 4}))
    np.testing.assert_allclose(parts.losses[0], whole.losses[0], rtol=1e-5)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=2e-2)
    _, smaller = fit_generator(fresh(quantizer), data, plain.model_copy(update={"batch_size": 20}))
    assert abs(smaller.losses[0] - whole.losses[0]) > 1e-2


def test_a_corpus_without_captions_is_trained_on_virtual_queries() -> None:
    quantizer, data = corpus()
    none = TrainingData(
        data.vectors, data.codes, np.zeros((0, DIM), np.float32), np.zeros((0, LAYERS, TOKENS, TEXT), np.float16),
        np.zeros((0, TOKENS), bool), np.zeros(0, np.int64), 15.0,
    )  # fmt: skip
    model, report = fit_generator(fresh(quantizer), none, SMALL.model_copy(update={"epochs": 20}))
    assert report.final < np.mean(report.losses[:3])
    assert not torch.allclose(weights(model), weights(fresh(quantizer)))


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    curve = [warmup_cosine(i, 100) for i in range(100)]
    assert curve[0] < curve[4] and max(curve) == 1.0 and curve[-1] < 0.01
    assert all(a >= b for a, b in pairwise(curve[5:]))


# -- several workers ------------------------------------------------------------------------------------------------


def _worker(rank: int, folder: str) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    collective = TorchCollective()
    total = collective.all_reduce(torch.tensor([1.0 + rank]))
    same = collective.broadcast(torch.tensor([7.0 + rank]))
    layer = torch.nn.Linear(1, 1)
    if rank == 0:
        layer.weight.grad = torch.full((1, 1), 4.0)
    average_gradients(layer.parameters(), collective)
    quantizer, data = corpus()
    settings = SMALL.model_copy(update={"dropout": 0.0, "r_drop": 0.0})
    model, report = fit_generator(fresh(quantizer), data, settings, collective=collective)
    torch.save(
        {
            "total": total, "same": same, "grad": layer.weight.grad, "weights": weights(model),
            "losses": torch.tensor(report.losses),
        },
        f"{folder}/{rank}.pt",
    )  # fmt: skip
    dist.destroy_process_group()


def test_two_workers_train_the_same_model_together() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(folder,), nprocs=2)
        first, second = (torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in (0, 1))
    assert float(first["total"]) == float(second["total"]) == 3.0
    assert float(first["same"]) == float(second["same"]) == 7.0
    assert float(first["grad"]) == float(second["grad"]) == 2.0
    torch.testing.assert_close(first["weights"], second["weights"])
    torch.testing.assert_close(first["losses"], second["losses"])
    quantizer, data = corpus()
    alone = fit_generator(fresh(quantizer), data, SMALL.model_copy(update={"dropout": 0.0, "r_drop": 0.0}))[1]
    np.testing.assert_allclose(first["losses"].numpy(), alone.losses, rtol=0.1)


def test_a_missing_process_group_is_explained() -> None:
    with pytest.raises(SettingsError, match="process group"):
        TorchCollective()


def test_shares_cover_every_row_once() -> None:
    class Second(LocalCollective):
        rank, world_size = 1, 3

    assert list(range(10))[share(10, Second())] == [1, 4, 7]
