"""The optimization against the method's equations in float64, and against its own purpose."""

import math

import pytest
import torch
from modulora_half_quadratic import reference
from modulora_half_quadratic.options import Options


def the_papers(w, bits, options):
    """Scale and zero point of one group: the two sub-problems, a number at a time."""
    levels = 2**bits - 1
    s = (max(w) - min(w)) / levels
    z, beta = -min(w) / s, options.beta
    for _ in range(options.iterations):
        q = [min(max(round(x / s + z), 0), levels) for x in w]
        errors = [x / s - (code - z) for x, code in zip(w, q, strict=True)]
        outliers = [
            math.copysign(max(0.0, abs(e) - abs(e) ** (options.p - 1) / beta), e) if e else 0.0
            for e in errors
        ]
        z = sum(code - x / s + o for x, code, o in zip(w, q, outliers, strict=True)) / len(w)
        beta *= 1.01
    return s, z


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("options", [{}, {"p": 0.5, "beta": 3.0}, {"p": 1.0, "iterations": 7}])
def test_with_a_fixed_scale_the_result_is_the_papers(bits, options, generator):
    options = Options(bits=bits, fit_scale=False, **options)
    W = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    _, scales, offsets = reference.solve(W, options)
    for row in range(12):
        s, z = the_papers(W[row].tolist(), bits, options)
        assert scales[row].item() == pytest.approx(s, rel=2**-11)  # half a step of fp16
        assert offsets[row].item() == pytest.approx(-s * z, rel=2**-11)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("fit_scale", [True, False])
def test_each_code_is_the_best_for_its_scale_and_offset(bits, fit_scale, generator):
    W = torch.randn(30, 50, generator=generator)
    q, s, b = reference.solve(W, Options(bits=bits, fit_scale=fit_scale))
    values = s.double() * torch.arange(2**bits) + b.double()  # [groups, levels]
    best = (W.double()[:, :, None] - values[:, None, :]).abs().amin(dim=2)
    error = (W.double() - values.gather(1, q.long())).abs()
    assert bool((error <= best + 1e-6).all())


def test_least_squares_are_torchs(generator):
    W = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    q = torch.randint(0, 8, (9, 30), generator=generator).to(W.dtype)
    W += q  # so that the scale is positive
    s, b = reference.least_squares(W, q, torch.ones(9, 1, dtype=W.dtype))
    for row in range(9):
        A = torch.stack([q[row], torch.ones(30, dtype=W.dtype)], dim=1)
        expected = torch.linalg.lstsq(A, W[row][:, None]).solution[:, 0]
        torch.testing.assert_close(torch.cat([s[row], b[row]]), expected, rtol=1e-5, atol=1e-5)
    # equal codes, and codes against the weights: the scale stays
    W = torch.randn(2, 10, generator=generator)
    q = torch.stack([torch.full((10,), 3.0), -W[1]])
    s, b = reference.least_squares(W, q, torch.full((2, 1), 0.5))
    assert s.tolist() == [[0.5], [0.5]]
    torch.testing.assert_close(b, (W - 0.5 * q).mean(dim=1, keepdim=True))


@pytest.mark.parametrize(("p", "beta"), [(0.7, 10.0), (0.5, 2.0), (1.0, 4.0)])
def test_shrinking_zeroes_small_errors_and_keeps_large_ones(p, beta):
    threshold = beta ** (-1 / (2 - p))
    x = torch.tensor([0.0, 0.999 * threshold, 1.001 * threshold, 1e3], dtype=torch.float64)
    for sign in (1, -1):
        zero, small, more, large = (sign * reference.shrink(sign * x, beta, p)).tolist()
        assert zero == small == 0
        assert 0 < more < 0.01 * threshold
        assert large == pytest.approx(1e3 - 1e3 ** (p - 1) / beta)


def test_for_the_l1_norm_shrinking_solves_its_sub_problem(generator):
    """|e| + β/2 (e − x)² over a grid of e has its minimum at shrink(x)."""
    x = torch.randn(50, generator=generator, dtype=torch.float64)
    e = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    best = e[(e.abs() + 2.5 / 2 * (e - x[:, None]) ** 2).argmin(dim=1)]
    torch.testing.assert_close(reference.shrink(x, 2.5, 1.0), best, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("bits", "share"), [(1, 0.7), (2, 0.85), (4, 0.99)])
def test_optimizing_and_fitting_the_scale_lower_the_lp_error(bits, share, generator):
    W = torch.randn(400, 64, generator=generator)

    def lp_error(**options):
        options = Options(bits=bits, **options)
        q, s, b = reference.solve(W, options)
        return float((W - (s.float() * q + b.float())).abs().pow(options.p).mean())

    fixed = lp_error(fit_scale=False)
    assert fixed < 0.99 * lp_error(iterations=0)
    assert lp_error() < share * fixed
