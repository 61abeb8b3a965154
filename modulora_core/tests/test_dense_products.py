"""Products by torch's own choice and by oneDNN equal the product in float64."""

import pytest
import torch

from modulora_core import dense_products
from modulora_core.dense_products import (
    add_product,
    linear,
    product,
    put_product,
)

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="torch was built without oneDNN")

NEAR = {"rtol": 1e-5, "atol": 1e-4}  # fp32 sums of at most 40 products of values near 1


@pytest.fixture(params=["torch", pytest.param("oneDNN", marks=needs_onednn)])
def library(request, monkeypatch):
    """The library that multiplies, on any processor and for products of any size."""
    monkeypatch.setattr(dense_products, "onednn_is_faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(dense_products, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(dense_products, "LEAST_PRODUCTS_OF_A_ROW", 1)
    return str(request.param)


def operands(n, k, m, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + k + m)
    x, w = torch.randn(n, k, generator=generator), torch.randn(k, m, generator=generator)
    return x.to(dtype), w.to(dtype)


def assert_is_product(y, x, w, before=0.0):
    """Allow the error of an fp32 sum of k products in any order."""
    exact = x.double() @ w.double() + before
    size = x.double().abs() @ w.double().abs() + 1.0
    error = 2 * torch.finfo(torch.float32).eps * x.shape[1] ** 0.5 * size
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= error).all()


SIZES = [(1, 1, 1), (3, 5, 7), (33, 100, 65), (130, 17, 9), (1, 300, 200), (7, 1, 300)]
EMPTY = [(0, 4, 4), (4, 0, 4), (4, 4, 0)]


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
def test_products_equal_the_fp64_product_for_any_strides(size, library):
    n, k, m = size
    x, w = operands(*size)
    wide = torch.full((n, k + 9), torch.nan)
    wide[:, 4 : 4 + k] = x
    before = torch.linspace(-1, 1, n * m).view(n, m)
    for a in (x, x.t().contiguous().t(), wide[:, 4 : 4 + k]):
        for b in (w, w.t().contiguous().t()):
            assert_is_product(product(a, b), x, w)
            y = torch.full((n, m + 5), 7.0)
            put_product(y[:, 2:-3], a, b)
            assert_is_product(y[:, 2:-3], x, w)
            assert (y[:, [0, 1, -3, -2, -1]] == 7).all()
            total = before.clone()
            add_product(total, a, b)
            assert_is_product(total, x, w, before.double())


@pytest.mark.parametrize("put", [put_product, add_product])
def test_a_large_result_is_written_in_parts(put, library, monkeypatch):
    monkeypatch.setattr(dense_products, "SCRATCH_BYTES", 4 * 20 * 8)  # 8 rows of 20 columns
    monkeypatch.setattr(dense_products, "LEAST_ROWS", 1)
    x, w = operands(29, 12, 20)
    y = torch.zeros(29, 20)
    put(y, x, w)
    assert_is_product(y, x, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_torch_multiplies_other_dtypes(dtype, library):
    x, w = operands(16, 64, 48, dtype)
    assert torch.equal(product(x, w), torch.mm(x, w))
    y = torch.zeros(16, 48)
    put_product(y, x, w)
    add_product(y, x, w)
    assert torch.equal(y, 2 * torch.mm(x, w).float())


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0, 3)], ids=str)
def test_a_linear_layer_equals_the_fp64_layer_with_its_gradients(
    leading, has_bias, trains, library
):
    x = torch.randn(*leading, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = operands(1, 12, 20)[1].t().contiguous().requires_grad_(trains)
    bias = torch.linspace(-1, 1, 20) if has_bias else None
    y = linear(x, weight, bias)
    dY = torch.linspace(-2, 1, y.numel()).view(y.shape)
    y.backward(dY)
    W, X = weight.detach().double(), x.detach().double()
    exact = X @ W.t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), exact, **NEAR)
    torch.testing.assert_close(x.grad.double(), dY.double() @ W, **NEAR)
    assert (weight.grad is not None) == trains
    if trains:
        dW = dY.double().reshape(-1, 20).t() @ X.reshape(-1, 12)
        torch.testing.assert_close(weight.grad.double(), dW, **NEAR)


# --- the choice --------------------------------------------------------------------------------
