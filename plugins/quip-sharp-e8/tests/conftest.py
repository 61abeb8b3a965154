"""Layers with correlated inputs, and packed weights of random codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from modulora_conformance.fixtures import generator, one_thread, plain_torch  # noqa: F401
from modulora_quip_sharp_e8.reference import Options, Solution
from torch import Tensor

from modulora_core.kernels.rotation import signs


@pytest.fixture(scope="session")
def layer() -> Callable[..., tuple[Tensor, Tensor]]:
    """``layer(M, N, dtype)``: a weight ``[M, N]`` and H of correlated inputs of uneven size.

    The weight has a large column and a large row.
    """

    def make(M: int, N: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        numbers = torch.Generator().manual_seed(N)

        def draw(rows: int) -> Tensor:
            return torch.randn(rows, N, generator=numbers, dtype=dtype)

        W = 0.02 * draw(M)
        W[:, N // 2] *= 20
        W[M // 3] *= 5
        mixing = draw(N) / N**0.5 + torch.eye(N, dtype=dtype)
        x = draw(4 * N) @ mixing * torch.linspace(0.1, 3, N, dtype=dtype)
        return W, x.T @ x / len(x)

    return make


@pytest.fixture(scope="session")
def random_solution() -> Callable[..., Solution]:
    """``random_solution((M, N), options)``: every bit pattern, scales as after a rescaling."""

    def make(shape: tuple[int, int], options: Options) -> Solution:
        numbers = torch.Generator().manual_seed(0)
        blocks = (shape[0], -(-shape[1] // 8))

        def codes(dtype: torch.dtype) -> Tensor:
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
            return torch.randint(low, high + 1, blocks, generator=numbers, dtype=dtype)

        def scales(n: int, side: str) -> Tensor:
            return (signs(7, n, side) * (0.5 + torch.rand(n, generator=numbers))).half()

        residual = {2: None, 3: torch.uint8, 4: torch.int16}[options.bits]
        first, second = codes(torch.int16), residual and codes(residual)
        vectors = scales(shape[1], "input"), scales(shape[0], "output")
        return Solution(first, second, *vectors, torch.tensor([0.017]))

    return make
