"""The clock of a CUDA device (ROCm's are called so too), for calls that are shorter than it takes the host to start them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

TICK = 5e-7
"""Seconds: what events resolve."""

LEAST_AHEAD, MOST_AHEAD = 1e-4, 4e-3
"""Seconds for which the device is kept busy before a call. What would take more than the most is timed as the host starts it, as it is
in life.
"""

_CYCLES = 2e9
"""A second of a fast card. One with a faster clock waits for less time, one with a slower clock for more."""


def seconds_of(
    call: Callable[[], object], device: torch.device, host_seconds: float = 0.0
) -> tuple[float, float]:
    """What one call takes the device, and the host.

    The device waits first, for twice ``host_seconds``, so that all of the call is queued when its first kernel starts, and the time between
    kernels isn't the host's. Nothing is allocated.

    Args:
        call: what it returns is dropped.
        device: the CUDA device that it computes on.
        host_seconds: that the call takes the host, as far as is known.

    Returns:
        seconds of the device, at least :data:`TICK`, and of the host.
    """
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        ahead = max(LEAST_AHEAD, 2 * host_seconds)
        torch.cuda._sleep(int(_CYCLES * (ahead if ahead <= MOST_AHEAD else LEAST_AHEAD)))
        start.record()
        before = time.perf_counter()
        call()
        host_seconds = time.perf_counter() - before
        stop.record()
    stop.synchronize()
    return max(TICK, float(start.elapsed_time(stop)) / 1e3), host_seconds
