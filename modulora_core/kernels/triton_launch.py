"""How Triton kernels are started: the one place that knows of devices, of tuning and of the interpreter.

    launch(kernel, grid, arguments, constants, configs)

runs ``kernel`` on the GPU where its tensors are, in the configuration that is fastest there; in the interpreter, in the first; and
inside of :func:`recorded` not at all: the call is kept, so that it can be compiled ahead of time, with the types and the alignments of
a real one, for a GPU that isn't here (``modulora_conformance.ahead_of_time``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from modulora_core.kernels.triton_blocks import INTERPRETED

Argument = Tensor | int | float | tuple["Argument", ...]
"""What a kernel takes: a tensor becomes a pointer, a tuple stays one."""

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]
"""The numbers of programs, given the kernel's constants."""


@dataclass(frozen=True, slots=True)
class Config:
    """One way to run a kernel.

    Attributes:
        warps: of 32 threads (64 on AMD's) in a program.
        stages: how many iterations of a loop around ``tl.dot`` have their loads under way. With more than 1 every load in it goes through
            shared memory first, lookups in a table too.
        constants: the kernel's constants that go with it, as pairs of name and value.
    """

    warps: int = 4
    stages: int = 1
    constants: tuple[tuple[str, Hashable], ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A launch that was recorded: ``kernel`` with ``arguments``, then ``constants`` by name, in ``config``."""

    kernel: Any
    arguments: tuple[Argument, ...]
    constants: Mapping[str, Hashable] = field(repr=False)
    config: Config


_CALLS: ContextVar[list[Call] | None] = ContextVar("modulora_triton_calls", default=None)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Inside of this block kernels aren't run; what would have been is in the list that it gives. Results are undefined."""
    calls: list[Call] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def launch(
    kernel: Any,
    grid: Grid,
    arguments: tuple[Argument, ...],
    constants: Mapping[str, Hashable],
    configs: Sequence[Config] = (Config(),),
    key: Sequence[str] = (),
) -> None:
    """Run ``kernel`` once.

    Args:
        kernel: a ``@triton.jit`` function that only writes what it is to compute, so that running it twice does no harm.
        grid: the numbers of programs.
        arguments: in the kernel's order; its constants come after them.
        constants: by name; among them may be ``@triton.jit`` functions that the kernel calls.
        configs: where there are several, each is timed once for each value of the constants ``key`` names and each dtype, and the
            fastest is taken. Give several only where they all compute the same bits. The first is for where nothing is timed.
        key: the names of the constants on which the choice depends.
    """
    first = configs[0]
    calls = _CALLS.get()
    if calls is not None:
        calls.append(Call(kernel, arguments, {**constants, **dict(first.constants)}, first))
        return
    if INTERPRETED.value:
        kernel[grid](*arguments, **constants, **dict(first.constants))
        return
    with torch.cuda.device(_device(arguments)):
        if len(configs) > 1:
            functions = tuple(value for value in constants.values() if isinstance(value, triton.JITFunction))
            _tuned(kernel, functions, tuple(configs), tuple(key))[grid](
                *arguments, **constants, enable_fp_fusion=False
            )
        else:
            kernel[grid](
                *arguments, **constants, **dict(first.constants),
                num_warps=first.warps, num_stages=first.stages, enable_fp_fusion=False,
            )  # fmt: skip


@cache
def _tuned(kernel: Any, functions: tuple[Any, ...], configs: tuple[Config, ...], key: tuple[str, ...]) -> Any:  # noqa: ARG001
    """A tuner for ``kernel`` around these ``functions``: their best configuration is their own."""
    choices = [triton.Config(dict(c.constants), num_warps=c.warps, num_stages=c.stages) for c in configs]
    return triton.autotune(choices, key=list(key))(kernel)


def _device(arguments: tuple[Argument, ...]) -> torch.device:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device
        if isinstance(argument, tuple) and any(isinstance(a, Tensor) for a in argument):
            return _device(argument)
    raise AssertionError("a kernel without a tensor")
