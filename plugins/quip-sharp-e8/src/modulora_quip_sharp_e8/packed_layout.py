"""What QuIP#'s weights are packed into.

Packed tensors; ``whole`` is ``out`` but for a window, and a block is eight weights of a row::

    codes         int16 [whole, blocks]              E8P12 codes, the bits of unsigned numbers
    residual      uint8 or int16 [whole, blocks]     at 3 bits E8₁, at 4 bits E8P12 once more
    input_scale   fp16 [in]                          S_U, over the rescaling
    output_scale  fp16 [whole]                       S_V
    scale         fp32 [1]                           what one unit of the codebook is

    Ŵ = scale · diag(output_scale) H_whole C H_inᵀ diag(input_scale)        C: the decoded codes

Metadata: ``bits``; ``rows``, ``[start, whole]``: the weight is the rows from ``start`` on of a larger
one of so many rows, as in checkpoints that hold q, k and v as one matrix. Rotations mix all rows of the larger one,
so each of its parts carries all of its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from modulora_core.spec import PackedWeight, TensorLayout
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.options import Options


def metadata_of(options: Options, rows: list[int]) -> dict[str, Any]:
    return {"bits": options.bits, "rows": rows}


def tensors_of(shape: tuple[int, int], bits: int, rows: Sequence[int]) -> dict[str, TensorLayout]:
    """What a weight of this shape is packed into. Raises ValueError or TypeError for metadata that can't be."""
    if any(
        type(number) is not int for number in (bits, *rows)
    ):  # 2.0 and True would pass for what was cached
        raise TypeError(f"bits and rows: expected whole numbers, got {bits!r} and {rows!r}")
    return _known_tensors(shape, bits, *rows)


@cache
def _known_tensors(
    shape: tuple[int, int], bits: int, start: int, whole: int
) -> dict[str, TensorLayout]:
    if bits not in codebooks.OPT_SCALE:
        raise ValueError(
            f"bits: expected one of {', '.join(map(str, codebooks.OPT_SCALE))}, got {bits}"
        )
    if not 0 <= start <= start + shape[0] <= whole:
        raise ValueError(
            f"rows: expected [start, whole] around {shape[0]} rows, got [{start}, {whole}]"
        )
    blocks = (whole, -(-shape[1] // BLOCK))
    tensors = {
        "codes": TensorLayout("int16", blocks),
        "input_scale": TensorLayout("float16", (shape[1],)),
        "output_scale": TensorLayout("float16", (whole,)),
        "scale": TensorLayout("float32", (1,)),
    }
    if bits > 2:
        tensors["residual"] = TensorLayout("uint8" if bits == 3 else "int16", blocks)
    return tensors


def whole_shape(packed: PackedWeight) -> tuple[int, int]:
    """The shape of C: of the larger weight, where this one is a window."""
    return packed.metadata["rows"][1], packed.shape[1]
