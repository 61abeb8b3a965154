"""Packed weights of random walks."""

import pytest
import torch
from modulora_conformance.fixtures import generator, layer, one_thread, plain_torch  # noqa: F401
from modulora_qtip import trellis
from modulora_qtip.reference import Solution


@pytest.fixture(scope="session")
def random_solution():
    """``random_solution((M, N), options)``: every bit pattern, scales as after a rescaling."""

    def make(shape, options):
        numbers = torch.Generator().manual_seed(0)
        block = options.block or 1
        M, N = (-(-n // block) * block for n in shape)
        walks = (-(-N // 16), -(-M // 16), trellis.units(options.bits))

        def scales(n):
            signs = torch.where(torch.randn(n, generator=numbers) > 0, 1.0, -1.0)
            return (signs * (0.5 + torch.rand(n, generator=numbers))).half()

        strings = torch.randint(-(2**15), 2**15, walks, generator=numbers, dtype=torch.int16)
        return Solution(strings, scales(N), scales(M), torch.tensor([0.017]))

    return make
