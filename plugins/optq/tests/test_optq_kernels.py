"""Packed bits, and the CPU kernels that read them, beside a definition in numpy."""

from __future__ import annotations

import modulora_kernels as kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_conformance.fixtures import without_kernels
from modulora_conformance.oracle import product_error
from modulora_conformance.tolerances import PRODUCT
from modulora_optq import packing
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, from_solution, to_solution

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("one_thread")

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

ODD = [
    (2, 16, False, True, (5, 130)),
    (3, -1, True, False, (1, 1)),
    (3, 64, False, True, (19, 2113)),  # decoded in pieces, which end inside a group
    (4, 100, False, False, (37, 257)),
    (8, 64, True, True, (5, 6144)),  # each part has whole groups
    (8, 16, False, False, (7, 33)),
]
"""Bits, group size, symmetric, permuted, shape."""

some_options = st.builds(
    Options,
    bits=st.sampled_from(BITS),
    group_size=st.just(-1) | st.integers(16, 200),
    symmetric=st.booleans(),
    damping=st.just(0.1),
)


def by_definition(solution, options):
    """Ŵ, fp32, in numpy: float(code − zero) · float(scale), each column in its own place."""
    columns = np.arange(solution.codes.shape[1])
    group = columns // (len(columns) if options.group_size == -1 else options.group_size)
    codes, zeros = (t.numpy().astype(np.int32) for t in (solution.codes, solution.zeros))
    steps = (codes - zeros[:, group]).astype(np.float32)
    stored = steps * solution.scales.numpy().astype(np.float32)[:, group]
    W = np.empty_like(stored)
    W[:, columns if solution.permutation is None else solution.permutation.numpy()] = stored
    return torch.from_numpy(W)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 5), st.integers(0, 300))
def test_unpacking_gives_the_codes_that_were_packed(bits, rows, n):
    numbers = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=numbers)
    packed = packing.pack(codes, bits)
    assert packed.shape == (rows, packing.row_bytes(n, bits))
    assert n % 8 or 8 * packing.row_bytes(n, bits) == bits * n
    assert torch.equal(packing.unpack(packed, bits, n), codes)


def test_a_row_of_three_bits_has_two_planes():
    codes = torch.tensor(
        [[0b101, 0b010, 0b111, 0b000, 0b011, 0b100, 0b110, 0b001, 0b111]], dtype=torch.uint8
    )
    low = [0b10_00_01, 0b01_11_10, 0b11_00_11]  # parts (01 10 11), (00 11 00), (10 01 11)
    high = [0b1_1_0_1_1, 0b0_1_0_0]  # parts (1 0), (1 0), (0 1), (1 0), (1)
    assert packing.pack(codes, 3).tolist() == [low + high]


@pytest.fixture(params=ODD, ids=str)
def odd(request, random_solution):
    """Quantizer, packed weight, Ŵ."""
    bits, size, symmetric, permuted, shape = request.param
    options = Options(bits=bits, group_size=size, symmetric=symmetric)
    solution = random_solution(shape, options, permuted)
    return OPTQ(options), from_solution(solution, options), by_definition(solution, options)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "plain torch"])
def test_tiles_have_the_bits_of_the_definition(odd, compiled, monkeypatch):
    if not compiled:
        without_kernels(monkeypatch)
    quantizer, packed, W = odd
    out_features = len(W)
    for start, stop in ((0, out_features), (out_features // 3, out_features - out_features // 4)):
        for dtype in DTYPES:
            tile = quantizer.dequantize_tile(packed, (start, stop), dtype)
            assert torch.equal(tile, W[start:stop].to(dtype)), (start, dtype)


@settings(max_examples=60, deadline=None)
@given(some_options, st.integers(1, 20), st.integers(1, 400), st.booleans(), st.data())
def test_any_rows_of_any_weight_have_the_bits_of_the_definition(
    random_solution, options, out_features, in_features, permuted, data
):
    start = data.draw(st.integers(0, out_features))
    stop = data.draw(st.integers(start, out_features))
    solution = random_solution((out_features, in_features), options, permuted)
    packed, W = from_solution(solution, options), by_definition(solution, options)
    for dtype in DTYPES:
        tile = OPTQ(options).dequantize_tile(packed, (start, stop), dtype)
        assert torch.equal(tile, W[start:stop].to(dtype))
    again = to_solution(packed)
    for field in ("codes", "scales", "zeros", "permutation"):
        expected = getattr(solution, field)
        assert expected is getattr(again, field) or torch.equal(getattr(again, field), expected)


@settings(max_examples=60, deadline=None)
@given(some_options, st.sampled_from((130, 512, 576, 1027)), st.data())
def test_any_columns_of_some_rows_are_decoded(random_solution, options, columns, data):
    """Products decode pieces of rows."""
    from modulora_optq.kernels.cpu import decode, operands

    solution = random_solution((4, columns), options)
    weight = kernels.operands(from_solution(solution, options), operands)
    row, start = data.draw(st.integers(0, 3)), data.draw(st.integers(0, columns - 1))
    count = data.draw(st.integers(1, columns - start))
    wanted = by_definition(solution, options)[row:, start : start + count]
    for dtype, number in ((torch.float32, np.float32), (torch.bfloat16, np.int16)):
        out = np.full((4 - row, count + 5), 77, number)
        decode(weight, row, start, count, out)
        assert torch.equal(torch.from_numpy(out[:, :count]).view(dtype), wanted.to(dtype))
        assert (out[:, count:] == 77).all()


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
def test_products_equal_the_product_with_the_definition(
    odd, transpose, compiled, generator, monkeypatch
):
    if not compiled:
        without_kernels(monkeypatch)
    quantizer, packed, W = odd
    for rows in (0, 1, 2, 5, 40):
        for dtype in DTYPES:
            x = torch.randn(rows, len(W) if transpose else W.shape[1], generator=generator)
            x = x.to(dtype)
            y = quantizer.matmul(x, packed, transpose)
            assert y.dtype == dtype
            assert product_error(y, x, W.double(), transpose) <= PRODUCT[dtype].value


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "shape"),
    [
        (2, 64, False, (45, 576)),  # 45 rows: the last of 16 are fewer
        (3, 16, False, (3, 2048)),  # zeros of a row are in several chunks
        (3, 64, True, (2, 576)),  # a plane of third bits that ends inside 32 bytes
        (3, 64, False, (19, 64)),  # too short for the kernel
        (4, -1, False, (1, 64)),
        (8, 32, False, (19, 192)),
        (4, 24, False, (5, 192)),  # groups of no whole vectors: not the kernel for one row
    ],
)
def test_a_product_of_one_row_equals_the_product_with_the_definition(
    bits, group_size, symmetric, shape, random_solution
):
    options = Options(bits=bits, group_size=group_size, symmetric=symmetric)
    solution = random_solution(shape, options)
    packed, W = from_solution(solution, options), by_definition(solution, options).double()
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(0))
    y = OPTQ(options).matmul(x, packed)
    assert product_error(y, x, W) <= PRODUCT[torch.float32].value


@pytest.mark.parametrize("permuted", [False, True], ids=["own order", "permuted"])
def test_looked_up_rows_have_the_bits_of_tiles(permuted, random_solution):
    options = Options(bits=3)
    packed = from_solution(random_solution((41, 130), options, permuted), options)
    W = OPTQ(options).dequantize_tile(packed, (0, 41), torch.bfloat16)
    ids = torch.tensor([[40, 0, 7], [7, 3, 40]])
    assert torch.equal(OPTQ(options).lookup(ids, packed, torch.bfloat16), W[ids])
