"""Times calls beside each other: in turns within one process, by medians.

Sides that take turns in one process are slowed alike by other work on the machine. So the ratio of
their times means more than seconds. Operands that rotate come from memory, as in a model::

    timings = in_turns({"ours": rotating(multiply, packed_copies), "dense": rotating(mm, copies)})
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
from modulora_kernels.clock import seconds_of

from modulora_core.errors import OptionError

Item = TypeVar("Item")
Call = Callable[[], object]

LEAST_TURNS, MOST_TURNS = 3, 1000

LAST_CACHE = 32 * 2**20
"""Bytes of the last-level cache if the system does not say."""

MOST_COLD = 2**29
"""Operands that rotate take no more bytes than this, except two large ones."""

MOST_COPIES = 256
"""A layer so small that these fit a cache is small in a model too."""

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

_COLD_BYTES = 2**28
"""A buffer larger than any GPU's cache, overwritten before each call."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of one call in every turn, in order."""

    turns: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.turns)

    @property
    def low(self) -> float:
        """The tenth percentile: close to the time on an idle machine."""
        return sorted(self.turns)[len(self.turns) // 10]

    @property
    def noise(self) -> float:
        """The median divided by the best: about 1 on an idle machine."""
        return self.seconds / min(self.turns)

    def beside(self, other: Timing) -> float:
        """The median ratio to the other call's time in the same turn."""
        return statistics.median(a / b for a, b in zip(self.turns, other.turns, strict=True))

    def to_json(self) -> dict[str, Any]:
        """``{"seconds", "low_seconds", "noise", "turns"}``; ``turns`` is their number."""
        return {
            "seconds": self.seconds,
            "low_seconds": self.low,
            "noise": self.noise,
            "turns": len(self.turns),
        }


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
        calls: by name.
        seconds: for all calls together, without the warm-up.
        least: turns that are made however long they take.
        most: turns that are never exceeded.
        device: the device of the calls. On CUDA and ROCm the device's clock is read, after its
            caches are overwritten, so that neither warm caches nor Python count.
        warm_up: calls of each before the first turn, not timed.

    Returns:
        a :class:`Timing` for each call.

    Raises:
        OptionError: no calls, ``seconds`` or ``least`` is not positive, or ``most`` is below
            ``least``.
        Exception: a call raises it.
    """
    if not calls or seconds <= 0 or not 1 <= least <= most:
        raise OptionError(
            "in_turns: expected calls, seconds > 0 and 1 <= least <= most, got "
            f"{len(calls)} calls, seconds {seconds:g}, least {least}, most {most}"
        )
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
    """A call that takes the next of ``items`` each time."""
    turning = itertools.cycle(items)
    return lambda: call(next(turning))


def cold_copies(nbytes: int) -> int:
    """How many operands of ``nbytes`` rotate so that each comes from memory.

    Together they take twice the last-level cache, within :data:`MOST_COLD` bytes; at least two and
    at most :data:`MOST_COPIES`."""
    wanted = min(2 * _last_cache_bytes(), MOST_COLD)
    return min(MOST_COPIES, max(2, -(-wanted // max(1, nbytes))))


def device_name(device: torch.device) -> str:
    """The name of the processor or the accelerator; torch's name if the system does not say."""
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
    """The CPU's largest cache, as Linux says; :data:`LAST_CACHE` elsewhere."""
    try:
        sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    except OSError:
        sizes = []
    units = {"K": 2**10, "M": 2**20}
    known = (int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units)
    return max(known, default=LAST_CACHE)


def _clock(device: torch.device) -> Callable[[Call], float]:
    """Measures the seconds of one call on a device."""
    if device.type == "cuda":
        return _event_clock(device)

    def wait() -> None:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    def clock(call: Call) -> float:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    return clock


def _event_clock(device: torch.device) -> Callable[[Call], float]:
    """The device's clock, with its caches overwritten and the host ahead."""
    cold = torch.empty(_COLD_BYTES, dtype=torch.uint8, device=device)
    on_host: dict[Call, float] = {}

    def clock(call: Call) -> float:
        cold.zero_()
        seconds, on_host[call] = seconds_of(call, device, on_host.get(call, 0.0))
        return seconds

    return clock
