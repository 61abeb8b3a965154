"""Launch Triton kernels: on their tensors' GPU, in the interpreter, or only on record.

A kernel with several configurations is timed once, and runs in the fastest. Inside of
:func:`recorded` nothing runs: ``modulora_conformance.ahead_of_time`` compiles the recorded calls
for GPUs that are not here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from modulora_kernels.clock import seconds_of
from modulora_kernels.triton.blocks import INTERPRETED

Argument = Tensor | int | float | tuple["Argument", ...]
"""A kernel's argument: a tensor becomes a pointer, a tuple stays one."""

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]
"""The numbers of programs, given the kernel's constants."""


WORTH_TUNING = 2**20
"""Numbers of a call's largest tensor from which configurations are timed."""

_TRIALS = 9


@dataclass(frozen=True, slots=True)
class Config:
    """A way to run a kernel: warps, stages and constants.

    Attributes:
        warps: of 32 threads in a program. AMD's of 64 are half as many, so that the weights of a
            thread are as many.
        stages: iterations of a loop around ``tl.dot`` whose loads are under way. With more than 1,
            every load in it goes through shared memory, lookups in a table too.
        constants: the kernel's constants that go with it, as pairs of name and value.
    """

    warps: int = 4
    stages: int = 1
    constants: tuple[tuple[str, Hashable], ...] = ()


def warps_of(config: Config, lanes: int) -> int:
    """The warps of a program on a GPU whose warps have so many threads."""
    return max(1, config.warps * 32 // lanes)


@dataclass(frozen=True, slots=True)
class Call:
    """A recorded launch: ``kernel`` with ``arguments``, then ``constants`` by name.

    Attributes:
        config: the first of ``configs``, from which the clock chooses on a GPU.
        grid: the numbers of programs, given the constants.
    """

    kernel: Any
    arguments: tuple[Argument, ...]
    constants: Mapping[str, Hashable] = field(repr=False)
    config: Config
    configs: tuple[Config, ...] = ()
    grid: Grid = lambda _: (1,)

    @property
    def programs(self) -> int:
        """How many programs it starts."""
        return math.prod(self.grid(self.constants))

    def choices(self) -> list[Call]:
        """The launch in each configuration."""
        return [
            replace(self, config=each, constants={**self.constants, **dict(each.constants)})
            for each in self.configs
        ]


_CALLS: ContextVar[list[Call] | None] = ContextVar("modulora_triton_calls", default=None)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record launches in a list instead of running them. Results are undefined."""
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
        kernel: a ``@triton.jit`` function that may run twice: it only writes its results.
        grid: the numbers of programs.
        arguments: in the kernel's order; its constants come after them.
        constants: by name; among them may be ``@triton.jit`` functions that the kernel calls.
        configs: the fastest is taken; each is timed once for each dtype and each value of the
            constants in ``key``. They must compute the same bits. The first runs where nothing is
            timed: in the interpreter, and with fewer numbers than :data:`WORTH_TUNING`.
        key: names of the constants on which the choice depends.

    Raises:
        RuntimeError: tensors on two devices, which a kernel would read at a wrong address.
    """
    first, devices = configs[0], {tensor.device for tensor in _tensors(arguments)}
    if len(devices) > 1:
        raise RuntimeError(
            f"{kernel.__name__}: expected all tensors on one device, got "
            f"{', '.join(sorted(map(str, devices)))}; move x to the device of the weight"
        )
    calls = _CALLS.get()
    if calls is not None:
        chosen = {**constants, **dict(first.constants)}
        calls.append(Call(kernel, arguments, chosen, first, tuple(configs), grid))
        return
    if INTERPRETED.value:
        kernel[grid](*arguments, **constants, **dict(first.constants))
        return
    device = devices.pop()
    lanes = _lanes(device)
    with torch.cuda.device(device):
        if len(configs) > 1 and max(map(Tensor.numel, _tensors(arguments))) >= WORTH_TUNING:
            functions = tuple(
                value for value in constants.values() if isinstance(value, triton.JITFunction)
            )
            _tuned(kernel, functions, tuple(configs), tuple(key), lanes)[grid](
                *arguments, **constants, enable_fp_fusion=False
            )
        else:
            kernel[grid](
                *arguments, **constants, **dict(first.constants),
                num_warps=warps_of(first, lanes), num_stages=first.stages, enable_fp_fusion=False,
            )  # fmt: skip


@cache
def _lanes(device: torch.device) -> int:
    """The threads of a warp."""
    return torch.cuda.get_device_properties(device).warp_size if torch.version.hip else 32


@cache
def _tuned(
    kernel: Any,
    functions: tuple[Any, ...],  # noqa: ARG001 - a part of the cache's key
    configs: tuple[Config, ...],
    key: tuple[str, ...],
    lanes: int,
) -> Any:
    """Make a tuner of ``kernel`` with these ``functions``; others get a tuner of their own."""
    choices = [
        triton.Config(dict(c.constants), num_warps=warps_of(c, lanes), num_stages=c.stages)
        for c in configs
    ]
    return triton.autotune(choices, key=list(key), do_bench=_milliseconds)(kernel)


def forget_choices() -> None:
    """Forget measured times, so that configurations are timed again without compiling."""
    _tuned.cache_clear()


def _milliseconds(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """The median time of a call, for Triton's tuner.

    Its own timer fills 256 MiB of the device's memory, which a model may not leave free.
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
