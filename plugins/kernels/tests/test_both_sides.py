"""Rows rounded in turn, against the definition in float64."""

import pytest
import torch
from modulora_kernels.both_sides import DAMPING, block_rows, round_in_turn

from modulora_core.errors import WeightError

M, N = 187, 24
ROWS = block_rows(M)


def moment(n, seed):
    """Of gradients with a few large directions, as a layer's outputs have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, dtype=torch.float64, generator=generator)
    mix = torch.randn(n, n, dtype=torch.float64, generator=generator)
    x = (x * torch.logspace(1, -1, n, dtype=torch.float64)) @ mix
    return x.T @ x


def rounded(W, output_hessian):
    """Ŵ, on a grid of whole numbers."""
    W_hat = torch.full_like(W, torch.nan)

    def round_rows(T, rows):
        W_hat[rows] = T.round()
        return T - W_hat[rows]

    round_in_turn("test", W, output_hessian, round_rows)
    return W_hat


def test_each_block_gets_the_errors_that_the_factor_of_the_damped_moment_gives_it():
    W = torch.randn(M, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H_O = moment(M, 2)
    H = H_O / H_O.diagonal().mean() + DAMPING * torch.eye(M)
    expected = W.clone()
    for start in reversed(range(0, M, ROWS)):
        a, b = slice(start, start + ROWS), slice(start + ROWS, None)
        E = (W - expected)[b]
        # errors E of later rows are best made up for by −H_uu⁻¹ H_ub E in all rows before them
        up = slice(0, start + ROWS)
        shift = torch.linalg.solve(H[up, up], H[up, b] @ E)[start:]
        expected[a] = (W[a] + shift).round()
    torch.testing.assert_close(rounded(W, H_O), expected)


def test_without_correlations_rows_are_rounded_apart():
    W = torch.randn(M, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for H_O in (None, torch.eye(M, dtype=torch.float64), torch.zeros(M, M, dtype=torch.float64)):
        assert torch.equal(rounded(W, H_O), W.round())


def test_a_moment_of_negative_directions_is_refused():
    H_O = torch.eye(M, dtype=torch.float64)
    H_O[0, 1] = H_O[1, 0] = 1e6
    with pytest.raises(WeightError, match="test: expected a positive semidefinite second moment"):
        rounded(torch.zeros(M, N, dtype=torch.float64), H_O)
