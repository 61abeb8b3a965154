"""NF4's Triton kernels in Triton's interpreter: run by ``test_nf4_triton.py`` in a process with
``TRITON_INTERPRET=1``.
"""

import itertools

import pytest
import torch
from modulora_conformance.interpreted_kernels import InterpretedKernels
from modulora_conformance.oracle import product_error
from modulora_conformance.tolerances import PRODUCT
from modulora_kernels.triton import write_tile
from modulora_nf4.kernels import gpu
from modulora_nf4.quantizer import NF4, Options

SHAPES = [(1, 1), (3, 5), (17, 130), (40, 192)]
"""One weight; rows that begin inside of a byte; rows that begin inside, and at the start, of a
block."""
OPTIONS = [
    {}, {"double_quant": True}, {"block_size": 1}, {"block_size": 16, "double_quant": True},
    {"block_size": 4096},
]  # fmt: skip


def packed(shape, **options):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return NF4(Options(**options)).pack(weight)


class TestInterpreted(InterpretedKernels):
    @pytest.fixture(params=itertools.product(SHAPES, OPTIONS), ids=str)
    def weight(self, request, by_the_reference):
        shape, options = request.param
        weight = packed(shape, **options)
        return NF4(Options(**options)), weight, by_the_reference(weight)


def test_a_sum_in_many_shares_is_the_same_every_time(by_the_reference):
    weight = packed((40, 2048))
    x = torch.randn(1, 2048, generator=torch.Generator().manual_seed(1))
    y = gpu.product(x, weight, False)
    assert torch.equal(gpu.product(x, weight, False), y)
    W = by_the_reference(weight).double()
    assert product_error(y, x, W, False) <= PRODUCT[torch.float32].value


def test_many_rows_and_fp64_are_left_to_tiles():
    weight = packed((8, 64))
    assert gpu.product(torch.ones(33, 64), weight, False) is None
    assert gpu.product(torch.ones(1, 64, dtype=torch.float64), weight, False) is None


@pytest.mark.parametrize("below", [1, 63])
def test_a_flat_index_just_below_2_to_the_31_does_not_wrap(below, by_the_reference):
    """Ŵ is one row of so many elements. Its first block alone is here to be read."""
    weight = packed((1, 64))
    tensors, levels = weight.tensors, gpu.operands(weight)[1]
    flat = tensors["codes"], levels, 2**30 - below // 2, tensors["absmax"]
    out = torch.full((1, 64), torch.nan)
    write_tile(
        gpu.decode, flat, out, (0, 1), (1, 2**31 - below), (6, True, False), columns=(0, 64),
        align=64,
    )  # fmt: skip
    assert torch.equal(out, by_the_reference(weight))
