"""A sound and a broken Triton kernel for the checks of interpreted kernels. Tests run it."""

import pytest
import torch
from modulora_conformance.interpreted_kernels import InterpretedKernels
from modulora_zoo.devices import InTriton, TritonWithoutMask
from modulora_zoo.healthy import Healthy


class TestInTriton(InterpretedKernels):
    cls = InTriton

    @pytest.fixture(params=[(1, 2), (5, 70)], ids=str)
    def weight(self, request):
        quantizer = self.cls()
        weight = torch.randn(request.param, generator=torch.Generator().manual_seed(0))
        packed = quantizer.pack(weight)
        return quantizer, packed, Healthy.decode(quantizer, packed, (0, len(weight)))


class TestWithoutMask(TestInTriton):
    cls = TritonWithoutMask
