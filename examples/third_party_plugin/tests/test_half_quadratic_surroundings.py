"""Compiled kernels: mapped files, threads, out-of-bounds reads, memory, no numba."""

import subprocess
import sys

import pytest
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_half_quadratic.quantizer import HalfQuadratic, Options


class TestKernels(CompiledKernels):
    packing_share = 2.5

    @pytest.fixture
    def quantizers(self):
        chosen = ({"bits": 3}, {"bits": 8, "group_size": 48})
        return [HalfQuadratic(Options(iterations=1, **options)) for options in chosen]


def test_the_options_import_neither_torch_nor_numba():
    module = "modulora_half_quadratic.options"
    code = f"import sys, {module}; print(*(sys.modules.keys() & {{'torch', 'numba'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
