"""Tensors in memory that ends with their last byte: reading beyond it ends the process with a signal."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_KEPT: list[mmap.mmap] = []
"""Until the process ends: a mapping with a protected page can't be given back piece by piece."""


def guarded(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor, followed by a page that can't be read. Linux alone.

    A kernel that reads a vector over the end of its codes works by chance in ordinary memory.
    """
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor.clone()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    _KEPT.append(memory)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(begin + pages), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect of the page behind a tensor")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    return copy.view(tensor.shape).copy_(tensor)
