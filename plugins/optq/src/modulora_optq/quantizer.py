"""OPTQ behind the contract: packed tensors, and which code runs where.

Packed tensors; ``row_bytes`` and the arrangement of the bits are those of :mod:`modulora_optq.packing`::

    codes        uint8 [out, row_bytes(in, bits)]        columns in the stored order
    scales       fp16 [out, groups]                      groups of consecutive stored columns
    zeros        uint8 [out, row_bytes(groups, bits)]    unless symmetric: there every zero is 2^(bits − 1)
    permutation  int32 [in]                              if permuted: stored column k is column permutation[k]

Metadata: ``bits``, ``group_size``, ``symmetric``, ``permuted``.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from modulora_core import kernels
from modulora_core.errors import CheckpointError, OptionError
from modulora_core.spec import (
    Calibration,
    PackedLayout,
    PackedWeight,
    Quantizer,
    TensorLayout,
    check_rows,
)
from modulora_core.tiles import tiled_matmul
from modulora_optq import SPEC, packing, solver
from modulora_optq.options import Options
from modulora_optq.reference import Solution

FEW_ROWS = 64
"""Up to so many rows of x the fused kernel is faster than a product over decoded tiles (README, Speed)."""


class OPTQ(Quantizer):
    """OPTQ, also known as GPTQ (Frantar et al. 2022, arXiv 2210.17323)."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``, so that its product with the inputs that calibration saw changes little.

        Raises:
            OptionError: there is no calibration.
            ShapeError: its H isn't ``[in, in]``.
            WeightError: NaN or Inf in the weight or in H, or an H that can't be a second moment.
        """
        if calibration is None:
            raise OptionError(
                f"optq: expected a calibration, got none for a weight of shape {list(weight.shape)}; it needs "
                "the second moment of the layer's inputs: give text to calibrate with"
            )
        options: Options = self.options
        return from_solution(solver.solve(weight, calibration.hessian, options), options)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        options: Options = self.options
        metadata = _metadata(options, options.permutes(shape[1]))
        return PackedLayout(SPEC.name, self.format, shape, _tensors(shape, **metadata), metadata)

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        check_rows(packed, rows)
        return _tile(packed, rows, dtype, _order(packed))

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """The product with Ŵ as it is stored: where columns are permuted, x is, or the result when ``transpose``."""
        order = _order(packed)
        if transpose:
            y = _stored_matmul(x, packed, transpose)
            return y if order is None else y.index_select(-1, order.inverse)
        if order is not None and x.dim() and x.shape[-1] == packed.shape[1]:
            x = x.detach().index_select(-1, order.columns)
        return _stored_matmul(x, packed, transpose)


def from_solution(solution: Solution, options: Options) -> PackedWeight:
    """Pack what the solver found, or what a file of another format holds.

    Args:
        solution: the weight. Whether it has a permutation decides whether the packed one has.
        options: ``bits``, ``group_size`` and ``symmetric`` are read.

    Raises:
        CheckpointError: codes or zeros that ``options`` can't hold, or tensors of other shapes or dtypes.
    """
    tensors = {"codes": _packed("codes", solution.codes, options), "scales": solution.scales}
    if not options.symmetric:
        tensors["zeros"] = _packed("zeros", solution.zeros, options)
    elif not bool((solution.zeros == middle(options.bits)).all()):
        raise CheckpointError(f"optq: expected zeros of {middle(options.bits)} in a symmetric weight of {options.bits} bits, "
                              "got others; pack it as asymmetric")  # fmt: skip
    if solution.permutation is not None:
        tensors["permutation"] = solution.permutation
    out_features, in_features = solution.codes.shape
    metadata = _metadata(options, solution.permutation is not None)
    packed = PackedWeight(SPEC.name, OPTQ.format, (out_features, in_features), tensors, metadata)
    kernels.check_tensors(packed, _tensors)
    _order(packed)
    return packed


def codes_of(packed: PackedWeight) -> Solution:
    """The inverse of :func:`from_solution`.

    Raises:
        CheckpointError: the tensors aren't what the metadata says.
    """
    kernels.check_tensors(packed, _tensors)
    order = _order(packed)
    return _solution(packed, (0, packed.shape[0]), None if order is None else order.columns)


def middle(bits: int) -> int:
    """The zero of a symmetric weight."""
    return int(2 ** (bits - 1))


def _packed(what: str, codes: Tensor, options: Options) -> Tensor:
    if codes.dtype is not torch.uint8 or (codes.numel() and int(codes.max()) > options.levels):
        raise CheckpointError(f"optq: expected {what} of {options.bits} bits, uint8 from 0 to {options.levels}, got "
                              f"{codes.dtype} to {codes.max().item() if codes.numel() else 0}")  # fmt: skip
    return packing.pack(codes, options.bits)


def _metadata(options: Options, permuted: bool) -> dict[str, Any]:
    return options.model_dump(include={"bits", "group_size", "symmetric"}) | {"permuted": permuted}


def _options(packed: PackedWeight) -> Options:
    """What of the options the metadata has."""
    return Options.model_validate(
        {name: value for name, value in packed.metadata.items() if name != "permuted"}
    )


@cache
def _tensors(
    shape: tuple[int, int], bits: int, group_size: int, symmetric: bool, permuted: bool
) -> dict[str, TensorLayout]:
    """What a weight of this shape is packed into. Raises ValueError for metadata that can't be."""
    options = Options.model_validate(
        {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    )
    if not isinstance(permuted, bool):
        raise TypeError(f"permuted: expected true or false, got {permuted!r}")
    out_features, in_features = shape
    groups = options.groups(in_features)
    tensors = {
        "codes": TensorLayout(
            "uint8", (out_features, packing.row_bytes(in_features, options.bits))
        ),
        "scales": TensorLayout("float16", (out_features, groups)),
    }
    if not options.symmetric:
        tensors["zeros"] = TensorLayout(
            "uint8", (out_features, packing.row_bytes(groups, options.bits))
        )
    if permuted:
        tensors["permutation"] = TensorLayout("int32", (in_features,))
    return tensors


class _Order(NamedTuple):
    """Stored column k is column ``columns[k]``, and column j is stored as ``inverse[j]``: both int32 ``[in]``."""

    columns: Tensor
    inverse: Tensor


def _order(packed: PackedWeight) -> _Order | None:
    """The order of the stored columns, None where it is the weight's own.

    Raises:
        CheckpointError: the tensor isn't a permutation, as in a checkpoint that was edited.
    """
    columns = packed.tensors.get("permutation")
    if columns is None or not packed.metadata.get("permuted"):
        return None
    kernels.check_tensors(packed, _tensors)
    if columns.is_inference():  # without a count of changes
        return _Order(columns, _inverse(packed, columns))
    memory = columns.data_ptr(), columns._version
    known = _INVERSES.get(columns)
    if known is None or known[0] != memory:
        known = _INVERSES[columns] = memory, _inverse(packed, columns)
    return _Order(columns, known[1])


_INVERSES: MutableMapping[Tensor, tuple[tuple[int, int], Tensor]] = WeakTensorKeyDictionary()
"""For each permutation in use: where its memory is and how often it was changed, and its inverse. On a GPU finding it waits for all that
runs there, which would be done for each product."""


def _inverse(packed: PackedWeight, columns: Tensor) -> Tensor:
    """The inverse of a permutation, which is checked: a kernel would read out of bounds."""
    n = len(columns)
    inside = columns.clamp(0, n - 1)
    stored = torch.arange(n, dtype=columns.dtype, device=columns.device)
    inverse = torch.full_like(columns, -1).scatter_(0, inside.long(), stored)
    if not torch.equal(inside, columns) or bool((inverse < 0).any()):
        raise CheckpointError(
            f"{packed.quantizer} weight of shape {list(packed.shape)}: expected a permutation of its {n} columns, "
            "got one that leaves some out; the checkpoint was changed, quantize again"
        )
    return inverse


def _kernels(device: torch.device) -> Any:
    """The compiled kernels; None where they can't run, and then plain torch does."""
    return kernels.load("modulora_optq.cpu", device)


def _gpu(device: torch.device) -> Any:
    """The Triton kernels; None where they can't run."""
    return kernels.load_triton("modulora_optq.gpu", device)


def _solution(packed: PackedWeight, rows: tuple[int, int], permutation: Tensor | None) -> Solution:
    """Rows ``[start, stop)``, unpacked."""
    start, stop = rows
    options, tensors = _options(packed), packed.tensors
    codes = packing.unpack(tensors["codes"][start:stop], options.bits, packed.shape[1])
    scales = tensors["scales"][start:stop]
    if options.symmetric:
        zeros = torch.full(
            scales.shape, middle(options.bits), dtype=torch.uint8, device=scales.device
        )
    else:
        zeros = packing.unpack(tensors["zeros"][start:stop], options.bits, scales.shape[1])
    return Solution(codes, scales, zeros, permutation)


def _operands(packed: PackedWeight) -> tuple[Any, ...]:
    """A weight as the kernels take it: codes, the bits of scales, zeros, bits, columns of a group and of a row."""
    kernels.check_tensors(packed, _tensors)
    options, tensors = _options(packed), packed.tensors
    codes = tensors["codes"].view(-1)
    zeros = codes[:0] if options.symmetric else tensors["zeros"].view(-1)
    return (
        codes,
        tensors["scales"],
        zeros,
        options.bits,
        options.group(packed.shape[1]),
        packed.shape[1],
    )


def _gpu_weight(gpu: Any, packed: PackedWeight) -> Any:
    """A weight as Triton's kernels take it."""
    options, tensors = _options(packed), packed.tensors
    zeros = None if options.symmetric else tensors["zeros"]
    group = options.group(packed.shape[1])
    return gpu.Weight(packed.shape, tensors["codes"], tensors["scales"], zeros, options.bits, group)


def _tile(
    packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype, order: _Order | None
) -> Tensor:
    """Rows ``[start, stop)``, their columns as they are stored, or put in the weight's own ``order``."""
    kernels.check_tensors(packed, _tensors)
    gpu = _gpu(packed.device)
    if gpu is not None:
        tile: Tensor = gpu.dequantize(_gpu_weight(gpu, packed), rows, dtype)
        return tile if order is None else tile.index_select(1, order.inverse)
    cpu = _kernels(packed.device)
    if cpu is None:
        solution = _solution(packed, rows, None if order is None else order.columns)
        return solution.dequantize(_options(packed)).to(dtype)

    weight = kernels.operands(packed, _operands)
    if order is None:
        stored: Tensor = cpu.rows.tile(weight, rows, packed.shape[1], dtype)
        return stored
    inverse = order.inverse

    def fill(start: int, _stop: int, out: Tensor) -> None:
        kernels.launch(
            cpu.dequantize_permuted, weight, torch.get_num_threads(), start, inverse, out
        )

    return kernels.filled_tile(fill, rows, packed.shape[1], dtype)


def _stored_matmul(x: Tensor, packed: PackedWeight, transpose: bool) -> Tensor:
    """``x Ŵᵀ``, or ``x Ŵ`` when ``transpose``, with the columns of Ŵ as they are stored."""
    gpu = _gpu(packed.device)
    if gpu is not None:
        kernels.check_tensors(packed, _tensors)
        given, wanted = packed.shape if transpose else reversed(packed.shape)
        rows = gpu.few_rows(x, given)
        if rows is not None:
            product: Tensor = gpu.matmul(rows, _gpu_weight(gpu, packed), transpose)
            return product.view(*x.shape[:-1], wanted)
    cpu = _kernels(packed.device)
    y: Tensor | None = None
    if cpu is not None:
        weight = partial(kernels.operands, packed, _operands)
        y = cpu.rows.product(x, packed.shape, weight, FEW_ROWS, transpose)
    if y is not None:
        return y
    return tiled_matmul(
        x,
        lambda start, stop, dtype: _tile(packed, (start, stop), dtype, None),
        packed.shape,
        transpose,
    )
