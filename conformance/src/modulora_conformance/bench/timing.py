"""Timing calls beside each other: interleaved turns, medians, and the noise told.

What else a machine does falls on every side of a comparison when the sides take turns in one process, so a ratio from the same
turns means more than seconds do. :func:`in_turns` measures; :func:`rotating` makes a call that takes another operand each time, so that
operands come from memory instead of from the last cache, as they do in a model::

    timings = in_turns({"ours": rotating(multiply, packed_copies), "dense": rotating(torch.Tensor.matmul, dense_copies)})
    timings["ours"].beside(timings["dense"])     # the ratio of times: below 1 ours is faster
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from modulora_core.devices.clock import seconds_of
from modulora_core.errors import OptionError

Item = TypeVar("Item")
Call = Callable[[], object]

LEAST_TURNS, MOST_TURNS = 3, 1000

LAST_CACHE = 32 * 2**20
"""Bytes of the last-level cache where the system tells none."""

MOST_COLD = 2**29
"""Operands that rotate take no more bytes than this, or two of them where one is larger than half of it."""

MOST_COPIES = 256
"""A layer so small that these fit a cache is small in a model too."""

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

_COLD_BYTES = 2**28
"""Of a buffer larger than any GPU's cache, which is filled before a call is timed."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of one call in every turn, in order. Those of one :func:`in_turns` have equally many."""

    turns: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.turns)

    @property
    def low(self) -> float:
        """The tenth percentile: nearly what the call takes on a machine that does nothing else."""
        return sorted(self.turns)[len(self.turns) // 10]

    @property
    def noise(self) -> float:
        """How many times its best the median is: about 1 on a machine that does nothing else."""
        return self.seconds / min(self.turns)

    def beside(self, other: Timing) -> float:
        """The median over the turns of this call's time as a multiple of the other's in the same turn."""
        return statistics.median(
            mine / its for mine, its in zip(self.turns, other.turns, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """``{"seconds", "low_seconds", "noise", "turns"}``; turns is how many."""
        return {"seconds": self.seconds, "low_seconds": self.low, "noise": self.noise, "turns": len(self.turns)}  # fmt: skip


def in_turns(
    calls: Mapping[str, Call],
    *,
    seconds: float = 1.0,
    least: int = LEAST_TURNS,
    most: int = MOST_TURNS,
    device: str | torch.device = "cpu",
    warm_up: int = 1,
) -> dict[str, Timing]:
    """Time calls beside each other. Each turn makes every call once, in the mapping's order.

    Args:
        calls: by name; what one returns is dropped within its time.
        seconds: for all calls together, warming up not counted; turns end with the first that ends after it.
        least: turns that are made however long they take.
        most: turns after which it is enough, however short.
        device: what the calls compute on. On CUDA (and ROCm) the device's own clock is read around each call, with the caches
            overwritten before it and the host ahead, so that neither warm caches nor Python count. Other accelerators are waited for.
        warm_up: calls of each before the first turn, which compile and fill pools; not timed.

    Returns:
        a :class:`Timing` of each call, by the same names in the same order.

    Raises:
        OptionError: no calls, or ``seconds`` or ``least`` isn't positive, or ``most`` is below ``least``.
        Exception: whatever a call raises.
    """
    if not calls or seconds <= 0 or not 1 <= least <= most:
        raise OptionError(f"in_turns: expected calls, seconds > 0 and 1 <= least <= most, got {len(calls)} calls, seconds {seconds:g}, "
                          f"least {least}, most {most}")  # fmt: skip
    clock = _clock(torch.device(device))
    for call in calls.values():
        for _ in range(warm_up):
            clock(call)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= least and time.perf_counter() >= end:
            break
        for name, call in calls.items():
            taken[name].append(clock(call))
    return {name: Timing(tuple(times)) for name, times in taken.items()}


def rotating(call: Callable[[Item], object], items: Sequence[Item]) -> Call:
    """A call that takes the next of ``items`` each time, around and around."""
    turning = itertools.cycle(items)
    return lambda: call(next(turning))


def cold_copies(nbytes: int) -> int:
    """How many operands of ``nbytes`` to rotate over so that each comes from memory: as many as twice the last-level cache, within
    :data:`MOST_COLD` bytes, at least two and at most :data:`MOST_COPIES`.
    """
    wanted = min(2 * _last_cache_bytes(), MOST_COLD)
    return min(MOST_COPIES, max(2, -(-wanted // max(1, nbytes))))


def device_name(device: torch.device) -> str:
    """The processor's or the accelerator's name, as reports give it; torch's name of the device where the system tells none."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or str(device)


def _last_cache_bytes() -> int:
    """What Linux tells of the CPU's largest cache; :data:`LAST_CACHE` elsewhere."""
    try:
        sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    except OSError:
        sizes = []
    units = {"K": 2**10, "M": 2**20}
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units),
        default=LAST_CACHE,
    )


def _clock(device: torch.device) -> Callable[[Call], float]:
    """What times one call on a device, in seconds."""
    if device.type == "cpu":
        return _host_clock
    if device.type == "cuda":
        return _event_clock(device)
    return lambda call: _waiting_clock(call, device)


def _host_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _waiting_clock(call: Call, device: torch.device) -> float:
    def wait() -> None:
        getattr(torch, device.type).synchronize()

    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _event_clock(device: torch.device) -> Callable[[Call], float]:
    """The device's clock, after its cache was filled with something else, the host ahead by what the call took it the last time."""
    cold = torch.empty(_COLD_BYTES, dtype=torch.uint8, device=device)
    on_host: dict[Call, float] = {}

    def clock(call: Call) -> float:
        cold.zero_()
        seconds, on_host[call] = seconds_of(call, device, on_host.get(call, 0.0))
        return seconds

    return clock
