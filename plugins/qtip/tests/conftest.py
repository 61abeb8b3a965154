"""Layers with correlated inputs, and packed weights of random walks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from modulora_conformance.fixtures import generator, one_thread, plain_torch  # noqa: F401
from modulora_qtip.reference import Options, Solution
from torch import Tensor


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
        block = options.block or 1
        M, N = (-(-n // block) * block for n in shape)
        walks = (-(-N // 16), -(-M // 16), 16 * options.bits)

        def scales(n: int) -> Tensor:
            signs = torch.where(torch.randn(n, generator=numbers) > 0, 1.0, -1.0)
            return (signs * (0.5 + torch.rand(n, generator=numbers))).half()

        strings = torch.randint(-(2**15), 2**15, walks, generator=numbers, dtype=torch.int16)
        return Solution(strings, scales(N), scales(M), torch.tensor([0.017]))

    return make
