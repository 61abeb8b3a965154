"""Where tensors wait that aren't needed for a while: in a file when the work is on a CPU, in the CPU's memory when it is on a GPU.

A training step needs two kinds of them: the inputs of checkpointed blocks, from the forward to the backward, and the moments of the
optimizer, from one step to the next. :class:`DiskFile` maps a file without a name, which is gone with the process, and hands pages back as
soon as they are written: then the kernel may drop them from memory, and the process's resident set doesn't count them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from modulora_core.errors import WorkError

_SMALLEST = 64 * 2**10
"""In bytes. Smaller tensors stay where they are: all of them together are little, and each would cost a round trip."""


_GROWTH = 64 * 2**20
"""Bytes by which the file grows, in one map each: every map takes one of the process's file descriptors."""


@dataclass(frozen=True, slots=True)
class _Region:
    """``length`` bytes of a map from ``start`` on."""

    pages: mmap.mmap
    start: int
    length: int


class Place(Protocol):
    """Keeps tensors elsewhere."""

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in this place, on the CPU, bit for bit; read it or write to it as to any tensor.

        One that is in this place already is itself, and is dropped.
        """

    def drop(self, kept: Tensor) -> None:
        """Say that ``kept`` was read or written and won't be for a while."""


class HostMemory:
    """The CPU's memory, pinned: a GPU copies to and from it directly."""

    def keep(self, tensor: Tensor) -> Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return pinned.copy_(tensor)

    def drop(self, kept: Tensor) -> None:
        pass


class DiskFile:
    """A temporary file in ``folder``, which should be on a disk: in a file system that lives in memory nothing would be gained.

    Attributes:
        nbytes: what the file has grown to. The room of a tensor that is gone is used again.

    Raises:
        WorkError: in :meth:`keep`, when the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open for as long as this object is
        self._closer = weakref.finalize(self, self._file.close)
        self._regions: dict[int, _Region] = {}  # by address, those in use
        self._free: defaultdict[int, list[_Region]] = defaultdict(list)  # by length
        self._rest = _Region(mmap.mmap(-1, 1), 0, 0)
        self.nbytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closer()

    def keep(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() in self._regions:
            self.drop(tensor)
            return tensor
        region = self._region(tensor.numel() * tensor.element_size())
        kept = torch.frombuffer(region.pages, dtype=tensor.dtype, count=tensor.numel(), offset=region.start)
        kept = kept.view(tensor.shape).copy_(tensor)
        storage = kept.untyped_storage()
        self._regions[storage.data_ptr()] = region
        weakref.finalize(storage, self._recycle, storage.data_ptr())
        self.drop(kept)
        return kept

    def drop(self, kept: Tensor) -> None:
        region = self._regions[kept.untyped_storage().data_ptr()]
        if hasattr(mmap, "MADV_DONTNEED"):  # what was written stays in the file: it is mapped shared
            region.pages.madvise(mmap.MADV_DONTNEED, region.start, region.length)

    def _region(self, nbytes: int) -> _Region:
        length = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._free[length]:
            return self._free[length].pop()
        if self._rest.length < length:
            self._rest = self._grown(-(-length // _GROWTH) * _GROWTH)
        pages, start, free = self._rest.pages, self._rest.start, self._rest.length
        self._rest = _Region(pages, start + length, free - length)
        return _Region(pages, start, length)

    def _grown(self, length: int) -> _Region:
        start, self.nbytes = self.nbytes, self.nbytes + length
        try:
            # reserved, not only promised: writing to a page that finds no room on the disk would kill the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), start, length)
            else:
                self._file.truncate(self.nbytes)
        except OSError as error:
            raise WorkError(
                f"offloading to disk: {length / 2**20:.0f} MiB beyond {start / 2**20:.0f} MiB don't fit "
                f"({error.strerror}); free some space, or train without offloading"
            ) from None
        return _Region(mmap.mmap(self._file.fileno(), length, offset=start), 0, length)

    def _recycle(self, address: int) -> None:
        region = self._regions.pop(address)
        self._free[region.length].append(region)


@contextmanager
def offload_place(device: torch.device, folder: Path) -> Iterator[Place]:
    """Where tensors of ``device`` wait: on a CPU in a file in ``folder``, for the length of the block."""
    if device.type != "cpu":
        yield HostMemory()
        return
    with DiskFile(folder) as file:
        yield file


def offloaded_activations(model: nn.Module, place: Place) -> AbstractContextManager[None]:
    """What autograd saves in this block waits in ``place``, but for the model's own tensors and small ones.

    With gradient checkpointing that is the input of each block. The values are the same bits.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> tuple[Tensor, torch.device | None]:
        small = tensor.numel() * tensor.element_size() < _SMALLEST
        if small or tensor.untyped_storage().data_ptr() in own:
            return tensor, None
        return place.keep(tensor.detach()), tensor.device

    def unpack(packed: tuple[Tensor, torch.device | None]) -> Tensor:
        kept, device = packed
        if device is None:
            return kept
        tensor = kept.to(device, copy=True)
        place.drop(kept)
        return tensor

    hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    return hooks
