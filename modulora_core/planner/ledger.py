"""Who holds how many bytes: the storages that torch's operations make, each under the name of what it is for.

It works on fake tensors (:mod:`torch._subclasses.fake_tensor`), which have shapes and no memory, as on real ones.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Bytes = Counter[str]
"""Bytes by item: ``{"activations": 1024, ...}``."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What happened between two marks.

    Attributes:
        name: what was done.
        before, after: bytes alive at its two ends.
        peak: bytes alive at the moment when most were.
    """

    name: str
    before: Bytes
    peak: Bytes
    after: Bytes


class Ledger(TorchDispatchMode):
    """Inside of this mode, follow the storages that torch's operations make, and cut the time into segments.

    Args:
        before: tensors whose storages exist already and don't count.

        small: the size up to which a storage counts for ``largest``.

    Attributes:
        segments: those that have ended.
        largest: bytes of the largest storage for activations, of those up to ``small``.
    """

    def __init__(self, before: Iterable[Tensor], small: int = 0) -> None:
        super().__init__()
        self._small, self.largest = small, 0
        self._items: dict[int, tuple[str, int]] = {
            t.untyped_storage()._cdata: ("", 0) for t in before
        }
        self._alive: Bytes = Counter()
        self._total = self._most = 0
        self._before: Bytes = Counter()
        self._peak: Bytes = Counter()
        self._item = "activations"
        self._name = ""
        self.segments: list[Segment] = []

    def begin(self, name: str, item: str = "activations") -> None:
        """End the segment that runs, if one does, and begin another; new storages are for ``item``."""
        self.end()
        self._name, self._item = name, item
        self._before, self._peak, self._most = self._alive.copy(), self._alive.copy(), self._total

    def end(self) -> None:
        if self._name:
            self.segments.append(Segment(self._name, self._before, self._peak, self._alive.copy()))
        self._name = ""

    @contextmanager
    def counted_as(self, item: str) -> Iterator[None]:
        """Inside, new storages are for ``item``."""
        outer, self._item = self._item, item
        try:
            yield
        finally:
            self._item = outer

    def call_it(self, tensor: Tensor, item: str) -> None:
        """From now on ``tensor``'s storage is for ``item``."""
        key = tensor.untyped_storage()._cdata
        if key in self._items and self._items[key][1]:
            old, nbytes = self._items[key]
            self._alive[old] -= nbytes
            self._alive[item] += nbytes
            self._items[key] = (item, nbytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # torch's signature
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._items:
            return
        self._items[key] = (self._item, nbytes)
        self._alive[self._item] += nbytes
        self._total += nbytes
        if self.largest < nbytes <= self._small and self._item == "activations":
            self.largest = nbytes
        if self._total > self._most:
            self._most, self._peak = self._total, self._alive.copy()
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        item, nbytes = self._items.pop(key)
        self._alive[item] -= nbytes
        self._total -= nbytes
