"""Why a file was refused: stable codes that a job counts by."""

from __future__ import annotations

import errno
from enum import StrEnum

from ace_core.config import LimitSettings
from ace_core.errors import MediaError


class Cause(StrEnum):
    """The ``cause`` of a :class:`~ace_core.errors.MediaError`, and of a file without a vector. Stored in tables: names
    never change."""

    EMPTY = "empty"  # no bytes
    TOO_LARGE = "too-large"  # more bytes than limits.max_bytes
    TOO_MANY_PIXELS = "too-many-pixels"  # more than limits.max_pixels, by the header
    TOO_LONG = "too-long"  # more than limits.max_seconds
    ZERO_LENGTH = "zero-length"  # a sound without samples, a part of no duration
    NOT_AN_IMAGE = "not-an-image"  # the bytes are of no picture format
    NOT_AUDIO = "not-audio"
    NOT_A_VIDEO = "not-a-video"
    NO_AUDIO = "no-audio"  # a container without a sound track
    NO_FRAMES = "no-frames"  # a container without pictures that can be decoded
    TRUNCATED = "truncated"  # ends before its own structure says it should
    CORRUPT = "corrupt"  # recognised, but its content cannot be decoded
    TIMEOUT = "timeout"  # took longer than limits.decode_seconds
    CRASHED = "crashed"  # the decoder's process died on it
    OUT_OF_MEMORY = "out-of-memory"  # the machine had too little left for it
    UNREADABLE = "unreadable"  # its storage did not give it
    NO_CONTENT = "no-content"  # decoded, and the encoder finds nothing in it
    UNEXPECTED = "unexpected"  # any other error


PASSING = frozenset({Cause.TIMEOUT, Cause.CRASHED, Cause.OUT_OF_MEMORY, Cause.UNREADABLE, Cause.UNEXPECTED})
"""What a busy machine, a full disk or a lost node can cause: another time the same file may do."""

_NO_MEMORY = ("out of memory", "malloc", "cannot allocate memory")  # as Pillow, libsndfile and FFmpeg say it

REMEDY_LIMIT = "Raise {setting} if the file is meant to be in the corpus."


def check_bytes(data: bytes, limits: LimitSettings) -> None:
    """Refuse an empty or oversized file before any decoder sees it.

    Raises:
        MediaError: ``empty`` or ``too-large``.
    """
    if not data:
        raise MediaError(Cause.EMPTY, "the file has no bytes", remedy="Copy it to the corpus again.")
    if len(data) > limits.max_bytes:
        raise MediaError(
            Cause.TOO_LARGE,
            f"the file has {len(data):,} bytes, the limit is {limits.max_bytes:,}",
            remedy=REMEDY_LIMIT.format(setting="limits.max_bytes"),
        )


def check_pixels(width: int, height: int, limits: LimitSettings) -> None:
    """Refuse a picture or frame by the size in its header.

    Raises:
        MediaError: ``too-many-pixels``.
    """
    if width * height > limits.max_pixels:
        raise MediaError(
            Cause.TOO_MANY_PIXELS,
            f"the header says {width} x {height} pixels, the limit is {limits.max_pixels:,}",
            remedy=REMEDY_LIMIT.format(setting="limits.max_pixels"),
        )


def check_seconds(seconds: float, limits: LimitSettings) -> None:
    """Refuse a recording, or the part of one that is asked for, by its duration.

    Raises:
        MediaError: ``too-long``.
    """
    if seconds > limits.max_seconds:
        raise MediaError(
            Cause.TOO_LONG,
            f"it lasts {seconds:,.0f} s, the limit is {limits.max_seconds:,.0f} s",
            remedy=REMEDY_LIMIT.format(setting="limits.max_seconds"),
        )


def check_memory(error: Exception) -> None:
    """Of a decoder's error, tell whether memory ran out: then the file may be fine.

    Raises:
        MediaError: ``out-of-memory``.
    """
    code, text = getattr(error, "errno", None), str(error).lower()
    if isinstance(error, MemoryError) or code == errno.ENOMEM or any(words in text for words in _NO_MEMORY):
        raise no_memory() from None


def no_memory() -> MediaError:
    """What is said of a file for which memory ran out."""
    return MediaError(
        Cause.OUT_OF_MEMORY,
        "the machine ran out of memory over it",
        remedy="Try again when more is free.",
    )
