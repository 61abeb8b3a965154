"""A single row of inputs: rotations and product in one call of a kernel."""

import pytest
import torch
from modulora_quip_sharp_e8 import products
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, window

pytest.importorskip("numba")


def random_weight(shape, bits):
    packed = QuIPSharpE8(Options(bits=bits)).layout(shape).empty("cpu")
    generator = torch.Generator().manual_seed(bits)
    for tensor in packed.tensors.values():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(
                torch.randint(0, 2**16, tensor.shape, generator=generator).to(tensor.dtype)
            )
    return packed


SHAPES = [(1, 8), (33, 36), (12, 172), (64, 520), (5, 3), (44, 576)]
"""Orders of the matrix across segments: 1, 12, 36, 20, 28, 44, odd numbers; columns that are no whole blocks, too; rows of 72 codes,
of which words are made eight rows at a time."""


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_of_one_row_is_that_of_the_decoded_weight(shape, bits):
    quantizer, packed = QuIPSharpE8(Options(bits=bits)), random_weight(shape, bits)
    x = torch.randn(1, 1, shape[1], generator=torch.Generator().manual_seed(1))
    for part in (packed, window(packed, shape[0] // 3, shape[0])):
        W = quantizer.dequantize_tile(part, (0, part.shape[0]), torch.float64)
        expected = x.double() @ W.T
        y = quantizer.matmul(x, part)
        assert y.shape == expected.shape
        # rotations are sums, too: an error spreads over all coordinates, in proportion to the norm
        assert float((y - expected).norm()) <= 32 * 2.0**-23 * float(x.norm() * W.norm())
        sixteen = quantizer.matmul(x.bfloat16(), part)
        assert sixteen.dtype == torch.bfloat16
        assert torch.equal(sixteen, quantizer.matmul(x.bfloat16().float(), part).bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_call_agrees_with_rotating_and_multiplying_apart(shape, monkeypatch):
    """Apart: each rotation in a call, and the product by the kernel for few rows, which sums in another order."""
    quantizer, packed = QuIPSharpE8(Options(bits=2)), random_weight(shape, 2)
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(2))
    together = quantizer.matmul(x, packed)
    monkeypatch.setattr(products, "_by_kernels", lambda *_: None)
    apart = quantizer.matmul(x, packed)
    assert float((together - apart).norm()) <= 8 * 2.0**-23 * float(apart.norm())


def test_a_dimension_whose_matrix_would_be_large_is_rotated_by_torch():
    """2053 is prime."""
    quantizer, packed = QuIPSharpE8(Options(bits=2)), random_weight((16, 2053), 2)
    x = torch.randn(1, 2053, generator=torch.Generator().manual_seed(3))
    W = quantizer.dequantize_tile(packed, (0, 16), torch.float64)
    error = (quantizer.matmul(x, packed) - x.double() @ W.T).norm()
    assert float(error) <= 32 * 2.0**-23 * float(x.norm() * W.norm())
