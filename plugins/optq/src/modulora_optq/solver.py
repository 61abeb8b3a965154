"""OPTQ as it runs: blocks of columns, lazy updates (Frantar et al. 2022, arXiv 2210.17323, section 3.3, step 2).

Inside a block columns are quantized one by one and their errors are made up for within the block only. What they mean for
later columns follows in one matrix product a block. The values are those of :mod:`modulora_optq.reference` up
to the order of sums, and so are the codes but for ties.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modulora_core import kernels
from modulora_core.devices.dense_products import add_product
from modulora_optq import reference
from modulora_optq.options import Options
from modulora_optq.reference import Problem, Solution

__all__ = ["Solution", "solve"]

BLOCK = 128
"""Columns of a block at most, as in the paper."""


def solve(weight: Tensor, hessian: Tensor, options: Options) -> Solution:
    """Quantize ``weight``.

    Args:
        weight: ``[out, in]``, any float dtype, any strides, finite. It isn't changed.
        hessian: H = E[xxᵀ], ``[in, in]``, symmetric, positive semidefinite. A factor common to all of it has no effect.
        options: bits, groups and order.

    Returns:
        the quantized weight, on ``weight``'s device; the same bytes for any number of threads that kernels run on.

    Raises:
        ShapeError: ``hessian`` doesn't fit ``weight``.
        WeightError: NaN or Inf in either, or ``hessian`` can't be a second moment.
    """
    problem = reference.prepare(weight, hessian, options)
    cpu = kernels.load("modulora_optq.cpu_solver", problem.W.device)
    work = _Torch(problem, options) if cpu is None else _Compiled(problem, options, cpu)
    W, U = problem.W, problem.U
    if options.static_groups:
        for g in range(options.groups(W.shape[1])):
            work.grid(g)
    for start, stop in blocks(W.shape[1], options):
        E = work.block(start, stop)
        add_product(W[:, stop:], E, -U[start:stop, stop:])
    return problem.solution(work.q, work.s, work.z, options)


def blocks(columns: int, options: Options) -> Iterator[tuple[int, int]]:
    """Cut the columns into blocks that start with a group, or lie inside of one that is longer than a block.

    So all columns of a group are up to date when its scale is chosen.
    """
    size = columns if options.static_groups else options.group(columns)
    span = size if size > BLOCK else BLOCK // max(1, size) * size
    for first in range(0, columns, max(1, span)):
        last = min(first + span, columns)
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


class _Torch:
    """The inner loops in plain torch, a column at a time: for other devices, and without numba."""

    def __init__(self, problem: Problem, options: Options) -> None:
        rows, columns = problem.W.shape
        self.problem, self.options = problem, options
        self.size = options.group(columns)
        self.q = torch.empty(rows, columns, dtype=torch.uint8, device=problem.W.device)
        self.s, self.z = (problem.W.new_empty(rows, options.groups(columns)) for _ in range(2))

    def grid(self, g: int) -> None:
        """Choose the grid of group ``g`` from W as it is."""
        columns = self.problem.group == g
        W, loss = self.problem.W[:, columns], self.problem.loss[columns]
        self.s[:, g], self.z[:, g] = reference.grid(W, loss, self.options)

    def block(self, start: int, stop: int) -> Tensor:
        """Quantize columns ``[start, stop)``: their errors e, ``[out, stop - start]``."""
        W, U = self.problem.W, self.problem.U
        E = W.new_empty(len(W), stop - start)
        groups = self.problem.group[
            start:stop
        ].tolist()  # from a GPU once, and not a column at a time
        for j, g in zip(range(start, stop), groups, strict=True):
            if not self.options.static_groups and j % self.size == 0:
                self.grid(g)
            s, z = self.s[:, g], self.z[:, g]
            code = reference.quantize(W[:, j], s, z, self.options)
            self.q[:, j] = code.to(torch.uint8)
            E[:, j - start] = (W[:, j] - s * (code - z)) / U[j, j]
            W[:, j + 1 : stop].addr_(E[:, j - start], U[j, j + 1 : stop], alpha=-1)
        return E


class _Compiled(_Torch):
    """The inner loops as kernels: for the CPU."""

    def __init__(self, problem: Problem, options: Options, cpu: Any) -> None:
        super().__init__(problem, options)
        self.cpu = cpu
        dtype = problem.W.dtype
        shares = reference.shares(options)
        self.search = (
            int(options.symmetric),
            torch.tensor(shares, dtype=dtype),
            torch.tensor([float(options.levels)], dtype=dtype),
        )

    def grid(self, g: int) -> None:
        columns = self.problem.group == g
        W, loss = self.problem.W[:, columns], self.problem.loss[columns]
        kernels.launch(self.cpu.grids, W, loss, *self.search, self.s, self.z, g)

    def block(self, start: int, stop: int) -> Tensor:
        problem = self.problem
        E = problem.W.new_empty(len(problem.W), stop - start)
        size = 0 if self.options.static_groups else self.size
        kernels.launch(
            self.cpu.block, problem.W, problem.U, problem.group, size, problem.loss, *self.search,
            start, stop, self.s, self.z, self.q, E,
        )  # fmt: skip
        return E
