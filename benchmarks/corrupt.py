"""Good media files of every kind, and what can go wrong with them: each damage with the causes that name it.

A damage is made by what really happens to files (cut off while copied, a wrong name, a block of zeros, a lying
header), and its cause follows from how it was made, not from what a decoder says of it.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import av
import numpy as np
import soundfile
from PIL import Image

_TEXT = b"Dear reader, this is a letter and no picture, sound or video at all. " * 9


def picture(number: int, kind: str = "PNG", side: int = 64) -> bytes:
    """A picture that differs from all others: ``number`` sets its colours and where its square is."""
    rng = np.random.default_rng(number)
    pixels = np.full((side, side, 3), rng.integers(0, 256, 3), np.uint8)
    x, y = rng.integers(0, side // 2, 2)
    pixels[y : y + side // 2, x : x + side // 2] = rng.integers(0, 256, 3)
    pixels[:8, :8] = rng.integers(0, 256, (8, 8, 3))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def sound(number: int, kind: str = "FLAC", seconds: float = 0.6) -> bytes:
    """A chord with some noise, another one for every number."""
    rng = np.random.default_rng(number)
    t = np.arange(int(16_000 * seconds)) / 16_000
    samples = sum(0.2 * np.sin(2 * np.pi * f * t) for f in rng.uniform(150, 3000, 3))
    samples = samples + rng.uniform(-0.02, 0.02, len(t))
    out = io.BytesIO()
    soundfile.write(out, samples.astype(np.float32), 16_000, format=kind)
    return out.getvalue()


def clip(number: int, kind: str = "mp4", codec: str = "libx264", frames: int = 12) -> bytes:
    """A square that moves over noise."""
    rng = np.random.default_rng(number)
    ground = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    step = rng.integers(1, 4)
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=10))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in range(frames):
            pixels = ground.copy()
            pixels[20:44, frame * step : frame * step + 20] = (230, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def _sound_only(number: int) -> bytes:
    """An MP4 with a sound stream and no pictures."""
    out = io.BytesIO()
    rng = np.random.default_rng(number)
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        stream.layout = "mono"
        for first in range(0, 16_000, 1024):
            frame = av.AudioFrame.from_ndarray(rng.uniform(-0.2, 0.2, (1, 1024)).astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, first
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def _bad_crc(png: bytes) -> bytes:
    at = png.index(b"IDAT")
    (length,) = struct.unpack(">I", png[at - 4 : at])
    end = at + 4 + length
    return png[:end] + bytes(b ^ 0xFF for b in png[end : end + 4]) + png[end + 4 :]


def _bad_pixels(png: bytes) -> bytes:
    """The compressed pixels replaced by others that are no zlib stream, under a right checksum."""
    at = png.index(b"IDAT")
    (length,) = struct.unpack(">I", png[at - 4 : at])
    chunk = b"IDAT" + b"\xaa" * length
    return png[:at] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[at + 4 + length + 4 :]


def _png_bomb(png: bytes) -> bytes:
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def _jpeg_bomb(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + struct.pack(">HH", 65_500, 65_500) + jpeg[at + 9 :]


def _gif_bomb(gif: bytes) -> bytes:
    return gif[:6] + struct.pack("<HH", 65_000, 65_000) + gif[10:]


def _no_samples(number: int) -> bytes:
    return _wave_header(16_000, 0) + b"LIST" + struct.pack("<I4sI", 8, b"INFO", number)


def _wave_header(rate: int, size: int) -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVE" + form + b"data" + struct.pack("<I", size)


def _hours_of_sound(number: int) -> bytes:
    """Five hours at one sample a second."""
    return _wave_header(1, 36_000) + np.full(18_000, number % 999, np.int16).tobytes()


def _hole(data: bytes, first: float, last: float) -> bytes:
    a, b = int(len(data) * first), int(len(data) * last)
    return data[:a] + bytes(b - a) + data[b:]


def _without(data: bytes, box: bytes) -> bytes:
    """An MP4 without one of its top-level boxes."""
    at = data.index(box) - 4
    (size,) = struct.unpack(">I", data[at : at + 4])
    return data[:at] + data[at + size :]


def _no_pictures(mp4: bytes) -> bytes:
    """The coded pictures of an MP4 replaced by zeros; its index is whole."""
    at = mp4.index(b"mdat")
    (size,) = struct.unpack(">I", mp4[at - 4 : at])
    return mp4[: at + 4] + bytes(size - 8) + mp4[at - 4 + size :]


@dataclass(frozen=True)
class Damage:
    """A kind of corrupt file: its suffix, the causes that are right for it, and how one is made from a number."""

    suffix: str
    causes: frozenset[str]
    make: Callable[[int], bytes]


def _damage(suffix: str, causes: str, make: Callable[[int], bytes]) -> Damage:
    return Damage(suffix, frozenset(causes.split()), make)


# Numbered texts keep the files different: equal ones would be quarantined by one decoding.
DAMAGES: dict[str, Damage] = {
    "picture of no bytes": _damage("png", "empty", lambda n: b""),
    "JPEG cut in its header": _damage("jpg", "truncated", lambda n: picture(n, "JPEG")[: 20 + n % 8]),
    "JPEG cut in the middle": _damage("jpg", "truncated", lambda n: _cut(picture(n, "JPEG"), 0.7)),
    "PNG cut in its header": _damage("png", "truncated", lambda n: picture(n)[: 18 + n % 8]),
    "PNG cut in the middle": _damage("png", "truncated", lambda n: _cut(picture(n), 0.5)),
    "PNG cut near its end": _damage("png", "truncated", lambda n: _cut(picture(n), 0.85)),
    "PNG with a wrong checksum": _damage("png", "corrupt", lambda n: _bad_crc(picture(n))),
    "PNG with scrambled pixels": _damage("png", "corrupt", lambda n: _bad_pixels(picture(n))),
    "GIF cut in the middle": _damage("gif", "truncated", lambda n: _cut(picture(n, "GIF"), 0.6)),
    "WebP cut in the middle": _damage("webp", "truncated", lambda n: _cut(picture(n, "WEBP"), 0.6)),
    "BMP cut in the middle": _damage("bmp", "truncated", lambda n: _cut(picture(n, "BMP"), 0.6)),
    "TIFF cut in the middle": _damage("tif", "truncated corrupt", lambda n: _cut(picture(n, "TIFF"), 0.6)),
    "PNG bomb": _damage("png", "too-many-pixels", lambda n: _png_bomb(picture(n))),
    "JPEG bomb": _damage("jpg", "too-many-pixels", lambda n: _jpeg_bomb(picture(n, "JPEG"))),
    "GIF bomb": _damage("gif", "too-many-pixels", lambda n: _gif_bomb(picture(n, "GIF"))),
    "text named .png": _damage("png", "not-an-image", lambda n: _TEXT + str(n).encode()),
    "web page named .jpg": _damage("jpg", "not-an-image", lambda n: b"<!DOCTYPE html><title>404</title>%d" % n),
    "archive named .webp": _damage("webp", "not-an-image", lambda n: b"PK\x03\x04" + _TEXT + str(n).encode()),
    "sound named .jpg": _damage("jpg", "not-an-image", lambda n: sound(n)),
    "zeros named .jpg": _damage("jpg", "not-an-image", lambda n: bytes(3000 + n)),
    "sound of no bytes": _damage("flac", "empty", lambda n: b""),
    "FLAC cut in the middle": _damage("flac", "truncated", lambda n: _cut(sound(n), 0.5)),
    "FLAC cut in its header": _damage("flac", "truncated", lambda n: sound(n)[: 20 + n % 8]),
    "FLAC with a hole": _damage("flac", "corrupt truncated", lambda n: _hole(sound(n), 0.3, 0.7)),
    "WAV cut in the middle": _damage("wav", "truncated", lambda n: _cut(sound(n, "WAV"), 0.5)),
    "Ogg cut in the middle": _damage("ogg", "truncated", lambda n: _cut(sound(n, "OGG"), 0.6)),
    "WAV without samples": _damage("wav", "zero-length", _no_samples),
    "WAV of five hours": _damage("wav", "too-long", _hours_of_sound),
    "text named .wav": _damage("wav", "not-audio", lambda n: _TEXT + str(n).encode()),
    "picture named .flac": _damage("flac", "not-audio", lambda n: picture(n)),
    "M4A without sound": _damage("m4a", "no-audio", lambda n: clip(n)),
    "video of no bytes": _damage("mp4", "empty", lambda n: b""),
    "MP4 cut in the middle": _damage("mp4", "truncated", lambda n: _cut(clip(n), 0.5)),
    "MP4 without its index": _damage("mp4", "truncated", lambda n: _without(clip(n), b"moov")),
    "MP4 with zeros for pictures": _damage("mp4", "no-frames corrupt", lambda n: _no_pictures(clip(n))),
    "MP4 with sound only": _damage("mp4", "no-frames", _sound_only),
    "Matroska cut in the middle": _damage("mkv", "truncated", lambda n: _cut(clip(n, "matroska"), 0.5)),
    "AVI cut in the middle": _damage("avi", "truncated", lambda n: _cut(clip(n, "avi", "mpeg4"), 0.5)),
    "text named .mp4": _damage("mp4", "not-a-video", lambda n: _TEXT + str(n).encode()),
    "picture named .mp4": _damage("mp4", "not-a-video", lambda n: picture(n)),
}


def write_good(folder: Path, pictures: int, sounds: int, clips: int) -> None:
    """Good files in subfolders of a thousand, formats mixed."""
    makers = (
        ("images", pictures, picture, (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif"))),
        ("sounds", sounds, sound, (("FLAC", "flac"), ("WAV", "wav"), ("OGG", "ogg"))),
        ("clips", clips, clip, (("mp4", "mp4"), ("matroska", "mkv"))),
    )
    for name, count, make, kinds in makers:
        for number in range(count):
            kind, suffix = kinds[number % len(kinds)]
            path = folder / name / f"{number // 1000:03d}" / f"{number:06d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make(number, kind))


def write_corrupt(folder: Path, count: int) -> dict[str, str]:
    """``count`` corrupt files, all kinds in turn; returns the kind by item id (path below ``folder``'s parent)."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(DAMAGES)
    made = {}
    for number in range(count):
        kind = kinds[number % len(kinds)]
        path = folder / f"{number:06d}.{DAMAGES[kind].suffix}"
        path.write_bytes(DAMAGES[kind].make(1_000_000 + number))
        made[f"{folder.name}/{path.name}"] = kind
    return made
