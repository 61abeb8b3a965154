"""Triton kernels compiled for GPUs that aren't here, and what the compiled code says: registers, spills, widths of loads.

What a kernel costs shows without running it. A plugin's test compiles what its own code would launch::

    packed = quantizer.layout((4096, 4096)).empty("cpu")
    for target in TARGETS:
        # kernels that modulora_core.kernels.triton.launching starts, on CPU tensors; nothing is run
        (compiled,) = compile_launches(lambda: gpu.matmul(x, packed, transpose=False), target)
        assert compiled.spills == 0
        assert compiled.loads[128] > 0                # some load of 16 bytes a thread

:func:`compile_kernel` takes any kernel, with the types written down. This needs triton, and neither a GPU nor a driver.
Each compilation takes a second or so; Triton keeps it in its cache on disk. Not in a process with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modulora_core.kernels.triton.launching import Call, Config, recorded

__all__ = [
    "TARGETS",
    "Call",
    "Compiled",
    "Config",
    "compile_call",
    "compile_kernel",
    "compile_launches",
    "recorded",
]

TARGETS: Mapping[str, GPUTarget] = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, consumer Ampere, Ada, Hopper, and AMD's MI300."""

Types = str | tuple["Types", ...]
"""Of an argument: ``"*fp32"`` a pointer, ``"i32"`` a number, a tuple of these."""

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip

WIDEST_ADDRESS = 16
"""Bytes to which torch aligns a tensor at least, and to which Triton asks whether a pointer or a number is a multiple."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the machine code for a target says.

    Attributes:
        target: as :data:`TARGETS` names it.
        registers: 32-bit registers of a thread. On AMD those of vectors.
        spills: bytes of a thread's registers that are kept in memory; 0 is wanted. On AMD the number of such registers.
        shared: bytes of shared memory of a program.
        loads, stores: how many instructions that read, or write, the GPU's memory there are, by the bits that each moves for a thread.
        text: the assembly (PTX, or AMD's), to look for other things.
    """

    target: str
    registers: int
    spills: int
    shared: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    text: str = field(repr=False)


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, Types],
    constants: Mapping[str, Any],
    target: str,
    *,
    divisible: Sequence[tuple[int, ...]] = (),
    warps: int = 4,
    stages: int = 1,
    fusion: bool = False,
) -> Compiled:
    """Compile a ``@triton.jit`` function.

    Args:
        kernel: the function.
        signature: the types of its arguments that aren't constants, by name.
        constants: its ``tl.constexpr`` arguments, by name.
        target: a key of :data:`TARGETS`.
        divisible: which arguments are multiples of 16 (addresses of 16 bytes): their places, ``(0,)`` for the first, ``(1, 0)`` for
            the first of the tuple that is the second. Without it no load can be wider than a value.
        warps, stages: as at a launch; fusion: whether a · b + c may be rounded once.

    Raises:
        KeyError: another target.
        triton.CompilationError: the kernel doesn't compile.
    """
    names = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        kernel,
        {name: names[name] for name in kernel.arg_names},
        dict(constants),
        attrs={place: [["tt.divisibility", WIDEST_ADDRESS]] for place in divisible},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    built = triton.compile(source, target=TARGETS[target], options=options)
    return _read(built, target)


def compile_call(call: Call, target: str) -> Compiled:
    """Compile what a recorded call would run, with the types, the alignments and the configuration that it would have."""
    signature: dict[str, Types] = {}
    constants, divisible = dict(call.constants), []
    for i, (parameter, argument) in enumerate(
        zip(call.kernel.params, call.arguments, strict=False)
    ):
        special = not parameter.do_not_specialize
        if (
            special and isinstance(argument, int) and argument == 1
        ):  # as Triton does: 1 is compiled in
            constants[parameter.name] = 1
            continue
        signature[parameter.name] = _type(argument)
        if special:
            divisible += [place for place, value in _leaves(argument, (i,)) if _is_divisible(value)]
    return compile_kernel(
        call.kernel, signature, constants, target, divisible=divisible,
        warps=call.config.warps, stages=call.config.stages,
    )  # fmt: skip


def compile_launches(launch: Callable[[], object], target: str) -> list[Compiled]:
    """Compile each kernel that ``launch`` would start, in order."""
    with recorded() as calls:
        launch()
    return [compile_call(call, target) for call in calls]


def _type(argument: Any) -> Types:
    if isinstance(argument, tuple):
        return tuple(_type(a) for a in argument)
    if isinstance(argument, Tensor):
        return POINTERS[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def _leaves(argument: Any, place: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(argument, tuple):
        for i, part in enumerate(argument):
            yield from _leaves(part, (*place, i))
    else:
        yield place, argument


def _is_divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % WIDEST_ADDRESS == 0
    return isinstance(value, int) and value % WIDEST_ADDRESS == 0


def _read(built: Any, target: str) -> Compiled:
    if TARGETS[target].backend == "cuda":
        text = built.asm["ptx"]
        registers, spills = _cubin_registers(built.asm["cubin"])
        loads, stores = (_ptx_widths(text, what) for what in ("ld", "st"))
    else:
        text = built.asm["amdgcn"]
        registers, spills = (_amd_number(text, what) for what in ("vgpr_count", "vgpr_spill_count"))
        loads, stores = (_amd_widths(text, what) for what in ("load", "store"))
    return Compiled(target, registers, spills, built.metadata.shared, loads, stores, text)


_PTX_ACCESS = r"\b%s\.(?:\w+\.)*?global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[bufs](\d+)\b"  # ld.global.L1::evict_last.v4.b32
_PTX_COPY = r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x\w+|\d+)[,;\s]"  # to shared memory: cp.async.cg.shared.global [a], [b], 16
_AMD_ACCESS = (
    r"\b(?:global|buffer|flat)_%s_(?:[us]?(byte|short)\w*|dword(?:x(\d))?)\b"  # global_load_dwordx4
)


def _ptx_widths(text: str, what: str) -> Counter[int]:
    found = Counter(
        int(count or 1) * int(bits) for count, bits in re.findall(_PTX_ACCESS % what, text)
    )
    if what == "ld":
        found.update(8 * int(size, 0) for size in re.findall(_PTX_COPY, text))
    return found


def _amd_widths(text: str, what: str) -> Counter[int]:
    found = re.findall(_AMD_ACCESS % what, text)
    return Counter(
        {"byte": 8, "short": 16}.get(small, 32 * int(count or 1)) for small, count in found
    )


def _amd_number(text: str, what: str) -> int:
    (number,) = re.findall(rf"\.{what}:\s+(\d+)", text)
    return int(number)


_ENTRY_WITH_SIZE = 4  # EIFMT_SVAL: two bytes of length follow, and so many bytes
_REGISTERS, _FRAME = (
    0x2F,
    0x11,
)  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE: each the index of a symbol and a number


def _cubin_registers(cubin: bytes) -> tuple[int, int]:
    """Registers, and the bytes of the stack frame, which holds nothing but spills: attributes in the section ``.nv.info`` of an ELF file.

    They are what ``cuobjdump --dump-resource-usage`` prints as REG and STACK.
    """
    found: Counter[int] = Counter()
    section, at = _section(cubin, b".nv.info"), 0
    while at < len(section):
        kind, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if kind == _ENTRY_WITH_SIZE:
            if attribute in (_REGISTERS, _FRAME):
                found[attribute] = max(found[attribute], struct.unpack_from("<II", section, at)[1])
            at += size
    assert found[_REGISTERS], "a cubin that doesn't say its registers"
    return found[_REGISTERS], found[_FRAME]


def _section(elf: bytes, name: bytes) -> bytes:
    """The contents of a section of a 64-bit little-endian ELF file."""
    headers = struct.unpack_from("<Q", elf, 0x28)[0]
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    # of a header: offset of its name, ..., offset and size of its contents
    sections = [struct.unpack_from("<I20xQQ", elf, headers + i * size) for i in range(count)]
    names = sections[names_index][1]
    for label, offset, length in sections:
        if elf[names + label :].split(b"\0", 1)[0] == name:
            return elf[offset : offset + length]
    raise AssertionError(f"no section {name.decode()} in the ELF file")
