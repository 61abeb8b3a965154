"""The clock of a CUDA device, for calls that are shorter than their launch."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

TICK = 5e-7
"""The resolution of CUDA events, in seconds."""

LEAST_AHEAD, MOST_AHEAD = 1e-4, 4e-3
"""Seconds that the device waits before a call, at least and at most."""

_CYCLES = 2e9
"""Cycles of a second of waiting. A faster clock waits shorter, a slower clock longer."""


def seconds_of(
    call: Callable[[], object], device: torch.device, host_seconds: float = 0.0
) -> tuple[float, float]:
    """Measure one call on the device and on the host.

    The device first waits for twice ``host_seconds``, so that the whole call is queued when its
    first kernel starts. A call that takes the host longer than :data:`MOST_AHEAD` is measured
    without.

    Args:
        call: the work; its result is dropped.
        device: the CUDA device that computes it.
        host_seconds: an estimate of the time that the call takes the host.

    Returns:
        seconds of the device, at least :data:`TICK`, and seconds of the host.
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
