"""What a search finds, before it is ranked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Candidates:
    """Items found for n queries, best first, c columns.

    Attributes:
        valid: (n, c) bool; elsewhere the other arrays hold zeros (and -inf log-probabilities).
        segment, row: (n, c) int64: the segment, and the item's row in its sorted items.
        log_prob: (n, c) float32, of the whole identifier.
        level_log_prob: (n, c, levels) float32.
        codes: (n, c, levels) uint16, the identifier.
    """

    valid: np.ndarray
    segment: np.ndarray
    row: np.ndarray
    log_prob: np.ndarray
    level_log_prob: np.ndarray
    codes: np.ndarray

    def __len__(self) -> int:
        return self.valid.shape[0]
