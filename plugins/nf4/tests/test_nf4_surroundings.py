"""NF4's compiled kernels outside of the ordinary: mapped files, threads, processors, no numba."""

import pytest
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_nf4.quantizer import NF4, Options


class TestKernels(CompiledKernels):
    packing_share = 2.5
    instruction_sets = True

    @pytest.fixture
    def quantizers(self):
        options = {}, {"double_quant": True}, {"block_size": 2}, {"block_size": 8}
        return [NF4(Options(**chosen)) for chosen in options]
