"""OPTQ on the CPU, compiled by numba: the values of :mod:`modulora_optq.reference`, bit for bit.

A *run* ends with a group, or with a part of a plane (:mod:`modulora_optq.packing`). Its codes are
at the same bits of consecutive bytes, and share a scale and a zero. Codes of up to four bits have
at most 16 values in a group, so they are computed, and rounded, once, and then looked up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from modulora_kernels.cpu import (
    LANES,
    CPUKernels,
    jit,
    load,
    load_shorts,
    narrow,
    on_stack,
    read_ahead,
    store_lookup,
    store_rounded,
    table_for,
    to_floats,
)

from modulora_core.packed import PackedWeight
from modulora_optq.kernels.groups import chunks_of, code_at, put_scales, put_zeros
from modulora_optq.kernels.one_row import groups_of, one_row
from modulora_optq.options import Options

_PIECE = 2048  # columns whose scales and zeros are converted at once
_GROUPS = _PIECE // 16 + 1  # the most groups in them

_CODES = np.array([[k % 2**bits for k in range(LANES)] for bits in range(5)], np.float32)
"""The code in the low four bits of a number, whose higher bits may belong to another code."""

_scales_room = on_stack(_GROUPS, np.float32)
_zeros_room = on_stack(_GROUPS + 3 * LANES, np.float32)


def operands(packed: PackedWeight) -> tuple[Any, ...]:
    """The ``weight`` of the kernels.

    Codes, scales, zeros (none if symmetric), bits, columns of a group, columns, and two tables:
    :func:`chunks_of` and :func:`groups_of`.
    """
    options, tensors, columns = Options.of(**packed.metadata), packed.tensors, packed.shape[1]
    codes, scales, bits = tensors["codes"], tensors["scales"], options.bits
    zeros = codes[:, :0] if options.symmetric else tensors["zeros"]
    group = options.group(columns)
    tables = chunks_of(scales.shape[1], bits), groups_of(columns, group, bits)
    return codes, scales, zeros, bits, group, columns, *tables


@jit(borrows=True)
def _decode_run(codes, place, bits, zero, scale, out, to, k, stop):
    """Write 32 values at a time of one run to ``out[to + k]`` on, up to ``stop`` or a few more.

    ``place``: codes are at ``codes[low + k]``, from bit ``shift`` on, and third bits likewise.
    """
    low, shift, high, high_shift = place
    if bits == 8:
        while k < stop:
            a, b = to_floats(load(codes, low + k)), to_floats(load(codes, low + k + LANES))
            store_rounded(out, to + k, (a - zero) * scale, (b - zero) * scale)
            k += 2 * LANES
        return k
    table = table_for(out, (load(_CODES, bits * LANES) - zero) * scale)
    if bits == 3:
        while k < stop:
            third = load_shorts(codes, high + k) >> high_shift
            index = ((load_shorts(codes, low + k) >> shift) & 3) | (third << 2)
            store_lookup(out, to + k, table, index)
            k += 2 * LANES
        return k
    while k < stop:
        store_lookup(out, to + k, table, load_shorts(codes, low + k) >> shift)
        k += 2 * LANES
    return k


@jit(borrows=True)
def _decode_runs(work, at, end, last, bits):
    """Runs of a part from ``at`` on: the column, its group, and where the group ends.

    Returns the same of the column where it stopped: ``end``, or from ``last`` on, inside a run.
    """
    (codes, place, group, s, z, out, to), (k, g, group_end) = work, at
    while k < end:
        stop = min(end, group_end)
        k = _decode_run(codes, place, bits, z[LANES + g], s[g], out, to, k, min(stop, last))
        if k < stop:
            break
        k = stop
        if k == group_end:
            g, group_end = g + 1, group_end + group
    return k, g, group_end


@jit(borrows=True)
def _decode_piece(weight, o, i, size, out, to):
    """Columns ``[i, i + size)`` of row o to ``out[to]`` on, which is flat."""
    codes, scales, zeros, bits, group, n, chunks, _ = weight
    width, third_width = (2, 1) if bits == 3 else (bits, bits)
    part, high_part = (n * width + 7) // 8, (n * third_width + 7) // 8
    s, z, first = _scales_room(), _zeros_room(), i // group
    count = (i + size - 1) // group + 1 - first
    put_scales(scales[o, first : first + count], s)
    put_zeros(zeros, o, 1, bits, chunks, scales.shape[1], first, count, z, LANES, 0)
    p, h, begin = i // part, i // high_part, o * codes.shape[1] + i
    low, shift, low_end = begin - p * part, width * p, (p + 1) * part - i
    high, third, high_end = begin - h * high_part, h, (h + 1) * high_part - i
    if bits == 3:
        high += part
    k, g, group_end = 0, 0, (first + 1) * group - i
    while k < size:
        end, place = min(size, low_end, high_end), (low, shift, high, third)
        # 32 codes are read, and 32 values written, at once
        last = min(size, codes.size - max(low, high)) - 2 * LANES + 1
        while k < end:
            work, at = (codes, place, group, s, z, out, to), (k, g, group_end)
            # a branch for each width: the loops over codes then have none
            if bits == 2:
                k, g, group_end = _decode_runs(work, at, end, last, 2)
            elif bits == 3:
                k, g, group_end = _decode_runs(work, at, end, last, 3)
            elif bits == 4:
                k, g, group_end = _decode_runs(work, at, end, last, 4)
            else:
                k, g, group_end = _decode_runs(work, at, end, last, 8)
            stop = min(end, group_end)
            for j in range(k, stop):
                value = (code_at(codes, o, i + j, n, bits) - z[LANES + g]) * s[g]
                out[to + j] = narrow(value, out[to + j])
            k = stop
            if k == group_end:
                g, group_end = g + 1, group_end + group
        if k == low_end:
            low, shift, low_end = low - part, shift + width, low_end + part
        if k == high_end:
            high, third, high_end = high - high_part, third + 1, high_end + high_part


@jit(borrows=True)
def decode(weight, row, start, columns, out):
    """Columns ``start ...`` of the rows from ``row`` on, for :class:`CPUKernels`."""
    codes, n = weight[0], weight[5]
    flat, row_bytes = out.reshape(out.size), codes.shape[1]
    for piece in range(0, columns, _PIECE):
        size, i = min(_PIECE, columns - piece), start + piece
        for r in range(len(out)):
            read_ahead(codes, (row + r) * row_bytes + row_bytes * i // n, row_bytes * size // n)
            _decode_piece(weight, row + r, i, size, flat, r * out.shape[1] + piece)


kernels = CPUKernels(decode, operands, one_row, rounds=True)
tile, product = kernels.tile, kernels.product
