"""BlockLDLQ and coordinate descent, fast: groups of columns, and compiled walks.

Both round a block of 16 columns given the errors E = W − Ŵ of other blocks::

    Ŵ_k = Q(W_k + Σ_j E_j P_jk)

    BlockLDLQ             P = L, and E is still zero for blocks before k        algorithm 5
    coordinate descent    P_jk = H_jk H_kk⁻¹

So one loop serves both. It computes as :mod:`modulora_qtip.reference` does, with three exceptions:
the order of sums, the last k bits of an error (:mod:`modulora_qtip.kernels.viterbi`), and the
overlap of a walk, which weights near the seam decide alone. Symbols are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import modulora_kernels as kernels
import torch
from modulora_kernels import incoherence
from modulora_kernels.both_sides import round_in_turn
from torch import Tensor

from modulora_core.dense_products import add_product, product
from modulora_qtip import SPEC, codes, reference, trellis
from modulora_qtip.reference import Options, Solution
from modulora_qtip.trellis import TILE

GROUP = 128
"""Columns of a group: one matrix product feeds the errors of other groups to all of it."""

MARGIN = 64
"""Weights on each side of the seam that decide on an overlap.

With 64 the distortion is as with all 128; with 24 it is 2 % more at 4 bits of 16-bit states."""


def solve(
    weight: Tensor,
    hessian: Tensor,
    options: Options,
    progress: Callable[[float], None] | None = None,
    output_hessian: Tensor | None = None,
) -> Solution:
    """Quantize ``weight``.

    Args:
        weight: ``[M, N]``, any float dtype, any strides, finite; unchanged.
        hessian: H = E[xxᵀ], ``[N, N]``, symmetric, positive semidefinite. Only its ratios matter.
        options: the user's choices.
        progress: called after each block with the finished share.
        output_hessian: None, or H_O of the outputs, ``[M, M]``: then rows are rounded in turn
            (:mod:`modulora_kernels.both_sides`).

    Returns:
        the quantized weight on ``weight``'s device, the same bytes for any number of threads.

    Raises:
        ShapeError: a second moment does not fit ``weight``.
        WeightError: NaN or Inf in one of them, or one is no second moment.
    """
    problem = reference.prepare(weight, hessian, options, output_hessian)
    W = problem.W
    strings = W.new_empty(
        (W.shape[1] // TILE, W.shape[0] // TILE, trellis.units(options.bits)), dtype=torch.int16
    )
    L = incoherence.feedback(SPEC.name, problem.H, TILE, options.damping)
    P = incoherence.descent(problem.H, TILE) if options.sweeps else L
    done, all_tiles = 0, (1 + options.sweeps) * strings.shape[:2].numel()

    def round_rows(T: Tensor, rows: slice) -> Tensor:
        nonlocal done
        E, own = torch.zeros_like(T), strings[:, rows.start // TILE : -(-rows.stop // TILE)]
        for sweep in range(1 + options.sweeps):
            for _ in _rounds(T, E, P if sweep else L, own, options, lower=sweep == 0):
                done += len(T) // TILE
                if progress is not None:
                    progress(done / all_tiles)
        return E

    round_in_turn(SPEC.name, W, problem.H_O, round_rows)
    return Solution(strings, problem.input_scale, problem.output_scale, problem.scale)


def _rounds(
    W: Tensor, E: Tensor, P: Tensor, strings: Tensor, options: Options, *, lower: bool
) -> Iterator[None]:
    """Round every block once, the last one first, given the errors of the others; yield after each.

    Args:
        W: ``[M, N]``.
        E: W − Ŵ, zero where nothing is rounded yet; updated.
        P: ``[N, N]``, with zeros in its diagonal blocks.
        strings: int16 ``[N / 16, M / 16, 16 bits]``, written.
        options: the user's choices.
        lower: whether P has blocks below the diagonal only.
    """
    for start in reversed(range(0, W.shape[1], GROUP)):
        stop = min(start + GROUP, W.shape[1])
        feeds = P[:, start:stop].contiguous()
        base = product(E[:, stop:], feeds[stop:])
        if not lower:
            add_product(base, E[:, :start], feeds[:start])
        for k in range(stop - TILE, start - 1, -TILE):
            here = slice(k, k + TILE)
            inside = slice(k + TILE if lower else start, stop)
            target = W[:, here] + base[:, k - start : k - start + TILE]
            target = target + product(E[:, inside], P[inside, here])
            strings[k // TILE], values = quantize(target, options)
            E[:, here] = W[:, here] - values
            yield


def quantize(x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """As :func:`modulora_qtip.reference.quantize`, of ``[M, 16]``, by a kernel on a CPU."""
    module = None
    if x.dtype == torch.float32:
        module = kernels.load("modulora_qtip.kernels.viterbi", x.device)
    if module is None:
        (strings,), values = reference.quantize(x, options)
        return strings, values
    C = codes.table(options.code, options.states, x.device)
    (w,) = trellis.to_sequences(x)
    walks = torch.empty(w.shape, dtype=torch.int32, device=x.device)
    kernels.launch(
        module.walks, min(len(w), torch.get_num_threads()), w.contiguous(), MARGIN, C,
        trellis.new_bits(options.bits), walks,
    )  # fmt: skip
    found = walks.long()
    return trellis.pack(found, options.bits), trellis.from_sequences(C[found][None])
