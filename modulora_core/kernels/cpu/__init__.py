"""Tools for a plugin's numba kernels. Importing this package imports numba.

    CPUKernels                     tiles and products around a decoder
    jit, share, signed             compile; divide rows among threads
    scratch, on_stack              scratch memory of a thread; of a function
    read_ahead                     prefetch the bytes that come next
    largest_bits                   max |x|, by the bits of numbers
    narrow, widen, from_half,      one number to bf16's bits and back; from fp16's bits; rounded to fp16
    through_half
    narrow_row, widen_row          the same of a row

For a kernel in LLVM's own language (numba's ``intrinsic``), where a loop is measurably slower: vectors of
:data:`LANES` numbers, and operations on them.
"""

from __future__ import annotations

from modulora_core.kernels.cpu.conversions import (
    bf16_to_float,
    float_to_bf16,
    from_half,
    halves_to_floats,
    narrow,
    narrow_row,
    put_numbers,
    through_half,
    through_halves,
    widen,
    widen_row,
)
from modulora_core.kernels.cpu.cpu_kernels import CPUKernels
from modulora_core.kernels.cpu.magnitudes import largest_bits
from modulora_core.kernels.cpu.prefetch import AHEAD, FAR, NEAR, ask_for, read_ahead
from modulora_core.kernels.cpu.product_templates import STRIP
from modulora_core.kernels.cpu.scratch import on_stack, scratch
from modulora_core.kernels.cpu.shares import share, signed
from modulora_core.kernels.cpu.tables import Table
from modulora_core.kernels.cpu.vectors import (
    LANES,
    assembly,
    call,
    chosen,
    has,
    lookup,
    loops,
    matrix,
    multiply_add,
    pointer,
    splat,
    sum_of_lanes,
    zeros,
)
from modulora_core.kernels.loading import jit

__all__ = [
    "AHEAD",
    "FAR",
    "LANES",
    "NEAR",
    "STRIP",
    "CPUKernels",
    "Table",
    "ask_for",
    "assembly",
    "bf16_to_float",
    "call",
    "chosen",
    "float_to_bf16",
    "from_half",
    "halves_to_floats",
    "has",
    "jit",
    "largest_bits",
    "lookup",
    "loops",
    "matrix",
    "multiply_add",
    "narrow",
    "narrow_row",
    "on_stack",
    "pointer",
    "put_numbers",
    "read_ahead",
    "scratch",
    "share",
    "signed",
    "splat",
    "sum_of_lanes",
    "through_half",
    "through_halves",
    "widen",
    "widen_row",
    "zeros",
]
