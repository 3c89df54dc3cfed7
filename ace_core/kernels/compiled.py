"""What all kernels are made of: how they are compiled, and how they read arrays by their addresses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

NO_MASK = np.uint64(0)

_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
_STAMP = hashlib.blake2b(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()


class Layout(NamedTuple):
    """Where S segments' tokens and pointers lie, by level (L levels).

    Attributes:
        tokens: (L, S) uint64 addresses; wide: (L, S) bool, 16-bit tokens instead of 8-bit; strides: (L, S) int64,
            tokens from one node to the next.
        pointers: (L, S) uint64 addresses of first_child, 0 where a level's nodes are items: there a child is a run of
            equal tokens.
        pointers_wide: (S,) bool, 64-bit pointers instead of 32-bit.
    """

    tokens: np.ndarray
    wide: np.ndarray
    strides: np.ndarray
    pointers: np.ndarray
    pointers_wide: np.ndarray


def compiled(function: Callable, **options: Any) -> Callable:
    """Compile on first use, and keep the result on disk where there is a place for it."""
    try:
        dispatcher = numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy", **options)(function)
    # numba compiles again when the function's own file has changed; here also when that of a function it calls has
    dispatcher._cache._cache_file._source_stamp = _STAMP
    return dispatcher


@intrinsic
def _pointer(typingctx, address):
    """An address (uint64) as a C pointer for ``numba.carray``."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address (uint64), without waiting for it."""

    def codegen(context, builder, signature, args):
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(ask, [builder.inttoptr(args[0], cgutils.voidptr_t), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.uint64), codegen


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
def token_at(address, wide, stride, node):
    return np.int64(uint16_at(address)[node * stride]) if wide else np.int64(uint8_at(address)[node * stride])


@compiled
def child_at(address, wide, node):
    return int64_at(address)[node] if wide else np.int64(int32_at(address)[node])


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
