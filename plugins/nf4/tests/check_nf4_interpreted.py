"""NF4's Triton kernels in Triton's interpreter: run by ``test_nf4_triton.py`` in a process with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import pytest
import torch
from modulora_conformance.oracle import product_error
from modulora_conformance.tolerances import PRODUCT
from modulora_nf4 import gpu, packing, reference
from modulora_nf4.quantizer import NF4, Options

from modulora_core import kernels

SHAPES = [(1, 1), (3, 5), (17, 130), (40, 192)]
"""One weight; an odd number, so that rows begin in the middle of a byte and of a block; rows that don't begin with one; rows that do."""


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten(monkeypatch):
    """New memory holds NaN, so that what a kernel forgot isn't a zero by chance."""
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def packed(shape, **options):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return NF4(Options(**options)).pack(weight)


def truth(weight):
    """Ŵ by the reference alone, fp32."""
    tensors, B = weight.tensors, weight.metadata["block_size"]
    out_features, in_features = weight.shape
    numel = out_features * in_features
    c2 = tensors.get("absmax")
    if c2 is None:
        nested = tensors["absmax_codes"], tensors["nested_absmax"], tensors["offset"]
        c2 = reference.double_dequantize(*nested)
    return reference.dequantize(packing.unpack(tensors["codes"], 0, numel), c2, B).view(weight.shape)


OPTIONS = [
    {}, {"double_quant": True}, {"block_size": 1}, {"block_size": 16, "double_quant": True}, {"block_size": 4096},
]  # fmt: skip
KINDS = pytest.mark.parametrize("options", OPTIONS, ids=str)


def test_cpu_tensors_are_given_to_the_kernels():
    assert kernels.load_triton("modulora_nf4.gpu", torch.device("cpu")) is gpu


@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_the_reference_bit_for_bit(shape, options):
    weight, rows = packed(shape, **options), shape[0]
    expected = truth(weight)
    for dtype, (start, stop) in (
        (torch.float32, (0, rows)), (torch.float32, (rows // 2, rows // 2 + 1)), (torch.bfloat16, (1, rows)), (torch.float16, (0, rows)),
        (torch.float64, (rows // 3, rows)), (torch.float32, (rows, rows)),
    ):  # fmt: skip
        tile = gpu.dequantize(weight, (start, stop), dtype)
        assert torch.equal(tile, expected[start:stop].to(dtype)), (dtype, start, stop)


@KINDS
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.float32), (3, torch.bfloat16), (17, torch.float16)], ids=str
)
def test_products_are_those_of_the_reference(rows, dtype, options):
    for shape in SHAPES:
        weight = packed(shape, **options)
        for transpose in (False, True):
            x = torch.randn(
                rows, shape[0 if transpose else 1], generator=torch.Generator().manual_seed(1)
            ).to(dtype)
            y = gpu.matmul(x, weight, transpose)
            assert y.dtype == dtype
            error = product_error(y, x, truth(weight).double(), transpose)
            assert error <= PRODUCT[dtype].value, (shape, transpose, PRODUCT[dtype].reason)


def test_a_sum_in_many_shares_is_the_same_every_time():
    weight = packed((40, 2048))
    x = torch.randn(1, 2048, generator=torch.Generator().manual_seed(1))
    y = gpu.matmul(x, weight, False)
    assert torch.equal(gpu.matmul(x, weight, False), y)
    assert product_error(y, x, truth(weight).double(), False) <= PRODUCT[torch.float32].value


def test_many_rows_and_fp64_are_left_to_tiles():
    weight = packed((8, 64))
    assert gpu.matmul(torch.ones(33, 64), weight, False) is None
    assert gpu.matmul(torch.ones(1, 64, dtype=torch.float64), weight, False) is None
    x = torch.ones(33, 64, dtype=torch.float64)
    assert (
        product_error(NF4().matmul(x, weight), x, truth(weight).double(), False)
        <= PRODUCT[torch.float64].value
    )
