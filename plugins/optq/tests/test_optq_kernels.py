"""Dense bit streams and the kernels that read them: every width, any shape, the same bits as plain torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_optq import packing, quantizer
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, codes_of, from_solution

from modulora_core import kernels

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("one_thread")

BITS = (2, 3, 4, 8)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 16), (7, 33), (1, 1), (5, 130), (37, 257), (5, 6144), (19, 2113), (3, 9001)]
"""The last is decoded in three pieces, whose ends are in the midst of groups; of 6144 columns every part consists of whole groups of 64."""
OPTIONS = [
    Options(bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product(BITS, (16, 64, 100, -1), (False, True))
]
PRODUCTS = [
    Options(bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in zip(
        2 * BITS, (16, 64, 100, -1, -1, 100, 64, 16), 4 * (True, False), strict=True
    )
]


def name(value):
    if isinstance(value, Options):
        return f"{value.bits}bit-g{value.group_size}{'-symmetric' if value.symmetric else ''}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def by_hand(solution, options):
    """Ŵ, fp32, in numpy: float(code − zero) · float(scale), and the columns to where they came from."""
    columns = np.arange(solution.codes.shape[1])
    group = columns // (len(columns) if options.group_size == -1 else options.group_size)
    steps = (
        solution.codes.numpy().astype(np.int32) - solution.zeros.numpy().astype(np.int32)[:, group]
    )
    stored = steps.astype(np.float32) * solution.scales.numpy().astype(np.float32)[:, group]
    W = np.empty_like(stored)
    W[:, columns if solution.permutation is None else solution.permutation.numpy()] = stored
    return torch.from_numpy(W)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 5), st.integers(0, 300))
def test_unpacking_gives_the_codes_that_were_packed(bits, rows, n):
    codes = torch.randint(
        0, 2**bits, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)
    )
    packed = packing.pack(codes, bits)
    assert packed.shape == (rows, packing.row_bytes(n, bits))
    assert torch.equal(packing.unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_whole_bytes_take_exactly_their_bits(bits):
    for n in range(0, 4096, 8):
        assert 8 * packing.row_bytes(n, bits) == bits * n


def test_a_row_of_three_bits_is_laid_out_as_documented():
    codes = torch.tensor(
        [[0b101, 0b010, 0b111, 0b000, 0b011, 0b100, 0b110, 0b001, 0b111]], dtype=torch.uint8
    )
    low = [
        0b10_00_01,
        0b01_11_10,
        0b11_00_11,
    ]  # a byte a column of (01 10 11), (00 11 00), (10 01 11), last part first
    high = [0b1_1_0_1_1, 0b0_1_0_0]  # likewise of (1 0), (1 0), (0 1), (1 0), (1)
    assert packing.pack(codes, 3).tolist() == [low + high]


@pytest.mark.parametrize("permuted", [False, True], ids=["own-order", "permuted"])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_kernels_give_the_bits_of_the_definition(options, permuted, random_solution):
    for shape in SHAPES:
        solution = random_solution(shape, options, permuted)
        packed, W = from_solution(solution, options), by_hand(solution, options)
        for dtype in DTYPES:
            tile = OPTQ(options).dequantize_tile(packed, (0, shape[0]), dtype)
            assert tile.dtype == dtype
            assert torch.equal(tile, W.to(dtype)), (shape, dtype)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from((16, 48, 64, 128, -1)),
    st.sampled_from((130, 512, 576, 1027, 1536)),
    st.booleans(),
    st.data(),
)
def test_any_columns_of_some_rows_are_decoded(
    random_solution, bits, size, columns, symmetric, data
):
    from modulora_optq.cpu_decode import decode  # which imports numba

    options = Options(bits=bits, group_size=size, symmetric=symmetric)
    solution = random_solution((4, columns), options)
    weight = kernels.operands(from_solution(solution, options), quantizer._operands)
    row, start = data.draw(st.integers(0, 3)), data.draw(st.integers(0, columns - 1))
    count = data.draw(st.integers(1, columns - start))
    wanted = by_hand(solution, options)[row:, start : start + count]
    for dtype, number in ((torch.float32, np.float32), (torch.bfloat16, np.int16)):
        out = np.full((4 - row, count + 5), 77, number)
        decode(weight, row, start, count, out)
        assert torch.equal(torch.from_numpy(out[:, :count]).view(dtype), wanted.to(dtype))
        assert (out[:, count:] == 77).all()


@pytest.mark.parametrize("permuted", [False, True], ids=["own-order", "permuted"])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_plain_torch_gives_the_bits_of_the_definition(
    options, permuted, random_solution, plain_torch
):
    for shape in SHAPES:
        solution = random_solution(shape, options, permuted)
        packed, W = from_solution(solution, options), by_hand(solution, options)
        for rows in {(0, shape[0]), (shape[0] // 3, shape[0] // 2), (shape[0], shape[0])}:
            for dtype in DTYPES:
                tile = OPTQ(options).dequantize_tile(packed, rows, dtype)
                assert torch.equal(tile, W[slice(*rows)].to(dtype)), (shape, rows, dtype)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_dequantize_tile_equals_rows_of_the_whole(data, random_solution):
    out_features, in_features = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 400))
    start = data.draw(st.integers(0, out_features))
    stop = data.draw(st.integers(start, out_features))
    options = Options(
        bits=data.draw(st.sampled_from(BITS)),
        group_size=data.draw(st.one_of(st.just(-1), st.integers(16, 200))),
        symmetric=data.draw(st.booleans()),
    )
    solution = random_solution((out_features, in_features), options, data.draw(st.booleans()))
    packed, W = from_solution(solution, options), by_hand(solution, options)
    for dtype in DTYPES:
        part = OPTQ(options).dequantize_tile(packed, (start, stop), dtype)
        assert torch.equal(part, W[start:stop].to(dtype))


def test_a_tile_of_many_rounding_pieces_is_rounded_once(random_solution):
    options = Options(bits=3)
    packed = from_solution(
        random_solution((701, 1027), options, True), options
    )  # 2.7 MiB of fp32, odd rows
    whole = OPTQ(options).dequantize_tile(packed, (0, 701), torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(
            OPTQ(options).dequantize_tile(packed, (3, 700), dtype), whole[3:700].to(dtype)
        )


# fp32 sums of n products of any order differ by about sqrt(n) roundings; an output in 16 bits is rounded once more, and where the
# processor multiplies bf16 numbers the weights are too
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float64: 1e-15,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-7,
}


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("permuted", [False, True], ids=["own-order", "permuted"])
@pytest.mark.parametrize("options", PRODUCTS, ids=name)
def test_matmul_equals_the_product_with_the_definition(
    options, permuted, transpose, generator, random_solution
):
    for shape in [(1, 16), (7, 33), (37, 257), (19, 2113)]:
        solution = random_solution(shape, options, permuted)
        packed, W = from_solution(solution, options), by_hand(solution, options).double()
        for rows, dtype in itertools.product((0, 1, 2, 5, 31, 40), DTYPES):
            x = torch.randn(rows, shape[0] if transpose else shape[1], generator=generator).to(
                dtype
            )
            y = OPTQ(options).matmul(x, packed, transpose)
            exact = x.double() @ (W if transpose else W.t())
            magnitude = x.double().abs() @ (W if transpose else W.t()).abs()
            assert y.dtype == dtype
            assert y.shape == exact.shape
            # fp16 has steps of 2⁻²⁴ near zero
            allowed = TOLERANCE[dtype] * magnitude + (2**-25 if dtype == torch.float16 else 0)
            assert bool(((y.double() - exact).abs() <= allowed).all()), (shape, rows, dtype)


@pytest.mark.parametrize("bits", BITS)
def test_products_without_kernels_equal_those_with_them(
    bits, generator, random_solution, monkeypatch
):
    options = Options(bits=bits)
    packed = from_solution(random_solution((130, 257), options, True), options)
    x, y = torch.randn(3, 257, generator=generator), torch.randn(3, 130, generator=generator)
    compiled = OPTQ(options).matmul(x, packed), OPTQ(options).matmul(y, packed, True)
    monkeypatch.setattr(kernels, "load", lambda module, device: None)
    torch.testing.assert_close(OPTQ(options).matmul(x, packed), compiled[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        OPTQ(options).matmul(y, packed, True), compiled[1], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("permuted", [False, True], ids=["own-order", "permuted"])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_codes_of_is_the_inverse_of_from_solution(options, permuted, random_solution):
    solution = random_solution((13, 203), options, permuted)
    again = codes_of(from_solution(solution, options))
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(again, field), getattr(solution, field)), field
    if permuted:
        assert torch.equal(again.permutation, solution.permutation)
    else:
        assert again.permutation is None


def test_few_row_products_do_not_depend_on_the_number_of_threads(generator, random_solution):
    options = Options(bits=3)
    packed = from_solution(random_solution((96, 1500), options, True), options)
    x, y = torch.randn(3, 1500, generator=generator), torch.randn(3, 96, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = OPTQ(options).matmul(x, packed), OPTQ(options).matmul(y, packed, True)
        torch.set_num_threads(2)
        two = OPTQ(options).matmul(x, packed), OPTQ(options).matmul(y, packed, True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
