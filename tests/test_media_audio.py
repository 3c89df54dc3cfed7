"""Sounds of many containers, rates and kinds of damage, made here."""

from __future__ import annotations

import io
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.media import Cause, decode_audio

LIMITS = LimitSettings()


def tone(seconds: float = 1.0, rate: int = 22_050, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def sound(samples: np.ndarray, rate: int = 22_050, kind: str = "WAV", codec: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=codec)
    return out.getvalue()


def by_ffmpeg(samples: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def pitch(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * rate / len(samples))


def cause_of(data: bytes, limits: LimitSettings = LIMITS, **part: float) -> str:
    with pytest.raises(MediaError) as error:
        decode_audio(data, limits, 16_000, **part)
    return error.value.cause


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "PCM_U8"),
        ("WAV", "FLOAT"),
        ("WAV", "ULAW"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
    ],
)
def test_containers(kind: str, codec: str) -> None:
    rate = 48_000 if codec == "OPUS" else 22_050
    got = decode_audio(sound(tone(1.0, rate), rate, kind, codec), LIMITS, 16_000)
    assert got.dtype == np.float32 and got.ndim == 1
    assert abs(len(got) - 16_000) < 2_000  # lossy codecs pad
    assert abs(pitch(got, 16_000) - 440) < 2
    assert 0.4 < np.abs(got).max() < 0.65


@pytest.mark.parametrize(("container", "codec"), [("ipod", "aac"), ("adts", "aac"), ("matroska", "aac")])
def test_what_only_ffmpeg_reads(container: str, codec: str) -> None:
    got = decode_audio(by_ffmpeg(tone(2.0, 44_100), 44_100, container, codec), LIMITS, 16_000)
    assert abs(len(got) - 32_000) < 2_500 and abs(pitch(got, 16_000) - 440) < 2


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 96_000])
@pytest.mark.parametrize("target", [16_000, 48_000])
def test_any_rate(rate: int, target: int) -> None:
    got = decode_audio(sound(tone(1.0, rate), rate), LIMITS, target)
    assert abs(len(got) - target) <= 2
    assert abs(pitch(got, target) - 440) < 2


def test_channels_are_averaged() -> None:
    mono = tone()
    surround = np.stack([mono, -mono, mono, mono, mono, mono], axis=1)
    got = decode_audio(sound(surround), LIMITS, 22_050)
    assert np.allclose(got, mono * (4 / 6), atol=1e-3)


def test_own_rate_is_untouched() -> None:
    mono = tone()
    assert (decode_audio(sound(mono, codec="FLOAT"), LIMITS, 22_050) == mono).all()


@pytest.mark.parametrize("maker", ["flac", "ogg", "m4a"])
def test_a_part(maker: str) -> None:
    """Ten seconds, another pitch in each: the part from 6.25 to 7.75 s is mostly the seventh and eighth."""
    rate = 44_100
    whole = np.concatenate([tone(1.0, rate, 200.0 + 100 * k) for k in range(10)])
    data = by_ffmpeg(whole, rate, "ipod", "aac") if maker == "m4a" else sound(whole, rate, maker.upper())
    got = decode_audio(data, LIMITS, 16_000, start=6.25, end=7.75)
    assert abs(len(got) - 24_000) < 1_100
    assert abs(pitch(got[1_000:11_000], 16_000) - 800) < 5
    assert abs(pitch(got[13_500:], 16_000) - 900) < 5
    tail = decode_audio(data, LIMITS, 16_000, start=9.0)
    assert abs(len(tail) - 16_000) < 2_500 and abs(pitch(tail[:15_000], 16_000) - 1100) < 5
    assert cause_of(data, start=30.0) == Cause.ZERO_LENGTH
    assert cause_of(data, start=5.0, end=5.0) == Cause.ZERO_LENGTH


def test_limits_count_what_is_asked_for() -> None:
    data = sound(tone(4.0))
    limits = LimitSettings(max_seconds=3)
    assert cause_of(data, limits) == Cause.TOO_LONG
    assert len(decode_audio(data, limits, 16_000, start=1, end=3)) == 32_000
    assert cause_of(by_ffmpeg(tone(4.0), 22_050, "ipod", "aac"), limits) == Cause.TOO_LONG
    assert cause_of(data, LimitSettings(max_bytes=100)) == Cause.TOO_LARGE


def test_bad_samples_are_made_finite() -> None:
    samples = tone()
    samples[100:103] = (np.nan, np.inf, -np.inf)
    got = decode_audio(sound(samples, codec="FLOAT"), LIMITS, 22_050)
    assert got[100] == 0 and got[101] == 1 and got[102] == -1


def silent_video() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(5):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


WAV, FLAC = sound(tone(3.0)), sound(tone(3.0), kind="FLAC")
OGG, MP3 = sound(tone(3.0), kind="OGG"), sound(tone(3.0), kind="MP3")
LONG_FLAC = sound(np.random.default_rng(0).uniform(-0.5, 0.5, 300_000).astype(np.float32), kind="FLAC")
M4A = by_ffmpeg(tone(3.0), 22_050, "ipod", "aac")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", Cause.EMPTY),
        (b"\0" * 3000, Cause.NOT_AUDIO),
        (b"just a text file, renamed to .wav", Cause.NOT_AUDIO),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 500, Cause.NOT_AUDIO),
        (np.random.default_rng(0).bytes(20_000), Cause.NOT_AUDIO),
        (silent_video(), Cause.NO_AUDIO),
        (sound(np.zeros(0, np.float32)), Cause.ZERO_LENGTH),
        (sound(np.zeros(0, np.float32), kind="AU"), Cause.ZERO_LENGTH),
        (WAV[: len(WAV) // 2], Cause.TRUNCATED),
        (WAV[:20], Cause.TRUNCATED),
        (FLAC[: len(FLAC) // 2], Cause.TRUNCATED),
        (OGG[: len(OGG) // 2], Cause.TRUNCATED),
        (M4A[: len(M4A) // 2], Cause.TRUNCATED),
        (FLAC[:4] + b"\xff" * 2000, Cause.CORRUPT),
        (LONG_FLAC[:200_000] + b"\x55" * 500 + LONG_FLAC[200_500:], Cause.CORRUPT),
        (b"RIFF\xf8\x07\0\0WAVE" + b"\xee" * 2036, Cause.CORRUPT),
        (b"ID3" + b"\0" * 2000, Cause.CORRUPT),
    ],
)
def test_what_is_no_sound(data: bytes, cause: Cause) -> None:
    assert cause_of(data) == cause


def test_a_stream_of_unknown_length_is_not_called_truncated() -> None:
    data = bytearray(WAV)
    data[4:8] = b"\xff\xff\xff\xff"
    assert len(decode_audio(bytes(data), LIMITS, 22_050)) == 66_150


@pytest.mark.parametrize("data", [WAV, FLAC, OGG, MP3, M4A], ids=["wav", "flac", "ogg", "mp3", "m4a"])
def test_flipped_bytes_decode_or_are_refused(data: bytes) -> None:
    rng = np.random.default_rng(5)
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 3000), 12):
            damaged[position] = rng.integers(0, 256)
        try:
            got = decode_audio(bytes(damaged), LimitSettings(max_seconds=600), 16_000)
            assert np.isfinite(got).all()
            outcomes.add("decoded")
        except MediaError as e:
            outcomes.add(e.cause)
    assert outcomes <= {"decoded", *Cause}
    assert len(outcomes) > 1


@pytest.mark.parametrize("step", ["soundfile.SoundFile", "soundfile.SoundFile.read", "av.open", "av.AudioResampler"])
def test_too_little_memory_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    by_av = step.startswith("av")

    def starved(*args: object, **kwargs: object) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory") if by_av else soundfile.LibsndfileError(17)

    data = by_ffmpeg(tone(), 22_050, "mp4", "aac") if by_av else sound(tone())
    resampling = SimpleNamespace(resample=starved)
    monkeypatch.setattr(step, (lambda **kwargs: resampling) if step == "av.AudioResampler" else starved)
    assert cause_of(data) == Cause.OUT_OF_MEMORY
