"""The search is exact: no point of the codebook is nearer than the one found."""

import numpy as np
import pytest
import torch
from modulora_quip_sharp_e8 import codebooks

numba = pytest.importorskip("numba")

from modulora_quip_sharp_e8.kernels import rounding  # noqa: E402 - it imports numba

CODEBOOKS = {"e8p": codebooks.e8p, "e81": codebooks.e81}
SEARCHES = {"e8p": rounding.nearest_e8p, "e81": rounding.nearest_e81}


@numba.njit
def _search(x, nearest, codes):
    for n in range(len(x)):
        codes[n] = nearest(x[n])


@numba.njit
def _least_errors(x, S, out):
    for n in range(len(x)):
        least = np.inf
        for shift in (0.25, -0.25):
            for a in range(len(S)):
                error, signs, total, cheapest = 0.0, 0, 0.0, np.inf
                for i in range(8):
                    z = x[n, i] - shift
                    error += (abs(z) - S[a, i]) ** 2
                    cheapest = min(cheapest, 4 * abs(z) * S[a, i])
                    signs += z < 0
                    total += S[a, i]
                if (signs + total) % 2 == 1:
                    error += cheapest
                least = min(least, error)
        out[n] = least


def search(x, name):
    codes = torch.empty(len(x), dtype=torch.int64)
    _search(x.numpy(), SEARCHES[name], codes.numpy())
    return codes


def errors(x, codes, name):
    """|x − g|² in fp64, in which x − g is exact."""
    return (x.double() - CODEBOOKS[name]()[codes].double()).square().sum(-1)


def least(x, name):
    """|x − g|² of the nearest point, by brute force in fp64.

    For E8P12 over 256 absolute vectors in both cosets, with the signs of x ∓ 1/4, or with all but
    the cheapest.
    """
    if name == "e81":
        points = codebooks.e81().double()
        return errors(x, codebooks.nearest_brute(x.double(), points), name)
    out = torch.empty(len(x), dtype=torch.float64)
    _least_errors(x.numpy(), codebooks.absolute_vectors().double().numpy(), out.numpy())
    return out


def check(x, name):
    slack = 1e-13 * x.double().square().sum(-1) + 1e-13
    assert bool((errors(x, search(x, name), name) <= least(x, name) + slack).all())


def vectors(kind, n, numbers):
    """Inside of the codebook, at its rim, far beyond it, between points and on them."""
    gaussian = torch.randn(n, 8, generator=numbers)
    match kind:
        case "heavy tails":
            return gaussian / (torch.randn(n, 8, generator=numbers).abs() + 0.05)
        case "ties":  # midpoints of many points, deep holes of the lattice
            return torch.randint(-24, 25, (n, 8), generator=numbers) / 8
        case "midpoints":
            pairs = torch.randint(0, 1 << 16, (n, 2), generator=numbers)
            return codebooks.e8p()[pairs].mean(1)
        case scale:
            return scale * gaussian


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("kind", [1e-30, 0.9, 1.03, 50.0, "heavy tails", "ties", "midpoints"])
def test_no_point_of_the_codebook_is_nearer(kind, name, generator):
    check(vectors(kind, 20_000 if kind == 1.03 else 4000, generator), name)


def test_the_oracle_equals_brute_force(generator):
    x = vectors("heavy tails", 256, generator)
    brute = codebooks.nearest_brute(x.double(), codebooks.e8p().double())
    torch.testing.assert_close(least(x, "e8p"), errors(x, brute, "e8p"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_each_point_is_nearest_to_itself(name):
    points = CODEBOOKS[name]()
    assert torch.equal(search(points, name), torch.arange(len(points)))


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), torch.finfo(torch.float32).max])
def test_every_vector_gets_a_code_of_the_codebook(name, value, generator):
    chosen = torch.rand(512, 8, generator=generator) < 0.4
    x = torch.where(chosen, value, torch.randn(512, 8, generator=generator))
    codes = search(x, name)
    assert bool(((codes >= 0) & (codes < len(CODEBOOKS[name]()))).all())


@pytest.mark.parametrize("name", CODEBOOKS)
def test_points_of_kernels_are_those_of_the_tables(name):
    point, points = getattr(rounding, f"point_{name}"), CODEBOOKS[name]().numpy()
    out = np.empty(8, np.float32)
    for code in range(0, len(points), len(points) // 256 + (name == "e8p")):  # 257 is prime
        point(code, out)
        assert np.array_equal(out, points[code])
