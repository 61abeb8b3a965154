"""What the tests start from: layers with inputs that are correlated, and packed weights of random codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from modulora_conformance.fixtures import generator, one_thread, plain_torch  # noqa: F401 - for the tests
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.reference import Solution, signs
from torch import Tensor


@pytest.fixture(scope="session")
def layer() -> Callable[..., tuple[Tensor, Tensor]]:
    """``layer(M, N, dtype)``: a weight ``[M, N]`` with a large column and a large row, and H of correlated inputs of uneven size."""

    def make(M: int, N: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        numbers = torch.Generator().manual_seed(N)
        W = 0.02 * torch.randn(M, N, generator=numbers, dtype=dtype)
        W[:, N // 2] *= 20
        W[M // 3] *= 5
        mixing = torch.randn(N, N, generator=numbers, dtype=dtype) / N**0.5 + torch.eye(
            N, dtype=dtype
        )
        x = (
            torch.randn(4 * N, N, generator=numbers, dtype=dtype)
            @ mixing
            * torch.linspace(0.1, 3, N, dtype=dtype)
        )
        return W, x.T @ x / len(x)

    return make


@pytest.fixture(scope="session")
def random_solution() -> Callable[..., Solution]:
    """``random_solution((M, N), options)``: all codes, scales as after a rescaling."""

    def make(shape: tuple[int, int], options: Options) -> Solution:
        numbers = torch.Generator().manual_seed(0)
        blocks = (shape[0], -(-shape[1] // 8))

        def codes(dtype: torch.dtype) -> Tensor:
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
            return torch.randint(low, high + 1, blocks, generator=numbers, dtype=dtype)

        def scales(n: int, side: str) -> Tensor:
            return (signs(7, n, side) * (0.5 + torch.rand(n, generator=numbers))).half()

        residual = {2: None, 3: torch.uint8, 4: torch.int16}[options.bits]
        return Solution(codes(torch.int16), residual and codes(residual), scales(shape[1], "input"),
                        scales(shape[0], "output"), torch.tensor([0.017]))  # fmt: skip

    return make
