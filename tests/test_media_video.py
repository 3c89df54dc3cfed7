"""Videos through both decoders: what is sampled, what is refused."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.media import Cause, decode_video
from ace_core.media.decoders import VideoDecoder
from ace_core.media.isolate import IsolatedDecoder
from ace_core.media.video import available_backends

LIMITS = LimitSettings()
BACKENDS = available_backends()
both = pytest.mark.parametrize("backend", BACKENDS)


def video(
    frames: int = 40,
    fps: int = 10,
    kind: str = "mp4",
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    times: list[int] | None = None,
    gop: int = 12,
) -> bytes:
    """Frame i is grey of level 6 i, with a white mark in its top left corner. ``times`` are in units of 1 / fps."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.bit_rate = 2_000_000
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), min(6 * i, 240), np.uint8)
            pixels[:8, :8] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[i] if times else i
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def levels(clip: np.ndarray) -> np.ndarray:
    """Which frame each is, by its grey level."""
    return clip[:, 20:, 20:].mean((1, 2, 3)) / 6


def cause_of(data: bytes, backend: str, limits: LimitSettings = LIMITS, **part: float) -> str:
    with pytest.raises(MediaError) as error:
        decode_video(data, limits, 4, backend=backend, **part)
    return error.value.cause


def test_both_decoders_are_tested_where_both_exist() -> None:
    assert BACKENDS[-1] == "pyav"


@both
@pytest.mark.parametrize(
    ("kind", "codec"),
    [("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx-vp9"), ("matroska", "libx264"), ("avi", "mpeg4"),
     ("mov", "libx264"), ("mpegts", "libx264"), ("flv", "libx264"), ("asf", "mpeg4")],
)  # fmt: skip
def test_uniform_sampling(kind: str, codec: str, backend: str) -> None:
    clip = decode_video(video(kind=kind, codec=codec), LIMITS, 5, backend=backend)
    assert clip.frames.shape == (5, 48, 64, 3) and clip.frames.dtype == np.uint8
    # 4 seconds in 5 pieces: their middles are at 0.4, 1.2, ... seconds, which is frame 4, 12, ...
    assert np.abs(levels(clip.frames) - [4, 12, 20, 28, 36]).max() < 1.2
    assert np.allclose(clip.times, [0.4, 1.2, 2.0, 2.8, 3.6], atol=0.2)
    assert abs(clip.seconds - 4) < 0.25 and abs(clip.fps - (0 if kind == "asf" else 10)) < 0.1
    assert clip.frames[:, 2:6, 2:6].mean() > 240


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one decoder on this platform")
def test_the_decoders_agree() -> None:
    data = video(frames=120, fps=12)
    for part in ({}, {"start": 3.3, "end": 8.1}, {"start": 9.0}):
        one, two = (decode_video(data, LIMITS, 7, 40, backend=b, **part) for b in BACKENDS)
        assert np.abs(one.frames.astype(int) - two.frames).max() <= 3
        assert (one.times == two.times).all() and one.fps == two.fps


@both
def test_a_part(backend: str) -> None:
    data = video(frames=40)
    clip = decode_video(data, LIMITS, 3, backend=backend, start=1.0, end=2.5)
    assert np.abs(levels(clip.frames) - [12, 17, 22]).max() < 1.2
    assert cause_of(data, backend, start=9.0) == Cause.ZERO_LENGTH
    assert cause_of(data, backend, start=2.0, end=1.0) == Cause.ZERO_LENGTH


@both
def test_a_late_part_of_a_long_video(backend: str) -> None:
    """Seeking lands on a key frame before: what is shown must still be the frame asked for."""
    data = video(frames=900, fps=10, size=(32, 32), gop=50)
    clip = decode_video(data, LIMITS, 3, backend=backend, start=3.0, end=3.6)
    assert np.abs(levels(clip.frames) - [31, 33, 35]).max() < 1.2
    assert decode_video(data, LIMITS, 2, backend=backend, start=60.0, end=80.0).frames.shape == (2, 32, 32, 3)


@both
def test_uneven_frame_times(backend: str) -> None:
    """Ten frames of 0.4 s, then eleven of 0.1 s: the frame shown at a time, not the frame of a number."""
    data = video(frames=21, times=[*range(0, 40, 4), *range(40, 51)])
    clip = decode_video(data, LIMITS, 4, backend=backend)
    assert np.abs(levels(clip.frames) - [1, 4, 7, 14]).max() < 0.6


@both
def test_short_videos_repeat_frames(backend: str) -> None:
    assert decode_video(video(frames=1), LIMITS, 4, backend=backend).frames.shape == (4, 48, 64, 3)
    assert np.ptp(levels(decode_video(video(frames=2), LIMITS, 6, backend=backend).frames)) > 0.5


@both
def test_size(backend: str) -> None:
    assert decode_video(video(), LIMITS, 2, 32, backend=backend).frames.shape == (2, 32, 32, 3)


@both
def test_odd_sizes(backend: str) -> None:
    assert decode_video(video(size=(50, 34)), LIMITS, 2, backend=backend).frames.shape == (2, 34, 50, 3)


@both
@pytest.mark.parametrize(
    ("matrix", "shape", "corner"),
    [
        ((1, 0, 0, 1, 0, 0), (48, 64), (4, 4)),
        ((0, 1, -1, 0, 48, 0), (64, 48), (4, -4)),
        ((-1, 0, 0, -1, 64, 48), (48, 64), (-4, -4)),
        ((0, -1, 1, 0, 0, 64), (64, 48), (-4, 4)),
    ],
)
def test_phone_recordings_are_turned_upright(
    matrix: tuple[int, ...], shape: tuple[int, int], corner: tuple[int, int], backend: str
) -> None:
    """The track header's matrix turns the picture; the white mark of the top left corner goes with it."""
    a, b, c, d, x, y = matrix
    place = MP4.index(b"tkhd") + 44
    turned = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, x << 16, y << 16, 1 << 30)
    clip = decode_video(MP4[:place] + turned + MP4[place + 36 :], LIMITS, 3, backend=backend)
    assert clip.frames.shape == (3, *shape, 3)
    assert clip.frames[0, corner[0], corner[1]].min() > 240
    others = [clip.frames[0, i, j].max() for i in (4, -4) for j in (4, -4) if (i, j) != corner]
    assert max(others) < 100


@both
def test_limits(backend: str) -> None:
    data = video(frames=50)
    assert cause_of(data, backend, LimitSettings(max_seconds=4)) == Cause.TOO_LONG
    part = decode_video(data, LimitSettings(max_seconds=4), 2, start=1, end=4, backend=backend)
    assert len(part.frames) == 2
    assert cause_of(data, backend, LimitSettings(max_pixels=3000)) == Cause.TOO_MANY_PIXELS
    assert cause_of(data, backend, LimitSettings(max_bytes=99)) == Cause.TOO_LARGE


def sound_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


MP4, WEBM, AVI = video(), video(kind="webm", codec="libvpx-vp9"), video(kind="avi", codec="mpeg4")


def without_payload(data: bytes) -> bytes:
    """The same container with its media data overwritten."""
    begin = data.index(b"mdat") + 4
    size = int.from_bytes(data[begin - 8 : begin - 4], "big") - 8
    return data[:begin] + b"\0" * size + data[begin + size :]


@both
@pytest.mark.parametrize(
    ("data", "causes"),
    [
        (b"", {Cause.EMPTY}),
        (b"\0" * 3000, {Cause.NOT_A_VIDEO}),
        (b"<html>moved permanently</html>" * 50, {Cause.NOT_A_VIDEO}),
        (np.random.default_rng(0).bytes(20_000), {Cause.NOT_A_VIDEO}),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", {Cause.NOT_A_VIDEO}),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", {Cause.NOT_A_VIDEO}),
        (sound_only(), {Cause.NO_FRAMES}),
        (MP4[: len(MP4) // 2], {Cause.TRUNCATED}),
        (MP4[:40], {Cause.TRUNCATED}),
        (WEBM[: len(WEBM) // 2], {Cause.TRUNCATED}),
        (AVI[: len(AVI) // 2], {Cause.TRUNCATED}),
        (without_payload(MP4), {Cause.CORRUPT, Cause.NO_FRAMES}),
        (MP4[:32] + b"\xee" * 5000, {Cause.CORRUPT, Cause.TRUNCATED}),
    ],
)
def test_what_is_no_video(data: bytes, causes: set[str], backend: str) -> None:
    assert cause_of(data, backend) in causes


@both
@pytest.mark.parametrize("data", [MP4, WEBM, AVI], ids=["mp4", "webm", "avi"])
def test_flipped_bytes_decode_or_are_refused(data: bytes, backend: str) -> None:
    """In a child: decord 0.6 dies of a segmentation fault on some of these MP4 files."""
    decode = IsolatedDecoder(VideoDecoder(LimitSettings(max_pixels=10**6, decode_seconds=20), 3, backend=backend))
    rng = np.random.default_rng(7)
    outcomes = set()
    for _ in range(25):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 20):
            damaged[position] = rng.integers(0, 256)
        try:
            outcomes.add(decode(bytes(damaged)).ndim)
        except MediaError as e:
            outcomes.add(e.cause)
    assert outcomes <= {4, *Cause}
    assert len(outcomes) > 1


@pytest.mark.parametrize("step", ["av.open", "ace_core.media.video._pictures"])
def test_too_little_memory_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def starved(*args: object, **kwargs: object) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory")

    data = video(4)
    monkeypatch.setattr(step, starved)
    assert cause_of(data, "pyav") == Cause.OUT_OF_MEMORY
