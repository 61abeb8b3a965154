"""Tools for a plugin's numba kernels. Importing this package imports numba.

    CPUKernels                          tiles and products around a decoder
    jit                                 compile a function
    share, signed                       divide rows among threads
    scratch, on_stack                   memory of a thread, and of a function
    read_ahead, prefetch                load bytes into the cache before they are read
    largest_bits                        max |x|, by the bits of numbers
    narrow, widen, from_half, ...       numbers of 16 bits, whose arrays are int16

Operations on vectors of sixteen (:mod:`modulora_kernels.cpu.vectors`):

    load, load_shorts, store,           memory
    store_rounded
    splat, to_floats, as_shorts,        arithmetic, beside + - * & | << >>
    multiply_add, sum_of_lanes
    four_sums, add_in_turn, sum_of_four the product of one row, in four sums
    lookup, lookup_pairs, table_for,    lookup in sixteen
    store_lookup, reorder
    operation                           an operation of your own, in LLVM IR
    place, call, chosen                 a pointer, a call and a choice of lanes in it
"""

from __future__ import annotations

from modulora_kernels.compiled import jit
from modulora_kernels.cpu.cpu_kernels import CPUKernels
from modulora_kernels.cpu.lookups import (
    PAIR_ORDER,
    lookup,
    lookup_pairs,
    reorder,
    store_lookup,
    table_for,
)
from modulora_kernels.cpu.memory import AHEAD, on_stack, read_ahead, scratch, share, signed
from modulora_kernels.cpu.numbers import (
    from_half,
    largest_bits,
    narrow,
    narrow_row,
    widen,
)
from modulora_kernels.cpu.row_sums import add_in_turn, four_sums, sum_of_four
from modulora_kernels.cpu.vectors import (
    LANES,
    as_shorts,
    call,
    chosen,
    load,
    load_shorts,
    multiply_add,
    operation,
    place,
    prefetch,
    splat,
    store,
    store_rounded,
    sum_of_lanes,
    to_floats,
)

__all__ = [
    "AHEAD", "LANES", "PAIR_ORDER", "CPUKernels", "add_in_turn", "as_shorts", "call", "chosen",
    "four_sums", "from_half", "jit", "largest_bits", "load", "load_shorts", "lookup",
    "lookup_pairs", "multiply_add", "narrow", "narrow_row", "on_stack", "operation", "place",
    "prefetch", "read_ahead", "reorder", "scratch", "share", "signed", "splat", "store",
    "store_lookup", "store_rounded", "sum_of_four", "sum_of_lanes", "table_for", "to_floats",
    "widen",
]  # fmt: skip
