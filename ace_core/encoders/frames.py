"""Videos by their frames: what is seen, how that changes, and where something moves when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ace_core.config import LimitSettings
from ace_core.encoders.lite0 import SIDE, WIDTH, Lite0Images
from ace_core.encoders.protocol import normalised, sampled
from ace_core.items import Modality
from ace_core.manifest import fingerprint
from ace_core.media.decoders import VideoDecoder
from ace_core.media.isolate import guarded

if TYPE_CHECKING:
    from ace_core.media.video import Sampling

_CELLS = 8  # the motion map's cells along each side
_CHANGE_WEIGHT, _MOTION_WEIGHT = 0.5, 0.7  # against 1 for what is seen
_LARGE_CHANGE = np.sqrt(2 * (1 - 0.9))  # distance of two frames' unit vectors with a cosine of 0.9
_LARGE_MOTION = 0.2
_REVISION = 1  # raise it with any change of the numbers above: vectors of two revisions must not meet


class FrameVideos:
    """EfficientNet-Lite0 on ``frames`` sampled frames, behind the ``MediaEncoder`` protocol.

    A vector has three parts: the mean of the frames' features (what is seen); the last frame's minus the first's (how
    it changes); and a motion map of each frame. The last is there because a network's pooled features hardly tell
    where in a frame something is: from mean and change alone a linear probe reads 63 % of the demo's eleven motions,
    with the map all of them.
    """

    modality = Modality.VIDEO
    shares_text_space = False

    def __init__(self, frames: int, limits: LimitSettings, device: str = "cpu", sampling: Sampling = "uniform") -> None:
        self._images = Lite0Images(limits, device)
        self._frames = frames
        self.decoder = guarded(VideoDecoder(limits, frames, SIDE, sampling=sampling))
        self.dim = 2 * WIDTH + frames * _CELLS**2
        self.identity = fingerprint("frames", _REVISION, self._images.identity, frames, *sampled(sampling))

    def encode(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """(n, dim) float32, L2-normalised, of n (frames, 224, 224, 3) uint8 clips."""
        if not batch:
            return np.empty((0, self.dim), np.float32)
        seen = self._images.features(np.concatenate(batch)).reshape(len(batch), self._frames, WIDTH)
        change = normalised(seen[:, -1]) - normalised(seen[:, 0])
        motion = np.stack([motion_map(clip).reshape(-1) for clip in batch])
        return normalised(
            np.concatenate(
                [
                    normalised(seen.mean(axis=1)),
                    _CHANGE_WEIGHT * _at_most_unit(change, _LARGE_CHANGE),
                    _MOTION_WEIGHT * _at_most_unit(motion, _LARGE_MOTION),
                ],
                axis=1,
            )
        )


def motion_map(clip: np.ndarray) -> np.ndarray:
    """How much each cell of each frame differs from the clip's median picture: (frames, 8, 8) float32.

    Args:
        clip: (frames, side, side, 3) uint8, side a multiple of 32.
    """
    count, side = clip.shape[:2]
    block = side // (4 * _CELLS)
    small = clip.reshape(count, 4 * _CELLS, block, 4 * _CELLS, block, 3).mean((2, 4), dtype=np.float32) / 255
    distance = np.linalg.norm(small - np.median(small, axis=0), axis=-1)
    return distance.reshape(count, _CELLS, 4, _CELLS, 4).mean((2, 4))


def _at_most_unit(rows: np.ndarray, large: float) -> np.ndarray:
    """Rows longer than ``large`` to unit length, shorter ones in proportion: a still video's noise stays small."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), large)
