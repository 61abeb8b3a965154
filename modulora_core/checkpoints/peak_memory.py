"""Measure the peak memory of a process or a GPU."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

_running: list[PeakMemory] = []
"""The measurements in progress. The kernel keeps one peak, so a new one notes the peaks of the
others."""


class PeakMemory:
    """Measure the peak memory of a ``with`` block; blocks nest.

    On a CUDA device it is the peak of torch's allocator. On a CPU it is the peak resident set of
    the process, with interpreter and libraries. If the system cannot reset its peak (anything but
    Linux, or a locked-down container), it is the peak of the whole process. It is 0 if the system
    has none.

    Args:
        device: ``"cpu"`` or a CUDA device; others count as the CPU.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        device = torch.device(device)
        self._device = device if device.type == "cuda" else None
        self._seen = 0

    @property
    def nbytes(self) -> int:
        """The peak in bytes, so far or of the whole block."""
        return max(self._seen, self._read()) if self in _running else self._seen

    def __enter__(self) -> Self:
        _note_running()
        self._seen = 0
        self._reset()
        _running.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _note_running()
        _running.remove(self)

    def _read(self) -> int:
        if self._device is not None:
            return int(torch.cuda.max_memory_allocated(self._device))
        return _peak_resident_bytes()

    def _reset(self) -> None:
        if self._device is not None:
            torch.cuda.init()  # the next line does not
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(OSError):
            _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set, since Linux 4.0


def _note_running() -> None:
    for measurement in _running:
        measurement._seen = max(measurement._seen, measurement._read())


def _peak_resident_bytes() -> int:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
