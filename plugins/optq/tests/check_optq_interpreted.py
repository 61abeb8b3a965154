"""The Triton kernels in Triton's interpreter, on CPU tensors: run by ``test_optq_triton.py`` in a process with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import pytest
import torch
from modulora_conformance.interpreted_kernels import poison_new_memory
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, _gpu, from_solution

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# bits, group size, symmetric, permuted, shape: parts of whole groups and not, runs of 1, 2, 8 and 16, rows that end inside of a byte
CASES = [
    (2, 16, False, True, (5, 130)),
    (2, 64, True, False, (3, 256)),
    (3, 16, False, True, (17, 130)),
    (3, 32, False, False, (3, 256)),
    (3, 24, True, True, (2, 192)),
    (3, -1, False, False, (3, 5)),
    (4, 64, False, True, (5, 128)),
    (4, 100, True, False, (3, 210)),
    (4, 16, False, False, (1, 1)),
    (8, 16, False, True, (17, 130)),
    (8, -1, False, False, (2, 48)),
]


@pytest.fixture(
    params=CASES, ids=lambda case: f"{case[0]}bit-g{case[1]}-{'x'.join(map(str, case[4]))}"
)
def case(request, random_solution, monkeypatch):
    bits, size, symmetric, permuted, shape = request.param
    options = Options(bits=bits, group_size=size, symmetric=symmetric)
    solution = random_solution(shape, options, permuted)
    packed = from_solution(solution, options)
    poison_new_memory(monkeypatch)
    return OPTQ(options), packed, solution.dequantize(options)


def test_the_kernels_are_those_of_triton():
    assert _gpu(torch.device("cpu")) is not None


def test_tiles_have_the_bits_of_the_reference(case):
    optq, packed, W = case
    out_features = packed.shape[0]
    for dtype in DTYPES:
        assert torch.equal(optq.dequantize_tile(packed, (0, out_features), dtype), W.to(dtype)), (
            dtype
        )
    rows = (out_features // 3, out_features - out_features // 4)
    assert torch.equal(optq.dequantize_tile(packed, rows, torch.float64), W[slice(*rows)].double())
    assert optq.dequantize_tile(packed, (1, 1), torch.float16).shape == (0, packed.shape[1])


# fp32 sums in any order; in 16 bits the result is rounded once, and of more than one row Ŵ too
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2 * 2**-11, torch.bfloat16: 2 * 2**-8}


def assert_product(y, x, matrix):
    magnitude = x.double().abs() @ matrix.abs()
    # fp16 has steps of 2⁻²⁴ near zero, in the result and in every weight
    steps = (
        2**-25 * (1 + x.double().abs().sum(dim=1, keepdim=True)) if x.dtype == torch.float16 else 0
    )
    assert y.dtype == x.dtype
    error = (y.double() - x.double() @ matrix).abs()
    assert bool((error <= TOLERANCE[x.dtype] * magnitude + steps).all()), (x.shape, x.dtype)


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
def test_products_equal_those_with_the_reference(case, transpose, generator):
    optq, packed, W = case
    matrix = (W if transpose else W.t()).double()
    for dtype, rows in zip(DTYPES, (1, 5, 1) if transpose else (3, 1, 18), strict=True):
        x = torch.randn(rows, len(matrix), generator=generator).to(dtype)
        assert_product(optq.matmul(x, packed, transpose), x, matrix)


def test_a_sum_cut_into_shares_is_whole(random_solution, generator):
    options = Options(bits=4, group_size=64)
    # 812 columns a part: two blocks, each a share of its own; and three of the rows
    solution = random_solution((40, 1624), options)
    packed, W = from_solution(solution, options), solution.dequantize(options).double()
    for transpose, matrix in ((False, W.t()), (True, W)):
        x = torch.randn(1, len(matrix), generator=generator)
        assert_product(OPTQ(options).matmul(x, packed, transpose), x, matrix)
