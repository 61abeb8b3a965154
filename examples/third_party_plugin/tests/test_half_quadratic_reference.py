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
