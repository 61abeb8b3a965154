"""What the tests of packing and kernels start from: weights whose every code, scale and zero is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from modulora_optq.options import Options
from modulora_optq.reference import Solution

from modulora_core import kernels


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that runs where no kernel can."""
    monkeypatch.setattr(kernels, "load", lambda module, device: None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small products: torch's threads and numba's would wait for each other's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_solution() -> Callable[..., Solution]:
    """``random_solution(shape, options, permuted)``: all codes and zeros, scales from the smallest fp16 on."""

    def make(shape: tuple[int, int], options: Options, permuted: bool = False) -> Solution:
        generator = torch.Generator().manual_seed(0)
        groups, above = (shape[0], options.groups(shape[1])), options.levels + 1
        codes = torch.randint(0, above, shape, generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, above, groups, generator=generator, dtype=torch.uint8)
        if options.symmetric:
            zeros.fill_(above // 2)
        scales = 2.0 ** (20 * torch.rand(groups, generator=generator) - 24)
        permutation = torch.randperm(shape[1], generator=generator).int() if permuted else None
        return Solution(codes, scales.half(), zeros, permutation)

    return make
