"""Puts tensors in memory whose pages the processor protects. Linux only."""

from __future__ import annotations

import ctypes
import mmap
from enum import StrEnum

import torch
from torch import Tensor

_KEPT: list[mmap.mmap] = []
"""Until the process ends: a mapping with a protected page cannot be freed in parts."""

_NOTHING, _READ = 0, 1  # PROT_NONE, PROT_READ


class Place(StrEnum):
    """The end of a tensor that a protected page follows or precedes."""

    END = "before a protected page"
    START = "after a protected page"


def guarded(tensor: Tensor, place: Place = Place.END, *, read_only: bool = False) -> Tensor:
    """A copy of a CPU tensor beside protected pages: an out-of-bounds read ends the process.

    In ordinary memory, a kernel that reads a vector beyond its codes works by chance.

    Args:
        place: which end of the tensor touches a protected page.
        read_only: a write to the tensor ends the process instead, and a read beside it does not.
    """
    if tensor.nbytes == 0:
        return tensor.clone()
    size = mmap.PAGESIZE
    pages = -(-tensor.nbytes // size) * size
    memory = mmap.mmap(-1, pages + 2 * size)
    _KEPT.append(memory)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = size if place is Place.START else size + pages - tensor.nbytes
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    found = flat.view(tensor.shape).copy_(tensor)
    if read_only:
        _protect(begin, pages + 2 * size, _READ)
    else:
        _protect(begin, size, _NOTHING)
        _protect(begin + size + pages, size, _NOTHING)
    return found


def _protect(address: int, nbytes: int, allowed: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), allowed) != 0:
        raise OSError(ctypes.get_errno(), "mprotect of pages beside a tensor")
