"""Predicts the time of kernels on a GPU that is not there, from their machine code and arithmetic.

    time of a launch = max(bytes / bandwidth, instructions of each class / their rate, flops / peak)

It is a floor: latency, and waiting of one class for another, are ignored. Public figures of the
card, no measurement::

    [seconds] = product_seconds("nf4", (4096, 4096), [(1, False)], CARDS["H100"])
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from modulora_conformance.ahead_of_time import Call, Compiled, compile_call, recorded
from modulora_conformance.fake_device import fake_cuda
from modulora_core.registry import create
from modulora_core.spec import PackedWeight


@dataclass(frozen=True, slots=True)
class Card:
    """Public figures of a GPU.

    Attributes:
        target: a key of :data:`modulora_conformance.ahead_of_time.TARGETS`.
        processors: streaming multiprocessors.
        hertz: clock cycles a second, boosted.
        bandwidth: bytes a second from memory.
        flops: of bf16 products with fp32 sums on tensor cores, dense, a second.
        warps: most warps of a processor at once.
    """

    target: str
    processors: int
    hertz: float
    bandwidth: float
    flops: float
    warps: int


CARDS: Mapping[str, Card] = {
    "H100": Card("sm_90", 132, 1.83e9, 3.35e12, 989e12, 64),
    "4090": Card("sm_89", 128, 2.52e9, 1.008e12, 165e12, 48),
    "A100": Card("sm_80", 108, 1.41e9, 2.039e12, 312e12, 64),
}
"""Each by a part of its name. H100 SXM, RTX 4090 and A100 of 80 GB: NVIDIA's "H100 Tensor Core GPU
Architecture", "Ada GPU Architecture" and "A100 Tensor Core GPU"."""

RATES: Mapping[str, int] = {
    "all": 128, "float": 128, "integer": 64, "memory": 32, "conversion": 16,
}  # fmt: skip
"""Instructions of threads that a processor starts in a cycle, by class.

As CUDA's programming guide has them in "Throughput of Native Arithmetic Instructions". "all" is
four warps. "memory" and "conversion" are assumptions: the guide divides them further."""

CLASSES = {
    "tensor": r"HMMA|HGMMA|IMMA|v_mfma",
    "memory": r"LD(?!C)|ST|ATOM|SHFL|global_|buffer_|flat_|ds_|scratch_",
    "conversion": r"I2F\b|F2F\b|F2I|MUFU|v_cvt_|v_rcp",
    "float": r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2|IMAD|v_(?:pk_)?(?:add|sub|mul|fma|mac)c?_f",
    "uniform": r"U(?!P)|R2UR|S2UR|LDC|BRA|BAR|EXIT|s_",
}
"""The beginnings of instructions' names. Uniform ones only take a turn; others are "integer"."""

_MATRICES = re.compile(r"HMMA\.(16)(8)(\d+)|HGMMA\.64x(\d+)x(\d+)")
"""``HMMA.16816`` multiplies for a warp, ``HGMMA.64x32x16`` for four."""

ALLOCATIONS = ("empty", "detach", "_unsafe_view", "alias", "lift_fresh")
"""Operations of torch that move nothing, besides views."""

WAITS = ("_local_scalar_dense", "unique", "_unique2", "nonzero", "masked_select", "equal")
"""Operations of torch for which the host waits until the GPU has a value."""


@dataclass(slots=True)
class Work:
    """The work that the host gives to the GPU in this block, in order. Kernels are only recorded.

    Attributes:
        calls: launches of Triton kernels.
        operations: torch's operations that launch a kernel, by name.
        waits: operations for which the host waits.
        moved: bytes that torch's operations read and write, without products of matrices.
        flops: of products of matrices.
    """

    calls: list[Call] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    moved: int = 0
    flops: int = 0
    _open: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def launches(self) -> int:
        return len(self.calls) + len(self.operations)

    def __enter__(self) -> Work:
        self.calls = self._open.enter_context(recorded())
        self._open.enter_context(_Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


class _Operations(TorchDispatchMode):
    """Adds torch's operations to a :class:`Work`."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **kwargs or {})
        name = func.name().split("::")[1].split(".")[0]
        used = {id(t): t for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)}
        on_gpu = [t for t in used.values() if t.is_cuda]
        if not on_gpu or func.is_view or name.startswith(("new_empty", *ALLOCATIONS)):
            return result
        if name in WAITS or (len(on_gpu) < len(used) and any(t.dim() for t in used.values())):
            self.work.waits.append(name)
        self.work.operations.append(name)
        if name in ("mm", "addmm", "addmm_"):
            a, b = [each for each in args if isinstance(each, Tensor)][-2:]
            self.work.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        else:
            self.work.moved += sum(t.nbytes for t in on_gpu)
        return result


def work_of(work: Callable[[], object]) -> Work:
    """The work that a call gives to the GPU."""
    with Work() as found:
        work()
    return found


def per_thread(call: Call, compiled: Compiled) -> Counter[str]:
    """The instructions that a thread executes, by class."""
    found: Counter[str] = Counter()
    for names, times in ((compiled.once, 1), (compiled.loop, trips(call))):
        for name, count in names.items():
            found[class_of(name)] += count * times
            found["flops"] += count * times * flops_of(name)
    found["all"] = sum(found[each] for each in (*CLASSES, "integer"))
    return found


def class_of(name: str) -> str:
    """The class of an instruction by its name."""
    return next((each for each, names in CLASSES.items() if re.match(names, name)), "integer")


def flops_of(name: str) -> int:
    """The share of one thread in a product of small matrices; 0 of other instructions."""
    found = _MATRICES.match(name)
    if not found:
        return 0
    m, n, k, wide, deep = (int(each or 0) for each in found.groups())
    return 2 * m * n * k // 32 if m else 2 * 64 * wide * deep // 128


def named(call: Call) -> dict[str, Any]:
    """The arguments and constants of a call by name."""
    return {**dict(zip(call.kernel.arg_names, call.arguments, strict=False)), **call.constants}


def trips(call: Call) -> int:
    """How often the loop of one of the toolkit's kernels runs in a program."""
    a = named(call)
    kernel = call.kernel.__name__
    if kernel == "few_rows_kernel":
        return int(a["steps"] * (1 if a["TRANSPOSE"] else a["PARTS"]))
    if kernel == "across_kernel":
        return -(-int(a["K"]) // int(a["TERMS"]))
    return int(a.get("PARTS", 1))


def threads(call: Call) -> int:
    """The threads of a program."""
    return 32 * call.config.warps


def waves(call: Call, compiled: Compiled, card: Card) -> float:
    """How often all programs that fit on the card at once must run."""
    warps = call.config.warps
    resident = min(
        card.warps // warps,
        65536 // (32 * warps * max(1, -(-compiled.registers // 8) * 8)),
        100_000 // max(1, compiled.shared),
    )
    return call.programs / (card.processors * max(1, resident))


def bytes_of(call: Call, packed: PackedWeight | None) -> float:
    """The bytes that a launch moves, if each is read once: of the weight and of its tensors."""
    a = named(call)
    tensors = {id(t): t.nbytes for t in call.arguments if isinstance(t, Tensor)}
    share = 0.0
    if packed is not None and "weight" in a:
        whole = packed.shape[0] * packed.shape[1]
        share = a["out"].numel() / whole if "out" in a else 1.0
        return sum(tensors.values()) + share * packed.nbytes
    return sum(tensors.values())


def seconds_of_call(call: Call, packed: PackedWeight | None, card: Card) -> float:
    """The least time of a launch. Its busiest processor runs ⌈programs / processors⌉ of them."""
    compiled = compile_call(call, card.target)
    executed = per_thread(call, compiled)
    whole = threads(call) * -(-call.programs // card.processors)
    cycles = max(executed[each] * whole / rate for each, rate in RATES.items())
    tensor = executed["flops"] * whole * card.processors / card.flops
    return max(bytes_of(call, packed) / card.bandwidth, cycles / card.hertz, tensor)


def fastest(call: Call, packed: PackedWeight | None, card: Card) -> Call:
    """The call in the configuration that the clock would choose by this prediction."""
    choices = call.choices() if len(call.configs) > 1 else [call]
    return min(choices, key=lambda each: seconds_of_call(each, packed, card))


def predicted_seconds(work: Work, packed: PackedWeight | None, card: Card) -> float:
    """The least time of all work: kernels, products of matrices, and torch's other operations."""
    kernels = sum(seconds_of_call(fastest(call, packed, card), packed, card) for call in work.calls)
    return kernels + work.flops / card.flops + work.moved / card.bandwidth


def card_named(name: str) -> Card | None:
    """The card that a device's name contains; None of others."""
    return next((card for key, card in CARDS.items() if key in name), None)


def product_seconds(
    name: str, shape: tuple[int, int], products: Sequence[tuple[int, bool]], card: Card
) -> list[float]:
    """The least time of products in bf16 with a weight that quantizer ``name`` packs.

    Tables that the quantizer keeps are then of the fake device. So call it in a process of its own.

    Args:
        products: rows of x, and whether the weight is transposed.
    """
    quantizer, found = create(name), list[float]()
    with fake_cuda(values=False):
        packed = quantizer.layout(shape).empty("cuda")
        for rows, transpose in products:
            x = torch.empty(rows, shape[1 - transpose], dtype=torch.bfloat16, device="cuda")
            for _ in range(2):  # the second product finds tables in their caches
                with Work() as work:
                    quantizer.matmul(x, packed, transpose)
            found.append(predicted_seconds(work, packed, card))
    return found


def dense_seconds(shape: tuple[int, int], rows: int, card: Card) -> float:
    """The least time of a product with a dense bf16 weight."""
    out_features, in_features = shape
    flops = 2 * rows * out_features * in_features
    moved = 2 * (out_features * in_features + rows * (out_features + in_features))
    return max(flops / card.flops, moved / card.bandwidth)


def weights_of(call: Call) -> int:
    """How many weights all programs of a launch decode; 0 of a rotation."""
    a = named(call)
    if "DECODE" not in a:
        return 0
    if "out" in a:
        return int(a["out"].numel())
    return math.prod((a["out_features"], a["in_features"]))
