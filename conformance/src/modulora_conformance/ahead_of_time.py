"""Compiles Triton kernels for GPUs that are not there, and reads registers, spills and load widths.

They show the cost of a kernel without running it. A plugin's test compiles the kernels that its own
code would launch::

    packed = quantizer.layout((4096, 4096)).empty("cpu")
    for target in TARGETS:
        # kernels that modulora_kernels.triton launches, on CPU tensors; nothing runs
        compiled = compile_launch(lambda: gpu.matmul(x, packed, transpose=False), target)
        assert compiled.loads[128] > 0                # some load of 16 bytes a thread

A test needs triton, and neither a GPU nor a driver. It cannot run in a process with
``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from modulora_kernels.triton.launching import Call, Config, recorded, warps_of
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = [
    "TARGETS", "Call", "Compiled", "Config", "compile_call", "compile_launch", "compile_launches",
    "recorded",
]  # fmt: skip

TARGETS: Mapping[str, GPUTarget] = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, consumer Ampere, Ada, Hopper, and AMD's MI300."""

Types = str | tuple["Types", ...]
"""The type of an argument: ``"*fp32"`` a pointer, ``"i32"`` a number, a tuple of these."""

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

WIDEST_ADDRESS = 16
"""Bytes of alignment that torch's tensors have. Triton distinguishes numbers that it divides."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
"""NVIDIA's tools, which Triton's package has."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """Facts of the machine code for a target.

    Attributes:
        target: a key of :data:`TARGETS`.
        registers: 32-bit registers of a thread; on AMD vector registers.
        spills: bytes of a thread's registers kept in memory; on AMD the number of such registers.
        shared: bytes of shared memory of a program.
        loads: how many instructions read the GPU's memory, by the bits that each moves for a
            thread.
        stores: how many instructions write it.
        loop: how many instructions its longest loop has, by name; none if there is no loop.
        once: how many instructions are outside of that loop, by name.
        text: the assembly (PTX, or AMD's).
    """

    target: str
    registers: int
    spills: int
    shared: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    loop: Mapping[str, int] = field(repr=False)
    once: Mapping[str, int] = field(repr=False)
    text: str = field(repr=False)


@dataclass(frozen=True)
class _Absent:
    """The driver of a GPU that is not there: kernels ask it for the target."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target


_COMPILED: dict[tuple[str, str, int, int], Compiled] = {}
"""Compiled kernels by the hash of their source and types, the target, warps and stages."""


def compile_call(call: Call, target: str) -> Compiled:
    """Compile a recorded call, with the types, alignments and configuration of a launch.

    Args:
        call: the kernel, its arguments and its constants.
        target: a key of :data:`TARGETS`.

    Raises:
        KeyError: another target.
        triton.CompilationError: the kernel does not compile.
    """
    signature: dict[str, Types] = {}
    constants, places = dict(call.constants), list[tuple[int, ...]]()
    parameters = zip(call.kernel.params, call.arguments, strict=False)
    for i, (parameter, argument) in enumerate(parameters):
        specialized = not parameter.do_not_specialize
        if specialized and isinstance(argument, int) and argument == 1:
            constants[parameter.name] = 1  # as Triton does
            continue
        signature[parameter.name] = _type(argument)
        if specialized:
            places += [place for place, value in _leaves(argument, (i,)) if _is_divisible(value)]
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        call.kernel,
        {name: types[name] for name in call.kernel.arg_names},
        constants,
        attrs={place: [["tt.divisibility", WIDEST_ADDRESS]] for place in places},
    )
    warps = warps_of(call.config, TARGETS[target].warp_size)
    stages = call.config.stages
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    key = (source.hash(), target, warps, stages)
    if key not in _COMPILED:
        triton.runtime.driver.set_active(_Absent(TARGETS[target]))
        try:
            built = triton.compile(source, target=TARGETS[target], options=options)
        finally:
            triton.runtime.driver.set_active(None)  # Triton then looks for a GPU's
        _COMPILED[key] = _read(built, target)
    return _COMPILED[key]


def compile_launches(launch: Callable[[], object], target: str) -> list[Compiled]:
    """Compile each kernel that ``launch`` would start, in order."""
    with recorded() as calls:
        launch()
    return [compile_call(call, target) for call in calls]


def compile_launch(launch: Callable[[], object], target: str) -> Compiled:
    """Compile the one kernel that ``launch`` would start, which must spill no register."""
    (compiled,) = compile_launches(launch, target)
    assert compiled.spills == 0, f"expected no spilled registers, got {compiled.spills} bytes"
    return compiled


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
        return value.storage_offset() * value.itemsize % WIDEST_ADDRESS == 0
    return isinstance(value, int) and value % WIDEST_ADDRESS == 0


def _read(built: Any, target: str) -> Compiled:
    if TARGETS[target].backend == "cuda":
        text = built.asm["ptx"]
        printed = _printed("cuobjdump", "--dump-resource-usage", built.asm["cubin"])
        ((registers, spills),) = re.findall(r"REG:(\d+) STACK:(\d+)", printed)  # a stack of spills
        loads, stores = (_ptx_widths(text, access) for access in ("ld", "st"))
        code = _printed("nvdisasm", "--print-code", built.asm["cubin"])
    else:
        text = built.asm["amdgcn"]
        registers, spills = (_amd_number(text, n) for n in ("vgpr_count", "vgpr_spill_count"))
        loads, stores = (_amd_widths(text, access) for access in ("load", "store"))
        code = text.split("s_endpgm")[0]  # without masked accesses that are moved behind it
    loop, once = _instructions(code)
    return Compiled(
        target, int(registers), int(spills), built.metadata.shared, loads, stores, loop, once, text
    )


_LINE = re.compile(
    r"^(?P<label>\.L\w+):"
    r"|^\s+(?:/\*\w+\*/\s+(?:@!?\w+\s+)?)?(?P<name>[A-Za-z][\w.]*)(?P<operands>.*)$",
    re.MULTILINE,
)


def _instructions(code: str) -> tuple[Counter[str], Counter[str]]:
    """The instructions of the longest loop, and the others. A loop ends in a jump backwards."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loop = slice(0, 0)
    for line in _LINE.finditer(code):
        if line["label"]:
            labels[line["label"]] = len(names)
            continue
        names.append(line["name"])
        target = re.search(r"\.L\w+", line["operands"])
        begin = labels.get(target[0]) if target else None
        if begin is not None and len(names) - begin > max(1, loop.stop - loop.start):
            loop = slice(begin, len(names))
    body, padding = Counter(names[loop]), Counter({"NOP": len(names)})
    return body - padding, Counter(names) - body - padding


# ld.global.L1::evict_last.v4.b32
_PTX_ACCESS = r"\b%s\.(?:\w+\.)*?global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[bufs](\d+)\b"
# to shared memory: cp.async.cg.shared.global [a], [b], 16
_PTX_COPY = r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x\w+|\d+)[,;\s]"
# global_load_dwordx4
_AMD_ACCESS = r"\b(?:global|buffer|flat)_%s_(?:[us]?(byte|short)\w*|dword(?:x(\d))?)\b"


def _ptx_widths(text: str, access: str) -> Counter[int]:
    found = re.findall(_PTX_ACCESS % access, text)
    widths = Counter(int(count or 1) * int(bits) for count, bits in found)
    if access == "ld":
        widths.update(8 * int(size, 0) for size in re.findall(_PTX_COPY, text))
    return widths


def _amd_widths(text: str, access: str) -> Counter[int]:
    small_bits = {"byte": 8, "short": 16}
    found = re.findall(_AMD_ACCESS % access, text)
    return Counter(small_bits.get(small, 32 * int(count or 1)) for small, count in found)


def _amd_number(text: str, name: str) -> int:
    (number,) = re.findall(rf"\.{name}:\s+(\d+)", text)
    return int(number)


def _printed(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
