"""Descent after OPTQ: each code, and each scale, becomes the best beside all others.

OPTQ chooses a code once, and later columns make up for its error; nothing makes up for theirs.
Afterwards the errors of all columns are known. A row has the error r M rᵀ, with r = w − ŵ and
M = H + λI. It is a parabola in each code and in each scale:

    q_j ← q_j + round((r M)_j / (s M_jj)), at least 0 and at most maxq
    s_g ← s_g + (r M cᵀ) / (c M cᵀ)      c = q − z in the columns of group g, elsewhere 0

QuantEase (Behdin et al. 2023, arXiv 2309.01885) descends by codes. Where no code alone makes the
error smaller, several together may. A chain (Lin and Kernighan 1973) begins with a step of one code
that costs little, although it costs, and goes on with the cheapest step that is left after it::

    q_j + d, d = ±1:  the error grows by s² M_jj − 2 s d (r M)_j, and r M by −s d M_j

If the error is smaller after any step, the row keeps the chain up to there, otherwise nothing.

So nothing makes the error of a row larger. A sweep is a step for each code, a chain from each code,
and then a step for each scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import modulora_kernels as kernels
import torch
from torch import Tensor

from modulora_core.dense_products import add_product, product
from modulora_optq.options import Options
from modulora_optq.reference import (
    CHAIN,
    ENOUGH,
    HOPEFUL,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Problem,
)

BLOCK = 128
"""The columns of a block. One product a block takes its changes to the other columns."""

CHAIN_BLOCK = 1024
"""The same for chains, which stay inside a block, and take time in proportion to it."""

ROWS = 1024
"""The most rows at once, for less memory."""


class Descent:
    """Sweeps over the rows of one weight, with columns in the order of their groups."""

    def __init__(self, problem: Problem, options: Options) -> None:
        self._order = torch.argsort(problem.group, stable=True)
        self._M = problem.M[self._order[:, None], self._order]
        self._size, self._options = options.group(len(self._M)), options
        compiled = kernels.load("modulora_optq.kernels.solve", self._M.device)
        kernel, chains = _change_codes, _change_chains
        if compiled is not None:
            kernel = partial(kernels.launch, compiled.change_codes)
            bits = torch.int64 if self._M.dtype == torch.float64 else torch.int32
            like = torch.zeros(1, dtype=bits)

            def chains(*arguments: Any) -> None:
                kernels.launch(compiled.change_chains, *arguments, like)

        self._steps = (kernel, BLOCK), (chains, CHAIN_BLOCK)

    def improve(self, W: Tensor, q: Tensor, s: Tensor, z: Tensor) -> None:
        """Change the codes and scales of some rows.

        Args:
            W: the rows, ``[rows, in]``, columns in the problem's order.
            q, s, z: codes, uint8 ``[rows, in]``, scales and zeros, ``[rows, groups]`` in W's dtype.
        """
        for start in range(0, len(W), ROWS):
            rows = slice(start, start + ROWS)
            codes = q[rows, self._order]
            R = product(W[rows, self._order] - self._values(codes, s[rows], z[rows]), self._M)
            for _ in range(self._options.sweeps):
                for change, most in self._steps:
                    self._descend_by_codes(R, codes, s[rows], change, most)
                self._descend_by_scales(R, codes, s[rows], z[rows])
            q[rows] = torch.empty_like(codes).index_copy_(1, self._order, codes)

    def _values(self, q: Tensor, s: Tensor, z: Tensor) -> Tensor:
        group = torch.arange(q.shape[1], device=q.device) // self._size
        return s[:, group] * (q - z[:, group])

    def _descend_by_codes(
        self, R: Tensor, q: Tensor, s: Tensor, change: Callable[..., None], most: int
    ) -> None:
        """``R``: r M of each row; it follows the changes. A block has at most ``most`` columns."""
        maxq = R.new_tensor([float(self._options.maxq)])
        width = -(-R.shape[1] // -(-R.shape[1] // most))  # blocks of about one width
        for start in range(0, R.shape[1], width):
            columns = slice(start, start + width)
            M = self._M[columns]
            moves = R[:, columns].clone()
            change(moves, M[:, columns].contiguous(), q, s, maxq, start, self._size)
            add_product(R, moves, -M)

    def _descend_by_scales(self, R: Tensor, q: Tensor, s: Tensor, z: Tensor) -> None:
        for g, columns in enumerate(self._groups()):
            c = q[:, columns] - z[:, g : g + 1]
            cM = product(c, self._M[columns])
            best = s[:, g] + (R[:, columns] * c).sum(1) / (cM[:, columns] * c).sum(1)
            best = torch.where(best > 0, best, s[:, g])  # NaN where all c are 0
            best = best.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).to(s.dtype)
            R -= (best - s[:, g])[:, None] * cM
            s[:, g] = best

    def _groups(self) -> Iterator[slice]:
        for start in range(0, len(self._M), self._size):
            yield slice(start, start + self._size)


def _change_codes(
    R: Tensor, M: Tensor, q: Tensor, s: Tensor, maxq: Tensor, start: int, size: int
) -> None:
    """Change the codes of a block of columns, and put the changes of Ŵ in the place of r M.

    Args:
        R: r M of the block, ``[rows, columns]``; M: of the block, ``[columns, columns]``.
        q, s: of all columns and groups; maxq: the largest code, ``[1]``.
        start: the first column of the block; size: the columns of a group.
    """
    for j in range(R.shape[1]):
        scale, code = s[:, (start + j) // size], q[:, start + j].to(R.dtype)
        new = (code + torch.round(R[:, j] / (scale * M[j, j]))).clamp(min=0).minimum(maxq)
        change = scale * (new - code)
        R[:, j + 1 :].addr_(change, M[j, j + 1 :], alpha=-1)
        R[:, j] = change
        q[:, start + j] = new.to(q.dtype)


def _change_chains(
    R: Tensor, M: Tensor, q: Tensor, s: Tensor, maxq: Tensor, start: int, size: int
) -> None:
    """Change the codes of a block by chains, from each column in turn; as :func:`_change_codes`."""
    rows, columns = torch.arange(len(R), device=R.device), R.shape[1]
    scale = s[:, (start + torch.arange(columns, device=R.device)) // size]
    own, codes = scale.square() * M.diagonal(), q[:, start : start + columns].to(R.dtype)
    moved = torch.zeros_like(R)

    def steps(r: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """The better step of each code, ±1, and the error that it adds, infinite without room."""
        up = torch.where(free & (codes < maxq), own - 2 * scale * r, torch.inf)
        down = torch.where(free & (codes > 0), own + 2 * scale * r, torch.inf)
        return torch.where(up <= down, 1.0, -1.0).to(r), torch.minimum(up, down)

    for j in range(columns):
        r, chain, free = R.clone(), torch.zeros_like(R), torch.ones_like(R, dtype=torch.bool)
        step, cost = steps(r, free)
        k, total = torch.full_like(rows, j), cost[:, j].clone()
        going = total <= (1 - HOPEFUL) * own[:, j]
        gains = torch.zeros_like(going)
        for length in range(1, CHAIN + 1):
            d = torch.where(going, step[rows, k], 0)
            chain[rows, k] += d
            gains |= going & (total < -ENOUGH * own[:, j])
            going &= ~gains
            if length == CHAIN or not bool(going.any()):
                break
            free[rows, k] = False
            r -= (d * scale[rows, k])[:, None] * M[k]
            step, cost = steps(r, free)
            least, k = cost.min(dim=1)
            total += least
            going &= least < torch.inf
        chain[~gains] = 0
        codes += chain
        change = scale * chain
        moved += change
        R -= product(change, M)
    q[:, start : start + columns] = codes.to(q.dtype)
    R.copy_(moved)
