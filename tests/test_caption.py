"""Captions from a model: sampled, without near duplicates, resumed, trained on, and never asked with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers as tr
from tokenizers import Tokenizer, models, pre_tokenizers

from ace_core.captioner import Captioner, distinct, plain
from ace_core.config import CaptionSettings, LimitSettings, Settings
from ace_core.errors import CorpusError, SettingsError
from ace_core.items import Modality
from ace_core.manifest import Manifest
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines import caption as stage
from pipelines.caption import caption_stage
from pipelines.corpus import load_corpus
from pipelines.fit_aligner import fit_aligner_stage
from pipelines.generated import read_generated
from pipelines.ingest import ingest
from pipelines.progress import Reporter
from tests.corpora import write_clip, write_picture, write_tone

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "square", "bar", "tall", "thing", "soft", "loud"]
LIMITS = LimitSettings(isolate=False)


def _tokenizer() -> tr.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    return tr.PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BLIP with random weights, as transformers saves it."""
    folder = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**small, **ids, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 32}
    vision = {**small, "image_size": 32, "patch_size": 16}
    tr.BlipForConditionalGeneration(tr.BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tr.BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Whisper with random weights."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = tr.WhisperConfig(
        vocab_size=len(WORDS), num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, decoder_layers=1,
        decoder_attention_heads=2, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=50,
        max_target_positions=32, bos_token_id=2, eos_token_id=3, pad_token_id=0, decoder_start_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = tr.WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    model.save_pretrained(folder)
    tr.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return str(folder)


def test_pictures_frames_and_sounds_are_described(blip: str, whisper: str, tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", "red", "square")
    write_tone(tmp_path / "b.flac", 300)
    write_clip(tmp_path / "c.mp4", "red", to_right=True)
    settings = CaptionSettings(image=blip, audio=whisper, per_item=4, max_tokens=5)
    for modality, name in ((Modality.IMAGE, "a.png"), (Modality.AUDIO, "b.flac"), (Modality.VIDEO, "c.mp4")):
        captioner = Captioner(modality, settings, LIMITS)
        decoded = captioner.decode((tmp_path / name).read_bytes())
        captions = captioner.describe([decoded, decoded], seed=1)
        assert len(captions) == 2 and all(1 <= len(c) <= 4 for c in captions)
        assert all(set(text.split()) <= set(WORDS[4:]) for c in captions for text in c)
        assert all(len(text.split()) <= 5 for c in captions for text in c)
        assert captions == captioner.describe([decoded, decoded], seed=1)
        assert captions != captioner.describe([decoded, decoded], seed=2)
    assert Captioner(Modality.IMAGE, settings, LIMITS).describe([], 0) == []


def test_the_likeliest_words_alone_are_always_the_same(blip: str) -> None:
    pixels = np.full((40, 40, 3), 99, np.uint8)
    sure = Captioner(Modality.IMAGE, CaptionSettings(image=blip, top_p=1e-6, per_item=3), LIMITS)
    assert len(set(sure.describe([pixels], 0)[0])) == 1


def test_no_captioner_is_said() -> None:
    with pytest.raises(SettingsError, match="no captioner is set for audio"):
        Captioner(Modality.AUDIO, CaptionSettings(image="x"), LIMITS)


def test_a_corpus_without_captions_is_told_of_it(in_process: None, tmp_path: Path) -> None:
    for i in range(8):
        write_picture(tmp_path / "corpus" / f"{i}.png", "red", "square", shift=i)
    settings = load_settings(None, (f"corpus.path={tmp_path / 'corpus'}", f"store={tmp_path / 'store'}"))
    store, quiet = Store.open(settings.store), Reporter(quiet=True)
    ingest(settings, store, quiet)
    with pytest.raises(CorpusError, match="8 items have 0 captions") as error:
        fit_aligner_stage(settings, store, quiet)
    assert "ace caption" in error.value.remedy


def test_near_duplicates() -> None:
    assert plain("  Rote, HÄUSER!\n") == plain("rote hauser") == "rote hauser"
    texts = ["A red bar.", "a RED bar", "a bar that is red", "a blue square", "..."]
    vectors = np.array([[1, 0], [1, 0.1], [0.98, 0.05], [0, 1], [-1, 0]], np.float32)
    assert distinct(texts, vectors, 0.95) == ["A red bar.", "a blue square"]
    assert distinct(texts, 7 * vectors, 1.01) == ["A red bar.", "a bar that is red", "a blue square"]
    assert distinct([], np.empty((0, 2)), 0.9) == []


@pytest.mark.ray
def test_stage(ray_cluster: None, blip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Reporter(quiet=True)
    corpus = tmp_path / "corpus"
    for i in range(14):
        write_picture(corpus / f"{i:02d}.png", ("red", "blue")[i % 2], "square", shift=i)
    rows = [{"path": f"{i:02d}.png", "captions": [f"number {i}", f"picture {i}"]} for i in range(4)]
    rows += [{"path": f"{i:02d}.png", "split": "test"} for i in (4, 5)]
    (corpus / "captions.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    options = (f"corpus.path={corpus}", f"store={tmp_path / 'store'}", "compute.threads=1", "compute.encoders=1")
    settings = load_settings(None, options)
    store = Store.open(settings.store)
    features = ingest(settings, store, quiet)
    with pytest.raises(SettingsError, match="10 image"):
        caption_stage(settings, store, quiet)

    settings = load_settings(None, (*options, f"caption.image={blip}", "caption.max_tokens=6", "caption.batch_size=2"))
    monkeypatch.setattr(stage, "SHARD_ITEMS", 2)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(settings, store, monkeypatch)
    begun = {r["item_id"]: r["captions"] for r in read_generated(store, _only_part(store)).to_pylist()}
    assert 0 < len(begun) < 10 and store.parts("captions") == []
    part = caption_stage(settings, store, quiet)
    table = {r["item_id"]: r["captions"] for r in read_generated(store, part.id).to_pylist()}
    assert sorted(table) == [f"{i:02d}.png" for i in range(4, 14)]  # nobody's own captions are touched
    assert begun.items() <= table.items()  # nothing that was done is done again
    assert all(1 <= len(c) <= 3 and len({plain(t) for t in c}) == len(c) for c in table.values())
    assert caption_stage(settings, store, quiet) == part

    split = load_corpus(store, features.id, settings).split
    trained = {f"{r:02d}.png" for r in split.train_pairs.rows.tolist()}
    assert trained == {f"{i:02d}.png" for i in (*range(4), *range(6, 14))}  # a test item stays out
    generated = {text for captions in table.values() for text in captions}
    assert not generated & {*split.seen_queries.texts, *split.unseen_queries.texts, *split.val_queries.texts}
    assert split.seen_queries.texts == [f"picture {i}" for i in range(4)]
    assert (np.diff(split.train_pairs.rows) >= 0).all()

    write_picture(corpus / "20.png", "red", "bar")
    ingest(settings, store, quiet)
    more = caption_stage(settings, store, quiet)
    again = {r["item_id"]: r["captions"] for r in read_generated(store, more.id).to_pylist()}
    assert more.id != part.id and table.items() <= again.items() and set(again) - set(table) == {"20.png"}


def test_what_failed_is_tried_again_once_the_corpus_changed(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    before = stage._Shards(store, "before")
    said = {"a.png": (["a bar"], ""), "b.png": ([], "no-content"), "c.png": ([], "timeout"), "d.png": ([], "OSError")}
    for name, (captions, cause) in said.items():
        before.add({"item_id": name, "content_hash": name, "captions": captions, "cause": cause})
    before.flush()
    store.seal_part(Manifest(kind="captions", id="before", settings={"key": "k"}))
    store.set_latest("captions", "before")
    now = stage._Shards(store, "now")
    now.carry_over(pa.table({"item_id": list(said), "content_hash": list(said)}), "k")
    assert now.done.column("item_id").to_pylist() == ["a.png", "b.png"]


def _only_part(store: Store) -> str:
    (name,) = [i.base_name for i in store.listing("captions") if not i.is_file]
    return name


def _interrupted(settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage._Shards.flush
    calls = []

    def flush(self: stage._Shards) -> None:
        real(self)
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage._Shards, "flush", flush)
        caption_stage(settings, store, Reporter(quiet=True))
