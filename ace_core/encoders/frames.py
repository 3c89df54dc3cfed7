"""Videos by their frames: what is seen (the mean) and how it changes (last minus first)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ace_core.config import LimitSettings
from ace_core.encoders.lite0 import SIDE, Lite0Images
from ace_core.encoders.protocol import normalised
from ace_core.items import Modality
from ace_core.manifest import fingerprint
from ace_core.media.video import decode_video


class FrameVideos:
    """EfficientNet-Lite0 on ``frames`` sampled frames, behind the ``MediaEncoder`` protocol.

    A mean over frames is blind to time: an apple rolling left and one rolling right look the same. The second half
    of the vector is the difference between the last and the first frame, scaled to the length of the first half.
    """

    modality = Modality.VIDEO
    shares_text_space = False

    def __init__(self, frames: int, limits: LimitSettings, device: str = "cpu") -> None:
        self._images = Lite0Images(limits, device)
        self._frames = frames
        self._limits = limits
        self.dim = 2 * self._images.dim
        self.identity = fingerprint("frames", self._images.identity, frames)

    def decode(self, data: bytes, start: float | None = None, end: float | None = None) -> np.ndarray:
        """(frames, 224, 224, 3) uint8."""
        return decode_video(data, self._limits, self._frames, SIDE, start, end).frames

    def encode(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """(n, 2560) float32, L2-normalised, of n (frames, 224, 224, 3) uint8 clips."""
        if not batch:
            return np.empty((0, self.dim), np.float32)
        seen = self._images.features(np.concatenate(batch)).reshape(len(batch), self._frames, -1)
        return pool_frames(seen)


def pool_frames(features: np.ndarray) -> np.ndarray:
    """(n, frames, d) -> (n, 2 d): [mean ; last - first], each of unit length, together of unit length.

    The change of a still video is near zero and must stay so: it is scaled by the length of its two frames, not by
    its own. (The factor makes the change of two frames with a cosine of 0.9, as different as frames of one clip
    usually get, as long as the mean.)
    """
    mean = normalised(features.mean(axis=1))
    first, last = normalised(features[:, 0]), normalised(features[:, -1])
    change = (last - first) / np.sqrt(2 * (1 - 0.9))
    longest = np.linalg.norm(change, axis=1, keepdims=True)
    return normalised(np.concatenate([mean, change / np.maximum(longest, 1.0)], axis=1))
