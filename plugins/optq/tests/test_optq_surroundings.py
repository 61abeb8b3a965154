"""OPTQ's compiled kernels: mapped files, the end of memory, other processors, several threads."""

import pytest
from modulora_conformance.compiled_kernels import SHAPES, CompiledKernels
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, from_solution

BITS = (2, 3, 4, 8)


class TestKernels(CompiledKernels):
    instruction_sets = ("avx2",)  # the core and nf4 compare code without AVX2
    loops_of_core = True

    @pytest.fixture
    def quantizers(self):
        return [OPTQ(Options(bits=bits)) for bits in BITS]

    @pytest.fixture
    def weights(self, random_solution):
        """Every code and zero, permuted or not, with a scale for each 16 columns."""
        found = []
        for bits in BITS:
            options = Options(bits=bits, group_size=16)
            for i, shape in enumerate(SHAPES):
                solution = random_solution(shape, options, permuted=i % 2 == 1)
                found.append((OPTQ(options), from_solution(solution, options)))
        return found
