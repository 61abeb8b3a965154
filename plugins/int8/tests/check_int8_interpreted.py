"""INT8's Triton kernels in Triton's interpreter: run by ``test_int8_triton.py`` in a process with
``TRITON_INTERPRET=1``.
"""

import itertools

import pytest
import torch
from modulora_conformance.interpreted_kernels import InterpretedKernels
from modulora_int8 import reference
from modulora_int8.kernels import gpu
from modulora_int8.quantizer import INT8, Options

SHAPES = [(1, 1), (3, 5), (17, 130), (40, 192)]
"""One weight; rows at odd addresses, with a short last group; and rows of whole groups."""


class TestInterpreted(InterpretedKernels):
    @pytest.fixture(params=itertools.product(SHAPES, [None, 2, 24, 64, 4096]), ids=str)
    def weight(self, request):
        shape, group_size = request.param
        quantizer = INT8(Options(group_size=group_size))
        packed = quantizer.pack(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        tensors = packed.tensors
        return (
            quantizer,
            packed,
            reference.dequantize(tensors["codes"], tensors["scales"], group_size),
        )


def test_many_rows_are_left_to_tiles():
    packed = INT8().pack(torch.ones(8, 64))
    assert gpu.product(torch.ones(33, 64), packed, False) is None
