"""FP4's Triton kernels in Triton's interpreter: run by ``test_fp4_triton.py`` in a process with
``TRITON_INTERPRET=1``.
"""

import itertools

import pytest
import torch
from modulora_conformance.interpreted_kernels import InterpretedKernels
from modulora_fp4 import reference
from modulora_fp4.quantizer import FP4, Options

SHAPES = [(3, 96), (40, 544)]


class TestInterpreted(InterpretedKernels):
    @pytest.fixture(params=itertools.product(SHAPES, reference.BLOCK), ids=str)
    def weight(self, request):
        shape, kind = request.param
        quantizer = FP4(Options(type=kind))
        weight = quantizer.pack(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        return quantizer, weight, reference.dequantize(kind, *weight.tensors.values())
