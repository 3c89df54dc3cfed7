"""How many inputs to encode together: a short trial, on the device and the inputs that there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

MOST = {"cpu": 64, "cuda": 1024}
_WORTH = 1.1  # a batch twice as large is worth its memory if it is faster by this factor


def best_batch(encode: Callable[[Sequence[Any]], Any], inputs: Sequence[Any], most: int) -> int:
    """The batch from which on a larger one brings no more inputs a second, or no longer fits the device's memory.

    Batches of 1, 2, 4, ... are timed; two in a row that bring nothing end the trial.

    Args:
        encode: is called with up to ``most`` inputs, those given again and again.
        most: the largest batch that may be tried.
    """
    best, fastest, size, misses = 1, 0.0, 1, 0
    encode(inputs[:1])  # what only the first call costs
    while size <= most and misses < 2:
        batch = [inputs[i % len(inputs)] for i in range(size)]
        began = time.perf_counter()
        try:
            encode(batch)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        rate = size / (time.perf_counter() - began)
        if rate >= _WORTH * fastest:
            best, fastest, misses = size, rate, 0
        else:
            misses += 1
        size *= 2
    return best
