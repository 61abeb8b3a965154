"""What CPU kernels written with numba need, once for every plugin.

A plugin keeps its kernels in a module that imports numba at the top, decorates them with :func:`jit`, and
reaches them through :func:`load`, which imports numba, and :func:`launch`::

    cpu = kernels.load("mine.cpu", codes.device)     # None without numba, and off the CPU: run plain torch
    if cpu is not None:
        kernels.launch(cpu.decode, codes, scales, out)

Those for GPUs are written with Triton, in a module that :func:`load_triton` gives: see :mod:`modulora_core.kernels.triton.blocks`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from modulora_core.errors import CheckpointError
from modulora_core.kernels.cpu.bf16_choice import dtype_of_few
from modulora_core.kernels.cpu.process import prepared_numba
from modulora_core.packed import PackedWeight, TensorLayout
from modulora_core.tiles import tile_ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDING_BYTES = 2**20
"""fp32 scratch for a tile of another dtype. A common L2 cache holds it, and rounding reads from there."""

PARTIAL_SUMS = 8
"""Into how many parts a plugin may cut the rows of Ŵ where a product sums over them, each with a sum of its own.

Fixed, so that the order of a sum, and with it the result, is the same for any number of threads. More threads
than this hardly read faster from one memory."""

_HALVES = (torch.float16, torch.bfloat16)
_ONE_LAUNCH = threading.Lock()


@cache
def _numba() -> ModuleType | None:
    try:
        return importlib.import_module("numba")
    except ImportError as error:
        warnings.warn(
            f"numba, which compiles CPU kernels of quantizers and adapters, can't be imported ({error}); plain torch "
            "runs instead: the same values, tens of times slower. To mend it: pip install numba",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


@cache  # a layer asks for its module each token, as it does below
def load(module: str, device: torch.device) -> ModuleType | None:
    """A plugin's module of kernels; None where they can't run: off the CPU, and without numba.

    That numba is missing is said in one warning a process.
    """
    return (
        importlib.import_module(module) if device.type == "cpu" and _numba() is not None else None
    )


@cache
def load_triton(module: str, device: torch.device) -> ModuleType | None:
    """A plugin's module of Triton kernels; None where they don't run.

    They run on CUDA devices (ROCm's are called so too) where triton is installed; that it is missing is said in one warning a process. With
    ``TRITON_INTERPRET=1`` in the environment, which Triton reads once, they run on CPU tensors: that is how they are tested.
    """
    if device.type == "cuda" or (device.type == "cpu" and triton_is_interpreted()):
        return None if _triton() is None else importlib.import_module(module)
    return None


@cache
def triton_is_interpreted() -> bool:
    """Whether the environment asks for Triton's interpreter. Doesn't import triton; these are the words that it takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _triton() -> ModuleType | None:
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        warnings.warn(
            f"triton, which compiles the GPU kernels of quantizers, can't be imported ({error}); plain torch runs instead: the same "
            "values, slower and with more memory. GPU builds of torch bring it. To mend it: reinstall torch, or pip install triton",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def jit(
    *, parallel: bool = False, fastmath: tuple[str, ...] = (), borrows: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` for a kernel: compiled once, kept on disk, run without the GIL.

    Args:
        parallel: whether ``prange`` runs on threads.
        fastmath: LLVM's flags, by default none: kernels that decode must give the reference's bits. Only a
            sum, whose order nobody promises, may use ``"reassoc"`` and ``"contract"``.
        borrows: that it makes no array, and returns none but as it was given, else numba refuses to compile it; views are fine. Then
            no references are counted at its calls, by atomic additions to what all threads share: up to a tenth of a decoder's time.

    The compiled code is kept beside the module, else in the user's cache folder of numba. It is made again where neither can be written,
    and after a change of a module beside the kernel's, or of the core's kernels: numba itself looks at the kernel's own file alone.
    """
    import numba

    def decorate(function: Callable[..., Any]) -> Any:
        folder = Path(function.__code__.co_filename).parent
        function.__qualname__ += f"_{_sources(folder)}"  # numba names what it keeps so
        options: dict[str, Any] = {"nogil": True, "parallel": parallel, "_nrt": not borrows}
        options["fastmath"] = set(fastmath)
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder to write to
            return numba.njit(**options)(function)

    return decorate


@cache
def _sources(folder: Path) -> str:
    """What the modules of a folder and of this one say, as a short hash."""
    files = sorted(folder.glob("*.py")) + sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def check_tensors(
    packed: PackedWeight, expected: Callable[..., Mapping[str, TensorLayout]]
) -> None:
    """Refuse tensors that aren't what the metadata says, as in a checkpoint that was edited.

    Kernels have no bounds checks: they would read beyond the end. Loading compares a checkpoint's tensors with
    its own record, but only the plugin knows how many scales a block size means. This takes about a microsecond
    where ``expected`` is cached.

    Args:
        packed: what a kernel is about to read.
        expected: ``expected(shape, **metadata)`` gives the tensors by name; it raises TypeError or ValueError for
            metadata that the plugin wouldn't write (pydantic's errors are of that kind).

    Raises:
        CheckpointError: the metadata is malformed, or a tensor is missing or of another dtype or shape.
    """
    try:
        layouts = expected(packed.shape, **packed.metadata)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"metadata of a {packed.quantizer} weight: got {dict(packed.metadata)}: {error}"
        ) from None
    for name, layout in layouts.items():
        tensor = packed.tensors.get(name)
        if (
            tensor is None
            or tensor.shape != layout.shape
            or tensor.dtype is not getattr(torch, layout.dtype)
        ):
            raise CheckpointError(
                f"{packed.quantizer} weight of shape {list(packed.shape)} and {dict(packed.metadata)}: expected "
                f"{name} as {layout.dtype} {list(layout.shape)}, "
                f"got {'none' if tensor is None else f'{tensor.dtype} {list(tensor.shape)}'}"
            )


def operands(
    packed: PackedWeight, make: Callable[[PackedWeight], tuple[Any, ...]]
) -> tuple[Any, ...]:
    """What kernels read of a packed weight: ``make(packed)``, with arrays for tensors.

    It is kept beside ``packed``, since decoding needs it for each layer and token, and made again when one of the tensors was given
    other memory. Only where a tensor lies askew in a mapped file it is made each time: the aligned copy would take memory.

    Args:
        packed: on the CPU.
        make: checks the tensors (:func:`check_tensors`); gives numbers, and views of the tensors. No copies: they would be kept, and
            wouldn't follow when a tensor is changed in place.
    """
    memory = [*map(Tensor.data_ptr, packed.tensors.values())]
    known = packed.kept.get(make)
    if known is not None and known[0] == memory:
        made: tuple[Any, ...] = known[1]
        return made
    tensors = make(packed)
    made = tuple(_array(operand) for operand in tensors)
    if all(t.data_ptr() % t.element_size() == 0 for t in tensors if isinstance(t, Tensor)):
        packed.kept[make] = memory, made
    return made


def launch(kernel: Callable[..., None], *arguments: Any) -> None:
    """Run ``kernel`` on torch's number of threads; CPU tensors, also those in a tuple, are passed as arrays on the same memory, bf16 and
    fp16 as the int16 of their bits: numpy has no bf16, and numba can't compute with fp16 (:mod:`modulora_core.kernels.cpu.conversions` can).

    Tensors must be contiguous. One that isn't aligned to its dtype, as in a mapped file, is passed as a copy: what a
    kernel writes to must come from torch's allocator.

    One kernel runs at a time: numba's layer "workqueue", the one that is always there, ends the process when
    it is entered from two threads, and two kernels at once have no more cores than one.
    """
    run(kernel, *[_array(a) for a in arguments])


def run(kernel: Callable[..., None], *arrays: Any) -> None:
    """What :func:`launch` does, where arguments are arrays, and numbers, already."""
    numba = prepared_numba()
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    with _ONE_LAUNCH:
        before = numba.get_num_threads()
        if before == threads:  # as ever but once: to set the number takes longer than to ask for it
            kernel(*arrays)
        else:
            numba.set_num_threads(threads)
            try:
                kernel(*arrays)
            finally:
                numba.set_num_threads(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside of the block.

    A quantizer factorizes in it: LAPACK's last bits, and so perhaps some codes, depend on the number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _array(argument: Any) -> Any:
    """A numpy array on a tensor's memory. What lies askew in a mapped file is copied: numba would compile again."""
    if isinstance(argument, Tensor):
        tensor = argument.detach() if argument.requires_grad else argument
        array = (tensor.view(torch.int16) if tensor.dtype in _HALVES else tensor).numpy()
        return array if array.flags.aligned else array.copy()
    if isinstance(argument, tuple):
        for a in argument:  # what operands() keeps has arrays already
            if isinstance(a, Tensor):
                return tuple([_array(a) for a in argument])
    return argument


def filled_tile(
    fill: Callable[[int, int, Tensor], None],
    rows: tuple[int, int],
    in_features: int,
    dtype: torch.dtype,
    written: tuple[torch.dtype, ...] = (torch.float32,),
) -> Tensor:
    """A CPU tile in ``dtype`` from a kernel that writes fp32.

    Args:
        fill: ``fill(start, stop, out)`` writes rows ``[start, stop)`` to ``out``, ``[stop - start, in]`` and contiguous.
        rows: the range to fill.
        in_features: the length of a row.
        dtype: any float dtype. Others than those in ``written`` are rounded once, from an fp32 scratch of :data:`ROUNDING_BYTES`.
        written: the dtypes of ``out`` that ``fill`` knows, with fp32 among them.
    """
    start, stop = rows
    tile = torch.empty(stop - start, in_features, dtype=dtype)
    if tile.numel() == 0:
        return tile
    if dtype in written:
        fill(start, stop, tile)
        return tile
    scratch = torch.empty(0)
    for a, b in tile_ranges(stop - start, 4 * in_features, ROUNDING_BYTES):
        scratch = torch.empty(b - a, in_features) if scratch.numel() == 0 else scratch[: b - a]
        fill(start + a, start + b, scratch)
        tile[a:b].copy_(scratch)
    return tile


def few_rows(
    x: Tensor, features: int, most: int, dtype: torch.dtype | None = None, by_amx: bool = False
) -> Tensor | None:
    """``x`` as a few-row kernel takes it, contiguous ``[..., features]``; None where tiles are the way.

    It is fp32, but bf16 where inputs are that and the processor is faster so (:mod:`modulora_core.kernels.cpu.bf16_choice`).

    Tiles are for more than ``most`` rows, or fewer of bf16, where a matrix product over them costs less; for fp64, because the kernels sum
    in fp32; for devices other than the CPU; and for a wrong last dimension, so that the tiled product says what is wrong.

    Args:
        dtype: of the inputs, where ``x`` was made of them in another one.
        by_amx: whether the kernel multiplies bf16 by AMX.
    """
    size = x.numel()
    if (
        not x.is_cpu
        or x.dtype not in (torch.float32, *_HALVES)
        or x.dim() == 0
        or x.shape[-1] != features
    ):
        return None
    if not 0 < size <= most * features:
        return None
    is_bf16 = (x.dtype if dtype is None else dtype) is torch.bfloat16
    wanted = dtype_of_few(size // features, by_amx) if is_bf16 else torch.float32
    if wanted is None:
        return None
    rows = x.detach() if x.requires_grad else x
    return (rows if rows.dtype is wanted else rows.to(wanted)).contiguous()


def product_of_one(
    kernel: Callable[..., None], weight: tuple[Any, ...], x: Tensor, features: int
) -> Tensor:
    """The product of a single row with a packed weight, fp32 ``[..., features]``: decoding asks for it once a layer and token.

    Args:
        kernel: ``kernel(weight, threads, x, y)`` writes all of ``y``, fp32 ``[1, features]``, of ``x``, fp32 ``[1, given]``.
        weight: what it reads, all arrays or all tensors, and numbers; one of these is first.
        x: fp32 ``[..., given]`` of one row, as :func:`few_rows` gives it.
    """
    row: NDArray[Any] = x.numpy()
    y = np.empty((*row.shape[:-1], features), np.float32)
    arrays = weight if isinstance(weight[0], np.ndarray) else _array(weight)
    run(kernel, arrays, torch.get_num_threads(), row.reshape(1, row.size), y.reshape(1, features))
    return torch.from_numpy(y)


def rows_of(x: Tensor | NDArray[Any]) -> NDArray[Any]:
    """``x``, contiguous ``[..., features]`` on the CPU, as the array ``[n, features]`` that a few-row kernel reads or writes;
    bf16 as the int16 of its bits.

    Of arrays: for torch the same takes longer than a kernel's launch.
    """
    array: NDArray[Any] = _array(x)
    columns = array.shape[-1]
    return array.reshape(array.size // columns if columns else math.prod(array.shape[:-1]), columns)


def room_for(x: Tensor, features: int) -> NDArray[np.float32]:
    """Uninitialised fp32 ``[..., features]``, with the leading dimensions of ``x``, of which ``torch.from_numpy`` makes a tensor."""
    return np.empty((*x.shape[:-1], features), np.float32)


def like_input(y: Tensor, x: Tensor) -> Tensor:
    """The product of :func:`few_rows` of ``x`` in ``x``'s dtype."""
    # a call of torch that does nothing takes half a microsecond too
    return y if y.dtype is x.dtype else y.to(x.dtype)
