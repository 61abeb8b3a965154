"""The search is exact: no point of the codebook is nearer than the one it finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from modulora_quip_sharp_e8 import codebooks

from modulora_core import kernels

numba = pytest.importorskip("numba")

CODEBOOKS = {"e8p": (codebooks.e8p, torch.int16), "e81": (codebooks.e81, torch.uint8)}


def search(x, name):
    codes = torch.empty(len(x), dtype=CODEBOOKS[name][1])
    cpu = kernels.load("modulora_quip_sharp_e8.cpu_search", x.device)
    kernels.launch(getattr(cpu, f"search_{name}"), x, codes)
    return codes.long() % (1 << 16)


def errors(x, codes, name):
    """|x − g|² in fp64, where x − g is exact."""
    return (x.double() - CODEBOOKS[name][0]()[codes].double()).square().sum(-1)


def brute(x, name):
    points = CODEBOOKS[name][0]().double()
    return torch.cat([codebooks.nearest_brute(chunk.double(), points) for chunk in x.split(256)])


@numba.njit(parallel=True)
def _least_errors(x, S, out):
    for n in numba.prange(len(x)):
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


def least_errors(x):
    """|x − g|² of the nearest g of E8P12 in fp64, by looking at all 256 absolute vectors in both cosets.

    Their signs are those of z = x ∓ 1/4 or, where these are of the wrong parity, all but the one that costs least.
    """
    out = torch.empty(len(x), dtype=torch.float64)
    _least_errors(x.numpy(), codebooks.absolute_vectors().double().numpy(), out.numpy())
    return out


def vectors(kind, n, generator):
    """Where a search can go wrong: inside of the codebook, at its rim, far beyond it, between points and on them."""
    gaussian = torch.randn(n, 8, generator=generator)
    match kind:
        case "heavy tails":
            return gaussian / (torch.randn(n, 8, generator=generator).abs() + 0.05)
        case "ties":  # eighths: midpoints of many points, deep holes of the lattice
            return torch.randint(-24, 25, (n, 8), generator=generator) / 8
        case "points":
            return codebooks.e8p()[torch.randint(0, 1 << 16, (n,), generator=generator)]
        case "midpoints":
            pairs = codebooks.e8p()[torch.randint(0, 1 << 16, (n, 2), generator=generator)]
            return pairs.mean(1)
        case "one coordinate":
            return torch.zeros(n, 8).scatter(
                1, torch.randint(0, 8, (n, 1), generator=generator), 50 * gaussian[:, :1]
            )
        case scale:
            return scale * gaussian


KINDS = [
    1e-30,
    0.3,
    0.9,
    1.03,
    2.0,
    50.0,
    1e6,
    "heavy tails",
    "ties",
    "points",
    "midpoints",
    "one coordinate",
]


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_point_of_the_codebook_is_nearer(kind, name, generator):
    x = vectors(kind, 768, generator)
    # what is left of fp64's digits when |x|² is in the sum
    slack = 1e-14 * x.double().square().sum(-1) + 1e-14
    assert (errors(x, search(x, name), name) <= errors(x, brute(x, name), name) + slack).all()


@pytest.mark.parametrize("kind", [0.9, 1.03, 2.0, "heavy tails"])
def test_no_point_is_nearer_to_any_of_a_million_vectors(kind, generator):
    x = vectors(kind, 250_000, generator)  # four kinds
    found = errors(x, search(x, "e8p"), "e8p")
    assert (found <= least_errors(x) * (1 + 1e-13) + 1e-13).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_of_the_million_equals_brute_force(kind, generator):
    x = vectors(kind, 256, generator)
    slack = 1e-14 * float(x.double().square().sum(-1).max())
    torch.testing.assert_close(
        least_errors(x), errors(x, brute(x, "e8p"), "e8p"), rtol=1e-13, atol=slack + 1e-14
    )


@pytest.mark.parametrize("name", CODEBOOKS)
def test_each_point_is_nearest_to_itself(name):
    points = CODEBOOKS[name][0]()
    assert torch.equal(search(points, name), torch.arange(len(points)))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_zeros_of_either_sign_have_a_nearest_point(name):
    x = torch.zeros(256, 8)
    x[torch.arange(256)[:, None] >> torch.arange(8) & 1 == 1] = -0.0
    found = errors(x, search(x, name), name)
    assert (found == CODEBOOKS[name][0]().double().square().sum(-1).min()).all()


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), torch.finfo(torch.float32).max]
)
def test_what_is_not_a_number_still_gets_a_code_of_the_codebook(name, value, generator):
    x = torch.where(
        torch.rand(512, 8, generator=generator) < 0.4,
        value,
        torch.randn(512, 8, generator=generator),
    )
    codes = search(x, name)
    assert bool((codes < len(CODEBOOKS[name][0]())).all())


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_search_takes_any_number_of_vectors(name, generator):
    x = torch.randn(9001, 8, generator=generator)
    whole = search(x, name)
    for n in (0, 1, 4095, 4097):
        assert torch.equal(search(x[:n], name), whole[:n])


@pytest.mark.parametrize("name", CODEBOOKS)
def test_points_in_kernels_are_those_of_the_tables(name):
    cpu = kernels.load("modulora_quip_sharp_e8.cpu_search", torch.device("cpu"))
    point, points = getattr(cpu, f"point_{name}"), CODEBOOKS[name][0]().numpy()
    out = np.empty_like(points)
    for code in range(
        0, len(points), len(points) // 256 + (name == "e8p")
    ):  # 257 is prime: all bytes come up
        point(code, out[code])
        assert np.array_equal(out[code], points[code])


def test_fp64_vectors_are_searched_in_fp64(generator):
    cpu = kernels.load("modulora_quip_sharp_e8.cpu_search", torch.device("cpu"))
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    codes = torch.tensor([cpu.nearest_e8p(row.numpy()) for row in x])
    assert torch.equal(codes, brute(x, "e8p"))
