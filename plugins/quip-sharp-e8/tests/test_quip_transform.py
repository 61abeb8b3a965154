"""H_n for every dimension: orthogonal, what its definition says, the same bits in any company, by kernel and by torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from modulora_quip_sharp_e8.transform import laid_out, matrix, order, rotate, turn
from torch import Tensor

from modulora_core import kernels
from modulora_core.errors import ShapeError

pytestmark = pytest.mark.usefixtures("one_thread")

SMOLLM2 = {192, 320, 576, 960, 1536, 2048, 2560, 8192}
LLAMA = {
    4096,
    11008,
    5120,
    13824,
    6656,
    17920,
    8192,
    22016,
    32000,
    1024,
    3072,
    14336,
    28672,
    16384,
    53248,
    128256,
}
MISTRAL = {1024, 4096, 5120, 6144, 12288, 14336, 16384, 28672, 32768}
QWEN = {  # hidden, intermediate, and key-value sizes of 1.5, 2, 2.5 and 3, dense and with experts
    1024, 2816, 2048, 5504, 2560, 6912, 4096, 11008, 5120, 13696, 27392, 8192, 24576, 49152, 1408, 5632,
    896, 4864, 128, 1536, 8960, 256, 3584, 18944, 512, 13824, 27648, 29568, 20480, 3072, 6144, 9728, 12288, 17408,
    25600, 768,
}  # fmt: skip
MODELS = sorted(SMOLLM2 | LLAMA | MISTRAL | QWEN)
PRIMES = (577, 8191, 10007)  # 8191 and 10007 by way of a Fourier transform, and so are these:
LARGE_ODD_PARTS = (4 * 1031, 6 * 1025)
DENSE = [*range(1, 131), 172, 192, 344, 576, 577, 640, 1376, 1408, 1712, 2062]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "torch":
        request.getfixturevalue("plain_torch")
    else:
        pytest.importorskip("numba")
    return str(request.param)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    ).to(dtype)


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the expected root mean square."""
    return float(
        (got.double() - expected.double()).abs().max() / expected.double().square().mean().sqrt()
    )


def check_orthogonality(n: int) -> None:
    """To 1e-5, of what fp32 gives: norms and angles stay, the transpose is the inverse, an outlier reaches all alike."""
    x = torch.zeros(5, n)
    x[[0, 1, 2], [0, n // 3, n - 1]] = 1
    x[3:] = random(2, n) / math.sqrt(n)
    y = rotate(x)
    assert (y.double() @ y.double().T - x.double() @ x.double().T).abs().max() < 1e-5
    assert (rotate(y, transpose=True) - x).abs().max() < 1e-5
    assert y[:3].abs().max() <= 1.00001 * math.sqrt(2 / n)


@pytest.mark.parametrize("n", MODELS)
def test_every_dimension_of_common_models_has_an_orthogonal_transform(n):
    check_orthogonality(n)


@pytest.mark.parametrize("n", [*PRIMES, *LARGE_ODD_PARTS])
def test_so_has_every_other_dimension(n, path):
    check_orthogonality(n)


@pytest.mark.parametrize("n", [*range(1, 131), 192, 320, 576])
def test_the_whole_matrix_is_orthogonal_in_fp32(n, path):
    H = rotate(torch.eye(n)).double()
    assert (H @ H.T - torch.eye(n)).abs().max() < 1e-5


@pytest.mark.parametrize("n", DENSE)
def test_rotation_is_the_product_with_the_dense_matrix(n, path):
    H = matrix(n)
    assert (H @ H.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12
    x, before, after = random(3, n, dtype=torch.float64), 1 + random(n).abs(), random(n)
    for transpose, M in ((False, H), (True, H.T)):
        expected = ((x * before.double()) @ M) * after.double()
        got = rotate(x, transpose=transpose, before=before, after=after)
        assert got.dtype == torch.float64
        assert error(got, expected) < 1e-12
        assert (
            error(rotate(x.float(), transpose=transpose, before=before, after=after), expected)
            < 1e-5
        )


def test_dense_matrix_is_what_the_definition_says():
    cas = [
        [math.cos(2 * math.pi * a * b / 3) + math.sin(2 * math.pi * a * b / 3) for b in range(3)]
        for a in range(3)
    ]
    expected = np.kron(cas, [[1, 1], [1, -1]]) / math.sqrt(6)
    assert np.allclose(matrix(6).numpy(), expected, rtol=0, atol=1e-15)
    assert matrix(1).tolist() == [[1.0]]
    assert [order(n) for n in (1, 2, 3, 12, 24, 107 * 128, 2004)] == [1, 1, 3, 12, 12, 107, 501]


@pytest.mark.parametrize("n", [576, 577, 1024, 11008, 13696, 8191])
def test_transpose_is_the_adjoint(n, path):
    x, y = random(2, n, dtype=torch.float64), random(2, n, dtype=torch.float64) + 1
    before, after = random(n), random(n) + 1
    there = (rotate(x, before=before, after=after) * y).sum()
    back = (x * rotate(y, transpose=True, before=after, after=before)).sum()
    assert abs(there - back) < 1e-10 * x.norm() * y.norm()


@pytest.mark.parametrize("n", [11008, 13696, 29568, 32000, 28672])
def test_torch_and_kernels_agree_to_rounding(n, monkeypatch):
    pytest.importorskip("numba")
    x, before = random(2, n), random(n)
    got = rotate(x, before=before)
    monkeypatch.setattr(kernels, "load", lambda module, device: None)
    assert error(got, rotate(x, before=before)) < 1e-5


@pytest.mark.parametrize("n", [7, 20, 192, 256, 577, 2752, 1712, 8191, 4124])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_has_the_same_bits_whatever_the_others_are(n, dtype, path):
    x, before, after = random(9, n, dtype=dtype), random(n), random(n)
    for transpose in (False, True):
        together = rotate(x, transpose=transpose, before=before, after=after)
        for start, stop in ((0, 1), (3, 4), (2, 9), (5, 5)):
            alone = rotate(x[start:stop], transpose=transpose, before=before, after=after)
            assert torch.equal(alone, together[start:stop])


@pytest.mark.parametrize("n", [192, 577, 2752])
def test_bits_do_not_depend_on_the_number_of_threads(n, path):
    x = random(7, n)
    one = rotate(x)
    torch.set_num_threads(2)  # the fixture takes it back
    assert torch.equal(rotate(x), one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [576, 1030, 8191])
def test_half_precision_gives_what_its_values_give_in_fp32(n, dtype, path):
    x, before = random(3, n, dtype=dtype), random(n, dtype=dtype)
    got = rotate(x, before=before)
    assert got.dtype == torch.float32
    assert torch.equal(got, rotate(x.float(), before=before.float()))


@pytest.mark.parametrize("n", [28672, 13696, 10007])
def test_large_activations_do_not_overflow(n, path):
    x = torch.full((1, n), 1e4, dtype=torch.float16)
    y = rotate(x, before=torch.ones(n, dtype=torch.float16))
    assert y.isfinite().all()
    assert abs(y.norm() / x.double().norm() - 1) < 1e-5


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,), (2, 3, 12), (1, 1, 1, 12)])
def test_leading_dimensions_and_strides_are_any(shape, path):
    x = random(*shape, dtype=torch.float64)
    assert torch.allclose(rotate(x), x @ matrix(12), rtol=0, atol=1e-12)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(rotate(strided), rotate(x))


def test_input_is_neither_changed_nor_returned(path):
    x = random(2, 1)
    before = x.clone()
    y = rotate(x)
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("n", [1, 20, 256, 577, 1536, 8191])
def test_in_place_gives_the_same_bits(n, path):
    x, before, after = random(5, n), random(n), random(n) + 1
    expected = rotate(x, before=before, after=after)
    y = rotate(x, before=before, after=after, in_place=True)
    assert torch.equal(y, expected)
    assert (
        y.data_ptr() == x.data_ptr() or path == "torch" or n == 8191
    )  # by way of a Fourier transform


def test_random_signs_spread_an_outlier_and_a_constant(path):
    n = 1712  # 107 · 16: Hartley's matrix
    signs = torch.where(random(n) > 0, 1.0, -1.0)
    x = torch.ones(2, n)
    x[1, 5] = 1000
    y = rotate(x, before=signs)
    incoherence = y.abs().amax(dim=1) * math.sqrt(n) / x.norm(dim=1)
    bound = 2 * math.sqrt(
        math.log(2 * n / 1e-6)
    )  # Hoeffding's, for terms of magnitude √2, but for one in a million
    assert incoherence.max() < bound


@pytest.mark.parametrize(
    "x", [torch.ones(()), torch.ones(3, 0), torch.ones(3, 4, dtype=torch.int32)]
)
def test_what_cannot_be_rotated_is_refused(x):
    with pytest.raises(ShapeError, match="what is to be rotated"):
        rotate(x)


@pytest.mark.parametrize("name", ["before", "after"])
def test_a_vector_that_does_not_fit_is_refused(name):
    with pytest.raises(ShapeError, match=f"{name} of a rotation: expected the shape \\[4\\]"):
        rotate(torch.ones(2, 4), **{name: torch.ones(1)})


def turned(x: Tensor, scale: Tensor, transpose: bool, after: bool, dtype: torch.dtype) -> Tensor:
    """By the kernels for a product, in ``dtype``; 1.5 is the scale's unit."""
    out, n = torch.empty(x.shape, dtype=dtype), x.shape[1]
    matrix = laid_out(n, transpose, torch.float32).numpy()
    bits = scale.view(torch.int16).numpy()
    turn(kernels.rows_of(x), bits, np.float32(1.5), matrix, order(n), after, kernels.rows_of(out))
    return out


@pytest.mark.parametrize("n", [1, 8, 20, 48, 192, 256, 384, 577, 1024, 1536, 2752])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_products_rotation_is_that_of_its_scales(n, rows):
    pytest.importorskip("numba")
    x, scale = random(rows, n), random(n, dtype=torch.float16)
    factors = 1.5 * scale.double()
    for transpose in (False, True):
        before = turned(x, scale, transpose, False, torch.float32)
        assert error(before, rotate(x.double(), transpose=transpose, before=factors)) < 1e-5
        after = turned(x, scale, transpose, True, torch.float32)
        assert error(after, rotate(x.double(), transpose=transpose, after=factors)) < 1e-5


@pytest.mark.parametrize("n", [1, 8, 20, 48, 192, 256, 384, 577, 1024, 1536, 2752])
@pytest.mark.parametrize("after", [False, True])
def test_bf16_is_read_and_rounded_by_the_kernels_of_a_product(n, after):
    pytest.importorskip("numba")
    x, scale = random(5, n, dtype=torch.bfloat16), random(n, dtype=torch.float16)
    expected = turned(x.float(), scale, False, after, torch.float32)
    assert torch.equal(turned(x, scale, False, after, torch.float32), expected)
    assert torch.equal(turned(x.float(), scale, False, after, torch.bfloat16), expected.bfloat16())
    in_place = x.clone()
    matrix, bits = laid_out(n, False, torch.float32).numpy(), scale.view(torch.int16).numpy()
    rows = kernels.rows_of(in_place)
    turn(rows, bits, np.float32(1.5), matrix, order(n), after, rows)
    assert torch.equal(in_place, expected.bfloat16())
