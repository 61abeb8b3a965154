"""What a call allocates, and what is left of it: torch's storages and Python's (with numpy's) memory, on a CPU; or a GPU's."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_core.devices.memory import Allocations


@dataclass
class Footprint:
    """Bytes above what was there before: at most, and at the end. Filled when the block ends."""

    peak: int = 0
    alive: int = 0


@contextmanager
def tensor_footprint(before: Iterable[Tensor]) -> Iterator[Footprint]:
    """Measure the storages that torch's operations make, but for those of ``before``."""
    found = Footprint()
    with _new_objects(), Allocations(before) as allocations:
        yield found
        gc.collect()
        found.peak, found.alive = allocations.peak, allocations.alive


@contextmanager
def python_footprint() -> Iterator[Footprint]:
    """Measure the memory of Python objects and numpy arrays. The tracker of tensors would count here too: not both at once."""
    found = Footprint()
    with _new_objects():
        tracemalloc.start()
        try:
            yield found
            gc.collect()
            found.alive, found.peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()


@contextmanager
def _new_objects() -> Iterator[None]:
    """Inside, garbage is collected among new objects alone: the libraries have a million old ones."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def cuda_footprint() -> Iterator[Footprint]:
    """Measure the block by the statistics of torch's allocator on the current CUDA device."""
    found = Footprint()
    gc.collect()
    torch.cuda.synchronize()
    begun = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    gc.collect()
    torch.cuda.synchronize()
    found.peak = torch.cuda.max_memory_allocated() - begun
    found.alive = torch.cuda.memory_allocated() - begun
