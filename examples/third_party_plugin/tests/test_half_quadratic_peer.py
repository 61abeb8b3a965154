"""The package of HQQ's authors: with its bits and group size, our error is no larger."""

from __future__ import annotations

import warnings

import pytest
import torch
from modulora_half_quadratic.quantizer import HalfQuadratic, Options

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn, differently in each version
    peer = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed").Quantizer


def weight(kind):
    """``[128, 512]``, of a language model's magnitude: hqq's β, unlike ours, depends on it."""
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(128, 512, generator=generator)
    if kind == "heavy_tailed":
        W /= (torch.randn(3, 128, 512, generator=generator).square().sum(dim=0) / 3).sqrt()
    if kind == "outlier_columns":
        W[:, ::64] *= 20
    return W


def theirs(W, bits, group_size, stored):
    """Computed in fp32; scales and zero points are rounded to ``stored``."""
    options = {"axis": 1, "bitpack": False, "compute_dtype": torch.float32, "device": "cpu"}
    codes, meta = peer.quantize(W.clone(), nbits=bits, group_size=group_size, **options)
    rounded = {name: meta[name].to(stored).to(torch.float32) for name in ("scale", "zero")}
    return peer.dequantize(codes, meta | rounded).reshape(W.shape)


def error(W, W_hat):
    return float((W_hat - W).norm() / W.norm())


def ours(W, **options):
    quantizer = HalfQuadratic(Options(**options))
    return quantizer.dequantize_tile(quantizer.pack(W), (0, W.shape[0]), torch.float32)


@pytest.mark.parametrize("kind", ["gaussian", "heavy_tailed", "outlier_columns"])
@pytest.mark.parametrize(("bits", "group_size"), [(1, 64), (2, 16), (3, 64), (4, 64), (8, 16)])
def test_our_error_is_no_larger(bits, group_size, kind):
    """Ours stores fp16 and fits the scale. With a fixed scale and theirs in fp16, both are
    close."""
    W, sizes = weight(kind), {"bits": bits, "group_size": group_size}
    assert error(W, ours(W, **sizes)) <= error(W, theirs(W, bits, group_size, torch.float32))
    expected = error(W, theirs(W, bits, group_size, torch.float16))
    assert 0.85 * expected < error(W, ours(W, **sizes, fit_scale=False)) <= expected
