"""What all kernels are made of: how they are compiled, and how they read arrays by their addresses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, register_jitable

NO_BITMAP = np.uint64(0)

_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
_STAMP = hashlib.blake2b(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()


# The words of a segment's entry in a layout, an (L, S, 6) int64 array of L levels and S segments:
TOKENS = 0  # address of its tokens
WIDE = 1  # 16-bit tokens instead of 8-bit?
STRIDE = 2  # tokens from one node to the next
POINTERS = 3  # address of first_child; 0 where a level's nodes are items: there a child is a run of equal tokens
POINTERS_WIDE = 4  # 64-bit pointers instead of 32-bit?
PRESENT = 5  # address of the bitmaps of which children the nodes of the level above have; 0 where they have few

# The words of a beam row: its score (float64), the row that it continues, its node where there is one segment, then S
# begins of its intervals and S ends, L tokens (uint16) and L log-probabilities (float32). ace_core.rows names what they
# mean.
SCORE, PARENT, NODE, LOW = range(4)


@register_jitable
def probs_word(segments: int, levels: int) -> int:
    """Where the log-probabilities of a beam row begin."""
    return LOW + 2 * segments + (levels + 3) // 4


@register_jitable
def row_words(segments: int, levels: int) -> int:
    """Words of a beam row."""
    return probs_word(segments, levels) + (levels + 1) // 2


def compiled(function: Callable, **options: Any) -> Callable:
    """Compile on first use, and keep the result on disk where there is a place for it."""
    try:
        dispatcher = numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy", **options)(function)
    # numba compiles again when the function's own file has changed; here also when that of a function it calls has. In
    # the place of numba's version, which is read before anything that could name what is gone.
    dispatcher._cache._cache_file._version = f"{numba.__version__} {_STAMP}"
    return dispatcher


inlined = partial(compiled, forceinline=True)
"""A part of its caller: what a call is handed is copied, which takes longer than small work on many arrays."""


@intrinsic
def _pointer(typingctx, address):
    """An address (uint64) as a C pointer for ``numba.carray``."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@intrinsic
def trailing_zeros(typingctx, word):
    """Below the lowest bit that is set in a uint64 other than 0."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen


@intrinsic
def bit_count(typingctx, word):
    """Bits that are set in a uint64."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


@intrinsic
def copy_16_bytes(typingctx, target, source):
    """Copy 16 bytes from one address to another."""

    def codegen(context, builder, signature, args):
        kind = ir.PointerType(ir.VectorType(ir.IntType(8), 16))
        value = builder.load(builder.inttoptr(args[1], kind), align=1)
        builder.store(value, builder.inttoptr(args[0], kind), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), codegen


def ask_for(builder, address):
    """Build the instruction of :func:`prefetch`."""
    number = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
    ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(ask, [builder.inttoptr(address, cgutils.voidptr_t), number(0), number(3), number(1)])


@intrinsic
def _prefetch(typingctx, address):

    def codegen(context, builder, signature, args):
        ask_for(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.uint64), codegen


@compiled
def prefetch(address):
    """Ask for the cache line at an address (uint64), without waiting for it."""
    _prefetch(address)  # type: ignore[call-arg]


@compiled
def int8_at(address):
    return numba.carray(_pointer(address), (1,), np.int8)  # type: ignore[call-arg]


@compiled
def uint8_at(address):
    return numba.carray(_pointer(address), (1,), np.uint8)  # type: ignore[call-arg]


@compiled
def uint16_at(address):
    return numba.carray(_pointer(address), (1,), np.uint16)  # type: ignore[call-arg]


@compiled
def uint64_at(address):
    return numba.carray(_pointer(address), (1,), np.uint64)  # type: ignore[call-arg]


@compiled
def int32_at(address):
    return numba.carray(_pointer(address), (1,), np.int32)  # type: ignore[call-arg]


@compiled
def int64_at(address):
    return numba.carray(_pointer(address), (1,), np.int64)  # type: ignore[call-arg]


@compiled
def float32_at(address):
    return numba.carray(_pointer(address), (1,), np.float32)  # type: ignore[call-arg]


@compiled
def token_at(layout, level, s, node):
    """The token of a node of segment s."""
    address, at = np.uint64(layout[level, s, TOKENS]), node * layout[level, s, STRIDE]
    return np.int64(uint16_at(address)[at]) if layout[level, s, WIDE] else np.int64(uint8_at(address)[at])


@compiled
def child_at(layout, level, s, node):
    """The first child of a node of segment s."""
    address = np.uint64(layout[level, s, POINTERS])
    return int64_at(address)[node] if layout[level, s, POINTERS_WIDE] else np.int64(int32_at(address)[node])


@compiled
def any_bit(words, low, high):
    """Is any of bits low .. high - 1 set?"""
    if low >= high:
        return False
    first, last = low >> 6, (high - 1) >> 6
    head = words[first] >> np.uint64(low & 63)
    if first == last:
        return (head << np.uint64(63 - ((high - 1) & 63) + (low & 63))) != np.uint64(0)
    if head != np.uint64(0):
        return True
    for word in range(first + 1, last):
        if words[word] != np.uint64(0):
            return True
    return (words[last] << np.uint64(63 - ((high - 1) & 63))) != np.uint64(0)


@compiled
def next_bit(words, low, high):
    """The first of bits low .. high - 1 that is set, ``high`` where none is."""
    if low >= high:
        return high
    word = words[low >> 6] >> np.uint64(low & 63)
    if word != np.uint64(0):
        return min(low + trailing_zeros(word), high)  # type: ignore[call-arg]
    for at in range((low >> 6) + 1, ((high - 1) >> 6) + 1):
        if words[at] != np.uint64(0):
            return min((at << 6) + trailing_zeros(words[at]), high)  # type: ignore[call-arg]
    return high


@compiled
def bits_end(words, bit, high):
    """Where a run of set bits that begins with ``bit`` ends, or is cut by the end of its word; at most ``high``."""
    if bit >= high:
        return high
    beyond = ~(words[bit >> 6] >> np.uint64(bit & 63))  # what is shifted in ends a run, but for a whole word of ones
    run = np.int64(64) if beyond == np.uint64(0) else trailing_zeros(beyond)  # type: ignore[call-arg]
    return min(bit + run, high)


@compiled
def float64_at(address):
    return numba.carray(_pointer(address), (1,), np.float64)  # type: ignore[call-arg]
