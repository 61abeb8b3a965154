"""Tensors that are views of files: a page is read when it is first touched, and can be handed back at any time.

A file is mapped private and writable. What is written to such a tensor stays in this process and never reaches the file; packed tensors
are never written to, so that all their pages are *clean*: the file holds the same bytes. Of such a page (mmap(2), madvise(2))

    until it is touched    it takes no memory
    while it is here       it counts in the process's resident set (``RssFile`` in /proc/self/status)
    when memory is short   the kernel takes it away without writing anything; no swap space is needed
    once it is dropped     the process has it no more. It stays in the kernel's cache of files while nobody needs the memory,
                           and the next touch finds it there, or reads it again

A file must not be cut short while it is mapped: touching what is gone ends the process (SIGBUS). Our folders are written beside and
renamed (:mod:`modulora_core.checkpoints.outputs`), never changed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from modulora_core.models.safetensors_store import SafetensorsStore


class MappedFiles:
    """The tensors of a folder of safetensors as views of its files.

    Args:
        store: the folder, whose headers were checked.
        folder: where it is.

    The maps live as long as this object or any of the tensors.
    """

    def __init__(self, store: SafetensorsStore, folder: Path) -> None:
        self._store = store
        self._maps: dict[str, mmap.mmap] = {}
        for file in {tensor.file for tensor in store.tensors.values()}:
            with (folder / file).open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def view(self, name: str) -> Tensor:
        """A tensor on its file; a copy in memory where the file has it at an address that its dtype can't have, or it is empty."""
        stored, start = self._store.tensors[name], self._store.offset(name)
        if start % stored.dtype.itemsize or stored.nbytes == 0:
            return self._store.read(name)
        flat = torch.frombuffer(
            self._maps[stored.file], dtype=stored.dtype, count=stored.numel, offset=start
        )
        return flat.view(stored.shape)

    def views(self) -> dict[str, Tensor]:
        """All tensors."""
        return {name: self.view(name) for name in self._store.tensors}

    def ranges(self, names: Iterable[str]) -> list[PageRange]:
        """The whole pages that hold nothing but these tensors, neighbours in one range."""
        places = sorted(
            (stored.file, self._store.offset(name), stored.nbytes)
            for name, stored in ((name, self._store.tensors[name]) for name in names)
        )
        merged: list[tuple[str, int, int]] = []
        for file, start, nbytes in places:
            if merged and merged[-1][0] == file and merged[-1][2] == start:
                merged[-1] = (file, merged[-1][1], start + nbytes)
            else:
                merged.append((file, start, start + nbytes))
        return [
            PageRange(self._maps[file], first, last - first)
            for file, start, stop in merged
            if (first := _up(start)) < (last := stop // mmap.PAGESIZE * mmap.PAGESIZE)
        ]


class PageRange:
    """Pages of a mapped file.

    Attributes:
        nbytes: a multiple of the page's size.
    """

    def __init__(self, pages: mmap.mmap, start: int, nbytes: int) -> None:
        self._pages, self._start, self.nbytes = pages, start, nbytes

    def drop(self) -> None:
        """Hand the pages back. What was written to them is lost. Does nothing where the system has no madvise."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED, self._start, self.nbytes)

    def prefetch(self) -> None:
        """Let the kernel begin to read what isn't in its cache, while something else is done."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._pages.madvise(mmap.MADV_WILLNEED, self._start, self.nbytes)


def _up(start: int) -> int:
    return -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
