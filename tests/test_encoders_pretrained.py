"""Tiny random checkpoints of the real classes, saved, loaded by path, and compared with transformers' own way."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import transformers as tr
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ace_core.config import LimitSettings, MediaEncoderSettings, TextEncoderSettings
from ace_core.encoders import MediaEncoder, load_media_encoder, load_text_encoder
from ace_core.errors import ModelError, SettingsError
from ace_core.items import Modality

LIMITS = LimitSettings(isolate=False)
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (30, 50, 3), dtype=np.uint8), RNG.integers(0, 256, (64, 40, 3), dtype=np.uint8)]
CLIPS = [RNG.integers(0, 256, (4, 40, 40, 3), dtype=np.uint8) for _ in range(2)]
TEXTS = ["a red apple", "a dog and a cat play the piano", "apple"]
WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "a", "and", "the", "red", "dog", "cat", "apple", "piano", "play"]
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**LAYERS, "image_size": 32, "patch_size": 8}


def tokenizer(length: int = 20, *, mask: bool = True, pad: str = "[PAD]") -> tr.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = [(t, WORDS.index(t)) for t in ("[BOS]", "[EOS]")]
    core.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ids)
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]",
        model_max_length=length, model_input_names=["input_ids", "attention_mask"] if mask else ["input_ids"],
    )  # fmt: skip


def exact(model: torch.nn.Module):
    """A model in evaluation mode, of weights that packing for the CPU does not round."""
    return model.half().float().eval()


def text_config(**more) -> dict:
    ids = {"pad_token_id": WORDS.index("[PAD]"), "bos_token_id": WORDS.index("[BOS]"),
           "eos_token_id": WORDS.index("[EOS]")}  # fmt: skip
    return {**LAYERS, "vocab_size": len(WORDS), "max_position_embeddings": 20, **ids, **more}


def save(folder: Path, *parts) -> str:
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def clip(folder: Path) -> tuple[tr.CLIPModel, str]:
    torch.manual_seed(1)
    model = exact(tr.CLIPModel(tr.CLIPConfig(text_config=text_config(), vision_config=VISION, projection_dim=24)))
    size = {"shortest_edge": 32}
    processor = tr.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    return model, save(folder, model, processor, tokenizer())


def siglip(folder: Path) -> tuple[tr.SiglipModel, str]:
    torch.manual_seed(2)
    text = text_config(projection_size=32)
    model = exact(tr.SiglipModel(tr.SiglipConfig(text_config=text, vision_config=VISION)))
    processor = tr.SiglipImageProcessor(size={"height": 32, "width": 32})
    return model, save(folder, model, processor, tokenizer(mask=False, pad="[EOS]"))


def xclip(folder: Path) -> tuple[tr.XCLIPModel, str]:
    torch.manual_seed(3)
    vision = {**VISION, "num_frames": 4, "mit_hidden_size": 24, "mit_intermediate_size": 32, "mit_num_hidden_layers": 1,
              "mit_num_attention_heads": 2}  # fmt: skip
    config = tr.XCLIPConfig(
        text_config=text_config(), vision_config=vision, projection_dim=24, prompt_num_attention_heads=2
    )
    model = exact(tr.XCLIPModel(config))
    processor = tr.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, save(folder, model, processor, tokenizer())


def clap(folder: Path, truncation: str = "rand_trunc") -> tuple[tr.ClapModel, tr.ClapFeatureExtractor, str]:
    torch.manual_seed(4)
    audio = {
        "hidden_size": 64, "patch_embeds_hidden_size": 16, "depths": [1, 1, 1], "num_attention_heads": [2, 2, 2],
        "window_size": 8, "num_mel_bins": 64, "spec_size": 256, "num_hidden_layers": 3, "patch_size": 4,
        "patch_stride": [4, 4], "enable_fusion": truncation == "fusion",
    }  # fmt: skip
    config = tr.ClapConfig(text_config=text_config(max_position_embeddings=40), audio_config=audio, projection_dim=24)
    model = exact(tr.ClapModel(config))
    extractor = tr.ClapFeatureExtractor(truncation=truncation, padding="repeatpad", max_length_s=2)
    return model, extractor, save(folder, model, extractor, tokenizer())


def images(path: str) -> MediaEncoder:
    return load_media_encoder(Modality.IMAGE, MediaEncoderSettings(kind="transformers", path=path), LIMITS)


def sounds(path: str) -> MediaEncoder:
    return load_media_encoder(Modality.AUDIO, MediaEncoderSettings(kind="transformers", path=path), LIMITS)


def videos(path: str, frames: int = 4) -> MediaEncoder:
    settings = MediaEncoderSettings(kind="transformers", path=path, frames=frames)
    return load_media_encoder(Modality.VIDEO, settings, LIMITS)


def text(path: str, **settings):
    return load_text_encoder(TextEncoderSettings(kind="transformers", path=path, **settings))


def unit(x: torch.Tensor) -> np.ndarray:
    return F.normalize(x.detach().float(), dim=-1).numpy()


def close(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> bool:
    return a.shape == b.shape and np.allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@torch.no_grad()
def test_clip(tmp_path: Path) -> None:
    model, path = clip(tmp_path)
    encoder = images(path)
    assert encoder.shares_text_space and encoder.dim == 24
    pixels = tr.AutoImageProcessor.from_pretrained(path)([Image.fromarray(p) for p in PICTURES], return_tensors="pt")
    expected = model.get_image_features(**pixels).pooler_output
    assert close(encoder.encode(PICTURES), unit(expected))
    texts = text(path).encode(TEXTS)
    tokens = tr.AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt")
    output = model.get_text_features(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], output_hidden_states=True
    )
    assert close(texts.pooled, unit(output.pooler_output))
    real = tokens["attention_mask"].bool()
    assert (texts.mask == real).all()
    for layer in range(3):
        assert close(texts.hidden[:, layer][real], output.hidden_states[1 + layer][real])


@torch.no_grad()
def test_clip_frame_by_frame(tmp_path: Path) -> None:
    model, path = clip(tmp_path)
    encoder = videos(path)
    assert encoder.shares_text_space
    processor = tr.AutoImageProcessor.from_pretrained(path)
    expected = [
        unit(model.get_image_features(**processor([Image.fromarray(f) for f in c], return_tensors="pt")).pooler_output)
        for c in CLIPS
    ]
    means = np.stack([e.mean(0) for e in expected])
    assert close(encoder.encode(CLIPS), means / np.linalg.norm(means, axis=1, keepdims=True))


@torch.no_grad()
def test_siglip(tmp_path: Path) -> None:
    model, path = siglip(tmp_path)
    pixels = tr.AutoImageProcessor.from_pretrained(path)([Image.fromarray(p) for p in PICTURES], return_tensors="pt")
    assert close(images(path).encode(PICTURES), unit(model.get_image_features(**pixels).pooler_output))
    # As its authors use it: always padded to the full context, no attention mask.
    tokens = tr.AutoTokenizer.from_pretrained(path)(TEXTS, padding="max_length", max_length=20, return_tensors="pt")
    expected = model.get_text_features(input_ids=tokens["input_ids"]).pooler_output
    texts = text(path, max_tokens=12).encode(TEXTS)
    assert close(texts.pooled, unit(expected))
    assert texts.hidden.shape[2] == 10 and texts.mask.sum(1).tolist() == [5, 10, 3]


@torch.no_grad()
def test_xclip(tmp_path: Path) -> None:
    model, path = xclip(tmp_path)
    encoder = videos(path)
    processor = tr.AutoImageProcessor.from_pretrained(path)
    frames = [processor([Image.fromarray(f) for f in c], return_tensors="pt")["pixel_values"] for c in CLIPS]
    expected = model.get_video_features(pixel_values=torch.stack(frames)).pooler_output
    assert encoder.shares_text_space and close(encoder.encode(CLIPS), unit(expected))
    tokens = tr.AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    assert close(text(path).encode(TEXTS).pooled, unit(model.get_text_features(**tokens).pooler_output))
    with pytest.raises(SettingsError, match="frames: 4"):
        videos(path, frames=8)


@torch.no_grad()
@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_clap(tmp_path: Path, truncation: str) -> None:
    model, extractor, path = clap(tmp_path, truncation)
    encoder = sounds(path)
    assert encoder.shares_text_space
    waves = [RNG.standard_normal(48_000).astype(np.float32), RNG.standard_normal(96_000).astype(np.float32)]
    inputs = extractor(waves, sampling_rate=48_000, return_tensors="pt")
    inputs["is_longer"] = torch.zeros(2, 1, dtype=torch.bool)  # by itself it calls one of them longer, at random
    expected = unit(model.get_audio_features(**inputs).pooler_output)
    assert close(encoder.encode(waves), expected)
    # A longer sound: its beginning, the same every time.
    longer = np.concatenate([waves[1], RNG.standard_normal(50_000).astype(np.float32)])
    assert close(encoder.encode([longer]), expected[1:]) and close(encoder.encode([longer]), expected[1:])
    tokens = tr.AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    assert close(text(path).encode(TEXTS).pooled, unit(model.get_text_features(**tokens).pooler_output))


def test_sounds_are_decoded_at_the_models_rate(tmp_path: Path) -> None:
    *_, path = clap(tmp_path)
    out = io.BytesIO()
    soundfile.write(out, RNG.uniform(-0.5, 0.5, (22_050, 2)), 22_050, format="WAV")
    encoder = sounds(path)
    assert encoder.decoder(out.getvalue()).shape == (48_000,)
    assert np.isfinite(encoder.encode([np.zeros(10, np.float32)])).all()


@torch.no_grad()
def test_plain_image_backbones(tmp_path: Path) -> None:
    processor = tr.ViTImageProcessor(size={"height": 32, "width": 32})
    for name, model in {
        "vit": tr.ViTModel(tr.ViTConfig(**VISION)),
        "dino": tr.Dinov2Model(tr.Dinov2Config(**VISION)),
        "resnet": tr.ResNetModel(tr.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])),
    }.items():
        path = save(tmp_path / name, model.eval(), processor)
        encoder = images(path)
        assert not encoder.shares_text_space
        pixels = processor([Image.fromarray(p) for p in PICTURES], return_tensors="pt")
        hidden = model(**pixels).last_hidden_state
        assert close(encoder.encode(PICTURES), unit(hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)))


@torch.no_grad()
def test_plain_sound_backbones(tmp_path: Path) -> None:
    torch.manual_seed(5)
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
                    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
    config = tr.Wav2Vec2Config(**LAYERS, **convolutions, feat_extract_norm="layer", do_stable_layer_norm=True)
    model = tr.Wav2Vec2Model(config).eval()
    extractor = tr.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    encoder = sounds(save(tmp_path / "w2v", model, extractor))
    waves = [RNG.standard_normal(4_000).astype(np.float32), RNG.standard_normal(9_000).astype(np.float32)]
    # One alone needs no mask: padding must not change the mean of the shorter.
    alone = [
        model(**extractor(w, sampling_rate=16_000, return_tensors="pt", return_attention_mask=False)).last_hidden_state
        for w in waves
    ]
    expected = np.concatenate([unit(a.mean(1)) for a in alone])
    assert np.allclose(encoder.encode(waves), expected, atol=1e-4)
    ast = tr.ASTModel(tr.ASTConfig(**LAYERS, max_length=64, num_mel_bins=32)).eval()
    extractor = tr.ASTFeatureExtractor(max_length=64, num_mel_bins=32)
    inputs = extractor(waves, sampling_rate=16_000, return_tensors="pt")
    expected = unit(ast(**inputs).last_hidden_state.mean(1))
    assert close(sounds(save(tmp_path / "ast", ast, extractor)).encode(waves), expected)


@torch.no_grad()
def test_whisper_uses_its_encoder(tmp_path: Path) -> None:
    config = tr.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=40, max_source_positions=100, vocab_size=50,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = tr.WhisperModel(config).eval()
    extractor = tr.WhisperFeatureExtractor(feature_size=40, chunk_length=2)
    waves = [RNG.standard_normal(16_000).astype(np.float32)]
    inputs = extractor(waves, sampling_rate=16_000, return_tensors="pt")
    expected = unit(model.get_encoder()(inputs["input_features"]).last_hidden_state.mean(1))
    assert close(sounds(save(tmp_path, model, extractor)).encode(waves), expected)


@torch.no_grad()
def test_plain_video_backbones(tmp_path: Path) -> None:
    model = tr.VideoMAEModel(tr.VideoMAEConfig(**VISION, num_frames=4, tubelet_size=2)).eval()
    processor = tr.ViTImageProcessor(size={"height": 32, "width": 32})
    path = save(tmp_path, model, processor)
    frames = [processor([Image.fromarray(f) for f in c], return_tensors="pt")["pixel_values"] for c in CLIPS]
    expected = unit(model(torch.stack(frames)).last_hidden_state.mean(1))
    assert close(videos(path).encode(CLIPS), expected)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_plain_text_models(tmp_path: Path, activation: str) -> None:
    bert = exact(tr.BertModel(tr.BertConfig(**text_config(hidden_act=activation))))
    path = save(tmp_path / "bert", bert, tokenizer())
    encoder = text(path, fusion_layers=2)
    assert (encoder._lean is not None) == (activation == "gelu")
    got = encoder.encode(TEXTS)
    tokens = tr.AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    output = bert(**tokens, output_hidden_states=True)
    weights = tokens["attention_mask"][:, :, None]
    assert close(got.pooled, unit((output.last_hidden_state * weights).sum(1) / weights.sum(1)))
    assert got.hidden.shape == (3, 2, 10, 32)
    real = tokens["attention_mask"].bool()
    for layer in range(2):
        assert close(got.hidden[:, layer][real], output.hidden_states[2 + layer][real])


@torch.no_grad()
def test_encoder_decoders_give_their_encoder(tmp_path: Path) -> None:
    tokens = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    weights = tokens["attention_mask"][:, :, None]
    t5 = exact(tr.T5Model(tr.T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=32, num_layers=3, num_heads=2)))
    path = save(tmp_path / "t5", t5, tokenizer())
    output = t5.get_encoder()(**{k: tokens[k] for k in ("input_ids", "attention_mask")})
    expected = unit((output.last_hidden_state * weights).sum(1) / weights.sum(1))
    assert close(text(path).encode(TEXTS).pooled, expected)


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    model, path = clip(tmp_path / "a")
    before = images(path).identity
    assert images(path).identity == before != videos(path).identity
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 0.5
    model.save_pretrained(path)
    assert images(path).identity != before
    changed = tr.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32})
    now = images(path).identity
    changed.save_pretrained(path)
    assert images(path).identity != now


def test_a_model_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist.*encoders\.image\.path"):
        images(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        images(str(tmp_path))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        images("someone/no-such-model")
    _, path = clip(tmp_path / "clip")
    (Path(path) / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="Check the files"):
        images(path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model, path = clip(tmp_path)
    (Path(path) / "model.safetensors").unlink()
    torch.save(model.state_dict(), Path(path) / "pytorch_model.bin")
    with pytest.raises(ModelError):
        images(path)
