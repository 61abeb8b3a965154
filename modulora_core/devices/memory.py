"""Peak memory, measured.

:class:`PeakMemory`: on an accelerator what torch's allocator held at most; on a CPU the resident set of this whole process at its
largest, interpreter and libraries included. :class:`Allocations`: what torch's operations allocate, to the byte.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

_running: list[PeakMemory] = []
"""Those that have begun and not ended: the kernel keeps one peak, and a new one must not lose theirs."""


class PeakMemory:
    """Measure the peak inside a ``with`` block; :attr:`nbytes` may be read within and after it. Blocks nest.

    Args:
        device: ``"cpu"`` or a CUDA device. Others count as the CPU.

    Where the operating system can't reset its peak (not Linux, or a locked-down container), a CPU's peak is
    that of the process's life so far: never too low. It is 0 where the system tells none.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        device = torch.device(device)
        self._device = device if device.type == "cuda" else None
        self._seen = 0

    @property
    def nbytes(self) -> int:
        """The peak so far, or of the whole block once it has ended; in bytes."""
        return max(self._seen, self._read()) if self in _running else self._seen

    def __enter__(self) -> Self:
        _note_running()
        self._seen = 0
        self._reset()
        _running.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _note_running()
        _running.remove(self)

    def _read(self) -> int:
        if self._device is not None:
            return int(torch.cuda.max_memory_allocated(self._device))
        return _peak_resident_bytes()

    def _reset(self) -> None:
        if self._device is not None:
            torch.cuda.init()  # what follows doesn't, and knows no device without
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR_REFS.write_text(
                "5"
            )  # proc(5): 5 resets VmHWM to what is resident now (Linux 4.0)
        except OSError:
            return


def _note_running() -> None:
    for measurement in _running:
        measurement._seen = max(measurement._seen, measurement._read())


def _peak_resident_bytes() -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


class Allocations(TorchDispatchMode):
    """Inside of this mode, follow the bytes of the storages that torch's operations make, on any device.

    Storages are counted whole, also where only a view of one is left alive. What compiled kernels allocate for themselves isn't seen.

    Args:
        before: tensors whose storages exist already and don't count.

    Attributes:
        alive: bytes of new storages that are alive now; peak: at most so far.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # torch's signature
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.alive += nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, address, nbytes)

    def _release(self, address: int, nbytes: int) -> None:
        self._known.discard(address)
        self.alive -= nbytes
