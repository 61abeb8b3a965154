"""The package of HQQ's authors: at its bits and group size, our error is no larger than its own."""

from __future__ import annotations

import warnings

import pytest
import torch
from modulora_half_quadratic.quantizer import HalfQuadratic, Options

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports warns, differently from version to version
    peer = pytest.importorskip(
        "hqq.core.quantize", reason="hqq, the peer, isn't installed"
    ).Quantizer


def weight(kind: str) -> torch.Tensor:
    """``[128, 512]``, of the magnitude that language models' have: hqq's β, unlike ours, depends on it."""
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(128, 512, generator=generator)
    if kind == "heavy_tailed":
        W /= (torch.randn(3, 128, 512, generator=generator).square().sum(dim=0) / 3).sqrt()
    if kind == "outlier_columns":
        W[:, ::64] *= 20
    return W


def theirs(W: torch.Tensor, bits: int, group_size: int, stored: torch.dtype) -> torch.Tensor:
    """Computed in fp32 on the CPU; scales and zero points are rounded to ``stored``."""
    codes, meta = peer.quantize(
        W.clone(), nbits=bits, group_size=group_size, axis=1, bitpack=False, compute_dtype=torch.float32, device="cpu"
    )  # fmt: skip
    rounded = {name: meta[name].to(stored).to(torch.float32) for name in ("scale", "zero")}
    return peer.dequantize(codes, meta | rounded).reshape(W.shape)


def error(W: torch.Tensor, W_hat: torch.Tensor) -> float:
    return float((W_hat - W).norm() / W.norm())


def ours(W: torch.Tensor, **options: object) -> torch.Tensor:
    quantizer = HalfQuadratic(Options(**options))
    return quantizer.dequantize_tile(quantizer.pack(W), (0, W.shape[0]), torch.float32)


@pytest.mark.parametrize("kind", ["gaussian", "heavy_tailed", "outlier_columns"])
@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_our_error_is_no_larger(bits, group_size, kind):
    """Although our scales are in fp16, and theirs in fp32 here."""
    W = weight(kind)
    expected = error(W, theirs(W, bits, group_size, torch.float32))
    assert error(W, ours(W, bits=bits, group_size=group_size)) <= expected


@pytest.mark.parametrize("kind", ["gaussian", "heavy_tailed", "outlier_columns"])
@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_with_a_fixed_scale_and_as_many_bytes_our_error_is_much_like_theirs_and_no_larger(
    bits, group_size, kind
):
    W = weight(kind)
    expected = error(W, theirs(W, bits, group_size, torch.float16))
    fixed = error(W, ours(W, bits=bits, group_size=group_size, fit_scale=False))
    assert 0.85 * expected < fixed <= expected
