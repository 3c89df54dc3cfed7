"""Decoding of one modality with its settings bound: what an encoder needs of its files, as data that a child process
can be given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ace_core.config import LimitSettings


@dataclass(frozen=True)
class ImageDecoder:
    """Pictures to (h, w, 3) uint8. ``min_side``: as in ``decode_image``; ``side``: resized to (side, side, 3)."""

    limits: LimitSettings
    min_side: int | None = None
    side: int | None = None

    def __call__(self, data: bytes, start: float | None = None, end: float | None = None) -> np.ndarray:
        from ace_core.media.image import decode_image, resized

        picture = decode_image(data, self.limits, self.min_side)
        return picture if self.side is None else resized(picture, self.side, self.side)


@dataclass(frozen=True)
class AudioDecoder:
    """Sounds to (samples,) float32, mono at ``rate`` Hz."""

    limits: LimitSettings
    rate: int

    def __call__(self, data: bytes, start: float | None = None, end: float | None = None) -> np.ndarray:
        from ace_core.media.audio import decode_audio

        return decode_audio(data, self.limits, self.rate, start, end)


@dataclass(frozen=True)
class VideoDecoder:
    """Videos to (frames, h, w, 3) uint8, resized to ``side`` x ``side`` pixels if that is given.

    ``backend``: "decord" or "pyav"; None for the preferred one of this machine.
    """

    limits: LimitSettings
    frames: int
    side: int | None = None
    backend: Literal["decord", "pyav"] | None = None

    def __call__(self, data: bytes, start: float | None = None, end: float | None = None) -> np.ndarray:
        from ace_core.media.video import decode_video

        return decode_video(data, self.limits, self.frames, self.side, start, end, self.backend).frames


Decoder = ImageDecoder | AudioDecoder | VideoDecoder
