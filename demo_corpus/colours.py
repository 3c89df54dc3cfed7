"""Colour words of a picture, from its pixels."""

from __future__ import annotations

import numpy as np

# Hue limits in degrees: each name reaches up to its number.
_HUES = ((14, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (250, "blue"), (292, "purple"), (336, "pink"))
_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")
_SHARE = 0.12  # of the drawn area, below which a colour is a detail
_BLACKEST, _BLACK = 0.1, 0.3  # brightness of outlines (pure black), and of what is drawn as black (dark grey)
_OUTLINE_SHARE = 0.45  # outlines count as a colour only where they are most of the drawing


def colour_words(rgba: np.ndarray) -> tuple[str, ...]:
    """Up to three basic colour words that cover most of a drawing, the largest first.

    Args:
        rgba: (h, w, 4) uint8; transparent pixels are not part of the drawing.
    """
    drawn = rgba[rgba[..., 3] > 128][:, :3].astype(np.float32) / 255
    if not len(drawn):
        return ()
    classes = _classes(drawn)
    outline = drawn.max(axis=1) < _BLACKEST
    if outline.mean() < _OUTLINE_SHARE:
        classes = classes[~outline]
    shares = np.bincount(classes, minlength=len(_NAMES)) / len(classes)
    order = np.argsort(-shares, kind="stable")[:3]
    return tuple(_NAMES[i] for i in order if shares[i] >= _SHARE)


def _classes(rgb: np.ndarray) -> np.ndarray:
    """(n,) index into ``_NAMES`` of (n, 3) colours in 0..1."""
    high, low = rgb.max(1), rgb.min(1)
    chroma = high - low
    safe = np.maximum(chroma, 1e-6)
    r, g, b = rgb.T
    hue = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)) * 60
    limits = np.array([limit for limit, _ in _HUES])
    named = np.searchsorted(limits, hue, side="right") % len(_HUES)  # past the last limit it is red again
    saturation = chroma / np.maximum(high, 1e-6)
    # Brown is a dark or dull orange or red; light reds are pink.
    brown = np.isin(named, (0, 1)) & (hue < 42) & ((high < 0.72) & (hue > 6) | (saturation < 0.45) & (high < 0.85))
    pink = (named == 0) & (saturation < 0.55) & (high >= 0.85)
    named = np.where(pink, _NAMES.index("pink"), np.where(brown, _NAMES.index("brown"), named))
    grey = np.where(
        high > 0.92, _NAMES.index("white"), np.where(high < _BLACK, _NAMES.index("black"), _NAMES.index("grey"))
    )
    return np.where((saturation < 0.14) | (high < _BLACKEST), grey, named)
