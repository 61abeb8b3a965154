"""Quantizers with a kernel in Triton, sound and broken: level 7 tells them apart under Triton's interpreter."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from modulora_core.packed import PackedWeight
from modulora_zoo.healthy import Healthy


class InTriton(Healthy):
    """Decodes in Triton on a GPU, and on a CPU where Triton interprets its kernels."""

    masked = True

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        if packed.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return super().decode(packed, rows)
        from modulora_zoo.triton_kernels import decode

        part = {name: tensor[slice(*rows)].contiguous() for name, tensor in packed.tensors.items()}
        tile = torch.full((rows[1] - rows[0], packed.shape[1]), torch.nan, device=packed.device)
        decode(
            part["codes"],
            part["scale"],
            part["zero"],
            tile,
            packed.metadata["group_size"],
            masked=self.masked,
        )
        return tile


class TritonWithoutMask(InTriton):
    """Leaves the columns out that don't fill a block."""

    breaks = "test_interpreted_triton_kernels_give_the_dense_products"
    masked = False
