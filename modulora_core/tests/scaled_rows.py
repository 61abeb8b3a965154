"""A decoder that no plugin of ours has, as a module's source: whole numbers times a row's scale."""

from __future__ import annotations

import torch
from torch import Tensor

from modulora_core.packed import PackedWeight

DECODER = """
from modulora_core.kernels.cpu import CPUKernels, jit, narrow

@jit()
def decode(weight, row, start, columns, out):
    codes, scales = weight
    for r in range(len(out)):
        for k in range(columns):
            out[r, k] = narrow(codes[row + r, start + k] * scales[row + r], out[r, k])

def operands(packed):
    return packed.tensors["codes"], packed.tensors["scales"]

kernels = CPUKernels(decode, operands)
rounding = CPUKernels(decode, operands, rounds=True)
tile, product = kernels.tile, kernels.product
"""


def packed(out_features: int, in_features: int) -> tuple[PackedWeight, Tensor]:
    """A weight, and Ŵ in float64."""
    generator = torch.Generator().manual_seed(out_features)
    shape = (out_features, in_features)
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    scales = torch.rand(out_features, generator=generator) / 128
    weight = PackedWeight("outsider", 1, shape, {"codes": codes, "scales": scales})
    return weight, (codes.float() * scales[:, None]).double()


def poisoned(weight: PackedWeight) -> PackedWeight:
    """The weight with NaN for every scale."""
    tensors = {**weight.tensors, "scales": torch.full_like(weight.tensors["scales"], torch.nan)}
    return PackedWeight(weight.quantizer, weight.format, weight.shape, tensors)
