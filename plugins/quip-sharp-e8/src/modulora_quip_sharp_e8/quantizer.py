"""QuIP# behind the contract: packed tensors, tiles, products. The method is in reference.py.

Packed tensors; ``whole`` is ``out``, except for a window, and a block is eight weights of a row::

    codes         int16 [whole, blocks]              E8P12 codes, the bits of unsigned numbers
    residual      uint8 or int16 [whole, blocks]     E8₁ at 3 bits, E8P12 again at 4
    input_scale   fp16 [in]                          S_U, divided by the rescaling
    output_scale  fp16 [whole]                       S_V
    scale         fp32 [1]                           one unit of the codebook

    Ŵ = scale · diag(output_scale) H_whole C H_inᵀ diag(input_scale)        C: the decoded codes

Metadata: ``bits``; ``rows``, ``[start, whole]``. A window is the rows from ``start`` on of a larger
weight, as in checkpoints that hold q, k and v as one matrix. Rotations mix all rows of the larger
weight, so each of its windows carries all of its codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar

import modulora_kernels as kernels
import torch
from modulora_kernels.rotated import RotatedQuantizer
from pydantic import BaseModel
from torch import Tensor

from modulora_core.errors import OptionError, ShapeError
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, TensorLayout, check_rows
from modulora_quip_sharp_e8 import SPEC, codebooks, packing
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.reference import Options, Solution

KERNELS = "modulora_quip_sharp_e8.kernels"


class QuIPSharpE8(RotatedQuantizer):
    """QuIP# with the E8P12 codebook (Tseng et al. 2024, arXiv 2402.04396)."""

    spec = SPEC
    kernels, strip, strip_dim, code_rows = KERNELS, BLOCK, 1, 1
    code_tensors, scales = ("codes", "residual"), ("input_scale", "output_scale")
    format = 1
    Options: ClassVar[type[BaseModel]] = Options

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Quantize ``weight``, ``[out, in]``: products with the calibrated inputs stay close.

        Raises:
            OptionError: there is no calibration.
            ShapeError: its H is not ``[in, in]``, or its H_O is not ``[out, out]``.
            WeightError: NaN or Inf in the weight or in H, or an H that is no second moment.
        """
        if calibration is None:
            raise OptionError(
                "quip-sharp-e8: expected a calibration, the second moment of the layer's inputs, "
                f"got none for a weight of shape {list(weight.shape)}: give text to calibrate with"
            )
        # an fp64 weight would pack to other bytes than the same values in fp32
        weight = weight.to(torch.float32) if weight.dtype == torch.float64 else weight
        with kernels.without_autocast(weight.device):
            solution = packing.solve(
                weight, calibration.hessian, self.options, calibration.output_hessian
            )
        return packed_of(solution, self.options)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        metadata = {"bits": self.options.bits, "rows": [0, shape[0]]}
        return PackedLayout(SPEC.name, self.format, shape, tensors(shape, **metadata), metadata)

    @staticmethod
    def tensors(shape: tuple[int, int], bits: int, rows: Sequence[int]) -> dict[str, TensorLayout]:
        return tensors(shape, bits, rows)

    def first_row(self, packed: PackedWeight) -> int:
        start: int = packed.metadata["rows"][0]
        return start

    def codes(self, packed: PackedWeight, held: Mapping[str, Tensor]) -> PackedWeight:
        """C, ``[whole, in]``."""
        shape = (packed.metadata["rows"][1], packed.shape[1])
        return PackedWeight(
            SPEC.name, packed.format, shape, held, {"bits": packed.metadata["bits"]}
        )

    def strip_of(self, C: PackedWeight, a: int, b: int) -> PackedWeight:
        held = {name: tensor[:, a:b].contiguous() for name, tensor in C.tensors.items()}
        shape = (C.shape[0], min(b * BLOCK, C.shape[1]) - a * BLOCK)
        return PackedWeight(C.quantizer, C.format, shape, held, C.metadata)

    def reference_codes(self, C: PackedWeight, start: int, stop: int) -> Tensor:
        held = {name: tensor[start:stop] for name, tensor in C.tensors.items()}
        dense = codebooks.decode(held["codes"], held.get("residual"), C.metadata["bits"])
        return dense[:, : C.shape[1]]

    def nearest(self, V: Tensor, C: PackedWeight) -> tuple[Mapping[str, Tensor], Tensor]:
        bits = C.metadata["bits"]
        codes, residual = packing.nearest(V, bits)
        found = {"codes": codes[:, 0]}
        if residual is not None:
            found["residual"] = residual[:, 0]
        return found, codebooks.decode(codes, residual, bits)

    def rescaled(
        self, packed: PackedWeight, input_scale: Tensor, output_scale: Tensor
    ) -> PackedWeight:
        """As the base class. Raises ShapeError: a window."""
        _check_whole(packed, "rescale")
        return super().rescaled(packed, input_scale, output_scale)

    def rounded(
        self, packed: PackedWeight, V: Tensor, hessian: Tensor, *, damping: float, sweeps: int
    ) -> PackedWeight:
        """As the base class. Raises ShapeError: a window."""
        _check_whole(packed, "round")
        return super().rounded(packed, V, hessian, damping=damping, sweeps=sweeps)


def _check_whole(packed: PackedWeight, purpose: str) -> None:
    kernels.check_tensors(packed, tensors)
    rows, whole = packed.shape[0], packed.metadata["rows"][1]
    if rows != whole:
        raise ShapeError(
            f"quip-sharp-e8: expected a whole weight to {purpose}, got {rows} of its {whole} rows"
        )


def tensors(shape: tuple[int, int], bits: int, rows: Sequence[int]) -> dict[str, TensorLayout]:
    """The packed tensors of a weight of this shape, by name.

    Raises:
        TypeError, ValueError: metadata that this plugin does not write.
    """
    if any(type(number) is not int for number in (bits, *rows)):  # 2.0 and True equal cached keys
        raise TypeError(f"bits and rows: expected whole numbers, got {bits!r} and {rows!r}")
    return _tensors(shape, bits, *rows)


@cache
def _tensors(shape: tuple[int, int], bits: int, start: int, whole: int) -> dict[str, TensorLayout]:
    if bits not in codebooks.OPT_SCALE:
        raise ValueError(f"bits: expected one of {sorted(codebooks.OPT_SCALE)}, got {bits}")
    if not 0 <= start <= start + shape[0] <= whole:
        raise ValueError(
            f"rows: expected [start, whole] around {shape[0]} rows, got [{start}, {whole}]"
        )
    blocks = (whole, -(-shape[1] // BLOCK))
    residual = {3: "uint8", 4: "int16"}
    return {
        "codes": TensorLayout("int16", blocks),
        "input_scale": TensorLayout("float16", (shape[1],)),
        "output_scale": TensorLayout("float16", (whole,)),
        "scale": TensorLayout("float32", (1,)),
        **({"residual": TensorLayout(residual[bits], blocks)} if bits in residual else {}),
    }


def packed_of(solution: Solution, options: Options) -> PackedWeight:
    """Pack a solution of the solver, or of a foreign file.

    Raises:
        CheckpointError: tensors that do not fit ``options``.
    """
    shape = (len(solution.output_scale), len(solution.input_scale))
    names = ("codes", "residual", "input_scale", "output_scale", "scale")
    found = {name: getattr(solution, name) for name in names}
    packed = PackedWeight(
        SPEC.name,
        QuIPSharpE8.format,
        shape,
        {name: tensor for name, tensor in found.items() if tensor is not None},
        {"bits": options.bits, "rows": [0, shape[0]]},
    )
    kernels.check_tensors(packed, tensors)
    return packed


def window(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Rows ``[start, stop)`` of a weight, on the same tensors."""
    check_rows(packed, (start, stop))
    first, whole = packed.metadata["rows"]
    metadata = dict(packed.metadata) | {"rows": [first + start, whole]}
    shape = (stop - start, packed.shape[1])
    return PackedWeight(packed.quantizer, packed.format, shape, packed.tensors, metadata)
