"""Measure the memory of a block: tensors, objects of Python, or a CUDA device."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_conformance.allocations import Allocations
from modulora_conformance.cases import fit, gaussian, identity
from modulora_core.spec import Quantizer

PACKED_SHAPE = (1024, 1024)
"""4 MiB of dense fp32. Powers of two, which every quantizer packs fast."""

PACKED_WITH_H = (512, 512)


@dataclass
class Footprint:
    """Bytes above the start: the peak, and the rest at the end. Filled when the block ends."""

    peak: int = 0
    alive: int = 0


Measure = Callable[[list[Tensor]], AbstractContextManager[Footprint]]


@contextmanager
def tensor_footprint(before: list[Tensor]) -> Iterator[Footprint]:
    """Measure the storages that torch allocates, without the tensors of ``before``."""
    found = Footprint()
    with new_objects(), Allocations(before) as allocations:
        yield found
        gc.collect()
        found.peak, found.alive = allocations.peak, allocations.alive


@contextmanager
def python_footprint(_before: list[Tensor]) -> Iterator[Footprint]:
    """Measure the memory of Python objects and numpy arrays."""
    found = Footprint()
    with new_objects():
        tracemalloc.start()
        try:
            yield found
            gc.collect()
            found.alive, found.peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()


@contextmanager
def cuda_footprint(_before: list[Tensor]) -> Iterator[Footprint]:
    """Measure by the statistics of torch's allocator on the current CUDA device."""
    found = Footprint()
    gc.collect()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    gc.collect()
    torch.cuda.synchronize()
    found.peak = torch.cuda.max_memory_allocated() - start
    found.alive = torch.cuda.memory_allocated() - start


@contextmanager
def new_objects() -> Iterator[None]:
    """Limit garbage collection to new objects: the libraries have a million old ones."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


MEASURES: dict[str, Measure] = {
    "tensors": tensor_footprint,
    "objects and arrays": python_footprint,
}


def packing_peaks(quantizer: Quantizer) -> tuple[dict[str, int], int]:
    """The peak of ``pack`` in bytes by each of :data:`MEASURES`, and the bytes of its arguments in
    fp32."""
    calibrated = quantizer.spec.calibration != "none"
    weight = gaussian(
        fit(quantizer, *(PACKED_WITH_H if calibrated else PACKED_SHAPE)), 1
    ).bfloat16()
    calibration = identity(weight.shape[1]) if calibrated else None
    quantizer.pack(weight, calibration)  # whatever is made once exists now
    given = [weight, calibration.hessian] if calibration else [weight]
    peaks = {}
    for name, measure in MEASURES.items():
        with measure(given) as found:
            quantizer.pack(weight, calibration)
        peaks[name] = found.peak
    return peaks, sum(4 * tensor.numel() for tensor in given)
