"""Weights whose every code, scale and zero is known."""

import pytest
import torch
from modulora_conformance.fixtures import generator, one_thread, plain_torch  # noqa: F401
from modulora_optq.reference import Solution


@pytest.fixture(scope="session")
def random_solution():
    """``random_solution(shape, options, permuted)``: all codes and zeros, scales from 2⁻²⁴ on."""

    def make(shape, options, permuted=False):
        numbers = torch.Generator().manual_seed(0)
        groups, top = (shape[0], options.groups(shape[1])), options.maxq + 1
        codes = torch.randint(0, top, shape, generator=numbers, dtype=torch.uint8)
        zeros = torch.randint(0, top, groups, generator=numbers, dtype=torch.uint8)
        if options.symmetric:
            zeros.fill_(options.middle)
        scales = 2.0 ** (20 * torch.rand(groups, generator=numbers) - 24)
        permutation = torch.randperm(shape[1], generator=numbers).int() if permuted else None
        return Solution(codes, scales.half(), zeros, permutation)

    return make
