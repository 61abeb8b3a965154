"""The kernels: the bits of the definition when they decode, its product when they multiply, for any shape."""

from __future__ import annotations

import pytest
import torch
from modulora_quip_sharp_e8 import codebooks

from modulora_core import kernels

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("one_thread")

BITS = (2, 3, 4)
SHAPES = [
    (1, 8),
    (1, 1),
    (7, 24),
    (16, 13),
    (33, 65),
    (37, 1030),
    (5, 4104),
    (37, 576),  # 72 codes a row: words are made of eight rows at once, of five at the end
    (17, 4112),  # 514 codes a row: of seven rows, since 4096 codes are words at most
    (3, 33000),  # 4125 codes a row, more than that
]  # rows and columns, not all whole blocks
SUMS = 1e-6
"""Of the sum of magnitudes: fp32 sums of a few thousand products in eight or more parts are off by less."""


def cpu():
    return kernels.load("modulora_quip_sharp_e8.cpu", torch.device("cpu"))


def random_codes(shape, bits, generator):
    """Codes and residual (or the codes again, which kernels take for none), every bit pattern as likely."""

    def draw(dtype):
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        return torch.randint(low, high + 1, blocks, generator=generator, dtype=dtype)

    blocks = (shape[0], -(-shape[1] // 8))
    codes = draw(torch.int16)
    return codes, {2: codes, 3: draw(torch.uint8), 4: draw(torch.int16)}[bits]


def definition(codes, residual, bits):
    return codebooks.decode(codes, None if bits == 2 else residual, bits)


def matmul(codes, residual, bits, x):
    return cpu().rows.matmul((codes, residual, bits), x, len(codes))


def matmul_transposed(codes, residual, bits, y, columns=None):
    return cpu().rows.matmul((codes, residual, bits), y, columns or 8 * codes.shape[1], True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_gives_the_bits_of_the_definition(shape, bits, generator):
    codes, residual = random_codes(shape, bits, generator)
    out = torch.full(shape, torch.nan)
    cpu().rows.dequantize((codes, residual, bits), 0, out)
    assert torch.equal(out, definition(codes, residual, bits)[:, : shape[1]])


def test_every_code_decodes_to_its_point():
    codes = torch.arange(1 << 16).to(torch.int16).reshape(256, 256)
    out = torch.empty(256, 2048)
    cpu().rows.dequantize((codes, codes, 2), 0, out)
    assert torch.equal(out.reshape(-1, 8), codebooks.e8p())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_is_the_product_with_the_definition(shape, bits, generator):
    codes, residual = random_codes(shape, bits, generator)
    C = definition(codes, residual, bits)[:, : shape[1]].double()
    for n in (1, 2, 3, 4, 7, 32):
        x = torch.randn(n, C.shape[1], generator=generator)
        exact, magnitude = x.double() @ C.T, x.double().abs() @ C.T.abs()
        assert ((matmul(codes, residual, bits, x) - exact).abs() <= SUMS * magnitude).all(), n


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_transposed_is_the_product_with_the_definition(shape, bits, generator):
    codes, residual = random_codes(shape, bits, generator)
    C = definition(codes, residual, bits)[:, : shape[1]].double()
    for n in (1, 2, 7, 32):
        y = torch.randn(n, shape[0], generator=generator)
        exact, magnitude = y.double() @ C, y.double().abs() @ C.abs()
        x = matmul_transposed(codes, residual, bits, y, shape[1])
        assert ((x - exact).abs() <= SUMS * magnitude).all(), n


@pytest.mark.parametrize("rows", [1, 5])
def test_products_do_not_depend_on_the_number_of_threads(rows, generator):
    codes, residual = random_codes((131, 1100), 3, generator)
    x, y = (
        torch.randn(rows, 8 * codes.shape[1], generator=generator),
        torch.randn(rows, 131, generator=generator),
    )
    both = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        both.append((matmul(codes, residual, 3, x), matmul_transposed(codes, residual, 3, y)))
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])


def test_a_row_of_the_product_does_not_depend_on_the_rows_of_the_weight_beside_it(generator):
    codes, residual = random_codes((19, 512), 4, generator)
    x = torch.randn(6, 512, generator=generator)
    whole = matmul(codes, residual, 4, x)
    for start, stop in ((0, 1), (3, 10), (18, 19)):
        part = matmul(codes[start:stop], residual[start:stop], 4, x)
        assert torch.equal(part, whole[:, start:stop])


def test_infinite_inputs_stay_in_their_row(generator):
    codes, residual = random_codes((9, 64), 2, generator)
    x, y = torch.randn(5, 64, generator=generator), torch.randn(5, 9, generator=generator)
    x[2, 10], y[2, 8] = torch.inf, torch.inf
    for product in (matmul(codes, residual, 2, x), matmul_transposed(codes, residual, 2, y)):
        assert not product[2].isfinite().any()
        assert product[[0, 1, 3, 4]].isfinite().all()
