"""INT8's Triton kernels in Triton's interpreter: run by ``test_int8_triton.py`` in a process with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import pytest
import torch
from modulora_conformance.oracle import product_error
from modulora_conformance.tolerances import PRODUCT
from modulora_int8 import gpu, reference
from modulora_int8.quantizer import INT8, Options

from modulora_core import kernels

SHAPES = [(1, 1), (3, 5), (17, 130), (40, 192)]
"""One weight; rows at odd addresses, with a short last group; and rows of whole groups."""


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten(monkeypatch):
    """New memory holds NaN, so that what a kernel forgot isn't a zero by chance."""
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def packed(shape, group_size):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return INT8(Options(group_size=group_size)).pack(weight)


def truth(weight):
    """Ŵ by the reference alone, fp32."""
    tensors = weight.tensors
    return reference.dequantize(tensors["codes"], tensors["scales"], weight.metadata["group_size"])


GROUPS = pytest.mark.parametrize("group_size", [None, 2, 24, 64, 4096], ids=str)


def test_cpu_tensors_are_given_to_the_kernels():
    assert kernels.load_triton("modulora_int8.gpu", torch.device("cpu")) is gpu


@GROUPS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_the_reference_bit_for_bit(shape, group_size):
    weight, rows = packed(shape, group_size), shape[0]
    expected = truth(weight)
    for dtype, (start, stop) in (
        (torch.float32, (0, rows)), (torch.float32, (rows // 2, rows // 2 + 1)), (torch.bfloat16, (1, rows)), (torch.float16, (0, rows)),
        (torch.float64, (rows // 3, rows)), (torch.float32, (rows, rows)),
    ):  # fmt: skip
        tile = gpu.dequantize(weight, (start, stop), dtype)
        assert torch.equal(tile, expected[start:stop].to(dtype)), (dtype, start, stop)


@GROUPS
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.float32), (3, torch.bfloat16), (17, torch.float16)], ids=str
)
def test_products_are_those_of_the_reference(rows, dtype, group_size):
    for shape in SHAPES:
        weight = packed(shape, group_size)
        for transpose in (False, True):
            x = torch.randn(
                rows, shape[0 if transpose else 1], generator=torch.Generator().manual_seed(1)
            ).to(dtype)
            y = gpu.matmul(x, weight, transpose)
            assert y.dtype == dtype
            error = product_error(y, x, truth(weight).double(), transpose)
            assert error <= PRODUCT[dtype].value, (shape, transpose, PRODUCT[dtype].reason)


def test_many_rows_are_left_to_tiles():
    weight = packed((8, 64), None)
    assert gpu.matmul(torch.ones(33, 64), weight, False) is None
    x = torch.ones(33, 64)
    assert (
        product_error(INT8().matmul(x, weight), x, truth(weight).double(), False)
        <= PRODUCT[torch.float32].value
    )
