"""H_n for every dimension: its definition, its inverse, and the bits of a row."""

import math

import numpy as np
import pytest
import torch
from modulora_kernels.rotation import matrix, order, rotate, signs

from modulora_core.errors import ShapeError

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = (896, 5632, 11008, 13696, 14336, 29568, 32000)
"""Orders 28, 44, 172, 107 (Hartley's), 28, 924 and 500."""
LARGE = (8191, 4 * 1031)
"""By a Fourier transform."""
DENSE = (1, 2, 3, 12, 20, 48, 192, 344, 577, 1536, 1712)
UNIT = torch.tensor([1.5])


@pytest.fixture(params=["kernels", "torch"])
def path(request):
    if request.param == "torch":
        request.getfixturevalue("plain_torch")
    else:
        pytest.importorskip("numba")
    return str(request.param)


def random(*shape, dtype=torch.float32):
    numbers = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype)


def error(got, expected):
    """The largest difference, in units of the expected root mean square."""
    size = expected.double().square().mean().sqrt()
    return float((got.double() - expected.double()).abs().max() / size)


@pytest.mark.parametrize("n", [*MODELS, *LARGE])
def test_norms_stay_the_transpose_is_the_inverse_and_an_outlier_reaches_all_alike(n, path):
    x = torch.zeros(4, n)
    x[[0, 1], [0, n // 3]] = 1
    x[2:] = random(2, n) / math.sqrt(n)
    y = rotate(x)
    assert (y.double() @ y.double().T - x.double() @ x.double().T).abs().max() < 1e-5
    assert (rotate(y, transpose=True) - x).abs().max() < 1e-5
    assert y[:2].abs().max() <= 1.00001 * math.sqrt(2 / n)


@pytest.mark.parametrize(
    ("n", "block"), [*((n, None) for n in DENSE), (128, 128), (384, 128), (96, 8), (24, 1)]
)
def test_rotation_is_the_product_with_the_dense_matrix(n, block, path):
    H, scale = matrix(n, block), random(n, dtype=torch.float16)
    assert (H @ H.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12
    if block is not None:  # blocks are rotated apart
        assert torch.equal(H, torch.block_diag(*[matrix(block)] * (n // block)))
    x, s = random(3, n, dtype=torch.float64), 1.5 * scale.double()
    for transpose, M in ((False, H), (True, H.T)):
        for after, expected in ((False, (x * s) @ M), (True, (x @ M) * s)):
            for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
                way = {"after": after, "transpose": transpose, "block": block}
                got = rotate(x.to(dtype), scale, UNIT, **way)
                assert got.dtype == dtype
                assert error(got, expected) < limit


def test_the_dense_matrix_follows_the_definition():
    angles = [[2 * math.pi * a * b / 3 for b in range(3)] for a in range(3)]
    cas = np.cos(angles) + np.sin(angles)
    expected = np.kron(cas, [[1, 1], [1, -1]]) / math.sqrt(6)
    assert np.allclose(matrix(6).numpy(), expected, rtol=0, atol=1e-15)
    assert [order(n) for n in (1, 2, 3, 12, 24, 107 * 128, 2004)] == [1, 1, 3, 12, 12, 107, 501]


def test_signs_are_half_of_each_and_depend_on_seed_and_side():
    drawn = [signs(seed, 4096, side) for seed in (0, 1) for side in ("input", "output")]
    for one in drawn:
        assert set(one.tolist()) == {1.0, -1.0}
        assert abs(float(one.sum())) < 5 * 4096**0.5
    for i, j in ((0, 1), (0, 2), (1, 3), (2, 3)):
        assert abs(float(drawn[i] @ drawn[j])) < 5 * 4096**0.5
    assert torch.equal(drawn[0], signs(0, 4096, "input"))


def test_what_does_not_fit_is_refused():
    x = random(2, 24)
    for given, message in (
        ((x.int(),), r"rotation: expected a float tensor \[..., n\]"),
        ((x, torch.ones(7)), r"scale of a rotation: expected the shape \[24\]"),
    ):
        with pytest.raises(ShapeError, match=message):
            rotate(*given)
    with pytest.raises(ShapeError, match="expected a power of two that divides 24"):
        rotate(x, block=16)
