"""How many inputs to encode together: found out while encoding, on the device and the inputs that there are."""

from __future__ import annotations

MOST = {"cpu": 64, "cuda": 1024}
_WORTH = 1.1  # a batch twice as large is worth its memory if it is faster by this factor
_MISSES = 2  # batches in a row that bring nothing, until the trial ends


class BatchTrial:
    """Batches of 1, 1, 2, 4, ... inputs, until larger ones bring no more inputs a second or no longer fit the device's
    memory; from then on the size that was best. Nothing is encoded for the trial's sake.

    Args:
        most: the largest batch that may be tried.
    """

    def __init__(self, most: int) -> None:
        self.size = 1
        self._most = most
        self._best, self._fastest = 1, 0.0
        self._warm = self._over = False
        self._misses = 0

    def ran(self, count: int, seconds: float) -> None:
        """Say how long a batch took. One that was not full (the last of its inputs) says nothing."""
        if self._over or count < self.size:
            return
        if not self._warm:  # the first call costs what no other does
            self._warm = True
            return
        rate = count / max(seconds, 1e-9)
        if rate >= _WORTH * self._fastest:
            self._best, self._fastest, self._misses = self.size, rate, 0
        else:
            self._misses += 1
        if self._misses == _MISSES or 2 * self.size > self._most:
            self._end(self._best)
        else:
            self.size *= 2

    def too_large(self, count: int) -> None:
        """Say that a batch did not fit the device's memory."""
        self._end(max(1, min(self.size, count // 2)))

    def _end(self, size: int) -> None:
        self.size, self._over = size, True
