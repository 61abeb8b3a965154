"""The Triton kernels in Triton's interpreter, against the definition and fp64 matrices.

test_qtip_triton.py runs it in a process with ``TRITON_INTERPRET=1``, which Triton reads once.
"""

import math

import pytest
import torch
from modulora_conformance.interpreted_kernels import poison_new_memory
from modulora_qtip import codes, trellis
from modulora_qtip.kernels import gpu

from modulora_core.packed import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")

COUNTS = [(torch.float32, 1), (torch.float32, 3), (torch.float16, 2), (torch.bfloat16, 17),
          (torch.bfloat16, 40)]  # fmt: skip
"""Dtypes and rows of x: sums, a small product of blocks, a large one, and tiles."""
SUMS = 1e-6
"""The error of fp32 sums of some hundred terms, by the sum of magnitudes."""
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""The error of one rounding. A product has three: of x, of C, and of the sum."""


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


def random_C(tiles, bits, states, code, generator):
    strings = torch.randint(
        -(2**15), 2**15, (*tiles, trellis.units(bits)), generator=generator, dtype=torch.int16
    )
    facts = {"bits": bits, "states": states, "code": code, "hadamard": "full"}
    C = PackedWeight("qtip", 1, (16 * tiles[1], 16 * tiles[0]), {"trellis": strings}, facts)
    return C, trellis.decode(strings, bits, states, code)


@pytest.mark.parametrize("code", codes.CODES)
@pytest.mark.parametrize("bits", [*range(1, 9), 1.5, 2.5, 3.5, 7.5])
def test_tiles_of_every_width_and_code_are_the_definitions(bits, code, generator):
    for states in (math.ceil(bits) + 6, 16):
        C, dense = random_C((3, 2), bits, states, code, generator)
        assert torch.equal(gpu.tile(C, (0, 32), torch.float32), dense)
        assert torch.equal(gpu.tile(C, (5, 30), torch.bfloat16), dense[5:30].bfloat16())


@pytest.mark.parametrize(("bits", "code"), [(2, "bytes"), (2, "mcg"), (2, "mul1"), (2.5, "mul1")])
def test_products_are_products_with_the_definition(bits, code, generator):
    C, dense = random_C((33, 1), bits, 12, code, generator)
    for dtype, n in COUNTS:
        for transpose, M in ((False, dense.T.double()), (True, dense.double())):
            x = torch.randn(n, len(M), generator=generator)
            y = gpu.multiply(x, C, transpose, dtype)
            limit = (3 * ROUNDING[dtype] + SUMS) * (x.double().abs() @ M.abs())
            assert y.dtype == torch.float32
            assert ((y - x.double() @ M).abs() <= limit).all(), (dtype, n, transpose)
