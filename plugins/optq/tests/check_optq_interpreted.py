"""The Triton kernels in Triton's interpreter, on CPU tensors.

``test_optq_triton.py`` runs this file in a process with ``TRITON_INTERPRET=1``.
"""

import pytest
import torch
from modulora_conformance.interpreted_kernels import InterpretedKernels
from modulora_conformance.oracle import product_error
from modulora_conformance.tolerances import PRODUCT
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, from_solution

CASES = [
    (2, 16, False, True, (5, 130)),
    (2, 64, True, False, (3, 256)),
    (3, 16, False, True, (17, 130)),
    (3, 24, True, True, (2, 192)),
    (3, -1, False, False, (3, 5)),
    (4, 64, False, True, (5, 128)),
    (4, 100, True, False, (3, 210)),
    (4, 16, False, False, (1, 1)),
    (8, 16, False, True, (17, 130)),
]
"""Bits, group size, symmetric, permuted, shape: parts of whole groups and not, runs of 1 to 16
columns, and rows that end inside a byte."""


class TestInterpreted(InterpretedKernels):
    @pytest.fixture(params=CASES, ids=str)
    def weight(self, request, random_solution):
        bits, size, symmetric, permuted, shape = request.param
        options = Options(bits=bits, group_size=size, symmetric=symmetric)
        solution = random_solution(shape, options, permuted)
        return OPTQ(options), from_solution(solution, options), solution.dequantize(options)


def test_a_sum_cut_into_shares_is_whole(random_solution, generator):
    options = Options(bits=4, group_size=64)
    # 812 columns a part: two blocks, each a share of its own; and three of the rows
    solution = random_solution((40, 1624), options)
    packed, W = from_solution(solution, options), solution.dequantize(options).double()
    for transpose in (False, True):
        x = torch.randn(1, W.shape[not transpose], generator=generator)
        y = OPTQ(options).matmul(x, packed, transpose)
        assert product_error(y, x, W, transpose) <= PRODUCT[torch.float32].value
