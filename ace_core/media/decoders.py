"""Decoding of one modality with its settings bound: what an encoder needs of its files, as data that a child process
can be given."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from ace_core.config import LimitSettings

Answer = np.ndarray | float | Exception  # a file decoded; how many seconds it lasts; or why it is neither


class OpenedMedia(Protocol):
    """A file of which several parts are asked."""

    def part(self, start: float | None = None, end: float | None = None) -> np.ndarray:
        """The file, or its part from ``start`` to ``end`` seconds, decoded."""
        ...


class _Files:
    """What every decoder offers beside a call for one file: several files in one question, a file kept open for its
    parts, its imports ahead of time."""

    needs: ClassVar[tuple[str, ...]] = ()

    def load(self) -> None:
        """Import what decoding needs: without this the first call does, within the time of its file, which it may
        exceed."""
        for module in self.needs:
            importlib.import_module(module)

    def wholes(self, files: Sequence[bytes], most: float) -> list[Answer]:
        """Each of n files decoded; of one that says it lasts longer than ``most`` seconds, how long it lasts; of one
        that cannot be decoded, the error."""
        answers: list[Answer] = []
        for data in files:
            try:
                answers.append(self.whole(data, most))  # type: ignore[attr-defined]
            except Exception as e:  # this file's, and no other's
                answers.append(e)
        return answers

    @contextmanager
    def opened(self, data: bytes) -> Iterator[OpenedMedia]:
        """The file, for as long as the block runs."""
        yield _Opened(self, data)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ImageDecoder(_Files):
    """Pictures to (h, w, 3) uint8. ``min_side``: as in ``decode_image``; ``side``: resized to (side, side, 3)."""

    needs = ("ace_core.media.image",)
    limits: LimitSettings
    min_side: int | None = None
    side: int | None = None

    def __call__(self, data: bytes, start: float | None = None, end: float | None = None) -> np.ndarray:
        from ace_core.media.image import decode_image, resized

        picture = decode_image(data, self.limits, self.min_side)
        return picture if self.side is None else resized(picture, self.side, self.side)

    def whole(self, data: bytes, most: float) -> np.ndarray | float:
        """The picture: pictures do not last."""
        return self(data)


@dataclass(frozen=True)
class AudioDecoder(_Files):
    """Sounds to (samples,) float32, mono at ``rate`` Hz."""

    needs = ("ace_core.media.audio",)
    limits: LimitSettings
    rate: int

    def __call__(self, data: bytes, start: float | None = None, end: float | None = None) -> np.ndarray:
        from ace_core.media.audio import decode_audio

        return decode_audio(data, self.limits, self.rate, start, end)

    def whole(self, data: bytes, most: float) -> np.ndarray | float:
        """The file decoded, or how long it lasts where it says that this is longer than ``most`` seconds."""
        from ace_core.media.audio import whole_audio

        return whole_audio(data, self.limits, self.rate, most)


@dataclass(frozen=True)
class VideoDecoder(_Files):
    """Videos to (frames, h, w, 3) uint8, resized to ``side`` x ``side`` pixels if that is given.

    ``backend``: "decord" or "pyav"; None for the preferred one of this machine.
    """

    needs = ("ace_core.media.video",)
    limits: LimitSettings
    frames: int
    side: int | None = None
    backend: Literal["decord", "pyav"] | None = None
    sampling: Literal["uniform", "scenes"] = "uniform"

    def __call__(self, data: bytes, start: float | None = None, end: float | None = None) -> np.ndarray:
        from ace_core.media.video import decode_video

        clip = decode_video(data, self.limits, self.frames, self.side, start, end, self.backend, self.sampling)
        return clip.frames

    def whole(self, data: bytes, most: float) -> np.ndarray | float:
        """The file decoded, or how long it lasts where it says that this is longer than ``most`` seconds."""
        from ace_core.media.video import whole_video

        clip = whole_video(data, self.limits, self.frames, self.side, most, self.backend, self.sampling)
        return clip if isinstance(clip, float) else clip.frames


Decoder = ImageDecoder | AudioDecoder | VideoDecoder


@dataclass(frozen=True)
class _Opened:
    """In this process there is nothing to keep open but the bytes."""

    decoder: Decoder
    data: bytes

    def part(self, start: float | None = None, end: float | None = None) -> np.ndarray:
        return self.decoder(self.data, start, end)
