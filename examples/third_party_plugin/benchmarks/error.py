"""Measures the README's table, and the errors that the spec promises.

    python benchmarks/error.py [--seeds 20] [--bits 1 2 3 4 8]

A row has the largest relative error ‖W − Ŵ‖ / ‖W‖ over the seeds, for weights [256, 512] of each
kind in the conformance kit. ``hqq`` is the package of HQQ's authors, with fp32 scales. Weights have
a language model's magnitude, because hqq's β, unlike ours, depends on it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from modulora_half_quadratic.options import Options
from modulora_half_quadratic.quantizer import HalfQuadratic
from torch import Tensor

SHAPE = (256, 512)
MAGNITUDE = 0.02


def gaussian(generator: torch.Generator) -> Tensor:
    return torch.randn(SHAPE, generator=generator)


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    chi_square = torch.randn(3, *SHAPE, generator=generator).square().sum(dim=0)
    return gaussian(generator) / (chi_square / 3).sqrt()


def outlier_columns(generator: torch.Generator) -> Tensor:
    W = gaussian(generator)
    W[:, ::64] *= 20
    return W


def constant(generator: torch.Generator) -> Tensor:
    return torch.randn(1, generator=generator).expand(SHAPE)


KINDS = (gaussian, heavy_tailed, outlier_columns, constant)


def ours(**options: object) -> Callable[[Tensor], Tensor]:
    quantizer = HalfQuadratic(Options.model_validate(options))
    return lambda W: quantizer.dequantize_tile(quantizer.pack(W), (0, SHAPE[0]), torch.float32)


def theirs(bits: int) -> Callable[[Tensor], Tensor] | None:
    """hqq's quantized weight; None if hqq is not installed, or lacks this width."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError:
        return None
    if bits not in Quantizer.SUPPORTED_BITS:
        return None

    def quantized(W: Tensor) -> Tensor:
        options = {"axis": 1, "bitpack": False, "compute_dtype": torch.float32, "device": "cpu"}
        codes, meta = Quantizer.quantize(W.clone(), nbits=bits, group_size=64, **options)
        W_hat: Tensor = Quantizer.dequantize(codes, meta)
        return W_hat.reshape(SHAPE)

    return quantized


def largest_error(
    kind: Callable[[torch.Generator], Tensor], quantized: Callable[[Tensor], Tensor], seeds: int
) -> float:
    errors = []
    for seed in range(seeds):
        W = MAGNITUDE * kind(torch.Generator().manual_seed(seed))
        errors.append(float((W - quantized(W)).double().norm() / W.double().norm()))
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure size and error.")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8])
    arguments = parser.parse_args()
    print(f"| bits | stored | quantizer | {' | '.join(kind.__name__ for kind in KINDS)} |")
    for bits in arguments.bits:
        stored = HalfQuadratic(Options(bits=bits)).layout((2048, 2048)).bits_per_weight
        rows = {
            "default": ours(bits=bits),
            "fit_scale=false": ours(bits=bits, fit_scale=False),
            "hqq": theirs(bits),
        }
        for name, quantized in rows.items():
            if quantized is not None:
                errors = (
                    f"{largest_error(kind, quantized, arguments.seeds):.5f}" for kind in KINDS
                )
                print(f"| {bits} | {stored:.5f} | {name} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
