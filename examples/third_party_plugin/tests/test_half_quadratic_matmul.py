"""Products, both ways, against the reference's weight in float64."""

from __future__ import annotations

import pytest
import torch
from modulora_half_quadratic.quantizer import FEW_ROWS, HalfQuadratic, Options

from modulora_core.autograd import lora_linear
from modulora_core.errors import ShapeError

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# fp32 sums of n products of any order differ by about sqrt(n) roundings; an output in 16 bits is rounded once more, and where the
# processor multiplies bf16 numbers the weights are too
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float64: 1e-15,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-7,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (6, 64), (37, 129), (131, 1030)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_matmul_equals_the_product_with_the_reference(
    shape, transpose, rows, dtype, generator, by_the_reference
):
    for bits in (3, 4):
        quantizer = HalfQuadratic(Options(bits=bits, iterations=2))
        packed = quantizer.pack(torch.randn(shape, generator=generator))
        W = by_the_reference(packed).double()
        x = torch.randn(rows, shape[0] if transpose else shape[1], generator=generator).to(dtype)
        y = quantizer.matmul(x, packed, transpose)
        exact = x.double() @ (W if transpose else W.t())
        magnitude = x.double().abs() @ (W if transpose else W.t()).abs()
        assert y.dtype == dtype
        assert y.shape == exact.shape
        error = (
            ((y.double() - exact).abs() / magnitude.clamp(min=1e-30)).max().item() if rows else 0.0
        )
        assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_multiplies_both_ways(bits, generator, by_the_reference):
    quantizer = HalfQuadratic(Options(bits=bits, group_size=24))
    packed = quantizer.pack(torch.randn(19, 77, generator=generator))
    W = by_the_reference(packed)
    x, y = torch.randn(3, 77, generator=generator), torch.randn(3, 19, generator=generator)
    torch.testing.assert_close(quantizer.matmul(x, packed), x @ W.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantizer.matmul(y, packed, True), y @ W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_an_empty_weight_gives_zeros_or_nothing(shape, transpose):
    given, wanted = shape if transpose else shape[::-1]
    y = HalfQuadratic().matmul(
        torch.ones(2, given), HalfQuadratic().pack(torch.ones(shape)), transpose
    )
    assert torch.equal(y, torch.zeros(2, wanted))


def test_matmul_takes_any_leading_dimensions_and_strides(generator, by_the_reference):
    packed = HalfQuadratic().pack(torch.randn(12, 20, generator=generator))
    x = torch.randn(20, 2, 3, generator=generator).permute(2, 1, 0)  # [3, 2, 20], not contiguous
    y = HalfQuadratic().matmul(x, packed)
    assert y.shape == (3, 2, 12)
    torch.testing.assert_close(y, x @ by_the_reference(packed).t(), rtol=1e-5, atol=1e-5)
    assert HalfQuadratic().matmul(x[0, 0], packed).shape == (12,)


def test_few_row_products_do_not_depend_on_the_number_of_threads(generator):
    packed = HalfQuadratic().pack(torch.randn(96, 1500, generator=generator))
    x, y = torch.randn(3, 1500, generator=generator), torch.randn(3, 96, generator=generator)
    threads, products = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            products.append(
                (HalfQuadratic().matmul(x, packed), HalfQuadratic().matmul(y, packed, True))
            )
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*products, rtol=0, atol=0)


@pytest.mark.parametrize("transpose", [False, True])
def test_matmul_refuses_a_wrong_last_dimension(transpose, generator):
    packed = HalfQuadratic().pack(torch.randn(4, 6, generator=generator))
    with pytest.raises(ShapeError, match=r"expected x of shape \[\.\.\., [46]\], got \[2, 5\]"):
        HalfQuadratic().matmul(torch.randn(2, 5), packed, transpose)


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_the_cores_layer_differentiates_through_it(bits):
    quantizer = HalfQuadratic(Options(bits=bits))
    packed = quantizer.pack(torch.randn(13, 70, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, 70, dtype=torch.float64, requires_grad=True)
    A = torch.randn(2, 70, dtype=torch.float64, requires_grad=True)
    B = torch.randn(13, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, A, B: lora_linear(x, quantizer, packed, None, A, B), (x, A, B)
    )
