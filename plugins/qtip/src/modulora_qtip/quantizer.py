"""QTIP behind the contract: packed tensors, tiles, products. The method is in reference.py.

Packed tensors; P(n) is n, or n rounded up to a multiple of 128 where Hadamard matrices are so
wide::

    trellis  int16 [⌈P(in) / 16⌉, ⌈P(out) / 16⌉, 16 bits]    walks, a tile of 16 × 16 weights each
    suh      fp16 [P(in)]                                    S_U, divided by the rescaling
    svh      fp16 [P(out)]                                   S_V
    scale    fp32 [1]                                        one unit of the code; only if "full"

    Ŵ = scale · diag(svh) H_out C H_inᵀ diag(suh), its first rows and columns    C: decoded walks

Metadata: ``bits``, a multiple of ½; ``states``, the bits of a state; ``code``, a name in
:mod:`modulora_qtip.codes`.
``hadamard`` is ``"full"`` for matrices as wide as the dimension, or ``"128"`` for blocks of 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import modulora_kernels as kernels
import torch
from modulora_kernels.rotated import RotatedQuantizer
from pydantic import BaseModel
from torch import Tensor

from modulora_core.errors import OptionError, ShapeError
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, TensorLayout
from modulora_qtip import SPEC, codes, packing, trellis
from modulora_qtip.reference import Options, Solution
from modulora_qtip.trellis import BLOCKS, TILE

KERNELS = "modulora_qtip.kernels"


class QTIP(RotatedQuantizer):
    """QTIP (Tseng, Sun, Hou, De Sa 2024, arXiv 2406.11235)."""

    spec = SPEC
    kernels, strip, strip_dim, code_rows = KERNELS, TILE, 0, TILE
    code_tensors, scales = ("trellis",), ("suh", "svh")
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
                "qtip: expected a calibration, the second moment of the layer's inputs, got none "
                f"for a weight of shape {list(weight.shape)}: give text to calibrate with"
            )
        # an fp64 weight would pack to other bytes than the same values in fp32
        weight = weight.to(torch.float32) if weight.dtype == torch.float64 else weight
        with kernels.without_autocast(weight.device):
            solution = packing.solve(
                weight, calibration.hessian, self.options, calibration.progress,
                calibration.output_hessian,
            )  # fmt: skip
        return packed_of(solution, (weight.shape[0], weight.shape[1]), self.options)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """As the base class. Raises ShapeError: sides that the layout ``exl3`` can't hold."""
        super().check_shape(shape)
        block = self.options.block or 1
        for size, side in zip(shape, ("out_features", "in_features"), strict=True):
            if size % block:
                raise ShapeError(
                    f"qtip: layout exl3: expected a multiple of {block} as {side}, got {size}; "
                    "leave the layer out with --exclude, or quantize without layout=exl3"
                )

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        metadata = metadata_of(self.options)
        return PackedLayout(SPEC.name, self.format, shape, tensors(shape, **metadata), metadata)

    def sliced(self, packed: PackedWeight, dim: int, start: int, stop: int) -> PackedWeight | None:
        """Cut between blocks of the Hadamard matrices, if they are not as wide as the weight."""
        block, size = self.block(packed), packed.shape[dim]
        if block is None or start % block or (stop % block and stop < size):
            return None
        held, padded = packed.tensors, -(-stop // block) * block
        name, tiles = (("svh", 1), ("suh", 0))[dim]
        parts = {
            **held,
            "trellis": held["trellis"].narrow(tiles, start // TILE, (padded - start) // TILE),
            name: held[name][start:padded],
        }
        shape = (stop - start, packed.shape[1]) if dim == 0 else (packed.shape[0], stop - start)
        return PackedWeight(packed.quantizer, packed.format, shape, parts, packed.metadata)

    @staticmethod
    def tensors(
        shape: tuple[int, int], bits: float, states: int, code: str, hadamard: str
    ) -> dict[str, TensorLayout]:
        return tensors(shape, bits, states, code, hadamard)

    def block(self, packed: PackedWeight) -> int | None:
        return BLOCKS[packed.metadata["hadamard"]]

    def codes(self, packed: PackedWeight, held: Mapping[str, Tensor]) -> PackedWeight:
        """C, of whole tiles."""
        return _of_walks(held["trellis"], packed)

    def strip_of(self, C: PackedWeight, a: int, b: int) -> PackedWeight:
        return _of_walks(C.tensors["trellis"][a:b], C)

    def reference_codes(self, C: PackedWeight, start: int, stop: int) -> Tensor:
        first, last = start // TILE, -(-stop // TILE)
        facts = C.metadata["bits"], C.metadata["states"], C.metadata["code"]
        dense = trellis.decode(C.tensors["trellis"][:, first:last], *facts)
        return dense[start - first * TILE : stop - first * TILE]

    def nearest(self, V: Tensor, C: PackedWeight) -> tuple[Mapping[str, Tensor], Tensor]:
        facts = {name: C.metadata[name] for name in ("bits", "states", "code")}
        strings, points = packing.quantize(V, self.options.model_copy(update=facts))
        return {"trellis": strings}, points


def _of_walks(walks: Tensor, like: PackedWeight) -> PackedWeight:
    shape = (TILE * walks.shape[1], TILE * walks.shape[0])
    return PackedWeight(SPEC.name, like.format, shape, {"trellis": walks}, like.metadata)


def tensors(
    shape: tuple[int, int], bits: float, states: int, code: str, hadamard: str
) -> dict[str, TensorLayout]:
    """The packed tensors of a weight of this shape, by name.

    Raises:
        TypeError, ValueError: metadata that this plugin does not write.
    """
    # 2.0 and True equal cached keys
    kind = float if bits % 1 else int
    if type(bits) is not kind or type(states) is not int:
        raise TypeError(f"bits and states: expected numbers, got {bits!r} and {states!r}")
    return _tensors(shape, bits, states, code, hadamard)


@cache
def _tensors(
    shape: tuple[int, int], bits: float, states: int, code: str, hadamard: str
) -> dict[str, TensorLayout]:
    if not 1 <= bits <= 8 or 2 * bits % 1:
        raise ValueError(f"bits: expected 1 to 8 in steps of a half, got {bits}")
    if not bits <= states <= trellis.LARGEST_STATE:
        raise ValueError(f"states: expected {bits} to {trellis.LARGEST_STATE}, got {states}")
    if code not in codes.CODES:
        raise ValueError(f"code: expected one of {', '.join(codes.CODES)}, got {code!r}")
    if hadamard not in BLOCKS:
        raise ValueError(f"hadamard: expected one of {', '.join(BLOCKS)}, got {hadamard!r}")
    block = BLOCKS[hadamard] or 1
    M, N = (-(-n // block) * block for n in shape)
    tiles = (-(-N // TILE), -(-M // TILE), trellis.units(bits))
    found = {
        "trellis": TensorLayout("int16", tiles),
        "suh": TensorLayout("float16", (N,)),
        "svh": TensorLayout("float16", (M,)),
    }
    return found | ({"scale": TensorLayout("float32", (1,))} if hadamard == "full" else {})


def metadata_of(options: Options) -> dict[str, Any]:
    hadamard = "full" if options.block is None else str(options.block)
    return {
        "bits": options.bits, "states": options.states, "code": options.code, "hadamard": hadamard,
    }  # fmt: skip


def packed_of(solution: Solution, shape: tuple[int, int], options: Options) -> PackedWeight:
    """Pack a solution of the solver.

    Raises:
        CheckpointError: tensors that do not fit ``options``.
    """
    names = ("trellis", "suh", "svh") + (("scale",) if options.block is None else ())
    found = {name: getattr(solution, name) for name in names}
    packed = PackedWeight(SPEC.name, QTIP.format, shape, found, metadata_of(options))
    kernels.check_tensors(packed, tensors)
    return packed
