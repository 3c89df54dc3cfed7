"""The one place that talks to FFmpeg (PyAV): probing a container, its frames at given times, its sound."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.error import FFmpegError

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.items import Modality
from ace_core.media.causes import Cause, check_memory, check_pixels, check_seconds
from ace_core.media.kinds import sniffed_modality
from ace_core.media.structure import is_cut_short

# FFmpeg fails in its own errors, and PyAV's argument checks in these, on damaged streams.
DAMAGE = (FFmpegError, ValueError, IndexError, TypeError, OverflowError, OSError)
_SEEK_GAP = 4.0  # seconds; below that, decoding on is cheaper than seeking back to a key frame


@dataclass(frozen=True)
class Probe:
    """What a container's header says of its first video stream: pixels, seconds, frames a second (0 if unsaid)."""

    width: int
    height: int
    seconds: float
    fps: float


def open_container(data: bytes, missing: Cause) -> av.container.InputContainer:
    """Open a container for reading, one that its first bytes speak for.

    FFmpeg guesses formats, and some of those it would guess (playlists, concatenations) name other files and
    addresses, which it would open: bytes from strangers must not make it.

    Raises:
        MediaError: ``missing`` if the bytes are of no known kind, else ``truncated``, ``corrupt`` or ``out-of-memory``.
    """
    if sniffed_modality(data) in (None, Modality.IMAGE):
        raise MediaError(missing, "the bytes are of no container that is known")
    try:
        return av.open(io.BytesIO(data), "r", metadata_errors="ignore")
    except DAMAGE as e:
        check_memory(e)
        cut = len(data) < 64 or is_cut_short(data)
        raise MediaError(
            Cause.TRUNCATED if cut else Cause.CORRUPT, f"the container cannot be opened: {_reason(e)}"
        ) from None


def probe_video(container: av.container.InputContainer, limits: LimitSettings) -> Probe:
    """Read a video's header and check it against the limits on pixels (seconds are the caller's).

    Raises:
        MediaError: ``no-frames`` (no video stream), ``too-many-pixels`` or ``corrupt``.
    """
    if not container.streams.video:
        raise MediaError(Cause.NO_FRAMES, "the container has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None or not context.width or not context.height:
        raise MediaError(Cause.CORRUPT, "the video stream's header cannot be read")
    check_pixels(context.width, context.height, limits)
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / av.time_base
    return Probe(context.width, context.height, seconds, float(stream.average_rate or 0))


def last_timestamp(container: av.container.InputContainer) -> float:
    """The end in seconds of a video that does not say its duration, from its packets (nothing is decoded)."""
    stream = container.streams.video[0]
    end = 0.0
    try:
        for packet in container.demux(stream):
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        container.seek(0)
    except DAMAGE as e:
        check_memory(e)  # otherwise what could be read counts; decoding will say what is wrong
    return end


def frames_at(container: av.container.InputContainer, times: np.ndarray) -> Iterator[np.ndarray]:
    """For each of the ascending ``times`` (seconds from the first frame), the frame shown then: (h, w, 3) uint8.

    A time past the end gives the last frame. Ends early when nothing can be decoded.
    """
    stream = container.streams.video[0]
    if not stream.codec_context.is_open:  # a second walk through the same container
        stream.thread_count = 1
    tick = stream.time_base or Fraction(1, av.time_base)
    origin = float((stream.start_time or 0) * tick)
    half = 0.5 / float(stream.average_rate or 1000)  # timestamps are rounded to the stream's time base
    decoder: Iterator[av.VideoFrame] = container.decode(stream)
    shown: av.VideoFrame | None = None
    ahead: av.VideoFrame | None = None
    ended = False
    for time in times + origin:
        position = _seconds(ahead) if ahead is not None else origin
        if time - position > _SEEK_GAP and not ended:
            container.seek(int(time / tick), stream=stream, backward=True)
            decoder, ahead = container.decode(stream), None
        while not ended and (ahead is None or _seconds(ahead) <= time + min(half, 1e-3)):
            shown = ahead if ahead is not None else shown
            try:
                ahead = next(decoder)
            except StopIteration:
                ended = True
        if shown is None:
            shown = ahead
        if shown is None:
            return
        yield _upright(shown)


def _sound_stream(container: av.container.InputContainer) -> av.AudioStream:
    if not container.streams.audio:
        raise MediaError(Cause.NO_AUDIO, "the container has no sound stream")
    return container.streams.audio[0]


def _sound_seconds(container: av.container.InputContainer, stream: av.AudioStream) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def sound_blocks(
    data: bytes, limits: LimitSettings, start: float, end: float | None
) -> tuple[int, float, Iterator[np.ndarray]]:
    """Of a container's first sound stream: rate, seconds of all of it by its header (0 where it does not say), and
    mono float32 blocks from ``start`` to ``end`` seconds.

    Raises:
        MediaError: ``not-audio``, ``no-audio``, ``too-long``, ``truncated``, ``corrupt`` or ``out-of-memory``.
    """
    container = open_container(data, Cause.NOT_AUDIO)
    try:
        stream = _sound_stream(container)
        total = _sound_seconds(container, stream)
        check_seconds((total if end is None else min(end, total or end)) - start, limits)
        if is_cut_short(data):
            raise MediaError(
                Cause.TRUNCATED, "the file ends before its header says", remedy="Copy it to the corpus again."
            )
    except MediaError:
        container.close()
        raise
    return stream.rate, total, _sound(container, start, end, limits)


def _sound(
    container: av.container.InputContainer, start: float, end: float | None, limits: LimitSettings
) -> Iterator[np.ndarray]:
    stream = container.streams.audio[0]
    rate = stream.rate
    stop = end if end is not None else start + limits.max_seconds
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
    try:
        if start > _SEEK_GAP:
            container.seek(int((start - 1.0) * av.time_base), backward=True)
        for frame in container.decode(stream):
            begin = frame.time or 0.0
            if begin >= stop:
                break
            for mono in resampler.resample(frame):
                block = mono.to_ndarray()[0]
                low = max(0, round((start - begin) * rate))
                high = max(0, round((stop - begin) * rate))
                if low < len(block) and high:
                    yield block[low:high].astype(np.float32)
                begin += len(block) / rate
    except DAMAGE as e:
        check_memory(e)
        raise MediaError(Cause.CORRUPT, f"the sound cannot be decoded: {_reason(e)}") from None
    finally:
        container.close()


def _seconds(frame: av.VideoFrame) -> float:
    return frame.time if frame.time is not None else 0.0


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB pixels, turned as the display matrix of a phone's recording asks."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
