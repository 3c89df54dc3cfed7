"""Beam rows: what a walk over the constraint index hands from one level to the next."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ace_core.kernels.compiled import LOW, PARENT, SCORE, probs_word


class Rows(NamedTuple):
    """Beam rows of n queries after ``level`` tokens; B rows each, live ones first, best first.

    All that is known of a row lies side by side, in words of eight bytes: a compiled loop is handed one array, not six
    (docs/LOG.md says what that saves), and a row is little more than a cache line. The properties are views.

    Attributes:
        level: tokens spelled so far.
        levels: L, segments: S.
        live: (n,) int64, rows that exist.
        block: (n, B, W) int64; what a walk returns is zero beyond the live rows, so that it may be used to index.
    """

    level: int
    levels: int
    segments: int
    live: np.ndarray
    block: np.ndarray

    @property
    def width(self) -> int:
        """Rows of the fullest query."""
        return int(self.live.max(initial=0))

    @property
    def score(self) -> np.ndarray:
        """(n, B) float64, summed log-probabilities."""
        return self.block.view(np.float64)[..., SCORE]

    @property
    def parent(self) -> np.ndarray:
        """(n, B) int64, the previous row that each row continues."""
        return self.block[..., PARENT]

    @property
    def low(self) -> np.ndarray:
        """(n, B, S) int64: per segment the first of the row's children, which are numbered as nodes of level ``level``;
        after the last level, the first of its items."""
        return self.block[..., LOW : LOW + self.segments]

    @property
    def high(self) -> np.ndarray:
        """(n, B, S) int64: where the interval that begins with :attr:`low` ends."""
        return self.block[..., LOW + self.segments : LOW + 2 * self.segments]

    @property
    def codes(self) -> np.ndarray:
        """(n, B, L) uint16, the tokens so far."""
        begin = 4 * (LOW + 2 * self.segments)
        return self.block.view(np.uint16)[..., begin : begin + self.levels]

    @property
    def level_log_prob(self) -> np.ndarray:
        """(n, B, L) float32 of the tokens so far."""
        begin = 2 * probs_word(self.segments, self.levels)
        return self.block.view(np.float32)[..., begin : begin + self.levels]
