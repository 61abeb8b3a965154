"""A device "cuda" that needs no GPU: its tensors hold values in the CPU's memory.

As on a GPU, an operation on tensors of two devices is an error, except for numbers. Memory has no
address to give to compiled code. Plain torch gives the CPU's values on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

CUDA = torch.device("cuda", 0)

UNDERNEATH = "meta"
"""The device that torch's C++ sees: without a GPU it refuses even to index a CUDA tensor."""


_HOME: ContextVar[str] = ContextVar("device of values", default="cpu")
"""The device that holds the values of the fake one: the CPU, or meta, without values."""

NO_ADDRESS = "data_ptr: expected no compiled code on a fake CUDA device, which has no addresses"


class OnCuda(Tensor):
    """A tensor that says it is on CUDA, and holds its values in ``on_cpu``, on the CPU."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnCuda:
        made: OnCuda = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(UNDERNEATH),
        )
        made.on_cpu = values
        return made

    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_meta = property(lambda _: False)

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        raise RuntimeError(NO_ADDRESS)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


PLAIN = torch.Generator


class Generator(PLAIN):
    """A generator of random numbers that may say it is on CUDA."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.named = torch.device(device)
        return made

    named: torch.device
    device = property(lambda self: self.named)


FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)
"""Functions that copy no values to the device underneath."""


class _Names(TorchFunctionMode):
    """Replaces the device in the arguments of each function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # a name
            return func(*args, **kwargs or {})
        args, kwargs = tree_map(_underneath, (args, kwargs or {}))
        _check_generators(func.__name__, args, kwargs)
        if func in FROM_VALUES and _is_underneath(kwargs.get("device")):
            return OnCuda(func(*args, **kwargs | {"device": "cpu"}).to(_HOME.get()))
        if func is Tensor.new_tensor and isinstance(args[0], OnCuda):
            return OnCuda(args[0].on_cpu.new_tensor(*args[1:], **kwargs))
        if func is Tensor.cuda:  # torch's own looks for a GPU
            return args[0].to(UNDERNEATH)
        return func(*args, **kwargs)


def _underneath(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device(UNDERNEATH) if value.type == "cuda" else value
    return UNDERNEATH if isinstance(value, str) and value in ("cuda", "cuda:0") else value


def _check_generators(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    given = list(tree_iter((args, kwargs)))
    on_cuda = _is_underneath(kwargs.get("device")) or any(isinstance(t, OnCuda) for t in given)
    of = "cuda" if on_cuda else "cpu"
    others = [g for g in given if isinstance(g, PLAIN) and g.device.type != of]
    if others:
        raise RuntimeError(f"{name}: expected a generator on {of}, got it on {others[0].device}")


def _is_underneath(device: Any) -> bool:
    return device is not None and torch.device(device).type == UNDERNEATH


class _Device(TorchDispatchMode):
    """Runs each operation on the values, and checks that its tensors are on one device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


COPIES = ("aten::_to_copy", "aten::copy_")
"""Operations that take tensors of two devices."""

INDEXED = ("aten::index.", "aten::index_put")
"""Operations on a tensor whose indices may be on the CPU: torch copies them."""


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, tensors = func.name(), [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    asked = kwargs.get("device")
    on_cuda = any(isinstance(t, OnCuda) for t in tensors)
    if on_cuda and not name.startswith(COPIES):
        checked = [args[0], *args[2:]] if name.startswith(INDEXED) else tensors
        mixed = [t for t in checked if _is_on_cpu(t)]
        if mixed:
            raise RuntimeError(
                f"{name}: expected all tensors on one device, got cuda and cpu "
                f"({list(mixed[0].shape)}); move tables to packed.device"
            )
    if asked is not None:
        on_cuda = _is_underneath(asked)
        kwargs = kwargs | {"device": torch.device(_HOME.get() if on_cuda else "cpu")}
    if name.startswith("aten::copy_"):
        on_cuda = isinstance(args[0], OnCuda)
    args, kwargs = tree_map_only(OnCuda, lambda t: t.on_cpu, (args, kwargs))
    if name == "aten::mm.dtype":  # which no CPU has
        func, args = torch.mm, [t.to(args[2]) for t in args[:2]]
    with _disable_current_modes():
        result = func(*args, **kwargs)
    if not on_cuda:
        return result
    kept = {id(t.on_cpu): t for t in tensors if isinstance(t, OnCuda)}  # of an in-place operation
    return tree_map_only(Tensor, lambda t: kept[id(t)] if id(t) in kept else OnCuda(t), result)


def _is_on_cpu(value: Any) -> bool:
    """Whether it is a tensor on the CPU, and no number: torch takes numbers of the CPU."""
    return isinstance(value, Tensor) and not isinstance(value, OnCuda) and value.dim() > 0


@contextmanager
def fake_cuda(values: bool = True, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within this block ``"cuda"`` is the fake device.

    Args:
        values: without, tensors have no memory, and operations only give shapes and dtypes.
        capability: the compute capability that the device says it has.
    """
    token = _HOME.set("cpu" if values else "meta")
    try:
        capable = mock.patch.object(torch.cuda, "get_device_capability", return_value=capability)
        with mock.patch.object(torch, "Generator", Generator), capable, _Names(), _Device():
            yield
    finally:
        _HOME.reset(token)


def moved(tensor: Tensor) -> Tensor:
    """A copy on the fake device."""
    return OnCuda(tensor.detach().clone().to(_HOME.get()))
