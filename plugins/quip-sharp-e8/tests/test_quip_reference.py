"""The reference against the paper's statements: bases, factors, rounding with feedback."""

import pytest
import torch
from modulora_kernels import incoherence, rotation
from modulora_quip_sharp_e8 import codebooks, reference
from modulora_quip_sharp_e8.reference import Options

from modulora_core.errors import WeightError


def in_its_basis(problem):
    """The rotation undone: W = scale · diag(S_V) H_M W̃ H_Nᵀ diag(S_U)."""
    M, N = len(problem.output_scale), len(problem.input_scale)
    H_M, H_N = (rotation.matrix(n) for n in (M, N))
    back = H_M @ problem.W[:, :N].double() @ H_N.T
    S_V, S_U = problem.output_scale.double()[:, None], problem.input_scale.double()
    return problem.scale.double() * S_V * back * S_U


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("shape", [(16, 32), (12, 20), (7, 13), (1, 1)])
def test_the_rotated_weight_is_the_weight_in_another_basis(shape, rescale, layer):
    W, H = layer(*shape, torch.float64)
    problem = reference.prepare(W, H, Options(rescale=rescale))
    # scale is stored in fp32; all else is fp64 here
    torch.testing.assert_close(in_its_basis(problem), W, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n", [8, 16, 136])
def test_feedback_is_the_block_ldl_factor(n, layer):
    I = torch.eye(n, dtype=torch.float64)  # noqa: E741
    H = layer(8, n, torch.float64)[1] + I
    L = reference.feedback(H, 0.01) + I
    half = torch.linalg.solve_triangular(L, H, upper=False)
    D = torch.linalg.solve_triangular(L, half.T, upper=False)
    blocks = torch.block_diag(*[torch.ones(8, 8, dtype=torch.float64)] * (n // 8))
    assert torch.equal(torch.triu(L) * (1 - blocks), torch.zeros_like(L))
    torch.testing.assert_close(D * (1 - blocks), torch.zeros_like(D), rtol=0, atol=1e-9)


def test_a_second_moment_that_fp32_cannot_factorize_is_factorized_in_fp64(generator):
    rows = torch.randint(-900, 901, (16, 16), generator=generator, dtype=torch.float64)
    rows[15] = rows[0]
    rows[15, 3] += 1  # the last pivot is 1e-7 of the number that it is the rest of
    H = rows @ rows.T
    assert torch.equal(H, H.float().double())
    assert torch.linalg.cholesky_ex(H.float())[1] != 0, "or this test tests nothing"
    L = torch.linalg.cholesky(H)
    diagonal = L[:8, :8].contiguous()
    blocks = torch.linalg.solve_triangular(diagonal, L[8:, :8], upper=False, left=False)
    found = reference.feedback(H.float(), 0.5)[8:, :8]
    torch.testing.assert_close(found, blocks.float(), rtol=1e-5, atol=1e-6)


def test_a_singular_second_moment_is_damped_until_it_can_be_factorized():
    L = reference.feedback(torch.ones(16, 16), 0.01)
    assert bool(L.isfinite().all())
    # the earlier block makes up for the mean of the later one's error
    torch.testing.assert_close(L[8:, :8], torch.full((8, 8), 1 / 8), rtol=0.02, atol=0)


def test_an_indefinite_second_moment_is_refused():
    H = torch.eye(16)
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(WeightError, match="positive semidefinite"):
        reference.feedback(H, 0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_block_is_the_nearest_point_to_its_target(bits, layer):
    """E (I + L) = −η with the error η of rounding: so the result gives its targets."""
    W, H = layer(32, 40, torch.float64)
    options = Options(bits=bits, sweeps=0)
    problem, solution = reference.prepare(W, H, options), reference.solve(W, H, options)
    W_hat = codebooks.decode(solution.codes, solution.residual, bits).double()
    L = reference.feedback(problem.H, options.damping) + torch.eye(40, dtype=torch.float64)
    target = W_hat + (problem.W - W_hat) @ L
    rounded = torch.cat([reference.quantize(t, bits)[1] for t in target.split(8, dim=1)], dim=1)
    torch.testing.assert_close(rounded, W_hat, rtol=0, atol=1e-6)


def test_feedback_sweeps_and_bits_each_lower_the_proxy_error(layer):
    W, H = layer(64, 96)

    def error(bits, hessian, sweeps):
        options = Options(bits=bits, sweeps=sweeps)
        return incoherence.proxy_error(W, reference.solve(W, hessian, options).dequantize(bits), H)

    before = None
    for bits in (2, 3, 4):
        blockldlq = error(bits, H, 0)
        assert blockldlq < 0.8 * error(bits, torch.eye(96), 0)
        assert error(bits, H, 4) < 0.99 * blockldlq
        # a bit more is a quarter of the error for an ideal quantizer
        assert before is None or blockldlq < before / 3
        before = blockldlq
