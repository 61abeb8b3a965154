"""Map a model's tensors from its files, and hold the packed weights of one decoder block at a time.

A file is mapped private and writable: writes to such a tensor never reach the file. Packed tensors
are never written to, so their pages stay clean. The kernel reads a clean page at the first touch,
and takes it back without swap space. While it is in memory it counts in the resident set
(``RssFile`` in /proc/self/status). A page that we drop (madvise(2)) stays in the kernel's file
cache while there is memory for it.

A file must not be cut short while it is mapped: touching a missing page ends the process (SIGBUS).
Our folders are never changed, only renamed (:mod:`modulora_core.checkpoints.outputs`).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modulora_core.errors import ModelError
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.models.sites import outermost_lists
from modulora_core.packed_parameters import PackedParameter, check_scales


class MappedFiles:
    """The tensors of a folder as views of its files, mapped as long as any of them lives."""

    def __init__(self, store: SafetensorsStore, folder: Path) -> None:
        self._store = store
        self._maps: dict[str, mmap.mmap] = {}
        for file in {tensor.file for tensor in store.tensors.values()}:
            with (folder / file).open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def views(self) -> dict[str, Tensor]:
        """All tensors by name. A tensor is copied if it is empty, or not aligned to its dtype."""
        return {name: self._view(name) for name in self._store.tensors}

    def _view(self, name: str) -> Tensor:
        stored, start = self._store.tensors[name], self._store.offset(name)
        if start % stored.dtype.itemsize or stored.nbytes == 0:
            return self._store.read(name)
        pages = self._maps[stored.file]
        flat = torch.frombuffer(pages, dtype=stored.dtype, count=stored.numel, offset=start)
        return flat.view(stored.shape)

    def ranges(self, names: Iterable[str]) -> list[PageRange]:
        """The whole pages that hold only these tensors; neighbours share a range."""
        merged: list[tuple[str, int, int]] = []
        for file, start, stop in sorted(map(self._place, names)):
            if merged and merged[-1][0] == file and merged[-1][2] == start:
                start = merged.pop()[1]
            merged.append((file, start, stop))
        return [
            PageRange(self._maps[file], first, last - first)
            for file, start, stop in merged
            if (first := -(-start // mmap.PAGESIZE) * mmap.PAGESIZE)
            < (last := stop // mmap.PAGESIZE * mmap.PAGESIZE)
        ]

    def _place(self, name: str) -> tuple[str, int, int]:
        stored, start = self._store.tensors[name], self._store.offset(name)
        return stored.file, start, start + stored.nbytes


class PageRange:
    """Pages of a mapped file; ``nbytes`` is a multiple of the page size."""

    def __init__(self, pages: mmap.mmap, start: int, nbytes: int) -> None:
        self._pages, self._start, self.nbytes = pages, start, nbytes

    def drop(self) -> None:
        """Give the pages back, and lose all writes to them. Without madvise it does nothing."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED, self._start, self.nbytes)

    def prefetch(self) -> None:
        """Ask the kernel to begin reading the pages that its cache lacks."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._pages.madvise(mmap.MADV_WILLNEED, self._start, self.nbytes)


class BlockWindow:
    """Keep the pages of the packed weights of one block at a time in memory.

    A training step goes through the blocks in order, and back. Entering a block drops the pages of
    the block before, and prefetches the next in the same direction.
    ``blocks`` are the pages of each block's packed weights; ``inside`` is the block entered last.
    """

    def __init__(self, blocks: Sequence[Sequence[PageRange]]) -> None:
        self._blocks = blocks
        self.inside: int | None = None

    def __deepcopy__(self, _: object) -> BlockWindow:
        return self  # the pages are the same files'

    def __reduce__(self) -> Any:
        raise ModelError(
            "pickle: expected a model in memory, got a mapped one, whose packed weights are in "
            "their files; write it with save_pretrained, or load it without mapped=True"
        )

    def enter(self, block: int, *_: Any) -> None:
        """Drop the block that was entered before, and prefetch the next."""
        before, self.inside = self.inside, block
        if before is None or before == block:
            return
        for pages in self._blocks[before]:
            pages.drop()
        following = block + (1 if block > before else -1)
        if 0 <= following < len(self._blocks):
            for pages in self._blocks[following]:
                pages.prefetch()

    def enter_backward(self, block: int, _module: nn.Module, _args: Any, output: Any) -> None:
        """Enter a block, of which this is a forward hook, when a gradient reaches its output."""
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(self.enter, block))


def keep_one_block(model: nn.Module, files: MappedFiles) -> BlockWindow:
    """Hold the packed weights of one block of ``model`` at a time from now on.

    A block is entered when its forward begins, when gradient checkpointing recomputes it, and when
    a gradient reaches its output. Parameters outside of the blocks and dense ones stay: they may be
    trained, and dropping their pages would lose that. The model's packed tensors are views of
    ``files``, under the model's own names. The scales of a block are checked when it first runs.

    Raises CheckpointError: a scale outside of the blocks is NaN or infinite.
    """
    tensors = _tensors_of_blocks(model)
    check_scales(model, skip=tuple(f"{path}." for path in tensors))
    window = BlockWindow([files.ranges(names) for names in tensors.values()])
    for number, path in enumerate(tensors):
        block = model.get_submodule(path)
        _check_at_first_touch(block, path)
        block.register_forward_pre_hook(partial(window.enter, number))
        block.register_forward_hook(partial(window.enter_backward, number))
    return window


def _tensors_of_blocks(model: nn.Module) -> Mapping[str, list[str]]:
    """The packed tensors of each block: each member of an outermost ModuleList."""
    lists = outermost_lists(model)
    blocks: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        outer = next((each for each in lists if path.startswith(f"{each}.")), None)
        if outer is not None and isinstance(module, PackedParameter):
            number = path.removeprefix(f"{outer}.").partition(".")[0]
            names = [f"{path}.{name}" for name in module.layout.tensors]
            blocks.setdefault(f"{outer}.{number}", []).extend(names)
    return blocks


def _check_at_first_touch(block: nn.Module, path: str) -> None:
    """Check the packed weights of ``block`` when it first runs, and reads their pages anyway."""
    hooks: list[Any] = []
    hooks.append(block.register_forward_pre_hook(partial(_check_once, f"{path}.", hooks)))


def _check_once(path: str, hooks: list[Any], block: nn.Module, _: Any) -> None:
    check_scales(block, path)
    hooks.pop().remove()
