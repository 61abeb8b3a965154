from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modulora_core.devices import dense_products
from modulora_core.devices.dense_products import DenseLinear, add_product, linear, product, put_product

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=["torch", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both on any processor that has both, and for products of any size."""
    if request.param == "oneDNN" and not HAS_ONEDNN:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(dense_products, "onednn_is_faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(dense_products, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(dense_products, "LEAST_PRODUCTS_OF_A_ROW", 1)
    return str(request.param)


def operands(n: int, k: int, m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k + m)
    return torch.randn(n, k, generator=generator).to(dtype), torch.randn(
        k, m, generator=generator
    ).to(dtype)


NEWER = """
import torch
from modulora_core.devices.dense_products import float32_precision, matmul_precision

matmul = torch.backends.mkldnn.matmul
for theirs, ours in (("tf32", "high"), ("bf16", "high"), ("ieee", "highest")):
    matmul.fp32_precision = theirs
    assert float32_precision() == ours, (theirs, float32_precision())
matmul.fp32_precision = "tf32"
with matmul_precision("highest"):
    assert matmul.fp32_precision == "tf32"
assert matmul.fp32_precision == "tf32"
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"),
    reason="this torch has no such settings (2.9 brought them)",
)
def test_torchs_newer_settings_of_precision_are_understood_and_stay() -> None:
    done = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def assert_is_product(y: Tensor, x: Tensor, w: Tensor, before: Tensor | float = 0.0) -> None:
    """To what fp32 sums of k products can be off by, in any order: k roundings of the sum of their sizes, of which few add up."""
    exact = x.double() @ w.double() + before
    size = x.double().abs() @ w.double().abs() + 1.0
    assert y.shape == exact.shape
    assert (
        (y.double() - exact).abs() <= 2 * torch.finfo(torch.float32).eps * x.shape[1] ** 0.5 * size
    ).all()


SIZES = [
    (1, 1, 1),
    (3, 5, 7),
    (16, 64, 48),
    (33, 100, 65),
    (130, 17, 9),
    (1, 300, 200),
    (7, 1, 300),
]


@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_that_in_fp64(size: tuple[int, int, int], library: str) -> None:
    x, w = operands(*size)
    assert_is_product(product(x, w), x, w)


@pytest.mark.parametrize("size", SIZES)
def test_strides_and_transposed_operands_make_no_difference(
    size: tuple[int, int, int], library: str
) -> None:
    x, w = operands(*size)
    wide = torch.full((size[0], size[1] + 9), torch.nan)
    wide[:, 4 : 4 + size[1]] = x
    for a in (x, x.t().contiguous().t(), wide[:, 4 : 4 + size[1]]):
        for b in (w, w.t().contiguous().t()):
            assert_is_product(product(a, b), x, w)


@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_put_into_columns_of_others_and_nowhere_else(
    size: tuple[int, int, int], library: str
) -> None:
    x, w = operands(*size)
    y = torch.full((size[0], size[2] + 5), 7.0)
    put_product(y[:, 2:-3], x, w)
    assert_is_product(y[:, 2:-3], x, w)
    assert (y[:, [0, 1, -3, -2, -1]] == 7).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_added(size: tuple[int, int, int], library: str) -> None:
    x, w = operands(*size)
    before = torch.linspace(-1, 1, size[0] * size[2]).view(size[0], size[2])
    y = before.clone()
    add_product(y, x, w)
    assert_is_product(y, x, w, before.double())


@pytest.mark.parametrize("put", [put_product, add_product])
def test_rows_are_by_onednn_a_block_at_a_time(
    put: object, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_products, "SCRATCH_BYTES", 4 * 20 * 8)  # 8 rows of 20 columns
    monkeypatch.setattr(dense_products, "LEAST_ROWS", 1)
    x, w = operands(29, 12, 20)
    y = torch.zeros(29, 20)
    put(y, x, w)  # type: ignore[operator]
    assert_is_product(y, x, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype, library: str) -> None:
    x, w = operands(16, 64, 48, dtype)
    assert torch.equal(product(x, w), torch.mm(x, w))
    y = torch.zeros(16, 48)
    put_product(y, x, w)
    assert torch.equal(y, torch.mm(x, w).float())
    add_product(y, x, w)
    assert torch.equal(y, 2 * torch.mm(x, w).float())


@pytest.mark.parametrize("size", [(0, 4, 4), (4, 0, 4), (4, 4, 0)])
def test_nothing_is_by_onednn_as_torch_does(size: tuple[int, int, int], library: str) -> None:
    x, w = operands(*size)
    y = torch.ones(size[0], size[2])
    add_product(y, x, w)
    assert torch.equal(y, torch.ones(size[0], size[2]))
    put_product(y, x, w)
    assert torch.equal(y, torch.zeros(size[0], size[2]))
    assert torch.equal(product(x, w), y)


def test_sizes_that_do_not_fit_are_torchs_to_name(library: str) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        product(torch.ones(2, 3), torch.ones(4, 5))


NEAR = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums of at most 20 products of values near 1


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (2, 0, 3)])
def test_a_frozen_layer_is_that_in_fp64_with_its_gradient(
    leading: tuple[int, ...], has_bias: bool, library: str
) -> None:
    x = torch.randn(*leading, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    w = operands(1, 12, 20)[1]
    bias = torch.linspace(-1, 1, 20) if has_bias else None
    y = linear(x, w.t(), bias)
    dY = torch.linspace(-2, 1, y.numel()).view(y.shape)
    y.backward(dY)
    exact = x.detach().double() @ w.double() + (0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), exact, **NEAR)
    torch.testing.assert_close(x.grad.double(), dY.double() @ w.t().double(), **NEAR)


def test_a_frozen_layers_inputs_and_gradients_have_any_strides(library: str) -> None:
    x = torch.randn(3, 12, 4).transpose(1, 2).requires_grad_()  # [3, 4, 12]
    w = operands(1, 12, 20)[1]
    y = linear(x, w.t())
    dY = torch.randn(20, 4, 3).permute(2, 1, 0)
    y.backward(dY)
    torch.testing.assert_close(y.double(), x.detach().double() @ w.double(), **NEAR)
    torch.testing.assert_close(x.grad.double(), dY.double() @ w.t().double(), **NEAR)


def test_a_compiler_sees_torchs_layer(library: str) -> None:
    x, w = operands(6, 12, 20)
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w.t()), x @ w, **NEAR)


def test_a_layer_that_trains_is_torchs(library: str) -> None:
    x, w = operands(6, 12, 20)
    weight = w.t().contiguous().requires_grad_()
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(20, 12))


@pytest.mark.skipif(not HAS_ONEDNN, reason="torch was built without oneDNN")
def test_a_layer_that_could_train_is_onednns_where_no_gradient_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense_products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(dense_products, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(
        dense_products, "_by_onednn", lambda x, w: torch.full((len(x), w.shape[1]), 7.0)
    )
    weight = torch.ones(20, 12, requires_grad=True)
    with torch.no_grad():
        assert (linear(torch.ones(6, 12), weight) == 7).all()
    assert (linear(torch.ones(6, 12), weight) == 12).all()


def test_autocast_reaches_a_layer(library: str) -> None:
    x, w = operands(6, 12, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w.t()).dtype is torch.bfloat16


def test_a_layer_names_sizes_that_do_not_fit(library: str) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.ones(2, 3), torch.ones(5, 4))


@pytest.mark.skipif(not HAS_ONEDNN, reason="torch was built without oneDNN")
def test_onednn_is_left_out_where_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "onednn_is_faster", lambda: True)
    asked = counted(monkeypatch)
    x, w = operands(64, 256, 256)
    product(x, w)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    product(x, w)
    assert asked == [64]


@pytest.mark.skipif(not HAS_ONEDNN, reason="torch was built without oneDNN")
def test_a_matrix_with_gaps_is_kept_from_onednns_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "onednn_is_faster", lambda: True)
    asked = counted(monkeypatch)
    x, w = operands(64, 512, 512)
    for part in (w[:, 3:500], w[:, 3:500].t(), w[::2], w[::2].t()):
        product(x[:, : len(part)], part)
    assert asked == []
    for whole in (w, w.t(), w[4:500], w[4:500].t()):
        product(x[:, : len(whole)], whole)
    assert asked == [64] * 4


@pytest.mark.skipif(not HAS_ONEDNN, reason="torch was built without oneDNN")
def test_tensors_of_other_kinds_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "onednn_is_faster", lambda: True)
    asked = counted(monkeypatch)
    with FakeTensorMode():
        assert product(*operands(64, 256, 256)).shape == (64, 256)
    assert asked == []


@pytest.mark.skipif(not HAS_ONEDNN, reason="torch was built without oneDNN")
def test_small_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "onednn_is_faster", lambda: True)
    asked = counted(monkeypatch)
    for size in ((15, 256, 256), (1, 2048, 2048), (16, 256, 256), (2, 1024, 512)):
        product(*operands(*size))
    assert asked == [16, 2]


GROWTH = """
import torch
from modulora_core import tiles
from modulora_core.devices import dense_products

dense_products.onednn_is_faster = lambda: True
dense_products.has_bfloat16_units()

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:"))

w, x = torch.randn(512, 512), torch.randn(600, 512)
for dtype in (torch.float32, torch.bfloat16):
    a, b = x.to(dtype), w.to(dtype)
    for n in range(600, 500, -1):  # the largest first, so that results find their memory
        dense_products.product(a[:n], b)
    before = resident()
    for n in range(500, 200, -1):
        dense_products.product(a[:n], b)
    print(resident() - before)
"""


@pytest.mark.skipif(
    not (HAS_ONEDNN and sys.platform == "linux"),
    reason="needs oneDNN, and Linux tells what is resident",
)
def test_what_onednn_keeps_does_not_grow_with_the_number_of_sizes() -> None:
    environment = {
        name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name
    }
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], env=environment, capture_output=True, text=True, check=True
    )
    for kib in map(int, done.stdout.split()):
        assert kib < 40 * 1024  # 300 sizes of half a MiB each would be 150 MiB


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of X of each product that is oneDNN's from now on."""
    asked: list[int] = []

    def multiplied(x: Tensor, w: Tensor) -> Tensor:
        asked.append(len(x))
        return x @ w

    monkeypatch.setattr(dense_products, "_by_onednn", multiplied)
    return asked


@pytest.mark.parametrize(
    ("described", "capability", "faster"),
    [
        ("vendor_id\t: AuthenticAMD", "AVX512", True),
        ("vendor_id\t: GenuineIntel", "AVX512", False),
        ("vendor_id\t: AuthenticAMD", "AVX2", False),
    ],
)
@pytest.mark.skipif(
    not (HAS_ONEDNN and torch.backends.mkl.is_available()),
    reason="torch was built without oneDNN or MKL",
)
def test_onednn_is_for_avx512_of_another_vendor(
    described: str, capability: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_products, "_processor", lambda: described)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert dense_products.onednn_is_faster.__wrapped__() is faster


def test_a_dense_layer_shares_the_parameters_of_the_linear_layer() -> None:
    linear = nn.Linear(4, 6)
    layer = DenseLinear.of(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert torch.equal(layer(torch.ones(2, 4)), linear(torch.ones(2, 4)))


@pytest.mark.parametrize("trains", [False, True])
def test_a_dense_layer_gives_the_product_and_its_gradients(
    trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(dense_products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(dense_products, "LEAST_PRODUCTS", 1)
    layer = DenseLinear(40, 24).requires_grad_(trains)
    x = torch.randn(2, 5, 40).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    W, b, X = layer.weight.detach().double(), layer.bias.detach().double(), x.detach().double()
    exact = X @ W.t() + b
    near = {"rtol": 1e-5, "atol": 1e-4}  # fp32 sums of 40 products
    torch.testing.assert_close(y.double(), exact, **near)
    torch.testing.assert_close(x.grad.double(), 2 * exact @ W, **near)
    assert (layer.weight.grad is not None) == trains
    if trains:
        torch.testing.assert_close(
            layer.weight.grad.double(), torch.einsum("abi,abj->ij", 2 * exact, X), **near
        )
