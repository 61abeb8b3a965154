"""The reference against the paper's own statements: bases, factors, and what rounding with feedback means."""

from __future__ import annotations

import pytest
import torch
from modulora_quip_sharp_e8 import codebooks, reference, transform
from modulora_quip_sharp_e8.options import Options

from modulora_core.errors import ShapeError, WeightError


def in_its_basis(problem):
    """What undoes the rotation: W = scale · diag(v) H_M W̃ H_Nᵀ diag(u)."""
    M, N = len(problem.output_scale), len(problem.input_scale)
    H_M, H_N = (transform.matrix(n) for n in (M, N))
    rotated_back = H_M @ problem.W[:, :N].double() @ H_N.T
    return (
        problem.scale.double()
        * problem.output_scale.double()[:, None]
        * rotated_back
        * problem.input_scale.double()
    )


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("shape", [(16, 32), (12, 20), (7, 13), (1, 1), (24, 36)])
def test_the_rotated_weight_is_the_weight_in_another_basis(shape, rescale, layer):
    W, H = layer(*shape, torch.float64)
    options = Options(rescale=rescale)
    problem = reference.prepare(W, H, options)
    # scale is stored in fp32; all else is fp64 here
    torch.testing.assert_close(in_its_basis(problem), W, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rescale", [True, False])
def test_an_error_costs_the_same_in_both_bases(rescale, layer, generator):
    W, H = layer(24, 32, torch.float64)
    options = Options(rescale=rescale, damping=0.25)
    problem = reference.prepare(W, H, options)
    moved = torch.randn(24, 32, generator=generator, dtype=torch.float64)
    rotated = reference.Problem(
        problem.W + moved, problem.H, problem.input_scale, problem.output_scale, problem.scale
    )
    E = in_its_basis(rotated) - in_its_basis(problem)
    damped = H / H.diagonal().mean() + 0.25 * torch.eye(32, dtype=torch.float64)
    here, there = (
        (E @ damped * E).sum(),
        (moved @ problem.H * moved).sum() * problem.scale.double() ** 2,
    )
    torch.testing.assert_close(here[None], there, rtol=1e-9, atol=0)


def test_rotation_leaves_no_weight_standing_out(layer):
    W, H = layer(64, 128)
    rotated = reference.prepare(W, H, Options(rescale=False)).W
    # of 8192 values of a Gaussian the largest is at about 4 standard deviations
    assert W.abs().max() / W.square().mean().sqrt() > 10
    assert rotated.abs().max() / rotated.square().mean().sqrt() < 5.5


def test_rescaling_evens_out_weights_and_inputs(layer):
    W, H = layer(64, 96, torch.float64)
    damped = H / H.diagonal().mean()
    damped.diagonal().add_(0.01)
    s = 1 / reference.prepare(W, H, Options(damping=0.01)).input_scale.double().abs()
    weights, inputs = (W * s).square().sum(dim=0), damped.diagonal() / s**2
    ratio = weights / inputs
    torch.testing.assert_close(
        ratio, ratio.mean().expand(96), rtol=5e-3, atol=0
    )  # s is rounded to fp16, and to the fourth power here


def test_signs_are_half_of_each_and_of_their_seed():
    drawn = [reference.signs(seed, 4096, side) for seed in (0, 1) for side in ("input", "output")]
    for one in drawn:
        assert set(one.tolist()) == {1.0, -1.0}
        assert abs(float(one.sum())) < 5 * 4096**0.5
    for i, j in ((0, 1), (0, 2), (1, 3), (2, 3)):
        assert abs(float(drawn[i] @ drawn[j])) < 5 * 4096**0.5
    assert torch.equal(drawn[0], reference.signs(0, 4096, "input"))


@pytest.mark.parametrize("n", [8, 16, 48, 136])
def test_feedback_is_the_block_ldl_factor(n, layer):
    H = layer(8, n, torch.float64)[1] + torch.eye(n, dtype=torch.float64)
    L = reference.feedback(H, 0.01) + torch.eye(n, dtype=torch.float64)
    D = torch.linalg.solve_triangular(
        L, torch.linalg.solve_triangular(L, H, upper=False).T, upper=False
    )
    blocks = torch.block_diag(*[torch.ones(8, 8, dtype=torch.float64)] * (n // 8))
    assert torch.equal(L * (1 - torch.tril(torch.ones_like(L))) * (1 - blocks), torch.zeros_like(L))
    torch.testing.assert_close(D * (1 - blocks), torch.zeros_like(D), rtol=0, atol=1e-9)


def test_a_second_moment_that_fp32_cannot_factorize_is_factorized_in_fp64(generator):
    rows = torch.randint(-900, 901, (16, 16), generator=generator, dtype=torch.float64)
    rows[15] = rows[0]
    rows[15, 3] += (
        1  # so that what is left for the last column is 1e-7 of what it is subtracted from
    )
    H = rows @ rows.T
    assert torch.equal(H, H.float().double())
    assert torch.linalg.cholesky_ex(H.float())[1] != 0, "or this test tests nothing"
    L = torch.linalg.cholesky(H)
    blocks = torch.linalg.solve_triangular(
        L[:8, :8].contiguous(), L[8:, :8], upper=False, left=False
    )
    torch.testing.assert_close(
        reference.feedback(H.float(), 0.5)[8:, :8], blocks.float(), rtol=1e-5, atol=1e-6
    )


def test_a_singular_second_moment_is_damped_until_it_can_be_factorized():
    ones = torch.ones(16, 16)
    L = reference.feedback(ones, 0.01)
    assert bool(L.isfinite().all())
    # with H of ones alone, the earlier block makes up for the mean of the later one's error
    torch.testing.assert_close(L[8:, :8], torch.full((8, 8), 1 / 8), rtol=0.02, atol=0)


def test_an_indefinite_second_moment_is_refused():
    H = torch.eye(16)
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(WeightError, match="positive semidefinite"):
        reference.feedback(H, 0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_block_is_the_nearest_point_to_its_target(bits, layer):
    """E (I + L) = −η, where η is what rounding added to the target: so targets can be had from the result alone."""
    W, H = layer(32, 40, torch.float64)
    options = Options(bits=bits, sweeps=0)
    problem, solution = reference.prepare(W, H, options), reference.solve(W, H, options)
    W_hat = codebooks.decode(solution.codes, solution.residual, bits).double()
    L = reference.feedback(problem.H, options.damping) + torch.eye(40, dtype=torch.float64)
    target = W_hat + (problem.W - W_hat) @ L
    rounded = torch.cat([reference.quantize(t, bits)[1] for t in target.split(8, dim=1)], dim=1)
    torch.testing.assert_close(rounded, W_hat, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_and_then_sweeps_lower_the_proxy_error(bits, layer):
    W, H = layer(64, 96)

    def error(hessian, sweeps):
        options = Options(bits=bits, sweeps=sweeps)
        return reference.proxy_error(W, reference.solve(W, hessian, options).dequantize(options), H)

    rounding, blockldlq, swept = error(torch.eye(96), 0), error(H, 0), error(H, 4)
    assert blockldlq < 0.8 * rounding
    assert swept < 0.99 * blockldlq


def test_more_bits_leave_less_error(layer):
    W, H = layer(64, 96)
    errors = []
    for bits in (2, 3, 4):
        options = Options(bits=bits, sweeps=0)
        errors.append(
            reference.proxy_error(W, reference.solve(W, H, options).dequantize(options), H)
        )
    # a bit more is a quarter of the error for an ideal quantizer
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 8), (8, 9), (2, 17), (20, 12)])
def test_odd_shapes_are_quantized_as_well_as_even_ones(shape, layer):
    W, H = layer(*shape)
    options = Options(bits=4)
    W_hat = reference.solve(W, H, options).dequantize(options)
    assert W_hat.shape == shape
    assert float((W - W_hat).norm() / W.norm()) < 0.25


def test_inputs_that_were_always_zero_do_no_harm(layer):
    W, H = layer(16, 24)
    H[3], H[:, 3] = 0, 0
    options = Options()
    W_hat = reference.solve(W, H, options).dequantize(options)
    assert bool(W_hat.isfinite().all())
    assert reference.proxy_error(W, W_hat, H) < 0.1


@pytest.mark.parametrize("what", ["weight", "inputs", "both"])
def test_zeros_are_quantized_to_finite_values(what, layer):
    W, H = layer(16, 24)
    W, H = W * (what == "inputs"), H * (what == "weight")
    options = Options()
    W_hat = reference.solve(W, H, options).dequantize(options)
    assert bool(W_hat.isfinite().all())


def test_what_cannot_be_quantized_is_refused(layer):
    W, H = layer(16, 24)
    with pytest.raises(ShapeError, match=r"\[24, 24\]"):
        reference.solve(W, H[:8, :8], Options())
    for bad in (float("nan"), float("inf")):
        for i, name in enumerate(("weight", "second moment")):
            tensors = [W.clone(), H.clone()]
            tensors[i][2, 3] = bad
            with pytest.raises(WeightError, match=f"finite {name}"):
                reference.solve(*tensors, Options())
    with pytest.raises(WeightError, match="diagonal"):
        reference.solve(W, -H, Options())
