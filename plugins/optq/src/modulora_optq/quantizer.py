"""OPTQ behind the contract: packed tensors and tiles. The method is in reference.py.

Packed tensors; :mod:`modulora_optq.packing` has ``row_bytes`` and the arrangement of the bits::

    codes        uint8 [out, row_bytes(in, bits)]       columns in the stored order
    scales       fp16 [out, groups]                     of groups of consecutive stored columns
    zeros        uint8 [out, row_bytes(groups, bits)]   unless symmetric: each is 2^(bits − 1)
    permutation  int32 [in]                             if permuted: the column of each stored one

Metadata: ``bits``, ``group_size``, ``symmetric``, ``permuted``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import ClassVar
from weakref import WeakKeyDictionary

import modulora_kernels as kernels
import torch
from modulora_kernels import KernelQuantizer
from modulora_kernels.scalar_grid import Grid, ScalarGrid, with_tensors
from pydantic import BaseModel
from torch import Tensor

from modulora_core.errors import CheckpointError, OptionError, WeightError
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, TensorLayout
from modulora_optq import SPEC, packing, reference, solver
from modulora_optq.options import Options
from modulora_optq.reference import Solution


class OPTQ(KernelQuantizer, ScalarGrid):
    """OPTQ, also known as GPTQ (Frantar et al. 2022, arXiv 2210.17323)."""

    spec = SPEC
    format = 1
    Options: ClassVar[type[BaseModel]] = Options
    kernels = "modulora_optq.kernels"
    row_tensors = ("codes", "scales", "zeros")

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``, for inputs like those that calibration saw.

        Raises:
            OptionError: there is no calibration.
            ShapeError: its H isn't ``[in, in]``, or its H_O isn't ``[out, out]``.
            WeightError: NaN or Inf in the weight or in H, or H is no second moment. Or fp16 scales
                can't represent the weight's magnitude.
        """
        if calibration is None:
            raise OptionError(
                f"{SPEC.name}: expected a calibration, got none for a weight of shape "
                f"{list(weight.shape)}; it needs the second moment of the layer's inputs: give "
                "text to calibrate with"
            )
        with kernels.without_autocast(weight.device):
            solution = solver.solve(  # in fp32: of fp64, some ties would fall another way
                weight.float(), calibration.hessian, self.options, calibration.output_hessian
            )
        largest = float(weight.detach().abs().amax()) if weight.numel() else 0.0
        if largest and not reference.SMALLEST_WEIGHT <= largest <= reference.LARGEST_WEIGHT:
            raise WeightError(
                f"{SPEC.name}: expected a largest magnitude of 0, or of "
                f"{reference.SMALLEST_WEIGHT:.2g} to {reference.LARGEST_WEIGHT:g} for fp16 scales, "
                f"got {largest:.3g} in a weight of shape {list(weight.shape)}; choose another "
                "quantizer"
            )
        return from_solution(solution, self.options)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        options: Options = self.options
        metadata = options.metadata(options.permutes(shape[1]))
        tensors = self.tensors(shape, **metadata)
        return PackedLayout(SPEC.name, self.format, shape, tensors, metadata)

    @staticmethod
    @lru_cache(maxsize=256)  # a model has few shapes, lookups as many as batches have lengths
    def tensors(
        shape: tuple[int, int], bits: int, group_size: int, symmetric: bool, permuted: bool
    ) -> dict[str, TensorLayout]:
        options = Options.of(bits=bits, group_size=group_size, symmetric=symmetric)
        if not isinstance(permuted, bool):
            raise TypeError(f"permuted: expected true or false, got {permuted!r}")
        out_features, in_features = shape
        groups = options.groups(in_features)
        row, row_of_zeros = (packing.row_bytes(n, options.bits) for n in (in_features, groups))
        tensors = {
            "codes": TensorLayout("uint8", (out_features, row)),
            "scales": TensorLayout("float16", (out_features, groups)),
        }
        if not options.symmetric:
            tensors["zeros"] = TensorLayout("uint8", (out_features, row_of_zeros))
        if permuted:
            tensors["permutation"] = TensorLayout("int32", (in_features,))
        return tensors

    def reference_tile(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        stored = replace(to_solution(packed, *rows), permutation=None)
        return stored.dequantize(Options.of(**packed.metadata))

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        stored, places = super().dequantize_tile(packed, rows, dtype), _places(packed)
        return stored if places is None else stored.index_select(1, places)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """Multiply by Ŵ as it is stored: its permutation is applied to x, or to the result."""
        places = _places(packed)
        if places is not None and not transpose and x.shape[-1:] == packed.shape[1:]:
            x = x.detach().index_select(-1, packed.tensors["permutation"])
        y = super().matmul(x, packed, transpose)
        return y if places is None or not transpose else y.index_select(-1, places)

    def grid(self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int]) -> Grid:
        options, places = Options.of(**packed.metadata), _places(packed)
        column = torch.arange(*columns, device=packed.device)
        group = (column if places is None else places[column]) // options.group(packed.shape[1])
        scales = packed.tensors["scales"][slice(*rows)]
        zeros: Tensor | float = float(options.middle)
        if not options.symmetric:
            stored = packed.tensors["zeros"][slice(*rows)]
            zeros = packing.unpack(stored, options.bits, scales.shape[1])[:, group].float()
        levels = torch.arange(options.maxq + 1, dtype=torch.float32, device=packed.device)
        return Grid(levels, scales[:, group].float(), zeros)

    def codes(self, packed: PackedWeight) -> Tensor:
        stored = packing.unpack(packed.tensors["codes"], packed.metadata["bits"], packed.shape[1])
        places = _places(packed)
        return stored if places is None else stored[:, places]

    def with_codes(self, packed: PackedWeight, codes: Tensor) -> PackedWeight:
        if _places(packed) is not None:
            codes = codes[:, packed.tensors["permutation"]]
        return with_tensors(packed, codes=packing.pack(codes, packed.metadata["bits"]))


def from_solution(solution: Solution, options: Options) -> PackedWeight:
    """Pack a solution, whose zeros are all in the middle if the options say symmetric."""
    tensors = {"codes": packing.pack(solution.codes, options.bits), "scales": solution.scales}
    if not options.symmetric:
        tensors["zeros"] = packing.pack(solution.zeros, options.bits)
    if solution.permutation is not None:
        tensors["permutation"] = solution.permutation
    out_features, in_features = solution.codes.shape
    metadata = options.metadata("permutation" in tensors)
    return PackedWeight(SPEC.name, OPTQ.format, (out_features, in_features), tensors, metadata)


def to_solution(packed: PackedWeight, start: int = 0, stop: int | None = None) -> Solution:
    """Unpack rows ``[start, stop)``, all by default: the inverse of :func:`from_solution`.

    Raises:
        CheckpointError: the tensors don't match the metadata.
    """
    kernels.check_tensors(packed, OPTQ.tensors)
    _places(packed)
    options, columns, tensors = Options.of(**packed.metadata), packed.shape[1], packed.tensors
    codes = packing.unpack(tensors["codes"][start:stop], options.bits, columns)
    scales = tensors["scales"][start:stop]
    if options.symmetric:
        zeros = torch.full_like(scales, options.middle, dtype=torch.uint8)
    else:
        zeros = packing.unpack(tensors["zeros"][start:stop], options.bits, scales.shape[1])
    permutation = tensors["permutation"] if packed.metadata["permuted"] else None
    return Solution(codes, scales, zeros, permutation)


_PLACES: WeakKeyDictionary[PackedWeight, tuple[object, Tensor]] = WeakKeyDictionary()
"""The inverse of each weight's permutation, and the memory and version of the permutation."""


def _places(packed: PackedWeight) -> Tensor | None:
    """The stored column of each column, int64 ``[in]``; None if they are stored in their own order.

    Cached beside the weight: on a GPU a check waits for all work before it.

    Raises:
        CheckpointError: the tensor is no permutation, as in an edited checkpoint.
    """
    if not packed.metadata.get("permuted"):
        return None
    kernels.check_tensors(packed, OPTQ.tensors)
    permutation = packed.tensors["permutation"]
    # tensors made in inference mode don't count their changes
    memory = None if permutation.is_inference() else (permutation.data_ptr(), permutation._version)
    known = _PLACES.get(packed)
    if known is None or known[0] != memory or memory is None:
        known = _PLACES[packed] = memory, _inverse(packed, permutation)
    return known[1]


def _inverse(packed: PackedWeight, permutation: Tensor) -> Tensor:
    columns, places = permutation.sort()
    if not torch.equal(columns, torch.arange(len(columns), device=columns.device).to(columns)):
        raise CheckpointError(
            f"{packed.quantizer} weight of shape {list(packed.shape)}: expected a permutation of "
            f"its {len(columns)} columns, got one that leaves some out; the checkpoint was "
            "changed, quantize again"
        )
    return places
