"""QuIP#'s compiled kernels: mapped files, the end of memory, other processors, several threads."""

import pytest
from modulora_conformance.compiled_kernels import SHAPES, CompiledKernels
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, packed_of
from modulora_quip_sharp_e8.reference import Options

BITS = (2, 3, 4)


@pytest.mark.slow
class TestKernels(CompiledKernels):
    instruction_sets = ("avx2",)  # the core and nf4 compare code without AVX2
    loops_of_core = True
    rounding = 1e-5
    """A tile is a rotation, whose sums are made in another order. A wrong code moves it by 1e-3."""

    @pytest.fixture
    def quantizers(self):
        return [QuIPSharpE8(Options(bits=bits)) for bits in BITS]

    @pytest.fixture
    def weights(self, random_solution):
        """Codes and residuals of every bit pattern."""
        options = [Options(bits=bits) for bits in BITS]
        return [
            (QuIPSharpE8(chosen), packed_of(random_solution(shape, chosen), chosen))
            for chosen in options
            for shape in SHAPES
        ]
