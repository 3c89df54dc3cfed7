"""Training of the text encoder: what is trained, what it gains, and that it goes on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import transformers as tr

from ace_core.config import AlignerSettings, TextEncoderSettings, TextTuningSettings
from ace_core.encoders import load_text_encoder
from ace_core.encoders.trainable import TrainableText
from ace_core.errors import SettingsError
from ace_core.fitting import Checkpoint, FitHooks
from ace_core.items import Modality
from ace_core.text_tuning import tune_text_encoder
from tests.test_encoders_pretrained import LAYERS, WORDS, clip, exact, save, siglip, tokenizer

torch.set_num_threads(1)
HEADS = AlignerSettings(dim=17, hidden=0, dropout=0.0, weight_decay=0.0)
TUNING = TextTuningSettings(layers=1, epochs=4, batch_size=16, learning_rate=3e-3)
TEXTS = [f"{a} {b} {c}" for a in ("a", "the") for b in ("red", "dog", "cat", "apple") for c in ("piano", "play", "and")]


def bert(folder: Path) -> str:
    torch.manual_seed(4)
    config = tr.BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, hidden_dropout_prob=0.1, **LAYERS)
    return save(folder, exact(tr.BertModel(config)), tokenizer())


def settings(path: str) -> TextEncoderSettings:
    return TextEncoderSettings(kind="transformers", path=path, fusion_layers=2, max_tokens=16)


def features() -> dict[Modality, np.ndarray]:
    """One item a text, its features drawn from the middle word: three texts of four hold it apart from others."""
    words = np.random.default_rng(0).normal(size=(4, 12))
    middle = [("red", "dog", "cat", "apple").index(text.split()[1]) for text in TEXTS]
    noise = np.random.default_rng(1).normal(size=(len(TEXTS), 12))
    return {Modality.IMAGE: (words[middle] + 0.1 * noise).astype(np.float32)}


def tuned(path: str, tuning: TextTuningSettings = TUNING, hooks: FitHooks | None = None) -> tuple[TrainableText, float]:
    encoder = TrainableText(path, settings(path), tuning.layers)
    rows = np.arange(len(TEXTS))
    return encoder, tune_text_encoder(encoder, features(), TEXTS, rows, HEADS, tuning, hooks=hooks)["loss"]


@pytest.mark.parametrize("make", [bert, lambda f: clip(f)[1], lambda f: siglip(f)[1]], ids=["bert", "clip", "siglip"])
def test_it_encodes_as_the_frozen_encoder_does(make, tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    encoder = TrainableText(path, settings(path), 1).eval()
    with torch.no_grad():
        ours = encoder(encoder.tokens(TEXTS))
    frozen = load_text_encoder(settings(path)).encode(TEXTS).pooled
    assert torch.allclose(ours, frozen, atol=2e-3)


@pytest.mark.parametrize(
    ("layers", "trained"), [(1, {"2"}), (2, {"1", "2"}), ("all", {"0", "1", "2", "embeddings"})], ids=str
)
def test_only_what_is_asked_for_is_trained(layers: int | Literal["all"], trained: set[str], tmp_path: Path) -> None:
    path = bert(tmp_path / "model")
    before = tr.BertModel.from_pretrained(path).state_dict()
    encoder, _ = tuned(path, TUNING.model_copy(update={"layers": layers, "epochs": 1}))
    encoder.save(tmp_path / "tuned")
    after = tr.BertModel.from_pretrained(tmp_path / "tuned").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {n.split(".")[2] if n.startswith("encoder.layer.") else n.split(".")[0] for n in changed} == trained


def test_a_tower_beside_the_text_is_left_alone(tmp_path: Path) -> None:
    path = clip(tmp_path / "model")[1]
    encoder, _ = tuned(path, TUNING.model_copy(update={"epochs": 1}))
    encoder.save(tmp_path / "tuned")
    before, after = (tr.CLIPModel.from_pretrained(p).state_dict() for p in (path, tmp_path / "tuned"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "text_projection.weight" in changed and any(n.startswith("text_model.encoder.layers.2.") for n in changed)
    assert not any(n.startswith(("vision", "visual", "text_model.encoder.layers.0", "text_model.emb")) for n in changed)


def test_texts_of_like_items_come_together(tmp_path: Path) -> None:
    path = bert(tmp_path / "model")

    def apart(where: str) -> float:
        """Mean similarity of texts with the same middle word, less that of others."""
        pooled = load_text_encoder(settings(where)).encode(TEXTS).pooled
        middle = np.array([text.split()[1] for text in TEXTS])
        same, similar = middle[:, None] == middle, (pooled @ pooled.T).numpy()
        return float(similar[same].mean() - similar[~same].mean())

    encoder, _ = tuned(path, TUNING.model_copy(update={"layers": 2, "epochs": 60, "batch_size": 12}))
    encoder.save(tmp_path / "tuned")
    assert apart(str(tmp_path / "tuned")) > apart(path) + 0.2


def test_a_resumed_tuning_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    path = bert(tmp_path / "model")
    saved: list[Checkpoint] = []
    whole, loss = tuned(path, hooks=FitHooks(save_checkpoint=saved.append, checkpoint_seconds=0))
    resumed, again = tuned(path, hooks=FitHooks(resume=saved[2]))
    assert again == pytest.approx(loss, abs=1e-6)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    path = bert(tmp_path / "model")
    with pytest.raises(SettingsError, match="the model has 3 layers"):
        TrainableText(path, settings(path), 4)
