"""Matrix products with weights in half precision and arithmetic in float32, for a dozen rows as fast as for thousands.

A layer of few rows takes as long as its weights take to read and to widen. Here they lie in the order of use, 16
outputs side by side, and up to six rows share what was read. Machine code for it comes from LLVM, as for all kernels.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ace_core.kernels.compiled import compiled

COLUMNS = 16  # outputs of a block: two registers of eight
ROWS = 6  # most rows that share a block's weights: with them, 12 of 16 registers hold sums

_LANES = 8
_SINGLE, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _NARROW = ir.VectorType(_SINGLE, _LANES), ir.VectorType(ir.HalfType(), _LANES)


def packed(weight: np.ndarray) -> np.ndarray:
    """A layer's weights (outputs, inputs) as blocks (outputs / 16, inputs, 16) of float16 in uint16; zeros fill it."""
    outputs, inputs = weight.shape
    whole = np.zeros((-(-outputs // COLUMNS) * COLUMNS, inputs), np.float16)
    whole[:outputs] = weight
    return np.ascontiguousarray(whole.reshape(-1, COLUMNS, inputs).transpose(0, 2, 1)).view(np.uint16)


@intrinsic(prefer_literal=True)
def _multiply(typingctx, rows, inputs, stride, block, weights, depth, bias, out, out_stride):
    """``rows`` (a literal) rows times one block.

    Addresses are uint64 and strides int64, in bytes; the type of ``block`` says what ``weights`` points to.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    number = rows.literal_value
    halves = range(COLUMNS // _LANES)
    narrow = block.dtype == types.uint16

    def codegen(context, builder, signature, args):
        _, inputs, stride, _, weights, depth, bias, out, out_stride = args

        def at(start, steps, size, kind, align):
            """What lies ``steps`` (a value or a number) of ``size`` bytes after an address: its pointer."""
            if isinstance(steps, int):
                steps = _INT64(steps)
            address = builder.add(start, builder.mul(steps, size if isinstance(size, ir.Value) else _INT64(size)))
            return builder.inttoptr(address, kind.as_pointer())

        def load(*where):
            value = builder.load(at(*where))
            value.align = where[-1]
            return value

        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{_LANES}f32"
        )
        start = [load(bias, half, 4 * _LANES, _VECTOR, 4) for half in halves]
        sums = [[cgutils.alloca_once_value(builder, start[half]) for half in halves] for _ in range(number)]
        lines = [builder.add(inputs, builder.mul(stride, _INT64(row))) for row in range(number)]
        nothing, everywhere = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_INT32, _LANES), None)
        with cgutils.for_range(builder, depth) as loop:
            if narrow:
                line = builder.add(weights, builder.mul(loop.index, _INT64(2 * COLUMNS)))
                wide = [builder.fpext(load(line, half, 2 * _LANES, _NARROW, 2), _VECTOR) for half in halves]
            else:
                line = builder.add(weights, builder.mul(loop.index, _INT64(4 * COLUMNS)))
                wide = [load(line, half, 4 * _LANES, _VECTOR, 4) for half in halves]
            for row in range(number):
                one = builder.insert_element(nothing, load(lines[row], loop.index, 4, _SINGLE, 4), _INT32(0))
                spread = builder.shuffle_vector(one, nothing, everywhere)
                for half in halves:
                    total = sums[row][half]
                    builder.store(builder.call(multiply_add, [spread, wide[half], builder.load(total)]), total)
        for row in range(number):
            line = builder.add(out, builder.mul(out_stride, _INT64(row)))
            for half in halves:
                stored = builder.store(builder.load(sums[row][half]), at(line, half, 4 * _LANES, _VECTOR, 4))
                stored.align = 4
        return context.get_dummy_value()

    word, step = types.uint64, types.int64
    return types.void(rows, word, step, block, word, step, word, word, step), codegen


@compiled
def linear(inputs, weights, bias, out):
    """Fill ``out`` (m, blocks * 16) float32 with the layer's outputs.

    Args:
        inputs: (m, at least k) float32 with rows of consecutive elements.
        weights: (blocks, k, 16) uint16, see :func:`packed`, or float32; bias: (blocks * 16,) float32.
    """
    count, depth = len(inputs), np.int64(weights.shape[1])
    stride, out_stride = np.int64(inputs.strides[0]), np.int64(out.strides[0])
    for block in range(len(weights)):
        these = np.uint64(weights[block].ctypes.data)
        add = np.uint64(bias[block * COLUMNS :].ctypes.data)
        first = 0
        while first < count:
            left = count - first
            rows = -(-left // -(-left // ROWS))  # seven are four and three: a tile of one row is the slowest
            x = np.uint64(inputs[first:].ctypes.data)
            y = np.uint64(out[first:].ctypes.data) + np.uint64(4 * block * COLUMNS)
            if rows == 6:
                _multiply(6, x, stride, weights, these, depth, add, y, out_stride)  # type: ignore[call-arg]
            elif rows == 5:
                _multiply(5, x, stride, weights, these, depth, add, y, out_stride)  # type: ignore[call-arg]
            elif rows == 4:
                _multiply(4, x, stride, weights, these, depth, add, y, out_stride)  # type: ignore[call-arg]
            elif rows == 3:
                _multiply(3, x, stride, weights, these, depth, add, y, out_stride)  # type: ignore[call-arg]
            elif rows == 2:
                _multiply(2, x, stride, weights, these, depth, add, y, out_stride)  # type: ignore[call-arg]
            else:
                _multiply(1, x, stride, weights, these, depth, add, y, out_stride)  # type: ignore[call-arg]
            first += rows
