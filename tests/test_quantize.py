"""Quantizer: K-Means, RQ-VAE, identifiers, health."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch

from ace_core.arrays import map_arrays, save_arrays
from ace_core.collective import LocalCollective, share
from ace_core.config import QuantizerSettings
from ace_core.errors import CorpusError, QualityError, StoreError
from ace_core.fitting import FitHooks, Progress
from ace_core.quantize.fit import fit_quantizer
from ace_core.quantize.health import check_health, measure_health
from ace_core.quantize.kmeans import Shard, fit_kmeans
from ace_core.quantize.quantizer import Quantizer
from ace_core.quantize.rqvae import RQVAE, fit_rqvae

DIM = 16
torch.set_num_threads(1)


def blobs(n: int, seed: int = 0, centres: int = 20) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(centres, DIM))[rng.integers(0, centres, n)] + 0.3 * rng.normal(size=(n, DIM))).astype(
        np.float32
    )


class ThreadCollective:
    """Workers as threads: every call meets at a barrier."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, slots: list) -> None:
        self.rank, self.world_size, self._barrier, self._slots = rank, world_size, barrier, slots

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._slots[self.rank] = tensor.detach().clone()
        self._barrier.wait(60)
        found = list(self._slots)
        self._barrier.wait(60)
        return found

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._exchange(tensor)[0]


def on_workers(world_size: int, work: Callable) -> list:
    """Run ``work(collective)`` on every worker; their results by rank."""
    barrier, slots, results = threading.Barrier(world_size), [None] * world_size, [None] * world_size
    errors = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadCollective(rank, world_size, barrier, slots))
        except BaseException as e:
            errors.append(e)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


def kmeans(points: np.ndarray, k: int, **options) -> object:
    return fit_kmeans(Shard.whole(torch.from_numpy(points)), k, iterations=25, collective=LocalCollective(), **options)


def test_kmeans_is_as_good_as_faiss() -> None:
    points = blobs(1500, centres=60)
    ours = kmeans(points, 40)
    theirs = faiss.Kmeans(DIM, 40, niter=25, seed=1, min_points_per_centroid=1)
    theirs.train(points)
    assert ours.inertia <= 1.03 * theirs.obj[-1] / len(points)
    assert int(ours.counts.sum()) == 1500 and float(ours.counts.min()) > 0


@pytest.mark.parametrize("workers", [2, 3])
def test_kmeans_does_not_depend_on_the_number_of_workers(workers: int) -> None:
    points = torch.from_numpy(blobs(501))
    alone = kmeans(points.numpy(), 12)

    def work(collective):
        rows = torch.arange(501)[share(501, collective)]
        return fit_kmeans(Shard(points[rows], rows, 501), 12, iterations=25, collective=collective)

    for result in on_workers(workers, work):
        torch.testing.assert_close(result.centroids, alone.centroids, atol=1e-4, rtol=1e-4)
        assert result.inertia == pytest.approx(alone.inertia, rel=1e-5)


def test_empty_clusters_move_to_the_farthest_points() -> None:
    points = np.repeat(np.eye(4, DIM, dtype=np.float32), 50, 0)
    points[-1] = 5.0  # an outlier that k-means++ may take, leaving duplicates of the four others
    result = kmeans(points, 5)
    assert float(result.counts.min()) > 0
    assert result.inertia == pytest.approx(0.0, abs=1e-6)


def test_more_clusters_than_points_is_refused_with_a_remedy() -> None:
    with pytest.raises(CorpusError, match="cannot make 20 clusters"):
        kmeans(blobs(10), 20)


def model_and_points(**settings) -> tuple[RQVAE, torch.Tensor]:
    torch.manual_seed(0)
    points = torch.from_numpy(blobs(600))
    model = RQVAE(DIM, 3, 32)
    model.start_as_kmeans(Shard.whole(points), 10, LocalCollective(), 0)
    return model, points


def test_each_level_lowers_the_error() -> None:
    model, points = model_and_points()
    _, seen = model.tokens(points)
    errors = [float(s.detach().square().mean()) for s in seen]
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]
    assert float(model.losses(points)[0].detach()) < errors[2]


def test_the_reconstruction_loss_moves_encoder_decoder_and_codebooks() -> None:
    model, points = model_and_points()
    model.losses(points)[0].backward()
    for p in (model.encoder, model.decoder, *model.codebooks):
        assert p.grad is not None and float(p.grad.abs().max()) > 0


def test_the_commitment_loss_moves_the_encoder_alone_and_towards_the_codes() -> None:
    model, points = model_and_points()
    before = model.losses(points)[1]
    before.backward()
    assert model.decoder.grad is None and all(b.grad is None for b in model.codebooks)
    assert model.encoder.grad is not None and float(model.encoder.grad.abs().max()) > 0
    with torch.no_grad():
        model.encoder -= 0.01 * model.encoder.grad / model.encoder.grad.norm()
    assert float(model.losses(points)[1].detach()) < float(before.detach())


def test_the_commitment_setting_changes_the_fit() -> None:
    shard = Shard.whole(torch.from_numpy(blobs(600)))

    def fit(weight: float) -> torch.Tensor:
        settings = QuantizerSettings(fine_levels=2, fine_codes=16, epochs=5, batch_size=200, commitment=weight)
        return fit_rqvae(shard, 16, settings, collective=LocalCollective(), hooks=FitHooks())[0].encoder.detach()

    none, strong = fit(0.0), fit(5.0)
    assert float(strong.norm()) < float(none.norm())


def test_training_lowers_the_reconstruction_loss() -> None:
    shard = Shard.whole(torch.from_numpy(blobs(600)))
    seen: list[Progress] = []

    def error(epochs: int) -> float:
        settings = QuantizerSettings(fine_levels=3, fine_codes=16, epochs=epochs, batch_size=100, commitment=0)
        hooks = FitHooks(on_progress=seen.append)
        model, _ = fit_rqvae(shard, 16, settings, collective=LocalCollective(), hooks=hooks)
        return float(model.losses(shard.points)[0].detach())

    assert error(30) < 0.99 * error(0)
    assert seen[-1].step == seen[-1].total == 30 * 6


def test_dead_codes_are_revived() -> None:
    model, points = model_and_points()
    with torch.no_grad():
        model.codebooks[1][:8] = 1e3
    tokens, _ = model.tokens(points)
    counts = torch.stack([torch.bincount(tokens[:, m], minlength=32) for m in range(3)])
    assert int((counts[1] == 0).sum()) >= 8
    revived = model.revive(counts, Shard.whole(points), LocalCollective(), 0)
    assert revived == int((counts == 0).sum())
    assert float(model.codebooks[1].detach().abs().max()) < 100
    used = torch.bincount(model.tokens(points)[0][:, 1], minlength=32)
    assert int((used == 0).sum()) < 8


SETTINGS = QuantizerSettings(coarse=16, fine_levels=2, fine_codes=32, epochs=3, batch_size=128)


@pytest.fixture(scope="module")
def fitted() -> tuple[Quantizer, np.ndarray, np.ndarray]:
    x = blobs(900)
    tokens = np.arange(900) % 3
    x[tokens == 1] += 2.0
    return fit_quantizer(x, tokens, SETTINGS)[0], x, tokens


def test_identifiers_rebuild_additively_and_near(fitted) -> None:
    quantizer, x, tokens = fitted
    codes = quantizer.assign(x, tokens)
    assert codes.dtype == np.uint16 and codes.shape == (900, 4) and quantizer.vocab_sizes == (3, 16, 32, 32)
    assert np.array_equal(codes[:, 0], tokens)
    parts = sum(quantizer.codewords(level)[codes[:, level]] for level in range(4))
    np.testing.assert_allclose(quantizer.reconstruct(codes), parts, atol=1e-5)
    coarse_only = quantizer.codewords(0)[codes[:, 0]] + quantizer.codewords(1)[codes[:, 1]]
    error, coarse_error = (np.square(x - r).sum(1).mean() for r in (parts, coarse_only))
    assert error < 0.6 * coarse_error


def test_a_beam_of_one_takes_the_nearest_code_at_every_level(fitted) -> None:
    quantizer, x, tokens = replace(fitted[0], beam=1), *fitted[1:]
    codes = quantizer.assign(x[:50], tokens[:50])
    left = (x[:50] - quantizer.modality_means[tokens[:50]]) @ quantizer.metric
    for level, table in enumerate((quantizer.coarse, *quantizer.latents), start=1):
        distances = np.square(left[:, None] - table[None]).sum(-1)
        assert np.array_equal(distances.argmin(1), codes[:, level])
        left = left - table[codes[:, level]]
        if level == 1:
            left = left @ quantizer.encoder


def latent_errors(quantizer: Quantizer, x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Squared distances, in the latent space, of items from what their tokens after the modality add up to."""
    z = (x - quantizer.modality_means[codes[:, 0]]) @ quantizer.metric @ quantizer.encoder
    words = (quantizer.coarse @ quantizer.encoder, *quantizer.latents)
    return np.square(z - sum(w[codes[:, level]] for level, w in enumerate(words, start=1))).sum(1)


def test_a_wider_beam_finds_nearer_identifiers_and_a_full_one_the_nearest(fitted) -> None:
    fitted, x, tokens = fitted
    errors = [latent_errors(fitted, x, replace(fitted, beam=beam).assign(x, tokens)).mean() for beam in (1, 2, 4, 16)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    small = replace(
        fitted, coarse=fitted.coarse[:3], latents=tuple(t[:4] for t in fitted.latents),
        codebooks=(fitted.codebooks[0][:3], *(c[:4] for c in fitted.codebooks[1:])), beam=3 * 4,
    )  # fmt: skip
    every = np.array(list(itertools.product(range(3), range(4), range(4))))
    for item, token in zip(x[:40], tokens[:40]):
        codes = np.concatenate([np.full((len(every), 1), token), every], axis=1)
        of_all = latent_errors(small, item[None], codes)
        found = latent_errors(small, item[None], small.assign(item[None], np.array([token])))
        assert found[0] <= of_all.min() + 1e-4


def test_inner_products_that_are_too_many_to_hold_are_computed(fitted, monkeypatch) -> None:
    fitted, x, tokens = replace(fitted[0]), *fitted[1:]
    held = latent_errors(fitted, x, fitted.assign(x, tokens))
    monkeypatch.setattr("ace_core.quantize.quantizer._GRAM", 0)
    monkeypatch.setattr("ace_core.quantize.quantizer._BLOCK_PRODUCTS", 500)  # blocks of few items
    computed = latent_errors(fitted, x, replace(fitted).assign(x, tokens))
    np.testing.assert_allclose(computed, held, rtol=1e-4, atol=1e-4)


def test_the_largest_vocabularies_take_little_memory() -> None:
    rng = np.random.default_rng(0)
    coarse, *latents = (rng.standard_normal((count, 4)).astype(np.float32) for count in (65536, 65536, 5000))
    same = np.eye(4, dtype=np.float32)
    quantizer = Quantizer(np.zeros((3, 4), np.float32), same, coarse, same, tuple(latents), (coarse, *latents), beam=2)
    x = coarse[-2:] + latents[0][-2:]
    assert (latent_errors(quantizer, x, quantizer.assign(x, np.zeros(2, int))) < 0.05).all()
    assert sum(array.nbytes for array in quantizer._words) < 8 << 20  # all inner products: 40 GB


def test_an_item_that_is_not_a_number_has_nothing_of_the_one_before(fitted) -> None:
    quantizer, x, tokens = fitted
    codes = quantizer.assign(np.stack([x[5], np.full(DIM, np.nan, np.float32), x[5]]), tokens[[5, 5, 5]])
    assert codes[0, 1:].any() and not codes[1, 1:].any() and np.array_equal(codes[0], codes[2])


def test_a_quantizer_of_before_seeks_as_it_did(fitted, tmp_path) -> None:
    fitted[0].save(tmp_path)
    assert Quantizer.load(tmp_path).beam == SETTINGS.beam > 1
    path = tmp_path / "quantizer.safetensors"
    save_arrays(path, {name: np.array(a) for name, a in map_arrays(path).items() if name != "beam"})
    assert Quantizer.load(tmp_path).beam == 1


def test_queries_shape_the_metric() -> None:
    """Directions that queries look in are rebuilt better than with a metric from other queries."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, DIM)).astype(np.float32)
    first, second = (np.zeros((500, DIM), np.float32) for _ in range(2))
    first[:, :4], second[:, -4:] = rng.normal(size=(500, 4)), rng.normal(size=(500, 4))
    errors = []
    for queries in (first, second):
        quantizer, _ = fit_quantizer(x, np.zeros(1000, int), SETTINGS, queries=queries)
        rebuilt = quantizer.reconstruct(quantizer.assign(x, np.zeros(1000, int)))
        errors.append(float(np.square((x - rebuilt) @ first.T).mean()))
    assert errors[0] < 0.5 * errors[1]


def test_the_whole_fit_does_not_depend_on_the_number_of_workers() -> None:
    x, tokens = blobs(400), np.arange(400) % 3
    settings = SETTINGS.model_copy(update={"epochs": 0})
    alone = fit_quantizer(x, tokens, settings)[0]

    def work(collective):
        rows = np.arange(400)[share(400, collective)]
        return fit_quantizer(x[rows], tokens[rows], settings, index=rows, collective=collective)[0]

    for quantizer in on_workers(2, work):
        for ours, theirs in zip(quantizer.codebooks, alone.codebooks):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_workers_end_the_rqvae_with_the_same_model() -> None:
    x, tokens = blobs(400), np.zeros(400, int)

    def work(collective):
        rows = np.arange(400)[share(400, collective)]
        return fit_quantizer(x[rows], tokens[rows], SETTINGS, index=rows, collective=collective)[0]

    first, second = on_workers(2, work)
    alone = fit_quantizer(x, tokens, SETTINGS)[0]
    for a, b in zip(first.codebooks, second.codebooks):
        np.testing.assert_array_equal(a, b)

    def error(quantizer: Quantizer) -> float:
        return float(np.square(x - quantizer.reconstruct(quantizer.assign(x, tokens))).mean())

    assert error(first) == pytest.approx(error(alone), rel=0.1)


def test_small_corpora_get_fewer_codes() -> None:
    quantizer, figures = fit_quantizer(blobs(40), np.zeros(40, int), SETTINGS)
    assert quantizer.vocab_sizes == (3, 10, 10, 10) and figures["coarse_codes"] == 10
    with pytest.raises(CorpusError, match="too few"):
        fit_quantizer(blobs(5), np.zeros(5, int), SETTINGS)


def test_save_and_load_keep_every_identifier(fitted, tmp_path) -> None:
    quantizer, x, tokens = fitted
    quantizer.save(tmp_path)
    loaded = Quantizer.load(tmp_path)
    codes = quantizer.assign(x, tokens)
    assert np.array_equal(loaded.assign(x, tokens), codes)
    np.testing.assert_array_equal(loaded.reconstruct(codes), quantizer.reconstruct(codes))
    with pytest.raises(StoreError):
        Quantizer.load(tmp_path / "nowhere")


@pytest.mark.slow
def test_assignment_speed() -> None:
    """At least 50k items/s on one core at five levels, D = 256."""
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(v, 256)).astype(np.float32) for v in (64, 256, 256, 256)]
    eye = np.eye(256, dtype=np.float32)
    quantizer = Quantizer(np.zeros((3, 256), np.float32), eye, tables[0], eye, tuple(tables[1:]), tuple(tables))
    x = rng.normal(size=(20_000, 256)).astype(np.float32)
    best = min(_seconds(lambda: quantizer.assign(x, np.zeros(len(x), int))) for _ in range(3))
    assert len(x) / best > 50_000


def _seconds(work: Callable[[], object]) -> float:
    """Processor seconds over all threads: items per second and core, on a busy machine too."""
    start = time.process_time()
    work()
    return time.process_time() - start


def test_health_counts_items_that_share_an_identifier() -> None:
    codes = np.array([[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 2, 1], [0, 2, 1], [0, 2, 1]], np.uint16)
    x = np.eye(6, 8, dtype=np.float32)
    health = measure_health(codes, (3, 4, 2), x, x)
    assert health.buckets == {1: 1, 2: 1, 3: 1}
    assert health.collision_rate == pytest.approx(5 / 6)
    assert health.utilisation == (0.75, 0.5)
    shares = np.array([2, 1, 3]) / 6
    assert health.perplexity[0] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()) / 4)
    assert health.perplexity[1] == pytest.approx(0.5)
    assert health.cosine == pytest.approx(1.0)
    assert health.as_dict()["buckets"] == {"1": 1, "2": 1, "3": 1}


def test_the_gate_stops_collapsed_and_colliding_quantizers(fitted) -> None:
    quantizer, x, tokens = fitted
    codes = quantizer.assign(x, tokens)
    healthy = quantizer.health(codes, x)
    check_health(healthy, SETTINGS)
    assert min(healthy.perplexity) > 0.3 and healthy.cosine > 0.8
    collapsed = codes.copy()
    collapsed[:, 2] = 0
    with pytest.raises(QualityError, match="collapsed at level 2") as caught:
        check_health(quantizer.health(collapsed, x), SETTINGS)
    assert "quantizer.fine_codes" in caught.value.remedy
    with pytest.raises(QualityError, match="share an identifier"):
        check_health(healthy, SETTINGS.model_copy(update={"max_collision_rate": healthy.collision_rate / 2}))
