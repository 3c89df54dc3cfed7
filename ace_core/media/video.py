"""Videos: bytes -> a few frames, by decord where its wheel exists and by PyAV everywhere else."""

from __future__ import annotations

import importlib.util
import io
import math
from dataclasses import dataclass
from typing import Literal

import av
import numpy as np

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.media import scenes
from ace_core.media.causes import Cause, check_bytes, check_memory, check_seconds
from ace_core.media.ffmpeg import DAMAGE, frames_at, last_timestamp, open_container, probe_video
from ace_core.media.image import resized
from ace_core.media.kinds import sniff
from ace_core.media.structure import is_cut_short

Backend = Literal["decord", "pyav"]
Sampling = Literal["uniform", "scenes"]
# decord 0.6 gives the wrong frames of MPEG transport streams, and fails on ASF.
_BY_DECORD = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi"})


@dataclass(frozen=True)
class VideoClip:
    """Frames of a video or of a part of it.

    Attributes:
        frames: (f, h, w, 3) uint8, RGB, in order of time.
        times: (f,) float64, seconds of each frame from the beginning of the file.
        seconds: duration of the whole file.
        fps: frames a second of the file; 0 where it does not say.
    """

    frames: np.ndarray
    times: np.ndarray
    seconds: float
    fps: float


def available_backends() -> tuple[Backend, ...]:
    """The decoders that are installed, the preferred one first. (decord has no wheel for arm64.)"""
    return ("decord", "pyav") if importlib.util.find_spec("decord") is not None else ("pyav",)


def decode_video(
    data: bytes,
    limits: LimitSettings,
    frames: int,
    size: int | None = None,
    start: float | None = None,
    end: float | None = None,
    backend: Backend | None = None,
    sampling: Sampling = "uniform",
) -> VideoClip:
    """Sample ``frames`` frames of a video, or of its part from ``start`` to ``end`` seconds.

    Uniformly: the part is cut into ``frames`` equal pieces, and the frame shown in the middle of each is taken. By
    scenes: see :func:`ace_core.media.scenes.scene_times`; the video is decoded twice. Frames of a
    video with fewer than asked for are repeated. Readers are made inside the call and use one thread: decord is
    not safe across a fork, and callers run one decoder a core.

    Args:
        size: height and width that every frame is resized to (the aspect ratio is not kept); None keeps its own.
        backend: the decoder to try first; by default the first of :func:`available_backends`. What decord cannot
            read, or is known to read wrongly, PyAV reads.

    Raises:
        MediaError: ``empty``, ``too-large``, ``too-long``, ``too-many-pixels``, ``not-a-video``, ``no-frames``,
            ``zero-length``, ``truncated``, ``corrupt`` or ``out-of-memory``.
    """
    if start is not None and end is not None and end <= start:
        raise MediaError(Cause.ZERO_LENGTH, f"the part from {start} to {end} s has no duration")
    clip = _decoded(data, limits, frames, size, start, end, backend, sampling)
    assert isinstance(clip, VideoClip)
    return clip


def whole_video(
    data: bytes,
    limits: LimitSettings,
    frames: int,
    size: int | None,
    most: float,
    backend: Backend | None = None,
    sampling: Sampling = "uniform",
) -> VideoClip | float:
    """As :func:`decode_video` of the whole file; of one that lasts longer than ``most`` seconds, how long it lasts.

    Raises:
        MediaError: as :func:`decode_video`.
    """
    return _decoded(data, limits, frames, size, None, None, backend, sampling, most)


def _decoded(
    data: bytes,
    limits: LimitSettings,
    frames: int,
    size: int | None,
    start: float | None,
    end: float | None,
    backend: Backend | None,
    sampling: Sampling,
    most: float = math.inf,
) -> VideoClip | float:
    check_bytes(data, limits)
    with open_container(data, Cause.NOT_A_VIDEO) as container:
        probe = probe_video(container, limits)
        seconds = probe.seconds or last_timestamp(container)
        first = start or 0.0
        last = seconds if end is None else min(end, seconds or end)
        check_seconds(last - first, limits)
        if is_cut_short(data):
            raise MediaError(
                Cause.TRUNCATED, "the file ends before its header says", remedy="Copy it to the corpus again."
            )
        if start is not None and last <= first:
            raise MediaError(Cause.ZERO_LENGTH, f"the part begins at {first} s, the video lasts {seconds:.2f} s")
        if seconds > most:
            return seconds
        times = _middles(first, last, frames)
        try:
            use_decord = (backend or available_backends()[0]) == "decord" and sniff(data) in _BY_DECORD
            if sampling == "scenes":
                count = min(scenes.CANDIDATES * frames, scenes.MOST)
                looks = _pictures(container, data, _middles(first, last, count), scenes.SIDE, use_decord)
                if len(looks) > 1:
                    times = scenes.scene_times(np.stack(looks), first, last, frames)
                container.seek(0)
            pictures = _pictures(container, data, times, size, use_decord)
        except DAMAGE as e:
            check_memory(e)
            raise MediaError(Cause.CORRUPT, f"the video cannot be decoded: {e}") from None
    if not pictures:
        raise MediaError(Cause.NO_FRAMES, "no frame of the video could be decoded")
    pictures += pictures[-1:] * (frames - len(pictures))
    return VideoClip(np.stack(pictures), times, seconds, probe.fps)


def _middles(first: float, last: float, count: int) -> np.ndarray:
    return first + (np.arange(count) + 0.5) * ((last - first) / count)


def _pictures(
    container: av.container.InputContainer, data: bytes, times: np.ndarray, size: int | None, use_decord: bool
) -> list[np.ndarray]:
    """The frames shown at ``times``, resized."""
    pictures = _by_decord(data, times, size) if use_decord else None
    return [_sized(f, size) for f in frames_at(container, times)] if pictures is None else pictures


def _by_decord(data: bytes, times: np.ndarray, size: int | None) -> list[np.ndarray] | None:
    """The frames shown at ``times``; None for what decord 0.6 cannot read (its FFmpeg is of 2020), and for what it
    gets wrong: videos turned by 90 degrees, as phones record them, have four channels and a black right part."""
    import decord

    try:
        reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
        if not len(reader):
            return []
        begins = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
        indices = np.searchsorted(begins - begins[0], times + 1e-3, side="right") - 1
        pictures: list[np.ndarray] = []
        for k, index in enumerate(np.maximum(indices, 0)):
            if k > 0 and index == indices[k - 1]:
                pictures.append(pictures[-1])
                continue
            frame = reader[int(index)].asnumpy()
            if frame.shape[-1] != 3:
                return None
            pictures.append(_sized(frame, size))
        return pictures
    except (decord.DECORDError, RuntimeError):
        return None


def _sized(frame: np.ndarray, size: int | None) -> np.ndarray:
    return frame if size is None else resized(frame, size, size)
