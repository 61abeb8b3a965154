"""Packed weights of random codes."""

import pytest
import torch
from modulora_conformance.fixtures import generator, layer, one_thread, plain_torch  # noqa: F401
from modulora_kernels.rotation import signs
from modulora_quip_sharp_e8.reference import Solution


@pytest.fixture(scope="session")
def random_solution():
    """``random_solution((M, N), options)``: every bit pattern, scales as after a rescaling."""

    def make(shape, options):
        numbers = torch.Generator().manual_seed(0)
        blocks = (shape[0], -(-shape[1] // 8))

        def codes(dtype):
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
            return torch.randint(low, high + 1, blocks, generator=numbers, dtype=dtype)

        def scales(n, side):
            return (signs(7, n, side) * (0.5 + torch.rand(n, generator=numbers))).half()

        residual = {2: None, 3: torch.uint8, 4: torch.int16}[options.bits]
        first, second = codes(torch.int16), residual and codes(residual)
        vectors = scales(shape[1], "input"), scales(shape[0], "output")
        return Solution(first, second, *vectors, torch.tensor([0.017]))

    return make
