"""OPTQ in blocks of columns with lazy updates (arXiv 2210.17323, section 3.3, step 2).

Within a block, columns are quantized one by one, and their errors are compensated inside the block
only. One matrix product a block then updates all later columns. The result is the result of
:mod:`modulora_optq.reference` up to the order of sums, so codes differ at ties only. Then
:mod:`modulora_optq.descent` improves codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import modulora_kernels as kernels
import torch
from modulora_kernels.both_sides import round_in_turn
from torch import Tensor

from modulora_core.dense_products import add_product
from modulora_optq import SPEC, reference
from modulora_optq.descent import Descent
from modulora_optq.options import Options
from modulora_optq.reference import Problem, Solution

BLOCK = 128
"""The most columns of a block, as in the paper."""


def solve(
    weight: Tensor, hessian: Tensor, options: Options, output_hessian: Tensor | None = None
) -> Solution:
    """Quantize ``weight``, ``[out, in]``.

    The result is on ``weight``'s device and does not depend on the number of threads. See
    :func:`modulora_optq.reference.prepare` for arguments and errors.

    Args:
        output_hessian: None, or H_O of the outputs, ``[out, out]``: then rows are quantized in
            turn (:mod:`modulora_kernels.both_sides`).
    """
    problem = reference.prepare(weight, hessian, options, output_hessian)
    descent = Descent(problem, options) if options.sweeps and problem.W.numel() else None

    def quantize(T: Tensor) -> _Torch:
        found = _quantize(replace(problem, W=T.clone()), options)
        if descent is not None:
            descent.improve(T, found.q, found.s, found.z)
        return found

    H_O = problem.H_O
    if H_O is None:
        found = quantize(problem.W)
        return problem.solution(found.q, found.s, found.z, options)
    order = torch.argsort(H_O.diagonal(), stable=True)  # the last block, which is first, has most
    W, groups = problem.W, options.groups(problem.W.shape[1])
    q, (s, z) = torch.empty_like(W, dtype=torch.uint8), W.new_empty(2, len(W), groups)

    def round_rows(T: Tensor, rows: slice) -> Tensor:
        found = quantize(T)
        here, group = order[rows], problem.group
        q[here], s[here], z[here] = found.q, found.s, found.z
        return T - found.s[:, group] * (found.q - found.z[:, group])

    round_in_turn(SPEC.name, W[order], H_O[order[:, None], order], round_rows)
    return problem.solution(q, s, z, options)


def _quantize(problem: Problem, options: Options) -> _Torch:
    """Codes, scales and zeros of all rows. Changes the problem's W."""
    W, U = problem.W, problem.U
    compiled = kernels.load("modulora_optq.kernels.solve", W.device)
    work = _Torch(problem, options) if compiled is None else _Compiled(problem, options, compiled)
    if options.static_groups:
        for g in range(options.groups(W.shape[1])):
            work.grid(g)
    for start, stop in blocks(W.shape[1], options):
        E = work.block(start, stop)
        add_product(W[:, stop:], E, -U[start:stop, stop:])
    return work


def blocks(columns: int, options: Options) -> Iterator[tuple[int, int]]:
    """Cut the columns into blocks that begin with a group, or lie inside a longer one.

    All columns of a group are then up to date when its scale is chosen.
    """
    size = columns if options.static_groups else options.group(columns)
    span = size if size > BLOCK else BLOCK // max(1, size) * size
    for first in range(0, columns, max(1, span)):
        last = min(first + span, columns)
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


class _Torch:
    """The inner loops in plain torch, a column at a time: on a GPU, and without numba."""

    def __init__(self, problem: Problem, options: Options) -> None:
        rows, columns = problem.W.shape
        self.problem, self.options = problem, options
        self.size = 0 if options.static_groups else options.group(columns)
        self.q = torch.empty(rows, columns, dtype=torch.uint8, device=problem.W.device)
        self.s, self.z = (problem.W.new_empty(rows, options.groups(columns)) for _ in range(2))

    def grid(self, g: int) -> None:
        """Choose scales and zeros of group ``g`` from the present W."""
        columns = self.problem.group == g
        W, loss = self.problem.W[:, columns], self.problem.loss[columns]
        self.s[:, g], self.z[:, g] = reference.grid(W, loss, self.options)

    def block(self, start: int, stop: int) -> Tensor:
        """Quantize columns ``[start, stop)``. Returns their errors e, ``[out, stop - start]``."""
        W, U = self.problem.W, self.problem.U
        E = W.new_empty(len(W), stop - start)
        groups = self.problem.group[start:stop].tolist()  # one copy from a GPU
        for j, g in zip(range(start, stop), groups, strict=True):
            if self.size and j % self.size == 0:
                self.grid(g)
            s, z = self.s[:, g], self.z[:, g]
            code = reference.quantize(W[:, j], s, z, self.options)
            self.q[:, j] = code.to(torch.uint8)
            E[:, j - start] = (W[:, j] - s * (code - z)) / U[j, j]
            W[:, j + 1 : stop].addr_(E[:, j - start], U[j, j + 1 : stop], alpha=-1)
        return E


class _Compiled(_Torch):
    """The inner loops compiled for the CPU."""

    def __init__(self, problem: Problem, options: Options, compiled: Any) -> None:
        super().__init__(problem, options)
        self.compiled, dtype = compiled, problem.W.dtype
        shares = torch.tensor(reference.shares(options), dtype=dtype, device="cpu")
        maxq = torch.tensor([float(options.maxq)], dtype=dtype, device="cpu")
        self.search = int(options.symmetric), shares, maxq

    def grid(self, g: int) -> None:
        columns = self.problem.group == g
        W, loss = self.problem.W[:, columns], self.problem.loss[columns]
        kernels.launch(self.compiled.grids, W, loss, *self.search, self.s, self.z, g)

    def block(self, start: int, stop: int) -> Tensor:
        problem, E = self.problem, self.problem.W.new_empty(len(self.q), stop - start)
        kernels.launch(
            self.compiled.block, problem.W, problem.U, problem.group, self.size, problem.loss,
            *self.search, start, stop, self.s, self.z, self.q, E,
        )  # fmt: skip
        return E
