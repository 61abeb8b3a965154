"""Row-wise, the format is bitsandbytes' own: the same codes, scales and values."""

import pytest
import torch
from modulora_int8.quantizer import INT8
from modulora_int8.reference import HALF_RANGE

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(64, 64), (1, 1), (5, 200), (7, 129), (33, 1000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights(kind, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if kind == "outliers":
        w[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.02] *= 1000
    if kind == "ties":  # codes that end in a half
        w = ((torch.arange(shape[0] * shape[1]) % 254) - 126.5).reshape(shape)
        w[:, 0] = 127
    if kind == "small":  # some values are below fp16's normal range, and its steps show
        w *= 1e-4
    if kind == "large":
        w = w.clamp(-4, 4) * 16000
    return w


def bytes_of_bitsandbytes(w):
    codes, scales, _ = functional.int8_vectorwise_quant(w.to(torch.float16))
    return codes, scales


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", ["normal", "outliers", "ties", "small", "large"])
def test_codes_scales_and_values_equal_bitsandbytes(kind, shape, dtype):
    w = weights(kind, shape).to(dtype)
    assert HALF_RANGE[0] <= w.float().abs().amax(dim=1).min()
    packed = INT8().pack(w)
    codes, scales = bytes_of_bitsandbytes(w)
    assert torch.equal(packed.tensors["codes"], codes)
    assert torch.equal(packed.tensors["scales"].view(-1), scales)
    ours = INT8().dequantize_tile(packed, (0, shape[0]), torch.float32)
    assert torch.equal(ours, functional.int8_vectorwise_dequant(codes, scales))


@pytest.mark.parametrize("magnitude", [1e6, 1e30, 1e-6, 1e-20, 1e-34])
def test_rows_that_fp16_cannot_hold_keep_their_digits(magnitude):
    """Here bitsandbytes gives Inf scales, or codes that are all zero; neither is of use."""
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * magnitude
    _, theirs = bytes_of_bitsandbytes(w)
    assert not bool((theirs.isfinite() & (theirs > 1e-5)).any())
    packed = INT8().pack(w)
    error = (INT8().dequantize_tile(packed, (0, 3), torch.float32) - w).abs()
    assert bool((error <= 0.501 * w.abs().amax(dim=1, keepdim=True) / 127).all())
