"""Give torch's tensors to kernels that numba compiled, and run these on torch's threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from modulora_core.errors import CheckpointError
from modulora_core.options import in_one_line
from modulora_core.packed import BITS_OF_DTYPE, PackedLayout, PackedWeight, TensorLayout
from modulora_core.tiles import tile_ranges
from modulora_kernels.process import prepared_numba

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDING_BYTES = 2**20
"""fp32 scratch for a tile of another dtype: a common L2 cache holds it."""

PARTIAL_SUMS = 4
"""Parts into which a kernel cuts a sum over the rows of Ŵ, each with sums of its own.

Fixed, so that the result does not depend on the number of threads.
"""

_HALVES = (torch.float16, torch.bfloat16)
_UNKNOWN = dict.fromkeys(_HALVES, "<i2") | {torch.float8_e4m3fn: "|u1", torch.float8_e8m0fnu: "|u1"}
"""For each dtype that numpy lacks, the integer dtype that holds its bits."""

_TYPES = {
    dtype: _UNKNOWN.get(dtype) or torch.empty(0, dtype=dtype, device="cpu").numpy().dtype.str
    for dtype in (getattr(torch, name) for name in BITS_OF_DTYPE)
}
"""numpy's names of the dtypes."""

_ONE_LAUNCH = threading.Lock()

_CHECKED: WeakKeyDictionary[PackedWeight, tuple[Any, ...]] = WeakKeyDictionary()
"""The check that each weight has passed, and the memory of its tensors then."""

_OPERANDS: WeakKeyDictionary[PackedWeight, dict[Any, tuple[list[int], tuple[Any, ...]]]] = (
    WeakKeyDictionary()
)
"""The operands of each weight by the function that made them, with the memory of its tensors."""


def check_tensors(
    packed: PackedWeight, expected: Callable[..., Mapping[str, TensorLayout]]
) -> None:
    """Refuse tensors that do not match the metadata, as in an edited checkpoint.

    Kernels do not check bounds, and only the plugin knows how many scales a block size means. A
    weight that passed is checked again when one of its tensors was given other memory.

    Args:
        packed: a weight that a kernel will read.
        expected: ``expected(shape, **metadata)`` gives the tensors by name. It raises TypeError or
            ValueError, such as pydantic's, for metadata that the plugin does not write.

    Raises:
        CheckpointError: as :func:`check_layout` does.
    """
    found = (expected, *map(Tensor.data_ptr, packed.tensors.values()))
    if _CHECKED.get(packed) != found:  # decoding calls this for each layer and token
        check_layout(packed, expected)
        _CHECKED[packed] = found


def check_layout(
    packed: PackedWeight | PackedLayout, expected: Callable[..., Mapping[str, TensorLayout]]
) -> None:
    """Refuse a layout that differs from the layout that its metadata implies.

    Raises:
        CheckpointError: the metadata is malformed, or a tensor is missing, too many, or of another
            dtype or shape.
    """
    layout = packed.layout if isinstance(packed, PackedWeight) else packed
    subject = f"{layout.quantizer} weight of shape {list(layout.shape)} and {dict(layout.metadata)}"
    try:
        wanted = expected(layout.shape, **layout.metadata)
    except (TypeError, ValueError) as error:
        found = in_one_line(error)
        if isinstance(error, TypeError):  # other names, or other types
            found = f"expected values of {', '.join([*signature(expected).parameters][1:])}"
        raise CheckpointError(
            f"metadata of a {layout.quantizer} weight: {found}, got {dict(layout.metadata)!s:.200}"
        ) from None
    for name in {**wanted, **layout.tensors}:
        tensor, got = (tensors.get(name, "none") for tensors in (wanted, layout.tensors))
        if tensor != got:
            raise CheckpointError(f"{subject}: expected {name} as {tensor}, got {got}")


def operands(
    packed: PackedWeight, make: Callable[[PackedWeight], tuple[Any, ...]]
) -> tuple[Any, ...]:
    """The arrays and numbers that a CPU kernel reads of a packed weight, cached beside it.

    They are made again after a tensor has moved to other memory. A tensor that is not aligned to
    its dtype, as in a mapped file, is copied each time: a cached copy would take memory.

    Args:
        packed: on the CPU.
        make: ``make(packed)`` gives views of the tensors, and numbers. A copy would not follow a
            tensor that is changed in place.
    """
    memory = [*map(Tensor.data_ptr, packed.tensors.values())]
    made = _OPERANDS.setdefault(packed, {})
    known, arrays = made.get(make, (None, ()))
    if known != memory:
        arrays = array_of(make(packed))
        if all(t.data_ptr() % t.element_size() == 0 for t in packed.tensors.values()):
            made[make] = memory, arrays
    return arrays


def launch(kernel: Callable[..., None], *arguments: Any) -> None:
    """Run ``kernel`` on torch's number of threads, on the memory of contiguous CPU tensors.

    Tensors, alone or in a tuple, become arrays. fp16 and bf16 become the int16 of their bits,
    because numba computes with neither. An unaligned tensor is copied, so a kernel may write only
    to memory from torch's allocator.

    One kernel runs at a time: numba's thread layer "workqueue" ends the process when two threads
    enter it.
    """
    run(kernel, *[array_of(a) for a in arguments])


def run(kernel: Callable[..., None], *arrays: Any) -> None:
    """:func:`launch` of arrays and numbers."""
    numba = prepared_numba()
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    with _ONE_LAUNCH:
        before = numba.get_num_threads()
        if before == threads:  # reading the number is cheaper than setting it
            kernel(*arrays)
            return
        numba.set_num_threads(threads)
        try:
            kernel(*arrays)
        finally:
            numba.set_num_threads(before)


def array_of(argument: Any) -> Any:
    """A numpy array on a tensor's memory; a copy of an unaligned tensor."""
    if isinstance(argument, Tensor):
        if not argument.numel():  # it has no address, which numpy 1 doesn't take
            return np.empty(argument.shape, _TYPES[argument.dtype])
        array: NDArray[Any] = np.asarray(_Memory(argument))
        return array if array.flags.aligned else array.copy()
    return tuple([array_of(a) for a in argument]) if isinstance(argument, tuple) else argument


class _Memory:
    """A CPU tensor for numpy. ``tensor.numpy()`` would forbid FSDP to free the tensor's memory."""

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # numpy's array holds this object
        self.__array_interface__ = {
            "version": 3,
            "shape": tensor.shape,
            "strides": None if tensor.is_contiguous() else _strides(tensor),
            "typestr": _TYPES[tensor.dtype],
            "data": (tensor.data_ptr(), False),
        }


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple([step * tensor.element_size() for step in tensor.stride()])


def filled_tile(
    fill: Callable[[int, int, Tensor], None],
    rows: tuple[int, int],
    in_features: int,
    dtype: torch.dtype,
    written: tuple[torch.dtype, ...] = (torch.float32,),
) -> Tensor:
    """A CPU tile in ``dtype``, filled by a kernel that writes fp32.

    Args:
        fill: ``fill(start, stop, out)`` writes rows ``[start, stop)`` to ``out``, contiguous
            ``[stop - start, in]``.
        rows: the range of rows.
        in_features: the length of a row.
        dtype: any float dtype; rounded from :data:`ROUNDING_BYTES` of fp32 if not in ``written``.
        written: the dtypes that ``fill`` writes, fp32 among them.
    """
    start, stop = rows
    tile = torch.empty(stop - start, in_features, dtype=dtype, device="cpu")
    if tile.numel() == 0:
        return tile
    if dtype in written:
        fill(start, stop, tile)
        return tile
    scratch = torch.empty(0, dtype=torch.float32, device="cpu")
    for a, b in tile_ranges(stop - start, 4 * in_features, ROUNDING_BYTES):
        scratch = scratch[: b - a] if scratch.numel() else scratch.new_empty(b - a, in_features)
        fill(start + a, start + b, scratch)
        tile[a:b].copy_(scratch)
    return tile


def fp32_input(x: Tensor, features: int) -> Tensor | None:
    """``x`` as a kernel reads it, contiguous fp32 ``[..., features]``.

    None for other devices, for fp64, which kernels do not sum in, for no rows, and for another last
    dimension.
    """
    if not x.is_cpu or x.dtype not in (torch.float32, *_HALVES) or x.shape[-1:] != (features,):
        return None
    return x.detach().to(torch.float32).contiguous() if x.numel() else None


def product_of_one(
    kernel: Callable[..., None], weight: tuple[Any, ...], x: Tensor, features: int
) -> Tensor:
    """The product of one row with a packed weight, fp32 ``[..., features]``.

    Args:
        kernel: ``kernel(weight, threads, x, y)`` writes ``y``, fp32 ``[1, features]``, from ``x``,
            fp32 ``[1, given]``.
        weight: all arrays, or all tensors, and numbers.
        x: one row, contiguous fp32 ``[..., given]``.
        features: of the result.
    """
    row: NDArray[Any] = x.numpy()
    y = np.empty((*row.shape[:-1], features), np.float32)
    arrays = weight if isinstance(weight[0], np.ndarray) else array_of(weight)
    run(kernel, arrays, torch.get_num_threads(), row.reshape(1, row.size), y.reshape(1, features))
    return torch.from_numpy(y)


def like_input(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in ``x``'s dtype."""
    return y if y.dtype is x.dtype else y.to(x.dtype)
