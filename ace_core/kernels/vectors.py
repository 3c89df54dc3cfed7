"""What a compiled loop does with several numbers at once, at addresses: 16 lanes of a vector, or up to 64 comparisons.

Numbers are float32 or float64, what a bound or base is handed in as. A comparison with one that is no number is false.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic


def _load(builder, address, kind, size, align):
    return builder.load(builder.inttoptr(address, ir.PointerType(ir.VectorType(kind, size))), align=align)


def _store(builder, value, address, align):
    builder.store(value, builder.inttoptr(address, ir.PointerType(value.type)), align=align)


def _all(kind, size, number):
    return ir.Constant(ir.VectorType(kind, size), [number] * size)


def _everywhere(builder, number, size):
    """A vector of one number."""
    undefined = ir.Constant(ir.VectorType(number.type, size), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, _all(ir.IntType(32), size, 0))


def _bytes(signature):
    return signature.args[-1].bitwidth // 8


def _above(builder, signature, args, size):
    """Which of the numbers at an address are above the bound, as a whole number of so many bits."""
    numbers = _load(builder, args[0], args[1].type, size, _bytes(signature))
    return builder.bitcast(builder.fcmp_ordered(">", numbers, _everywhere(builder, args[1], size)), ir.IntType(size))


@intrinsic
def exceeding(typingctx, address, bound):
    """Which of 64 numbers at an address are above a bound: bit i of a uint64 for number i."""

    def codegen(context, builder, signature, args):
        return _above(builder, signature, args, 64)

    return types.uint64(types.uint64, bound), codegen


@intrinsic
def any_exceeding(typingctx, lanes, bound):
    """Is one of 16 lanes above a bound?"""

    def codegen(context, builder, signature, args):
        return builder.icmp_unsigned("!=", _above(builder, signature, args, 16), ir.Constant(ir.IntType(16), 0))

    return types.boolean(types.uint64, bound), codegen


@intrinsic
def set_lanes(typingctx, lanes, number):
    """Set 16 lanes to a number."""

    def codegen(context, builder, signature, args):
        _store(builder, _everywhere(builder, args[1], 16), args[0], _bytes(signature))
        return context.get_dummy_value()

    return types.void(types.uint64, number), codegen


@intrinsic
def raise_lanes(typingctx, lanes, numbers, there, kind):
    """Raise 16 lanes to those of 64 numbers at an address whose bits are set in ``there``, four a lane, where these are
    larger. ``kind``: any number of their type."""

    def codegen(context, builder, signature, args):
        kind, align, bit = args[3].type, _bytes(signature), ir.IntType(1)
        present = builder.bitcast(args[2], ir.VectorType(bit, 64))
        highest = _load(builder, args[0], kind, 16, align)
        for part in range(0, 64, 16):
            address = builder.add(args[1], ir.Constant(ir.IntType(64), part * align))
            chosen = ir.Constant(ir.VectorType(ir.IntType(32), 16), list(range(part, part + 16)))
            real = builder.shuffle_vector(present, present, chosen)
            number = builder.select(real, _load(builder, address, kind, 16, align), _all(kind, 16, float("-inf")))
            highest = builder.select(builder.fcmp_ordered(">", number, highest), number, highest)
        _store(builder, highest, args[0], align)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64, kind), codegen


@intrinsic
def add_to_lanes(typingctx, lanes, base):
    """Add a base to 16 lanes, of which those above 0 count as 0."""

    def codegen(context, builder, signature, args):
        kind, align = args[1].type, _bytes(signature)
        number, nothing = _load(builder, args[0], kind, 16, align), _all(kind, 16, 0.0)
        number = builder.select(builder.fcmp_ordered(">", number, nothing), nothing, number)
        _store(builder, builder.fadd(number, _everywhere(builder, args[1], 16)), args[0], align)
        return context.get_dummy_value()

    return types.void(types.uint64, base), codegen
