"""Packing on the CPU, compiled by numba: the bytes of :mod:`modulora_fp4.packing`.

A block is one or two vectors of sixteen. Errors are summed by halves, as there.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]  # comes with numba, without types
from modulora_kernels.cpu import (
    LANES,
    jit,
    load,
    on_stack,
    operation,
    signed,
    store,
    sum_of_lanes,
)
from numba import prange

from modulora_fp4.packing import codes_of
from modulora_fp4.reference import LARGEST

_MOST = int(2 * LARGEST)
_CODES = codes_of(torch.arange(-_MOST, _MOST + 1, dtype=torch.float32, device="cpu") / 2).numpy()
"""The codes of the values -6, -5.5, ..., 6, of which some are none of E2M1."""

_room = on_stack(2 * LANES, np.float32)
_STEPS = {2.0: 0.5, 4.0: 1.0, np.inf: 2.0}
"""The distance of values up to these magnitudes."""

_SIGN = 0x80000000


@operation(lambda y: y(y))
def nearest(_context, builder, _kinds, y):
    """``(y)``: the nearest values of E2M1, as :func:`modulora_fp4.packing.rounded` finds them."""

    def same(of, number):
        return ir.Constant(of, [number] * LANES)

    whole = ir.VectorType(ir.IntType(32), LANES)
    bits = builder.bitcast(y, whole)
    magnitude = builder.bitcast(builder.and_(bits, same(whole, _SIGN - 1)), y.type)
    largest = same(y.type, LARGEST)
    is_less = builder.fcmp_ordered("<", magnitude, largest)
    magnitude = builder.select(is_less, magnitude, largest)
    *first, last = _STEPS.items()
    steps = same(y.type, last[1] * 2**23)  # adding so much rounds to multiples of a step
    for end, step in reversed(first):
        is_less = builder.fcmp_ordered("<", magnitude, same(y.type, end))
        steps = builder.select(is_less, same(y.type, step * 2**23), steps)
    value = builder.fsub(builder.fadd(magnitude, steps), steps)
    sign = builder.and_(bits, same(whole, _SIGN))
    return builder.bitcast(builder.or_(builder.bitcast(value, whole), sign), y.type)


@jit(borrows=True)
def _errors(x, at, w, column, X, inverse):
    """The weighted errors w (v - x)² of sixteen elements."""
    own = load(x, at)
    difference = nearest(own * inverse) * X - own
    return difference * difference * load(w, column)


@jit(borrows=True)
def _put_codes(x, at, size, inverse, codes, to):
    """The codes of a block of scale 1 / inverse, two a byte."""
    room = _room()
    for k in range(0, size, LANES):
        store(room, k, nearest(load(x, at + k) * inverse))
    for k in range(size >> 1):
        low, high = np.int32(2 * room[2 * k]), np.int32(2 * room[2 * k + 1])
        codes[to + k] = _CODES[low + _MOST] | _CODES[high + _MOST] << 4


@jit(parallel=True)
def quantize(x, w, table, inverses, steps, most, codes, scales):
    """Fill ``codes``; ``scales`` has the rule's codes, and gets the ones of the smallest error.

    ``w``: the weight of each column's error. ``table``, ``inverses``: the scale of each code and
    its reciprocal. ``steps``, ``most``: STEPS and MOST of packing.py.
    """
    size = x.shape[1] // scales.shape[1]
    for index in prange(len(x)):
        row = signed(index)
        for block in range(scales.shape[1]):
            column, first = block * size, np.int64(scales[row, block])
            at, least = row * x.shape[1] + column, np.float32(np.inf)
            for step in steps:
                tried = min(max(first + step, 0), most)
                X, inverse = table[tried], inverses[tried]
                errors = _errors(x, at, w, column, X, inverse)
                if size > LANES:
                    errors = errors + _errors(x, at + LANES, w, column + LANES, X, inverse)
                error = sum_of_lanes(errors)
                if error < least:
                    least = error
                    scales[row, block] = tried
            _put_codes(x, at, size, inverses[scales[row, block]], codes[row], column >> 1)
