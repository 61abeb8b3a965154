"""The optimization, against the paper's equations written out for one group in float64, and by what it must achieve."""

from __future__ import annotations

import math

import pytest
import torch
from modulora_half_quadratic import reference
from modulora_half_quadratic.options import Options
from modulora_half_quadratic.quantizer import HalfQuadratic


def the_papers(w: list[float], bits: int, options: Options) -> tuple[float, float]:
    """Scale and zero point of one group: the paper's two sub-problems, a number at a time, Python's floats."""
    levels = 2**bits - 1
    s = (max(w) - min(w)) / levels
    z = -min(w) / s
    beta = options.beta
    for _ in range(options.iterations):
        q = [min(max(round(x / s + z), 0), levels) for x in w]
        errors = [x / s - (code - z) for x, code in zip(w, q, strict=True)]
        forgiven = [
            math.copysign(max(0.0, abs(e) - abs(e) ** (options.p - 1) / beta), e) if e else 0.0
            for e in errors
        ]
        z = sum(code - x / s + f for x, code, f in zip(w, q, forgiven, strict=True)) / len(w)
        beta *= 1.01
    return s, z


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "options", [{}, {"p": 0.5, "beta": 3.0}, {"p": 1.0, "iterations": 7}], ids=str
)
def test_with_a_fixed_scale_the_result_is_the_papers(bits, options, generator):
    options = Options(bits=bits, fit_scale=False, **options)
    W = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    _, scales, offsets = reference.solve(W, options)
    for row in range(12):
        s, z = the_papers(W[row].tolist(), bits, options)
        assert scales[row].item() == pytest.approx(s, rel=2**-11)  # half a step of fp16
        assert offsets[row].item() == pytest.approx(-s * z, rel=2**-11)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("fit_scale", [True, False])
def test_each_code_is_the_best_for_its_scale_and_offset(bits, fit_scale, generator):
    W = torch.randn(30, 50, generator=generator)
    q, s, b = reference.solve(W, Options(bits=bits, fit_scale=fit_scale))
    values = s.double() * torch.arange(2**bits) + b.double()  # [groups, levels]
    best = (W.double()[:, :, None] - values[:, None, :]).abs().amin(dim=2)
    error = (W.double() - values.gather(1, q.long())).abs()
    assert bool((error <= best + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_are_torchs(dtype, generator):
    W = torch.randn(9, 30, generator=generator, dtype=dtype)
    q = torch.randint(0, 8, (9, 30), generator=generator).to(dtype)
    W += q  # so that the scale is positive
    s, b = reference.least_squares(W, q, torch.ones(9, 1, dtype=dtype))
    for row in range(9):
        A = torch.stack([q[row], torch.ones(30, dtype=dtype)], dim=1).double()
        expected = torch.linalg.lstsq(A, W[row].double()[:, None]).solution[:, 0]
        torch.testing.assert_close(
            torch.cat([s[row], b[row]]).double(), expected, rtol=1e-5, atol=1e-5
        )


def test_a_scale_that_nothing_determines_stays_what_it_was(generator):
    W = torch.randn(2, 10, generator=generator)
    q = torch.stack(
        [torch.full((10,), 3.0), -W[1]]
    )  # all codes equal, and codes against the weights
    s, b = reference.least_squares(W, q, torch.full((2, 1), 0.5))
    assert s.tolist() == [[0.5], [0.5]]
    torch.testing.assert_close(b, (W - 0.5 * q).mean(dim=1, keepdim=True))


@pytest.mark.parametrize(("p", "beta"), [(0.7, 10.0), (0.5, 2.0), (1.0, 4.0), (0.3, 0.5)])
def test_small_errors_are_not_forgiven_and_large_ones_almost_wholly(p, beta):
    threshold = beta ** (-1 / (2 - p))
    x = torch.tensor([0.0, 0.999 * threshold, 1.001 * threshold, 1e3], dtype=torch.float64)
    for sign in (1, -1):
        none, small, more, large = (sign * reference.shrink(sign * x, beta, p)).tolist()
        assert none == small == 0
        assert 0 < more < 0.01 * threshold
        assert large == pytest.approx(1e3 - 1e3 ** (p - 1) / beta)


def test_for_the_l1_norm_shrinking_solves_its_sub_problem(generator):
    """|e| + β/2 (e − x)² over a grid of e has its minimum where shrink says."""
    x = torch.randn(50, generator=generator, dtype=torch.float64)
    e = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    best = e[(e.abs() + 2.5 / 2 * (e - x[:, None]) ** 2).argmin(dim=1)]
    torch.testing.assert_close(reference.shrink(x, 2.5, 1.0), best, rtol=0, atol=1e-4)


def lp_error(options: Options, W: torch.Tensor) -> float:
    q, s, b = reference.solve(W, options)
    return float((W - (s.float() * q + b.float())).abs().pow(options.p).mean())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("fit_scale", [True, False])
def test_optimizing_lowers_the_lp_error(bits, fit_scale, generator):
    W = torch.randn(400, 64, generator=generator)
    start = lp_error(Options(bits=bits, iterations=0), W)
    assert lp_error(Options(bits=bits, fit_scale=fit_scale), W) < 0.99 * start


@pytest.mark.parametrize(("bits", "share"), [(1, 0.7), (2, 0.85), (3, 0.96), (4, 0.99)])
def test_fitting_the_scale_lowers_the_lp_error_the_more_the_fewer_bits(bits, share, generator):
    W = torch.randn(400, 64, generator=generator)
    assert lp_error(Options(bits=bits), W) < share * lp_error(
        Options(bits=bits, fit_scale=False), W
    )


@pytest.mark.parametrize(
    "options", [Options(bits=b, fit_scale=f) for b in (1, 3, 8) for f in (True, False)], ids=str
)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e-30, 2e20])
def test_a_constant_weight_is_kept_to_the_rounding_of_fp16(value, options):
    W = torch.full((3, 100), value)
    quantizer = HalfQuadratic(options)
    W_hat = quantizer.dequantize_tile(quantizer.pack(W), (0, 3), torch.float32)
    torch.testing.assert_close(W_hat, W, rtol=2**-11, atol=0)


@pytest.mark.parametrize("fit_scale", [True, False])
def test_a_nearly_constant_group_is_kept_to_the_rounding_of_fp16(fit_scale, generator):
    """Its zero point, −offset / scale, is about 10⁷: as such it would not fit in fp16."""
    W = 1 + 1e-6 * torch.randn(4, 64, generator=generator)
    quantizer = HalfQuadratic(Options(bits=3, fit_scale=fit_scale))
    W_hat = quantizer.dequantize_tile(quantizer.pack(W), (0, 4), torch.float32)
    torch.testing.assert_close(W_hat, W, rtol=2**-11 + 1e-5, atol=0)


@pytest.mark.parametrize("exponent", [-110, -40, -1, 7, 60, 115])
def test_a_multiple_by_a_power_of_two_differs_in_the_unit_alone(exponent, generator):
    W = torch.randn(5, 100, generator=generator)
    one, other = HalfQuadratic().pack(W), HalfQuadratic().pack(W * 2.0**exponent)
    assert torch.equal(other.tensors["unit"], one.tensors["unit"] * 2.0**exponent)
    for name in ("codes", "scales", "offsets"):
        assert torch.equal(one.tensors[name], other.tensors[name]), name
