"""Fixtures for a plugin's own tests. Import them in its ``conftest.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import modulora_kernels as kernels
import pytest
import torch
from modulora_kernels import compiled
from torch import Tensor


@pytest.fixture
def generator() -> torch.Generator:
    """Draws the same numbers in each test."""
    return torch.Generator().manual_seed(0)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn CPU kernels off until the test ends, so that plain torch runs."""
    for module in (kernels, compiled):  # a plugin calls the first, KernelQuantizer the second
        monkeypatch.setattr(module, "load", lambda module, device: None)  # noqa: ARG005


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns CPU kernels off, so that plain torch runs."""
    without_kernels(monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Uses one thread: in small products, torch's threads and numba's wait for each other."""
    with kernels.one_thread():
        yield


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
