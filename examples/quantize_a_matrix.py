"""Packs one matrix, reads tiles of it, and multiplies by it: the contract of a quantizer.

python examples/quantize_a_matrix.py
"""

from __future__ import annotations

import math

import torch

from modulora_core import Calibration, registry


def main(out_features: int = 512, in_features: int = 1024) -> dict[str, float]:
    """Returns the relative error of the product, by quantizer."""
    torch.manual_seed(0)
    W = torch.randn(out_features, in_features) / math.sqrt(in_features)  # [out, in]

    # inputs of different sizes, as in a language model
    x = torch.randn(2048, in_features) * torch.logspace(-1, 1, in_features)
    H = x.T @ x / len(x)  # E[xxᵀ], which a calibrated quantizer needs
    exact, errors = x @ W.T, {}

    print("relative errors\nquantizer            bits  ‖W - Ŵ‖  ‖x Wᵀ - x Ŵᵀ‖")
    for name, options in (("int8", {}), ("nf4", {}), ("optq", {"bits": 3})):
        quantizer = registry.create(name, options)
        seen = None if quantizer.spec.calibration == "none" else Calibration(H, len(x))
        packed = quantizer.pack(W, seen)

        # only one tile of Ŵ, 16 rows, is dense at a time
        difference = 0.0
        for start in range(0, out_features, 16):
            tile = quantizer.dequantize_tile(packed, (start, start + 16), torch.float32)
            difference += float((W[start : start + 16] - tile).square().sum())
        error = math.sqrt(difference) / float(W.norm())

        y = quantizer.matmul(x, packed)  # x Ŵᵀ, [2048, out]
        back = quantizer.matmul(y, packed, transpose=True)  # y Ŵ, [2048, in]
        assert back.shape == x.shape
        errors[name] = float((exact - y).norm() / exact.norm())
        title = f"{name} {options or ''}"
        print(f"{title:20} {packed.bits_per_weight:5.2f}  {error:7.4f}  {errors[name]:14.4f}")
    return errors


if __name__ == "__main__":
    main()
