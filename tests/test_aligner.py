"""The aligner: heads, caption memory, popularity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ace_core.aligner import Aligner, CaptionPairs
from ace_core.aligner_training import fit_aligner
from ace_core.config import AlignerSettings
from ace_core.contrast import info_nce
from ace_core.corrections import fit_corrections
from ace_core.errors import CorpusError, StoreError
from ace_core.fitting import Checkpoint, FitHooks, Progress
from ace_core.items import Modality
from ace_core.space import unit_query

torch.set_num_threads(1)
SETTINGS = AlignerSettings(dim=17, hidden=32, epochs=12, batch_size=64, dropout=0.1, weight_decay=0.01, bank=512)


class World:
    """Two modalities whose features and texts are noisy views of one hidden topic; the last third has no captions."""

    def __init__(self, items: int = 240, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        topics = rng.normal(size=(items, 8))
        self.split = 160
        views = {Modality.IMAGE: rng.normal(size=(8, 20)), Modality.AUDIO: rng.normal(size=(8, 12))}
        image, audio = np.arange(items) < self.split, np.arange(items) >= self.split
        self.features = {
            m: (topics[rows] @ views[m] + 0.3 * rng.normal(size=(rows.sum(), views[m].shape[1]))).astype(np.float32)
            for m, rows in ((Modality.IMAGE, image), (Modality.AUDIO, audio))
        }
        to_text = rng.normal(size=(8, 24))
        self.rows = np.repeat(np.arange(items), 4)
        self.pooled = (topics[self.rows] @ to_text + 1.0 * rng.normal(size=(4 * items, 24))).astype(np.float32)
        captioned = self.rows % 3 < 2
        held = np.arange(4 * items) % 4 == 3
        self.train = self.pairs(captioned & ~held)
        self.validation = self.pairs(held)
        self.unseen = self.pairs(~captioned)

    def pairs(self, which: np.ndarray) -> CaptionPairs:
        return CaptionPairs(self.pooled[which], self.rows[which])


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def aligner(world: World) -> Aligner:
    return fit_aligner(world.features, world.train, SETTINGS, validation=world.validation)[0]


def recall(aligner: Aligner, pairs: CaptionPairs, items: np.ndarray, k: int = 10) -> float:
    scores = aligner.text_vectors(pairs.pooled) @ items.T
    gold = scores[np.arange(len(pairs)), pairs.rows][:, None]
    return float(((scores > gold).sum(1) < k).mean())


def test_info_nce_never_pushes_twins_apart() -> None:
    text = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1)
    items = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1)
    scale = torch.tensor(10.0)
    plain = info_nce(text, items, scale, torch.eye(3, dtype=torch.bool))
    logits = 10 * text @ items.T
    target = torch.arange(3)
    expected = 0.5 * (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    )
    torch.testing.assert_close(plain, expected)
    twins = torch.eye(3, dtype=torch.bool)
    twins[0, 1] = twins[1, 0] = True
    pair = torch.stack([items[0], items[0], items[2]])
    same = info_nce(torch.stack([items[0], items[0], items[2]]), pair, torch.tensor(50.0), twins)
    apart = info_nce(torch.stack([items[0], items[0], items[2]]), pair, torch.tensor(50.0), torch.eye(3) > 0)
    torch.testing.assert_close(same, apart, atol=1e-3, rtol=0)  # identical twins share their mass either way


def test_the_shared_space_finds_items_of_both_modalities(world: World, aligner: Aligner) -> None:
    items = aligner.item_vectors(world.features, world.train)
    assert items.shape == (240, 17) and items.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(items[:, :-1], axis=1), 1, atol=1e-5)
    assert recall(aligner, world.validation, items) > 0.35  # 10 of 240 by chance: 0.04
    queries = aligner.text_vectors(world.pooled[:5])
    np.testing.assert_array_equal(queries[:, -1], 1)
    np.testing.assert_allclose(np.linalg.norm(queries[:, :-1], axis=1), 1, atol=1e-5)


def test_training_is_deterministic_and_reports(world: World) -> None:
    seen: list[Progress] = []
    short = SETTINGS.model_copy(update={"epochs": 2})
    first, figures = fit_aligner(world.features, world.train, short, hooks=FitHooks(on_progress=seen.append))
    second, _ = fit_aligner(world.features, world.train, short)
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        torch.testing.assert_close(a, b)
    assert [p.step for p in seen] == [p.total // 2 for p in seen[:1]] + [seen[-1].total]
    assert figures["loss"] > 0 and figures["scale"] > 1


def test_a_killed_fit_goes_on_as_if_nothing_had_happened(world: World) -> None:
    short = SETTINGS.model_copy(update={"epochs": 3})
    saved: list[Checkpoint] = []
    hooks = FitHooks(save_checkpoint=saved.append, checkpoint_seconds=0)
    whole, figures = fit_aligner(world.features, world.train, short, hooks=hooks)
    assert len(saved) == 3 * (len(world.train) // 64) - 1  # after every step but the last
    for checkpoint in (saved[len(saved) // 2], saved[len(world.train) // 64 - 1], saved[-1]):
        resumed, again = fit_aligner(world.features, world.train, short, hooks=FitHooks(resume=checkpoint), seed=0)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
            torch.testing.assert_close(a, b)
        assert again["scale"] == pytest.approx(figures["scale"])


def test_an_item_leans_towards_its_captions(world: World, aligner: Aligner) -> None:
    plain, remembering = aligner.item_vectors(world.features), aligner.item_vectors(world.features, world.train)
    captioned = np.unique(world.train.rows)
    others = np.setdiff1d(np.arange(240), captioned)
    np.testing.assert_allclose(plain[others], remembering[others], atol=1e-5)
    texts = aligner.text_vectors(world.train.pooled)[:, :-1]
    before, after = (np.einsum("nd,nd->n", texts, v[world.train.rows, :-1]).mean() for v in (plain, remembering))
    assert after > before + 0.05
    seen = CaptionPairs(
        *(a[np.isin(world.validation.rows, captioned)] for a in (world.validation.pooled, world.validation.rows))
    )
    assert recall(aligner, seen, remembering, 3) > recall(aligner, seen, plain, 3)


def test_the_offset_keeps_uncaptioned_items_findable(world: World, aligner: Aligner) -> None:
    items = aligner.item_vectors(world.features, world.train)
    without = items.copy()
    captioned = np.unique(world.train.rows)
    offset = aligner.offset[np.where(np.arange(240) < world.split, Modality.IMAGE.token, Modality.AUDIO.token)].numpy()
    assert offset[captioned].max() > 0
    without[captioned, -1] += offset[captioned]
    assert recall(aligner, world.unseen, items) > recall(aligner, world.unseen, without)


def test_corrections_that_find_less_than_the_heads_are_left_out() -> None:
    """Captions that belong to other items: leaning towards them can only harm."""
    world = World()
    wrong = CaptionPairs(world.train.pooled, np.random.default_rng(3).permutation(world.train.rows))
    aligner, figures = fit_aligner(world.features, world.train, SETTINGS, validation=world.validation)
    assert figures["image_caption_memory"] == pytest.approx(SETTINGS.caption_memory)
    figures = fit_corrections(aligner, world.features, wrong, world.validation, 0)
    assert figures["image_caption_memory"] == 0 and figures["audio_caption_memory"] == 0
    memory_free = aligner.item_vectors(world.features, wrong)[:, :-1]
    np.testing.assert_allclose(memory_free, aligner.item_vectors(world.features)[:, :-1], atol=1e-6)


def test_an_answer_with_the_query_s_text_is_right() -> None:
    """Captions that name classes: the corrections must not push an item's classmates away to put it first."""
    rng = np.random.default_rng(0)
    classes = np.arange(120) % 6
    features = {Modality.AUDIO: (np.eye(6)[classes] + 0.1 * rng.normal(size=(120, 6))).astype(np.float32)}
    names = rng.normal(size=(6, 24)).astype(np.float32)
    trained = np.flatnonzero(np.arange(120) // 6 % 3 < 2)
    train, validation = CaptionPairs(names[classes[trained]], trained), CaptionPairs(names[classes], np.arange(120))
    settings = SETTINGS.model_copy(update={"epochs": 80, "learning_rate": 1e-2})
    aligner, _ = fit_aligner(features, train, settings, validation=validation)
    found = (aligner.text_vectors(names) @ aligner.item_vectors(features, train).T).argmax(1)
    assert np.array_equal(classes[found], np.arange(6))


def test_without_kept_captions_trained_ones_ask_for_captioned_items(world: World) -> None:
    aligner, figures = fit_aligner(world.features, world.train, SETTINGS, validation=world.unseen)
    assert figures["image_caption_memory"] == pytest.approx(SETTINGS.caption_memory)
    assert figures["image_captioned_offset"] > 0, "captioned items are nearer to texts: they must not gain by it"
    kept = world.pairs(np.isin(np.arange(len(world.rows)), np.arange(3, len(world.rows), 4)) & (world.rows % 3 < 2))
    items = aligner.item_vectors(world.features, world.train)
    with torch.inference_mode():
        heads = [aligner.tower_item(m, torch.from_numpy(f)).numpy() for m, f in world.features.items()]
    plain = np.pad(np.concatenate(heads), ((0, 0), (0, 1)))
    for asked in (kept, world.unseen):  # captions that no choice has seen, and those that it was made by
        assert recall(aligner, asked, items, 3) >= recall(aligner, asked, plain, 3)


@pytest.mark.parametrize("kept", [True, False])
def test_where_captions_name_classes_neither_kind_of_item_is_buried(kept: bool) -> None:
    """A class is found by the heads among its captioned items and among the others: so it must be in the end."""
    rng = np.random.default_rng(2)
    classes = np.arange(180) % 6
    features = {Modality.AUDIO: (np.eye(6)[classes] + rng.normal(size=(180, 6))).astype(np.float32)}
    names = rng.normal(size=(6, 24)).astype(np.float32)
    captioned = np.arange(180) // 6 % 3 < 2
    train = CaptionPairs(names[classes[captioned]], np.flatnonzero(captioned))
    asked = np.arange(180) if kept else np.flatnonzero(~captioned)
    settings = SETTINGS.model_copy(update={"epochs": 40, "learning_rate": 1e-2})
    aligner, _ = fit_aligner(features, train, settings, validation=CaptionPairs(names[classes[asked]], asked))
    queries, items = aligner.text_vectors(names), aligner.item_vectors(features, train)
    with torch.inference_mode():
        heads = aligner.tower_item(Modality.AUDIO, torch.from_numpy(features[Modality.AUDIO])).numpy()
    right = classes == np.arange(6)[:, None]

    def found(scores: np.ndarray, kind: np.ndarray) -> float:
        best = np.where(right & kind, scores, -np.inf).max(1, keepdims=True)
        return float((1 / (1 + ((scores > best) & ~right).sum(1))).mean())

    for kind in (captioned, ~captioned):
        assert found(queries @ items.T, kind) >= found(queries[:, :-1] @ heads.T, kind)


def test_without_validation_the_offset_evens_out_what_captions_add(world: World) -> None:
    _, figures = fit_aligner(world.features, world.train, SETTINGS)
    assert figures["image_captioned_offset"] > 0 and figures["audio_captioned_offset"] > 0


def test_popularity_is_measured_on_the_bank() -> None:
    aligner = Aligner(8, {Modality.IMAGE: 8}, AlignerSettings(dim=9, hidden=0, popularity=1.0)).eval()
    raw = torch.randn(40, 8)
    assert float(aligner.item(Modality.IMAGE, raw)[:, -1].detach().abs().max()) == 0
    aligner.bank = aligner.tower_item(Modality.IMAGE, raw[:1]).detach().half().repeat(128, 1)
    with torch.inference_mode():
        items = aligner.item(Modality.IMAGE, raw)
        towers = aligner.tower_item(Modality.IMAGE, raw)
    torch.testing.assert_close(items[:, -1], -(towers @ towers[0]), atol=2e-3, rtol=0)
    assert int(items[:, -1].argmin()) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 9}, {"hidden": 0}, {"dropout": 0.6}, {"epochs": 1}, {"batch_size": 32}, {"learning_rate": 1e-4},
        {"weight_decay": 5.0}, {"caption_memory": 0.0}, {"popularity": 0.0}, {"bank": 300},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_every_setting_changes_the_items(world: World, change: dict[str, float]) -> None:
    base = SETTINGS.model_copy(update={"epochs": 2})
    first, second = (
        fit_aligner(world.features, world.train, s, validation=world.validation)[0].item_vectors(
            world.features, world.train
        )
        for s in (base, base.model_copy(update=change))
    )
    assert first.shape != second.shape or not np.allclose(first, second, atol=1e-4)


def test_an_item_as_a_query_finds_itself(world: World, aligner: Aligner) -> None:
    items = torch.from_numpy(aligner.item_vectors(world.features))
    query = unit_query(items)
    assert torch.equal(query[:, -1], torch.ones(240))
    assert float(((query @ items.T).argmax(1) == torch.arange(240)).float().mean()) > 0.8


def test_save_and_load_keep_every_vector(world: World, aligner: Aligner, tmp_path) -> None:
    aligner.save(tmp_path)
    loaded = Aligner.load(tmp_path)
    for captions in (None, world.train):
        np.testing.assert_array_equal(
            loaded.item_vectors(world.features, captions), aligner.item_vectors(world.features, captions)
        )
    (tmp_path / "aligner.safetensors").unlink()
    with pytest.raises(StoreError, match="cannot read the aligner"):
        Aligner.load(tmp_path)


def test_what_cannot_be_is_explained(world: World, aligner: Aligner) -> None:
    with pytest.raises(StoreError, match="without video items"):
        aligner.tower_item(Modality.VIDEO, torch.zeros(1, 5))
    with pytest.raises(CorpusError, match="captions to train on"):
        fit_aligner(world.features, CaptionPairs(world.pooled[:1], world.rows[:1]), SETTINGS)
