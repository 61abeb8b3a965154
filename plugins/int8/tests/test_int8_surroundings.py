"""INT8's compiled kernels outside of the ordinary: mapped files, threads, processors, no numba."""

import pytest
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_int8.quantizer import INT8, Options


class TestKernels(CompiledKernels):
    packing_share = 2.5

    @pytest.fixture
    def quantizers(self):
        return [INT8(Options(group_size=group_size)) for group_size in (None, 48)]
