"""The Triton kernels in Triton's interpreter, against the definition and against dense matrices in fp64.

Not collected by itself: test_quip_triton.py runs it in a process with ``TRITON_INTERPRET=1``, which Triton reads once.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from modulora_conformance.interpreted_kernels import poison_new_memory
from modulora_quip_sharp_e8 import codebooks, gpu, gpu_transform, transform
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, from_solution, window

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")

BITS = (2, 3, 4)
SHAPES = [
    (1, 1),
    (3, 5),
    (17, 130),
    (9, 520),
]  # not all whole blocks, nor all whole words of eight codes
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COUNTS = [
    (torch.float32, 1),
    (torch.float32, 3),
    (torch.float16, 2),
    (torch.bfloat16, 1),
    (torch.bfloat16, 17),
    (torch.bfloat16, 40),
]
"""Dtypes and rows of x: sums, a small product of blocks, a large one, and tiles."""
SUMS = 1e-6
"""Of the sum of magnitudes: what fp32 sums of some hundred terms may be off by."""
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Of one rounding. In a product there are three: of x, of C, and of the sum."""


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


def random_codes(shape, bits, generator):
    """Codes and residual (or the codes again, which kernels take for none), every bit pattern as likely."""

    def draw(dtype):
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        return torch.randint(low, high + 1, blocks, generator=generator, dtype=dtype)

    blocks = (shape[0], -(-shape[1] // 8))
    codes = draw(torch.int16)
    return codes, {2: codes, 3: draw(torch.uint8), 4: draw(torch.int16)}[bits]


def definition(codes, residual, bits, columns):
    return codebooks.decode(codes, None if bits == 2 else residual, bits)[:, :columns]


@triton.jit
def one_block(weight, out, OPTIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    values = gpu.decode(weight, 0, 0, ROWS, COLUMNS, OPTIONS, ROWS, COLUMNS)
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], values)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_decodes_to_its_point(bits):
    codes = torch.arange(1 << 16).to(torch.int16).reshape(256, 256)
    residual = {2: codes, 3: codes.to(torch.uint8), 4: codes.flip(0).contiguous()}[bits]
    out = torch.empty(256, 2048)
    one_block[(1,)](
        (codes, residual, gpu.words(), 32), out, OPTIONS=(bits, 8), ROWS=256, COLUMNS=2048
    )
    assert torch.equal(out, definition(codes, residual, bits, 2048))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_have_the_bits_of_the_definition_rounded_once(shape, bits, generator):
    rows, columns = shape
    codes, residual = random_codes(shape, bits, generator)
    C = definition(codes, residual, bits, columns)
    for dtype in DTYPES:
        for top, left in ((0, 0), (rows // 2, columns // 16 * 8)):
            part = gpu.dequantize(codes, residual, bits, (top, rows), (left, columns), dtype)
            assert torch.equal(part, C[top:, left:].to(dtype)), (dtype, top, left)


@pytest.mark.parametrize(("bits", "shape"), [*itertools.product(BITS, SHAPES[:3]), (3, (4, 520))])
def test_products_are_those_with_the_definition(shape, bits, generator):
    codes, residual = random_codes(shape, bits, generator)
    C = definition(codes, residual, bits, shape[1]).double()
    for dtype, n in COUNTS:
        for transpose, M in ((False, C.T), (True, C)):
            x = torch.randn(n, len(M), generator=generator)
            y = gpu.product(x, dtype, codes, residual, bits, shape[1], transpose)
            limit = (3 * ROUNDING[dtype] + SUMS) * (x.double().abs() @ M.abs())
            assert y.dtype == torch.float32
            assert ((y - x.double() @ M).abs() <= limit).all(), (dtype, n, transpose)


def test_inputs_beyond_the_range_of_fp16_and_zeros_multiply_in_fp16(generator):
    codes, residual = random_codes((9, 520), 2, generator)
    C = definition(codes, residual, 2, 520).double()
    x = torch.randn(3, 520, generator=generator) * torch.tensor([[1e7], [0.0], [1e-9]])
    y = gpu.product(x, torch.float16, codes, residual, 2, 520, False)
    assert ((y - x.double() @ C.T).abs() <= 4 * 2**-11 * (x.double().abs() @ C.T.abs())).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, where Inf meets Inf
@pytest.mark.parametrize("n", [1, 3])
def test_infinite_inputs_stay_in_their_row(n, generator):
    codes, residual = random_codes((9, 64), 2, generator)
    for transpose in (False, True):
        x = torch.randn(n, 9 if transpose else 64, generator=generator)
        x[0, 3] = torch.inf
        for dtype in DTYPES:
            y = gpu.product(x, dtype, codes, residual, 2, 64, transpose)
            assert not y[0].isfinite().any()
            assert y[1:].isfinite().all()


# by plan: whole rows in one kernel, one with Hartley's matrix, segments that go together, and segments of their own
DIMENSIONS = [1, 2, 12, 96, 107, 192, 256, 576, 1712, 172 * 4, 172 * 16]


@pytest.mark.parametrize("n", DIMENSIONS)
def test_rotation_is_the_product_with_the_dense_matrix(n, generator):
    H, K = transform.matrix(n), transform.order(n)
    x, before, after = (torch.randn(size, generator=generator) for size in ((2, n), (n,), (n,)))
    for transpose, M in ((False, H), (True, H.T)):
        expected = ((x.double() * before.double()) @ M) * after.double()
        got = gpu_transform.rotate(x, K, transpose, before, after)
        scale = (
            after.double() * (x.double() * before).square().mean(-1, keepdim=True).sqrt()
        ).abs()
        assert ((got - expected).abs() <= 1e-5 * scale).all(), (
            "fp32 sums of n terms, as by every other path"
        )


def test_a_matrix_between_segments_is_applied_with_a_sylvester_matrix_inside_of_them(generator):
    x, n = torch.randn(1, 172 * 128, generator=generator), 172 * 128
    assert gpu_transform.plan(172, 128).far == 172
    y = gpu_transform.rotate(x, 172, False, None, None)
    assert torch.allclose(
        y, transform._rotate(x, 172, False, torch.full((n,), n**-0.5), None), atol=1e-5
    )
    assert torch.allclose(gpu_transform.rotate(y, 172, True, None, None), x, atol=1e-5)


@pytest.mark.parametrize("n", [20, 576, 172 * 4])
def test_a_row_has_the_same_bits_whatever_the_others_are(n, generator):
    x = torch.randn(2, n, generator=generator)
    for transpose in (False, True):
        together = transform.rotate(x, transpose=transpose)
        assert torch.equal(transform.rotate(x[1:], transpose=transpose), together[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_what_its_values_give_in_fp32(dtype, generator):
    x, before = (
        torch.randn(2, 2, 96, generator=generator).to(dtype),
        torch.randn(96, generator=generator).half(),
    )
    got = transform.rotate(x, before=before)
    assert got.dtype == torch.float32
    assert torch.equal(got, transform.rotate(x.float(), before=before.float()))
    big = torch.full((1, 96), 6e4, dtype=dtype)
    assert transform.rotate(big).isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_infinite_input_of_a_rotation_stays_in_its_row(generator):
    x = torch.randn(3, 688, generator=generator)
    x[1, 5] = torch.inf
    finite = transform.rotate(x).isfinite()
    assert finite[[0, 2]].all()
    assert not finite[1].any()


def test_dimensions_without_a_kernel_are_left_to_torch(generator):
    assert gpu_transform.plan(8191, 1) is None
    x = torch.randn(1, 8191, generator=generator)
    assert torch.allclose(transform.rotate(transform.rotate(x), transpose=True), x, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_products_of_a_window_are_those_of_its_rows(bits, random_solution, generator):
    options = Options(bits=bits)
    solution = random_solution((24, 36), options)
    W = solution.dequantize(options)[5:16]
    packed, quantizer = window(from_solution(solution, options), 5, 16), QuIPSharpE8(options)
    for transpose, M in ((False, W.T), (True, W)):
        for dtype in DTYPES:
            x = torch.randn(3, len(M), generator=generator).to(dtype)
            error = (quantizer.matmul(x, packed, transpose) - x.double() @ M).norm() / (
                x.double() @ M
            ).norm()
            assert error <= 4 * ROUNDING[dtype] + 1e-5, (dtype, transpose)
    tile = quantizer.dequantize_tile(packed, (2, 9), torch.float32)
    assert (tile - W[2:9]).abs().max() <= 1e-5 * W.abs().max()
