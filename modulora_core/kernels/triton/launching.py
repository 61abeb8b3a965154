"""How Triton kernels are started: the one place that knows of devices, of tuning and of the interpreter.

    launch(kernel, grid, arguments, constants, configs)

runs ``kernel`` on the GPU where its tensors are, in the configuration that is fastest there; where they are small, and in the
interpreter, in the first; and inside of :func:`recorded` not at all: the call is kept, so that it can be compiled ahead of time, with
the types and the alignments of a real one, for a GPU that isn't here (``modulora_conformance.ahead_of_time``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from modulora_core.devices.clock import seconds_of
from modulora_core.kernels.triton.blocks import INTERPRETED

Argument = Tensor | int | float | tuple["Argument", ...]
"""What a kernel takes: a tensor becomes a pointer, a tuple stays one."""

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]
"""The numbers of programs, given the kernel's constants."""


WORTH_TUNING = 2**20
"""Numbers of a call's largest tensor from which on configurations are timed. With fewer a kernel takes, by
estimate, no longer than to start it, and what is fastest for them says nothing about large ones."""

_TRIALS = 9


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
            fastest is taken. Give several only where they all compute the same bits. The first is for where nothing is timed: in the
            interpreter, and where no tensor has :data:`WORTH_TUNING` numbers.
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
    with torch.cuda.device(next(_tensors(arguments)).device):
        if len(configs) > 1 and max(map(Tensor.numel, _tensors(arguments))) >= WORTH_TUNING:
            functions = tuple(
                value for value in constants.values() if isinstance(value, triton.JITFunction)
            )
            _tuned(kernel, functions, tuple(configs), tuple(key))[grid](
                *arguments, **constants, enable_fp_fusion=False
            )
        else:
            kernel[grid](
                *arguments, **constants, **dict(first.constants),
                num_warps=first.warps, num_stages=first.stages, enable_fp_fusion=False,
            )  # fmt: skip


@cache
def _tuned(
    kernel: Any,
    functions: tuple[Any, ...],  # noqa: ARG001 - a part of the cache's key
    configs: tuple[Config, ...],
    key: tuple[str, ...],
) -> Any:
    """A tuner for ``kernel`` around these ``functions``: their best configuration is their own."""
    choices = [
        triton.Config(dict(c.constants), num_warps=c.warps, num_stages=c.stages) for c in configs
    ]
    return triton.autotune(choices, key=list(key), do_bench=_milliseconds)(kernel)


def forget_choices() -> None:
    """Time configurations again: for a process that has shared its GPU with others until now. Nothing is compiled again."""
    _tuned.cache_clear()


def _milliseconds(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """Triton's tuner asks so how long a configuration takes, and takes the one whose first number is least: here the median, alone.

    Its own way fills a cache with 256 MiB of the device's memory, which a model may not leave, and which would count as a peak.
    """
    del quantiles
    device = torch.device("cuda", torch.cuda.current_device())
    _, on_host = seconds_of(call, device)  # compiles
    times = []
    for _ in range(_TRIALS):
        seconds, on_host = seconds_of(call, device, on_host)
        times.append(1e3 * seconds)
    return [statistics.median(times)]


def _tensors(arguments: tuple[Argument, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)
