"""Count the bytes of the storages that torch's operations make, by their purpose.

It works on fake tensors, which have shapes and no memory.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modulora_core.autograd import WEIGHTS
from modulora_core.dense_products import compute_dtype
from modulora_core.tiles import tile_bytes, tile_ranges

Bytes = Counter[str]
"""Bytes by item: ``{"activations": 1024, ...}``."""


def plus(a: Bytes, b: Bytes, sign: int = 1) -> Bytes:
    """Add two Counters, and keep negative counts, which their own ``+`` drops."""
    total = Bytes(a)
    total.update({item: sign * nbytes for item, nbytes in b.items()})
    return total


@dataclass(frozen=True, slots=True)
class Segment:
    """The bytes allocated between two marks, without bytes that were alive before.

    Attributes:
        peak: the bytes alive when they were most.
        change: the bytes alive at its end; negative if earlier ones were freed.
    """

    peak: Bytes
    change: Bytes


class ByteCounter(TorchDispatchMode):
    """Follow storages inside of this mode, and cut the time into segments.

    Fake tensors have no values. The counter answers the operations that read one: ``nonzero`` finds
    as many entries as it can, a bool is False, and a number is 1.

    Args:
        before: tensors whose storages do not count.
        device: the planned device.

    Attributes:
        segments: the finished segments by name; of several with one name the last.
        experts: the number of experts that share the tokens now.
        most_labels: the number of labels that the loss finds at most.
    """

    def __init__(self, before: Iterable[Tensor], device: torch.device) -> None:
        super().__init__()
        self.segments: dict[str, Segment] = {}
        self.experts, self.most_labels = 1, 1
        self._device = device
        self._items = {tensor.untyped_storage()._cdata: ("", 0) for tensor in before}
        self._alive, self._before, self._peak = Bytes(), Bytes(), Bytes()
        self._name, self._item, self._next = "", "", ("", "")

    def begin(self, name: str, item: str = "activations") -> None:
        """Begin a segment with the next operation, and end the running one."""
        self._next = (name, item)

    def end(self) -> None:
        """End the running segment, if one runs."""
        if self._name:
            peak, change = (plus(end, self._before, -1) for end in (self._peak, self._alive))
            self.segments[self._name] = Segment(peak, change)
        self._name = ""

    def call_it(self, tensor: Tensor, item: str) -> None:
        """Count the storage of ``tensor`` for ``item`` from now on."""
        key = tensor.untyped_storage()._cdata
        old, nbytes = self._items.get(key, ("", 0))
        if old:
            self._alive[old] -= nbytes
            self._alive[item] += nbytes
            self._items[key] = (item, nbytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._next[0]:  # frames of the segment before have ended by now
            self.end()
            (self._name, self._item), self._next = self._next, ("", "")
            self._before, self._peak = self._alive.copy(), self._alive.copy()
        if func is torch.ops.aten.nonzero.default:
            return self._all_found(args[0])
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        if func is torch.ops.modulora.product.default:
            x, number, transpose = args
            shape = WEIGHTS[number].layout.shape
            self._note(product_workspace(shape, x, transpose, self._device))
        return result

    def _all_found(self, mask: Tensor) -> Tensor:
        # with experts, a vector marks the experts that are hit, a matrix the tokens of one
        entries, dims = mask.numel(), mask.dim()
        shared = dims > 1 and entries != self.experts
        found = -(-entries // self.experts) if shared else entries
        found = min(found, self.most_labels) if self._item == "loss" else found
        return mask.new_empty((found, dims), dtype=torch.int64)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._items:
            return
        self._items[key] = (self._item, nbytes)
        self._alive[self._item] += nbytes
        self._note(0)
        weakref.finalize(storage, self._release, key)

    def _note(self, workspace: int) -> None:
        if self._alive.total() + workspace > self._peak.total():
            self._peak = plus(self._alive, Bytes(workspace=workspace))

    def _release(self, key: int) -> None:
        item, nbytes = self._items.pop(key)
        self._alive[item] -= nbytes


def product_workspace(
    shape: tuple[int, int], x: Tensor, transpose: bool, device: torch.device
) -> int:
    """Bytes that a tiled product takes beside its result (:mod:`modulora_core.tiles`).

    They are one dense tile, and input and result in the tile's dtype if it is wider. A kernel
    without tiles takes less. A plugin that rotates its input takes a copy more, which is small
    beside the activations.
    """
    if x.numel() == 0:
        return 0
    width = compute_dtype(x.dtype, device).itemsize
    start, stop = next(tile_ranges(shape[0], shape[1] * width, tile_bytes(device)))
    several = stop - start < shape[0]
    summed = max(width, 4) if several and transpose else width  # tiles of x Ŵ are summed in fp32
    results = x.numel() // x.shape[-1] * shape[1 if transpose else 0]
    casts = x.numel() * width if width > x.itemsize else 0
    casts += results * summed if summed > x.itemsize else 0
    return (stop - start) * shape[1] * width + casts
