"""Incoherence processing, against its definition in float64."""

import pytest
import torch
from modulora_kernels import incoherence, rotation

M, N = 48, 32


def problem(output_hessian, **choice):
    """W, and the problem that is made of it: rows of unlike sizes, and of unlike weight."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(M, N, dtype=torch.float64, generator=generator)
    W *= torch.logspace(-1, 1, M, dtype=torch.float64)[:, None]
    X = torch.randn(4 * N, N, dtype=torch.float64, generator=generator)
    options = {"rms": 1.0, "multiples": (16, 16), "damping": 0.1, "rescale": True, "seed": 0}
    made = incoherence.prepare("test", W, X.T @ X, output_hessian, **{**options, **choice})
    return W, made


def gradients():
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(4 * M, M, dtype=torch.float64, generator=generator)
    g *= torch.logspace(1, -2, M, dtype=torch.float64)
    return g.T @ g


@pytest.mark.parametrize("with_gradients", [False, True])
def test_scales_and_rotations_give_the_weight_back(with_gradients):
    W, made = problem(gradients() if with_gradients else None)
    H_M, H_N = rotation.matrix(M), rotation.matrix(N)
    S_V, S_U = made.output_scale.double()[:, None], made.input_scale.double()
    back = made.scale.double() * S_V * (H_M @ made.W @ H_N.T) * S_U
    torch.testing.assert_close(back, W, rtol=1e-6, atol=1e-6)


def test_rows_are_scaled_by_their_size_and_by_the_loss():
    H_O = gradients()
    W, made = problem(H_O)
    d = H_O.diagonal() / H_O.diagonal().mean() + incoherence.OUTPUT_DAMPING
    expected = (W.square().sum(1) / d) ** 0.25  # arXiv 2307.13304, section 4.2, of rows
    found = made.output_scale.double().abs()
    torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=1e-3, atol=0)
    S_V, H_M = made.output_scale.double(), rotation.matrix(M)
    rotated = H_M.T @ (S_V[:, None] * H_O * S_V) @ H_M
    torch.testing.assert_close(made.H_O, rotated, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("output_hessian", "rescale"), [(None, True), (torch.eye(M).double(), False)]
)
def test_rows_have_signs_alone_without_gradients_or_rescaling(output_hessian, rescale):
    _, made = problem(output_hessian, rescale=rescale)
    assert bool((made.output_scale.abs() == 1).all())


def test_gradients_of_zero_leave_rows_finite():
    _, made = problem(torch.zeros(M, M, dtype=torch.float64))
    assert bool(made.output_scale.isfinite().all())
    assert bool(made.W.isfinite().all())
