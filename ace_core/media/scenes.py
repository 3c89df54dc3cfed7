"""Which moments of a video to look at: its scenes, told apart by how much successive frames differ."""

from __future__ import annotations

import numpy as np

CANDIDATES = 8  # moments looked at for each frame that is wanted, and
MOST = 96  # at most
SIDE = 32  # pixels that they are shrunk to
_CHANGE = 0.08  # mean difference (of 1) of two moments that a cut has at least, and
_ABOVE = 3.0  # how many times as large as the median one it is


def scene_times(looks: np.ndarray, first: float, last: float, frames: int) -> np.ndarray:
    """Moments that show every scene of a clip, and long ones more than once.

    A cut is where two successive looks differ by much, absolutely and against the clip's median; of more cuts than
    can be shown the strongest count. Frames that are left over go to the scenes that have the fewest for their length,
    so a clip without cuts is sampled uniformly.

    Args:
        looks: (c, s, s, 3) uint8, the clip in the middle of c equal pieces of first..last seconds.
        frames: moments wanted.

    Returns:
        (frames,) float64 seconds, ascending.
    """
    count = len(looks)
    small = looks.astype(np.float32) / 255
    change = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))
    cuts = np.flatnonzero((change > _CHANGE) & (change > _ABOVE * np.median(change))) + 1
    cuts = np.sort(cuts[np.argsort(-change[cuts - 1], kind="stable")][: frames - 1])
    edges = first + (last - first) * np.concatenate([[0], cuts, [count]]) / count
    lengths = np.diff(edges)
    shown = np.ones(len(lengths), np.int64)
    while shown.sum() < frames:
        shown[np.argmax(lengths / shown)] += 1
    return np.concatenate([a + (np.arange(n) + 0.5) * (b - a) / n for a, b, n in zip(edges, edges[1:], shown)])
