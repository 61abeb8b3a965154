from __future__ import annotations

import gc
from types import ModuleType

import pytest
import torch
from torch import Tensor

from modulora_core.autograd import lora_linear, packed_product
from modulora_core.devices.memory import Allocations
from modulora_core.errors import ShapeError
from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import compute_dtype, tile_budget

OUT, IN, RANK = 11, 7, 3

TOLERANCE = {
    torch.float64: 1e-12,  # the order of sums
    torch.float32: 2e-5,  # the order of sums
    torch.float16: 4e-3,  # one rounding of the result and of dX: 2^-11 relative, a few values of magnitude 8
    torch.bfloat16: 3e-2,  # the same with 2^-8
}


@pytest.fixture
def quantizer(toy: ModuleType) -> Quantizer:
    return toy.Toy()


def make(
    quantizer: Quantizer, dtype: torch.dtype, leading: tuple[int, ...] = (5,), rank: int = RANK
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "x": torch.randn(*leading, IN).to(dtype),
        "bias": torch.randn(OUT).to(dtype),
        "A": torch.randn(rank, IN, dtype=adapter),
        "B": torch.randn(OUT, rank, dtype=adapter),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def dense_layer(
    W: Tensor, x: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float
) -> Tensor:
    """The oracle: what PEFT's LoRA over a dense linear layer computes, in float64."""
    y = x @ W.t()
    if bias is not None:
        y = y + bias
    if A is not None and B is not None:
        y = y + scale * (x @ A.t()) @ B.t()
    return y


def whole(quantizer: Quantizer, packed: PackedWeight) -> Tensor:
    return quantizer.dequantize_tile(packed, (0, packed.shape[0]), torch.float64)


@pytest.mark.parametrize("direction", [False, True], ids=["forward", "backward"])
def test_an_exception_of_a_plugin_says_whose_it_is(
    quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch, direction: bool
) -> None:
    product = quantizer.matmul

    def fails(x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        if transpose == direction:
            raise RuntimeError("boom")
        return product(x, packed, transpose)

    monkeypatch.setattr(quantizer, "matmul", fails)
    t, packed = make(quantizer, torch.float32), quantizer.pack(torch.randn(OUT, IN))
    with pytest.raises(RuntimeError, match="boom") as raised:
        lora_linear(t["x"], quantizer, packed).sum().backward()
    (note,) = raised.value.__notes__
    assert note.startswith(
        "transposed product" if direction else "product of a layer of [11, 7], by toy;"
    ), note


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rank", [None, 1, 3, 16], ids=lambda r: f"r{r}")
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_gradcheck_in_float64(
    quantizer: Quantizer, with_bias: bool, rank: int | None, leading: tuple[int, ...]
) -> None:
    packed = quantizer.pack(torch.randn(OUT, IN))
    t = make(quantizer, torch.float64, leading, rank or 1)
    bias = t["bias"] if with_bias else None
    A, B = (t["A"], t["B"]) if rank else (None, None)
    with tile_budget(2 * IN * 8):  # two rows a tile: seams inside
        assert torch.autograd.gradcheck(
            lambda x, bias, A, B: lora_linear(x, quantizer, packed, bias, A, B, scale=1.7),
            (t["x"], bias, A, B),
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_output_and_gradients_equal_the_dense_layer(
    quantizer: Quantizer, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    packed = quantizer.pack(torch.randn(OUT, IN))
    t = make(quantizer, dtype, leading)
    dY = torch.randn(*leading, OUT).to(dtype)
    with tile_budget(3 * IN * 4):
        y = lora_linear(t["x"], quantizer, packed, t["bias"], t["A"], t["B"], scale=0.5)
        y.backward(dY)
    oracle = {name: tensor.detach().double().requires_grad_() for name, tensor in t.items()}
    expected = dense_layer(whole(quantizer, packed), **oracle, scale=0.5)
    expected.backward(dY.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for name, tensor in t.items():
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        # dA, dB and the bias sum over rows: the input's rounding adds up
        atol = TOLERANCE[dtype] * max(1, t["x"].numel() // IN)
        torch.testing.assert_close(
            tensor.grad.double(), oracle[name].grad, rtol=TOLERANCE[dtype], atol=atol, msg=name
        )


@pytest.mark.parametrize("frozen", ["x", "A", "B", "bias"])
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(
    quantizer: Quantizer, frozen: str
) -> None:
    packed = quantizer.pack(torch.randn(OUT, IN))
    gradients = {}
    for freeze in (False, True):
        t = make(quantizer, torch.float32)
        t[frozen].requires_grad_(not freeze)
        lora_linear(t["x"], quantizer, packed, t["bias"], t["A"], t["B"]).square().sum().backward()
        gradients[freeze] = {name: tensor.grad for name, tensor in t.items()}
    assert gradients[True].pop(frozen) is None
    for name, gradient in gradients[True].items():
        torch.testing.assert_close(gradient, gradients[False][name], rtol=0, atol=0)


def test_backward_uses_the_weight_that_forward_used(quantizer: Quantizer) -> None:
    """Change one code: output and input gradient must both move, by the same Ŵ."""
    packed = quantizer.pack(torch.randn(OUT, IN))
    for change in (0, 5):
        packed.tensors["codes"][4, 2] += change
        W = whole(quantizer, packed)
        x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
        y = lora_linear(x, quantizer, packed)
        y.backward(torch.ones_like(y))
        torch.testing.assert_close(y, x @ W.t())
        torch.testing.assert_close(x.grad, W.sum(0).expand(3, IN))


def test_dropout_drops_the_adapters_input_alone_and_in_both_directions(
    quantizer: Quantizer,
) -> None:
    packed = quantizer.pack(torch.randn(OUT, IN))
    t = make(quantizer, torch.float64, (200,))
    t["A"].data.zero_()[:, 0] = 1.0  # the adapter sees the first input feature only
    y = lora_linear(t["x"], quantizer, packed, None, t["A"], t["B"], dropout=0.4)
    adapter = y - t["x"] @ whole(quantizer, packed).t()
    kept = adapter.abs().sum(1) > 1e-9
    assert 80 < kept.sum() < 160, f"{kept.sum()} of 200 kept, expected about 120"
    plain = (t["x"] @ t["A"].t()) @ t["B"].t()
    torch.testing.assert_close(adapter[kept], plain[kept] / 0.6)
    torch.autograd.backward(y, torch.ones_like(y))
    through_adapter = t["x"].grad - whole(quantizer, packed).sum(0)  # dX of the adapter
    expected = torch.zeros_like(through_adapter)
    expected[kept, 0] = t["B"].sum() / 0.6
    torch.testing.assert_close(through_adapter, expected)
    rows = t["x"].detach() * kept[:, None] / 0.6
    torch.testing.assert_close(t["B"].grad, (rows @ t["A"].detach().t()).sum(0).expand(OUT, RANK))
    expected_dA = t["B"].detach().sum(0)[:, None] * rows[:, :1].sum(
        0
    )  # feature 0: its mask is known
    torch.testing.assert_close(t["A"].grad[:, :1], expected_dA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_size_of_the_weight_is_saved(toy: ModuleType, dtype: torch.dtype) -> None:
    quantizer = toy.Toy()
    packed = quantizer.pack(torch.randn(256, 128))
    x = torch.randn(4, 128).to(dtype).requires_grad_()
    A, B = torch.randn(2, 128, requires_grad=True), torch.randn(256, 2, requires_grad=True)
    saved: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(tuple(t.shape))
        return t

    allocations = Allocations([*packed.tensors.values(), x, A, B])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), allocations:
        y = lora_linear(x, quantizer, packed, None, A, B)
    # x, U and the transposes of A and B
    assert sorted(saved) == sorted([(4, 128), (4, 2), (128, 2), (2, 256)])
    gc.collect()
    assert allocations.alive < 256 * 128, (
        allocations.alive
    )  # bytes: a quarter of the weight in fp32; y and U are 4 KiB
    y.sum().backward()


@pytest.mark.parametrize(
    ("trains", "shapes"),
    [("A", [(4, 7), (3, 11)]), ("B", [(4, 3)]), ("", [])],
    ids=["A", "B", "none"],
)
def test_x_is_saved_only_if_A_trains_and_x_A_only_if_B_trains(
    quantizer: Quantizer, trains: str, shapes: list[tuple[int, int]]
) -> None:
    packed = quantizer.pack(torch.randn(OUT, IN))
    A, B = (
        torch.randn(RANK, IN, requires_grad=trains == "A"),
        torch.randn(OUT, RANK, requires_grad=trains == "B"),
    )
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)), lambda t: t
    ):
        lora_linear(torch.randn(4, IN), quantizer, packed, None, A, B)
    assert sorted(saved) == sorted(shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_than_a_few_tiles_are_alive(toy: ModuleType, dtype: torch.dtype) -> None:
    """A weight of 8 MiB in tiles of 256 KiB: forward and backward together never hold a megabyte above their results."""
    quantizer = toy.Toy()
    packed = quantizer.pack(torch.randn(2048, 1024))
    x = torch.randn(4, 1024).to(dtype).requires_grad_()
    A, B = torch.randn(2, 1024, requires_grad=True), torch.randn(2048, 2, requires_grad=True)
    with tile_budget(256 * 2**10), Allocations([x, A, B, *packed.tensors.values()]) as allocations:
        y = lora_linear(x, quantizer, packed, None, A, B)
        y.backward(torch.ones_like(y))
    # the toy's tile is made of two in fp32 (codes as floats, their product) and rounded; the results and what is saved take 64 KiB
    width = compute_dtype(dtype, torch.device("cpu")).itemsize
    most = 2 * 4 / width + (2 if width < 4 else 1)
    assert 256 * 2**10 <= allocations.peak <= most * 256 * 2**10, (
        f"peak {allocations.peak / 2**20:.2f} MiB"
    )


def test_gradients_under_checkpointing_are_the_same(quantizer: Quantizer) -> None:
    packed = quantizer.pack(torch.randn(OUT, IN))
    gradients = []
    for checkpointed in (False, True):
        t = make(quantizer, torch.float32)
        torch.manual_seed(7)  # for the dropout

        def layer(x: Tensor, t: dict[str, Tensor] = t) -> Tensor:
            return lora_linear(x, quantizer, packed, t["bias"], t["A"], t["B"], dropout=0.5)

        y = (
            torch.utils.checkpoint.checkpoint(layer, t["x"], use_reentrant=False)
            if checkpointed
            else layer(t["x"])
        )
        y.square().sum().backward()
        gradients.append([t[name].grad for name in t])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize(("scales", "again"), [(False, 1), (True, 2)], ids=["", "output_scale"])
def test_under_checkpointing_the_last_layer_is_not_multiplied_by_again(
    quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch, scales: bool, again: int
) -> None:
    """But where its output scale trains, whose gradient needs the product."""
    packed = [quantizer.pack(torch.randn(IN, IN)) for _ in range(2)]
    A, B = torch.randn(RANK, IN, requires_grad=True), torch.randn(IN, RANK, requires_grad=True)
    v = torch.ones(IN, requires_grad=True) if scales else None
    multiplied: list[int] = []
    matmul = quantizer.matmul

    def counted(x: Tensor, weight: PackedWeight, transpose: bool = False) -> Tensor:
        if not transpose:
            multiplied.append([p is weight for p in packed].index(True))
        return matmul(x, weight, transpose)

    def block(x: Tensor) -> Tensor:
        for weight in packed:
            x = lora_linear(x, quantizer, weight, None, A, B, output_scale=v)
        return x

    monkeypatch.setattr(quantizer, "matmul", counted)
    x = torch.randn(4, IN, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    assert multiplied == [0, 1]
    y.square().sum().backward()
    assert multiplied == [0, 1, *range(again)]


@pytest.mark.parametrize("leading", [(4,), (2, 3)], ids=str)
def test_the_output_may_be_changed_in_place(quantizer: Quantizer, leading: tuple[int, ...]) -> None:
    packed = quantizer.pack(torch.randn(OUT, IN))
    x = torch.randn(*leading, IN, requires_grad=True)
    y = lora_linear(x, quantizer, packed)
    y += 1.0
    y.sum().backward()
    torch.testing.assert_close(x.grad, whole(quantizer, packed).float().sum(0).expand(*leading, IN))


def test_transposed_product_is_the_adjoint(quantizer: Quantizer) -> None:
    packed = quantizer.pack(torch.randn(OUT, IN))
    x = torch.randn(4, IN, dtype=torch.float64)
    y = torch.randn(4, OUT, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        (lora_linear(x, quantizer, packed) * y).sum(),
        (x * packed_product(y, quantizer, packed, transpose=True)).sum(),
    )
    assert torch.autograd.gradcheck(
        lambda y: packed_product(y, quantizer, packed, transpose=True), (y,)
    )


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        (
            torch.ones(3, 8),
            torch.ones(11, 3),
            r"A of a \[11, 7\] weight: expected \[3, 7\], got \[3, 8\]",
        ),
        (
            torch.ones(3, 7),
            torch.ones(11, 2),
            r"B of a \[11, 7\] weight: expected \[11, 3\], got \[11, 2\]",
        ),
        (torch.ones(3, 7), None, "expected both A and B"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    quantizer: Quantizer, A: Tensor, B: Tensor | None, message: str
) -> None:
    packed = quantizer.pack(torch.randn(OUT, IN))
    with pytest.raises(ShapeError, match=message):
        lora_linear(torch.ones(2, IN), quantizer, packed, None, A, B)
