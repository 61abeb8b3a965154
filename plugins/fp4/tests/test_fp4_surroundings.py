"""FP4's compiled kernels outside of the ordinary: mapped files, threads, processors, no numba."""

import pytest
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_fp4.quantizer import FP4, Options


class TestKernels(CompiledKernels):
    packing_share = 1.5
    instruction_sets = ("avx2",)  # the core and nf4 compare code without AVX2
    loops_of_core = True

    @pytest.fixture
    def quantizers(self):
        return [FP4(Options(type=kind)) for kind in ("mxfp4", "nvfp4")]
