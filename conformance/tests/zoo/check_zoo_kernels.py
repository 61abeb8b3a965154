"""Subclasses for ``test_kernel_checks.py``, which runs them in processes of their own."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
import zoo_kernels
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_conformance.interpreted_kernels import InterpretedKernels
from modulora_zoo.devices import InTriton, TritonWithoutMask
from modulora_zoo.healthy import Healthy

for name, spec in zoo_kernels.SPECS.items():

    def quantizers(self, spec=spec):
        module, cls = spec.location.split(":")
        return [getattr(importlib.import_module(module), cls)()]

    share = 4.0 if "Packs" in name else None
    members = {
        "quantizers": pytest.fixture(quantizers),
        "packing_share": share,
        "instruction_sets": True,
    }
    globals()[f"Test{name}"] = type(f"Test{name}", (CompiledKernels,), members)


if os.environ.get("TRITON_INTERPRET") == "1":

    class Interpreted(InterpretedKernels):
        cls: type[Healthy]

        @pytest.fixture(params=[(1, 2), (5, 70)], ids=str)
        def weight(self, request):
            quantizer = self.cls()
            packed = quantizer.pack(
                torch.randn(request.param, generator=torch.Generator().manual_seed(0))
            )
            return quantizer, packed, Healthy.decode(quantizer, packed, (0, request.param[0]))

    class TestInTriton(Interpreted):
        cls = InTriton

    class TestWithoutMask(Interpreted):
        cls = TritonWithoutMask
