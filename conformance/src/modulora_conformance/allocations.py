"""Count the bytes that torch's operations allocate, the packed product included."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modulora_core.autograd import compute_product


class Allocations(TorchDispatchMode):
    """Count the bytes of the storages that torch's operations allocate within this mode.

    A storage counts whole as long as a view of it is alive. Memory that compiled kernels allocate
    for themselves is not counted.

    Args:
        before: tensors whose storages exist already and do not count.

    Attributes:
        alive: bytes of the new storages that are alive.
        peak: the most so far.
        largest: the bytes of the largest new storage.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.modulora.product.default:
            with self:  # torch hides the allocations inside a custom operation
                result = compute_product(*args)
        else:
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
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, nbytes)
        weakref.finalize(storage, self._release, address, nbytes)

    def _release(self, address: int, nbytes: int) -> None:
        self._known.discard(address)
        self.alive -= nbytes
