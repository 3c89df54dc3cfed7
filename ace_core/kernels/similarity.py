"""Inner products of queries with integer vectors: some stored items, or all codewords."""

from __future__ import annotations

from functools import partial

import numpy as np

from ace_core.kernels.compiled import compiled, float32_at, int8_at, prefetch

_AHEAD = 4  # vectors that are on their way from memory while one is multiplied


@partial(compiled, fastmath={"reassoc", "nsz", "contract"})
def add_products(queries, vectors, scales, rows, chosen, out):
    """Add to ``out`` where a candidate is chosen; the sum is float32, in the order that suits the machine.

    Args:
        queries: (n, D) float32.
        vectors, scales: uint64 addresses of (items, D) int8 and (items,) float32.
        rows: (n, c) int64 items; chosen: (n, c) bool; out: (n, c) float32.
    """
    dim = np.uint64(queries.shape[1])
    count = rows.shape[1]
    scale = float32_at(scales)
    for q in range(len(rows)):
        query = queries[q]
        for i in range(count):
            if i + _AHEAD < count and chosen[q, i + _AHEAD]:
                line = vectors + np.uint64(rows[q, i + _AHEAD]) * dim
                for d in range(0, queries.shape[1], 64):
                    prefetch(line + np.uint64(d))
            if chosen[q, i]:
                item = np.uint64(rows[q, i])
                vector = int8_at(vectors + item * dim)
                total = np.float32(0)
                for d in range(dim):
                    total += query[d] * np.float32(vector[d])
                out[q, i] += total * scale[item]


@partial(compiled, fastmath={"reassoc", "nsz", "contract"})
def products(queries, vectors, scales, out):
    """Fill ``out`` with all inner products; a query's do not depend on the others.

    Args:
        queries: (n, D) float32; vectors: (m, D) int16, scales: (m,) float32, which they are multiplied by.
        out: (n, m) float32.
    """
    dim = np.uint64(queries.shape[1])
    for i in range(len(vectors)):
        vector = vectors[i]
        for q in range(len(queries)):
            query = queries[q]
            total = np.float32(0)
            for d in range(dim):
                total += query[d] * np.float32(vector[d])
            out[q, i] = total * scales[i]
