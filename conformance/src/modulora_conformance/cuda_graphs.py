"""Refuses what a CUDA graph can't record: values that are read on the host, and copies from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from modulora_conformance.fake_device import COPIES, FROM_VALUES, UNDERNEATH, OnCuda

READS = (
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero",
    "aten::masked_select", "aten::unique", "aten::_unique", "aten::bincount",
    "aten::repeat_interleave.Tensor",
)  # fmt: skip
"""Operations that wait for values: they return one, or a shape that depends on them."""

INDEXED = ("aten::index.", "aten::index_put")


class _Functions(TorchFunctionMode):
    """Refuses tensors that are made on the device from numbers of Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        new = func is Tensor.new_tensor and isinstance(args[0], OnCuda)
        if new or (func in FROM_VALUES and _is_on_device(kwargs.get("device"))):
            _refuse(f"torch.{func.__name__}", "copies from the host")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Refuses reads of values, and copies between the host and the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        on_device = any(isinstance(t, OnCuda) for t in tree_iter((args, kwargs)))
        if on_device and name.startswith(READS):
            _refuse(name, "reads values")
        if on_device and name.startswith(INDEXED):
            _check_indices(name, args)
        if name.startswith(COPIES):
            _check_copy(name, args, kwargs)
        return func(*args, **kwargs)


def _check_indices(name: str, args: Any) -> None:
    for index in (t for t in args[1] if t is not None):
        if index.dtype == torch.bool:
            _refuse(name, "reads a mask")
        if not isinstance(index, OnCuda) and index.dim() > 0:
            _refuse(name, "copies indices from the host")


def _check_copy(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name.startswith("aten::copy_"):
        there, here = isinstance(args[0], OnCuda), isinstance(args[1], OnCuda) or args[1].dim() == 0
    else:
        here, device = isinstance(args[0], OnCuda), kwargs.get("device")
        there = here if device is None else _is_on_device(device)
    if there != here:
        _refuse(name, "copies between the host and the device")


def _is_on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", UNDERNEATH)


def _refuse(name: str, fault: str) -> None:
    raise AssertionError(
        f"{name}: expected operations that a graph can record, got one that {fault}"
    )


@contextmanager
def capturing() -> Iterator[None]:
    """Within this block, and within ``fake_cuda()``, such an operation is an AssertionError."""
    with _Functions(), _Operations():
        yield
