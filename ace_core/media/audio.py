"""Sounds: bytes of any common format -> mono samples at one rate."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.items import Modality
from ace_core.media.causes import Cause, check_bytes, check_memory, check_seconds
from ace_core.media.kinds import sniff, sniffed_modality
from ace_core.media.structure import is_cut_short

_BLOCK = 1 << 20  # frames read at a time: memory stays near the size of the result
# What libsndfile does not read and FFmpeg does.
_BY_FFMPEG = frozenset({".m4a", ".mp4", ".mov", ".aac", ".wma", ".wmv", ".mkv", ".webm", ".3gp"})


def decode_audio(
    data: bytes, limits: LimitSettings, rate: int, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Decode one sound, or its part from ``start`` to ``end`` seconds: channels averaged, resampled to ``rate`` Hz.

    Args:
        data: the file (WAV, FLAC, Ogg, Opus, MP3, AIFF, AU by libsndfile; AAC, M4A, WMA by FFmpeg).
        limits: bytes, and seconds of what is asked for.
        rate: samples a second of the result.
        start, end: the part to decode; None for the beginning and the end of the file.

    Returns:
        (samples,) float32, in -1..1 for integer formats.

    Raises:
        MediaError: ``empty``, ``too-large``, ``too-long``, ``zero-length``, ``not-audio``, ``no-audio``,
            ``truncated``, ``corrupt`` or ``out-of-memory``.
    """
    if start is not None and end is not None and end <= start:
        raise MediaError(Cause.ZERO_LENGTH, f"the part from {start} to {end} s has no duration")
    source_rate, _, blocks = _blocks(data, limits, start or 0.0, end)
    return _resampled(blocks, source_rate, rate)


def whole_audio(data: bytes, limits: LimitSettings, rate: int, most: float) -> np.ndarray | float:
    """As :func:`decode_audio` of the whole file; of one that says it lasts longer than ``most`` seconds, how long.

    Raises:
        MediaError: as :func:`decode_audio`.
    """
    source_rate, seconds, blocks = _blocks(data, limits, 0.0, None)
    return seconds if seconds > most else _resampled(blocks, source_rate, rate)


def _blocks(
    data: bytes, limits: LimitSettings, start: float, end: float | None
) -> tuple[int, float, Iterator[np.ndarray]]:
    """Rate, seconds of the whole file (0 where it does not say), mono float32 blocks from ``start`` to ``end``."""
    check_bytes(data, limits)
    if sniff(data) in _BY_FFMPEG:
        from ace_core.media.ffmpeg import sound_blocks

        return sound_blocks(data, limits, start, end)
    return _soundfile_blocks(data, limits, start, end)


def _resampled(blocks: Iterator[np.ndarray], source_rate: int, rate: int) -> np.ndarray:
    resampler = None if source_rate == rate else soxr.ResampleStream(source_rate, rate, 1, dtype="float32")
    parts = []
    for block in blocks:
        parts.append(block if resampler is None else resampler.resample_chunk(block))
    if resampler is not None:
        parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    samples = np.concatenate(parts) if parts else np.empty(0, np.float32)
    if not len(samples):
        raise MediaError(Cause.ZERO_LENGTH, "the sound has no samples in the part that was asked for")
    # Float formats can hold anything; a few bad samples must not poison a whole vector.
    return np.nan_to_num(samples, nan=0.0, posinf=1.0, neginf=-1.0, copy=False)


def _soundfile_blocks(
    data: bytes, limits: LimitSettings, start: float, end: float | None
) -> tuple[int, float, Iterator[np.ndarray]]:
    source = io.BytesIO(data)
    try:
        file = soundfile.SoundFile(source)
    except (soundfile.LibsndfileError, TypeError) as e:
        check_memory(e)
        raise _refused(data, e) from None
    rate, frames = file.samplerate, file.frames
    if frames <= 0:
        raise MediaError(
            Cause.TRUNCATED if is_cut_short(data) else Cause.ZERO_LENGTH, "the sound has no samples", remedy=""
        )
    first = min(frames, round(start * rate))
    last = frames if end is None else min(frames, round(end * rate))
    check_seconds((last - first) / rate, limits)
    if is_cut_short(data):
        raise MediaError(Cause.TRUNCATED, "the file ends before its header says", remedy="Copy it to the corpus again.")
    return rate, frames / rate, _read(file, source, first, last)


def _read(file: soundfile.SoundFile, source: io.BytesIO, first: int, last: int) -> Iterator[np.ndarray]:
    try:
        if first:
            file.seek(first)
        left = last - first
        while left > 0:
            block = file.read(min(left, _BLOCK), dtype="float32", always_2d=True)
            if not len(block):
                raise MediaError(
                    Cause.TRUNCATED,
                    f"the header says {file.frames:,} samples, {left:,} are missing",
                    remedy="Copy it to the corpus again.",
                )
            left -= len(block)
            yield block.mean(axis=1)
    except soundfile.LibsndfileError as e:
        check_memory(e)
        # It wanted more where there is no more: cut off. Otherwise it met something that it could not read.
        cut = source.tell() >= source.getbuffer().nbytes
        raise MediaError(
            Cause.TRUNCATED if cut else Cause.CORRUPT, f"the sound cannot be decoded: {e.error_string}"
        ) from None
    finally:
        file.close()


def _refused(data: bytes, error: Exception) -> MediaError:
    if sniffed_modality(data) is not Modality.AUDIO:
        return MediaError(Cause.NOT_AUDIO, "the bytes are of no sound format that is known")
    if len(data) < 64 or is_cut_short(data):
        return MediaError(Cause.TRUNCATED, "the file ends before its header says")
    return MediaError(Cause.CORRUPT, f"the header cannot be read: {getattr(error, 'error_string', error)}")
