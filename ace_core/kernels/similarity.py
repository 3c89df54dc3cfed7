"""Inner products of queries with vectors of bytes: some stored items, or all codewords.

A query becomes 16-bit integers with one scale, as large as sums in 32 bits allow: neighbouring products are added as
they are made, which a processor does in one instruction (x86: pmaddwd). Sums are exact, so a query's products depend
neither on the order of adding nor on the queries beside it. Machine code comes from LLVM, as for all kernels.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, register_jitable

from ace_core.kernels.compiled import ask_for, compiled, float32_at, int8_at, prefetch

BLOCK = 32  # codewords whose bytes lie side by side: four registers of sums

_AHEAD = 8  # vectors that are on their way from memory while one is multiplied
_BYTES_AHEAD = 4096  # of codewords
_LANES = 16  # numbers that are multiplied at once
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_BYTES, _SHORTS = (ir.VectorType(ir.IntType(bits), _LANES) for bits in (8, 16))
_WIDE, _SUMS = ir.VectorType(_INT32, _LANES), ir.VectorType(_INT32, _LANES // 2)


def packed(words: np.ndarray) -> np.ndarray:
    """Codewords (m, D) int8 as blocks (m / 32, D / 2, 32, 2), two numbers of each side by side; zeros fill it."""
    count, dim = words.shape
    whole = np.zeros((-(-count // BLOCK) * BLOCK, dim + dim % 2), np.int8)
    whole[:count, :dim] = words
    return np.ascontiguousarray(whole.reshape(len(whole) // BLOCK, BLOCK, -1, 2).transpose(0, 2, 1, 3))


def _load(builder, address, offset, kind):
    """The numbers that lie so many bytes (a value or a number) after an address."""
    where = builder.add(address, _INT64(offset) if isinstance(offset, int) else offset)
    numbers = builder.load(builder.inttoptr(where, kind.as_pointer()))
    numbers.align = 1
    return numbers


def _add_pairs(builder, numbers, others, total):
    """Add to ``total`` (8 sums) products of 16 numbers and 16 others, two neighbours to each sum."""
    product = builder.mul(builder.sext(numbers, _WIDE), builder.sext(others, _WIDE))
    nothing = ir.Constant(_WIDE, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(product, nothing, ir.Constant(_SUMS, list(range(first, _LANES, 2)))) for first in (0, 1)
    )
    builder.store(builder.add(builder.load(total), builder.add(even, odd)), total)


def _zeros(builder, count):
    return [cgutils.alloca_once_value(builder, ir.Constant(_SUMS, None)) for _ in range(count)]


@intrinsic
def _product(typingctx, query, vector, steps):
    """The product (int32) of 32 ``steps`` (int64) int16 and int8 numbers at two addresses."""

    def codegen(context, builder, signature, args):
        query, vector, steps = args
        totals = _zeros(builder, 2)
        with cgutils.for_range(builder, steps) as loop:
            for part, total in enumerate(totals):
                first = builder.add(builder.mul(loop.index, _INT64(2 * _LANES)), _INT64(part * _LANES))
                numbers = _load(builder, query, builder.mul(first, _INT64(2)), _SHORTS)
                _add_pairs(builder, numbers, _load(builder, vector, first, _BYTES), total)
        reduce = ir.FunctionType(_INT32, [_SUMS])
        reduce = cgutils.get_or_insert_function(builder.module, reduce, f"llvm.vector.reduce.add.v{_SUMS.count}i32")
        return builder.call(reduce, [builder.add(*map(builder.load, totals))])

    return types.int32(types.uint64, types.uint64, types.int64), codegen


@intrinsic(prefer_literal=True)
def _block_products(typingctx, rows, queries, stride, block, pairs, out):
    """Products of ``rows`` (a literal) queries and a block, which is widened once: (rows, 32) int32 in ``out``.

    Args:
        stride: bytes from one query to the next; pairs: of numbers, in each query and codeword (int64).
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    count = rows.literal_value

    def codegen(context, builder, signature, args):
        _, queries, stride, block, pairs, out = args
        parts = range(2 * BLOCK // _LANES)
        totals = [_zeros(builder, len(parts)) for _ in range(count)]
        lines = [builder.add(queries, builder.mul(stride, _INT64(row))) for row in range(count)]
        nothing, everywhere = ir.Constant(_SUMS, ir.Undefined), ir.Constant(_SUMS, None)
        with cgutils.for_range(builder, pairs) as loop:
            here = builder.add(block, builder.mul(loop.index, _INT64(2 * BLOCK)))
            ask_for(builder, builder.add(here, _INT64(_BYTES_AHEAD)))
            words = [_load(builder, here, part * _LANES, _BYTES) for part in parts]
            for line, row in zip(lines, totals):
                pair = _load(builder, line, builder.mul(loop.index, _INT64(4)), _INT32)
                spread = builder.shuffle_vector(builder.insert_element(nothing, pair, _INT32(0)), nothing, everywhere)
                for part in parts:
                    _add_pairs(builder, builder.bitcast(spread, _SHORTS), words[part], row[part])
        for number, total in enumerate(total for row in totals for total in row):
            where = builder.add(out, _INT64(number * 2 * _LANES))
            builder.store(builder.load(total), builder.inttoptr(where, _SUMS.as_pointer())).align = 4
        return context.get_dummy_value()

    word, step = types.uint64, types.int64
    return types.void(rows, word, word, word, step, word), codegen


@register_jitable
def _to_integers(query, integers):
    """Fill ``integers`` (at least D,) int16 with a query (D,) float32; returns what they are multiplied by: NaN for a
    query that is not finite.

    No sum of products with bytes exceeds 32 bits: up to 512 numbers take all 16, beyond they share 24 with the sum.
    """
    top = np.float32(min(32767, (2**31 - 1) // (128 * len(query))))
    largest = np.float32(1e-30)
    for number in query:
        largest = max(largest, abs(number))
    finite = True
    for d in range(len(query)):
        finite &= abs(query[d]) < np.float32(np.inf)
        integers[d] = np.int32(np.rint(query[d] * (top / largest)))
    return largest / top if finite else np.float32(np.nan)


@compiled
def add_products(queries, vectors, scales, rows, chosen, out):
    """Add to ``out`` where a candidate is chosen.

    Args:
        queries: (n, D) float32.
        vectors, scales: uint64 addresses of (items, D) int8 and (items,) float32.
        rows: (n, c) int64 items; chosen: (n, c) bool; out: (n, c) float32.
    """
    dim, size = queries.shape[1], np.uint64(queries.shape[1])
    count, whole = rows.shape[1], dim // (2 * _LANES)
    scale = float32_at(scales)
    integers = np.empty(dim, np.int16)
    query = np.uint64(integers.ctypes.data)
    for q in range(len(rows)):
        factor = _to_integers(queries[q], integers)
        for i in range(-_AHEAD, count):
            if i + _AHEAD < count and chosen[q, i + _AHEAD]:
                ahead = np.uint64(rows[q, i + _AHEAD])
                prefetch(scales + np.uint64(4) * ahead)
                for d in range(0, dim, 64):
                    prefetch(vectors + ahead * size + np.uint64(d))
                prefetch(vectors + ahead * size + (size - np.uint64(1)))  # it need not begin with a line
            if i >= 0 and chosen[q, i]:
                item = np.uint64(rows[q, i])
                vector = int8_at(vectors + item * size)
                total = np.int32(_product(query, vectors + item * size, whole))  # type: ignore[call-arg]
                for d in range(2 * _LANES * whole, dim):
                    total += np.int32(integers[d]) * np.int32(vector[d])
                out[q, i] += np.float32(total) * (factor * scale[item])


@compiled
def products(queries, blocks, scales, out):
    """Fill ``out`` with all inner products; a query's do not depend on the others.

    Args:
        queries: (n, D) float32; blocks: of m codewords, see :func:`packed`.
        scales: (m,) float32, which the codewords are multiplied by; out: (n, m) float32.
    """
    count, pairs = len(queries), np.int64(blocks.shape[1])
    integers, factors = np.zeros((count, 2 * pairs), np.int16), np.empty(count, np.float32)
    for q in range(count):
        factors[q] = _to_integers(queries[q], integers[q])
    sums = np.empty((2, BLOCK), np.int32)
    stride = np.uint64(4 * pairs)
    for b in range(len(blocks)):
        block = np.uint64(blocks[b].ctypes.data)
        scale = scales[b * BLOCK : (b + 1) * BLOCK]
        for q in range(0, count, 2):
            # Asked for here: an array whose name the compiler meets no more is freed, whatever its address is used for.
            first, to = np.uint64(integers[q].ctypes.data), np.uint64(sums.ctypes.data)
            if q + 1 < count:
                _block_products(2, first, stride, block, pairs, to)  # type: ignore[call-arg]
            else:
                _block_products(1, first, stride, block, pairs, to)  # type: ignore[call-arg]
            for row in range(min(2, count - q)):
                line, total, factor = out[q + row, b * BLOCK :], sums[row], factors[q + row]
                for i in range(len(scale)):
                    line[i] = np.float32(total[i]) * (factor * scale[i])
