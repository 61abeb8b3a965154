"""Sound and broken with a Triton kernel: level 7 tells them apart in Triton's interpreter."""

import os

import torch

from modulora_zoo.healthy import Healthy


class InTriton(Healthy):
    masked = True

    def decode(self, packed, rows):
        if packed.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return super().decode(packed, rows)
        from modulora_zoo.triton_kernels import decode

        part = [packed.tensors[name][slice(*rows)] for name in ("codes", "scale", "zero")]
        shape = (rows[1] - rows[0], packed.shape[1])
        tile = torch.full(shape, torch.nan, device=packed.device)
        decode(*part, tile, packed.metadata["group_size"], masked=self.masked)
        return tile


class TritonWithoutMask(InTriton):
    """It omits the columns that do not fill a block."""

    breaks = "test_interpreted_triton_kernels_give_the_dense_products"
    masked = False
