"""The Triton kernels in Triton's interpreter, against the definition and fp64 matrices.

test_quip_triton.py runs it in a process with ``TRITON_INTERPRET=1``, which Triton reads once.
"""

import pytest
import torch
import triton
import triton.language as tl
from modulora_conformance.interpreted_kernels import poison_new_memory
from modulora_kernels import rotation
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.kernels import gpu
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, packed_of, window
from modulora_quip_sharp_e8.reference import Options

from modulora_core.packed import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")

BITS = (2, 3, 4)
SHAPES = [(1, 1), (3, 5), (17, 130), (9, 520)]
"""Not all whole blocks, nor whole words of eight codes."""
COUNTS = [(torch.float32, 1), (torch.float32, 3), (torch.float16, 2), (torch.bfloat16, 17),
          (torch.bfloat16, 40)]  # fmt: skip
"""Dtypes and rows of x: sums, a small product of blocks, a large one, and tiles."""
SUMS = 1e-6
"""The error of fp32 sums of some hundred terms, by the sum of magnitudes."""
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""The error of one rounding. A product has three: of x, of C, and of the sum."""


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


def random_C(shape, bits, generator):
    """Codes of every bit pattern, and C in fp32."""

    def draw(dtype):
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        return torch.randint(low, high + 1, blocks, generator=generator, dtype=dtype)

    blocks = (shape[0], -(-shape[1] // 8))
    held = {"codes": draw(torch.int16)}
    if bits > 2:
        held["residual"] = draw(torch.uint8 if bits == 3 else torch.int16)
    C = PackedWeight("quip-sharp-e8", 1, shape, held, {"bits": bits})
    return C, codebooks.decode(held["codes"], held.get("residual"), bits)[:, : shape[1]]


@triton.jit
def one_block(weight, out, OPTIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    values = gpu.decode(weight, 0, 0, ROWS, COLUMNS, OPTIONS, ROWS, COLUMNS)
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], values)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_decodes_to_its_point(bits):
    codes = torch.arange(1 << 16).to(torch.int16).reshape(256, 256)
    residual = {2: None, 3: codes.to(torch.uint8), 4: codes.flip(0).contiguous()}[bits]
    held = {"codes": codes} | ({} if residual is None else {"residual": residual})
    C = PackedWeight("quip-sharp-e8", 1, (256, 2048), held, {"bits": bits})
    out = torch.empty(256, 2048)
    one_block[(1,)](gpu.operands(C), out, OPTIONS=gpu.options(C), ROWS=256, COLUMNS=2048)
    assert torch.equal(out, codebooks.decode(codes, residual, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_and_products_are_the_definitions(shape, bits, generator):
    C, dense = random_C(shape, bits, generator)
    for dtype in (torch.float32, torch.bfloat16):
        for first in (0, shape[0] // 2):
            tile = gpu.tile(C, (first, shape[0]), dtype)
            assert torch.equal(tile, dense[first:].to(dtype))
    for dtype, n in COUNTS:
        for transpose, M in ((False, dense.T.double()), (True, dense.double())):
            x = torch.randn(n, len(M), generator=generator)
            y = gpu.multiply(x, C, transpose, dtype)
            limit = (3 * ROUNDING[dtype] + SUMS) * (x.double().abs() @ M.abs())
            assert y.dtype == torch.float32
            assert ((y - x.double() @ M).abs() <= limit).all(), (dtype, n, transpose)


def test_inputs_beyond_the_range_of_fp16_and_zeros_multiply_in_fp16(generator):
    C, dense = random_C((9, 520), 2, generator)
    x = torch.randn(3, 520, generator=generator) * torch.tensor([[1e7], [0.0], [1e-9]])
    y = gpu.multiply(x, C, False, torch.float16)
    M = dense.T.double()
    assert ((y - x.double() @ M).abs() <= 4 * 2**-11 * (x.double().abs() @ M.abs())).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, where Inf meets Inf
def test_infinite_inputs_stay_in_their_row(generator):
    C, _ = random_C((9, 64), 2, generator)
    for transpose, size in ((False, 64), (True, 9)):
        x = torch.randn(3, size, generator=generator)
        x[0, 3] = torch.inf
        y = gpu.multiply(x, C, transpose, torch.float16)
        assert not y[0].isfinite().any()
        assert y[1:].isfinite().all()
    x = torch.randn(3, 688, generator=generator)
    x[1, 5] = torch.inf
    finite = rotation.rotate(x).isfinite()
    assert finite[[0, 2]].all()
    assert not finite[1].any()


# by plan: one kernel, one with Hartley's matrix, segments that go together or apart
@pytest.mark.parametrize("n", [1, 12, 96, 107, 256, 576, 1712, 172 * 16])
def test_rotation_is_the_product_with_the_dense_matrix(n, generator):
    H, x = rotation.matrix(n), torch.randn(2, n, generator=generator)
    scale, unit = torch.randn(n, generator=generator).half(), torch.tensor([1.5])
    s = 1.5 * scale.double()
    for transpose, M in ((False, H), (True, H.T)):
        for after, expected in ((False, (x * s) @ M), (True, (x.double() @ M) * s)):
            got = rotation.rotate(x, scale, unit, after=after, transpose=transpose)
            size = (x.double().norm(dim=1, keepdim=True) / n**0.5) * s.abs().max()
            assert ((got - expected).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("bits", BITS)
def test_products_of_a_window_are_products_with_its_rows(bits, random_solution, generator):
    options = Options(bits=bits)
    solution = random_solution((24, 36), options)
    W = solution.dequantize(bits)[5:16]
    packed, quantizer = window(packed_of(solution, options), 5, 16), QuIPSharpE8(options)
    for transpose, M in ((False, W.T), (True, W)):
        for dtype in ROUNDING:
            x = torch.randn(3, len(M), generator=generator).to(dtype)
            expected = x.double() @ M
            error = (quantizer.matmul(x, packed, transpose) - expected).norm() / expected.norm()
            assert error <= 4 * ROUNDING[dtype] + 1e-5, (dtype, transpose)
    tile = quantizer.dequantize_tile(packed, (2, 9), torch.float32)
    assert (tile - W[2:9]).abs().max() <= 1e-5 * W.abs().max()
