"""Coordinate descent after OPTQ: each code, and each scale, becomes the best beside all others.

OPTQ chooses a code once, and later columns make up for its error; nothing makes up for theirs.
Afterwards the errors of all columns are known. A row has the error r M rᵀ, with r = w − ŵ and
M = H + λI. It is a parabola in each code and in each scale:

    q_j ← q_j + round((r M)_j / (s M_jj)), at least 0 and at most maxq
    s_g ← s_g + (r M cᵀ) / (c M cᵀ)      c = q − z in the columns of group g, elsewhere 0

So no step makes the error of a row larger. A sweep is a step for each code, and then one for each
scale. QuantEase (Behdin et al. 2023, arXiv 2309.01885) descends by codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import modulora_kernels as kernels
import torch
from torch import Tensor

from modulora_core.dense_products import add_product, product
from modulora_optq.options import Options
from modulora_optq.reference import LARGEST_SCALE, SMALLEST_SCALE, Problem

BLOCK = 128
"""The columns of a block. One product a block takes its changes to the other columns."""

ROWS = 1024
"""The most rows at once, for less memory."""


class Descent:
    """Sweeps over the rows of one weight, with columns in the order of their groups."""

    def __init__(self, problem: Problem, options: Options) -> None:
        self._order = torch.argsort(problem.group, stable=True)
        self._M = problem.M[self._order[:, None], self._order]
        self._size, self._options = options.group(len(self._M)), options
        compiled = kernels.load("modulora_optq.kernels.solve", self._M.device)
        self._change_codes = (
            _change_codes if compiled is None else partial(kernels.launch, compiled.change_codes)
        )

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
                self._descend_by_codes(R, codes, s[rows])
                self._descend_by_scales(R, codes, s[rows], z[rows])
            q[rows] = torch.empty_like(codes).index_copy_(1, self._order, codes)

    def _values(self, q: Tensor, s: Tensor, z: Tensor) -> Tensor:
        group = torch.arange(q.shape[1], device=q.device) // self._size
        return s[:, group] * (q - z[:, group])

    def _descend_by_codes(self, R: Tensor, q: Tensor, s: Tensor) -> None:
        """``R``: r M of each row; it follows the changes."""
        maxq = R.new_tensor([float(self._options.maxq)])
        for start in range(0, R.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
            M = self._M[columns]
            change = R[:, columns].clone()
            self._change_codes(change, M[:, columns].contiguous(), q, s, maxq, start, self._size)
            add_product(R, change, -M)

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
