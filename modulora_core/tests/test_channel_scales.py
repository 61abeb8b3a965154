"""Channel scales in the backward and in the layer: diag(v) Ŵ diag(u) in the place of Ŵ."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from modulora_core.autograd import lora_linear
from modulora_core.errors import ShapeError
from modulora_core.layers import LoRALinear, PackedParameter, QuantLinear
from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import compute_dtype, tile_budget

pytestmark = pytest.mark.usefixtures("one_thread")

OUT, IN, RANK = 11, 7, 3
NAMES = ("x", "bias", "A", "B", "u", "v")

TOLERANCE = {
    torch.float64: 1e-12,  # the order of sums
    torch.float32: 2e-5,  # the order of sums
    torch.float16: 6e-3,  # X ⊙ u, Z, v ⊙ Z and the sums are each rounded once: 2^-11 relative, values of magnitude 8
    torch.bfloat16: 5e-2,  # the same with 2^-8
}


@pytest.fixture
def quantizer(toy: ModuleType) -> Quantizer:
    return toy.Toy()


@pytest.fixture
def packed(quantizer: Quantizer) -> PackedWeight:
    torch.manual_seed(0)
    return quantizer.pack(torch.randn(OUT, IN))


def make(dtype: torch.dtype, leading: tuple[int, ...] = (5,)) -> dict[str, Tensor]:
    """Leaves of the graph by name. Adapter and scales are in float32 where the activations are in 16 bits."""
    torch.manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {
        "x": torch.randn(*leading, IN).to(dtype),
        "bias": torch.randn(OUT).to(dtype),
        "A": torch.randn(RANK, IN, dtype=wide),
        "B": torch.randn(OUT, RANK, dtype=wide),
        "u": 1 + torch.randn(IN, dtype=wide) / 4,
        "v": 1 + torch.randn(OUT, dtype=wide) / 4,
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def layer(
    quantizer: Quantizer, packed: PackedWeight, t: dict[str, Tensor], dropout: float = 0.0
) -> Tensor:
    return lora_linear(
        t["x"], quantizer, packed, t.get("bias"), t.get("A"), t.get("B"),
        scale=0.5, dropout=dropout, input_scale=t.get("u"), output_scale=t.get("v"),
    )  # fmt: skip


def dense_layer(quantizer: Quantizer, packed: PackedWeight, t: dict[str, Tensor]) -> Tensor:
    """The oracle: the scaled weight as a dense matrix, through torch's own autograd."""
    W = quantizer.dequantize_tile(packed, (0, OUT), torch.float64)
    y = t["x"] @ (t["v"][:, None] * W * t["u"]).t() + t["bias"]
    return y + 0.5 * (t["x"] @ t["A"].t()) @ t["B"].t()


# gradients


@pytest.mark.parametrize("scales", ["u", "v", "uv"])
@pytest.mark.parametrize("with_lora", [True, False], ids=["lora", "alone"])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_equal_finite_differences(
    quantizer: Quantizer, packed: PackedWeight, scales: str, with_lora: bool, leading: tuple[int, ...], dropout: float
) -> None:  # fmt: skip
    names = ("x", "bias", *("AB" if with_lora else ""), *scales)
    tensors = {
        name: tensor for name, tensor in make(torch.float64, leading).items() if name in names
    }

    def output(*values: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask each time
        return layer(quantizer, packed, dict(zip(tensors, values, strict=True)), dropout)

    with tile_budget(2 * IN * 8):  # two rows a tile: seams inside
        assert torch.autograd.gradcheck(output, tuple(tensors.values()))


def test_every_subset_that_trains_gets_the_dense_layers_gradients_and_the_rest_none(
    quantizer: Quantizer, packed: PackedWeight
) -> None:
    torch.manual_seed(2)
    dY = torch.randn(5, OUT, dtype=torch.float64)
    oracle = make(torch.float64)
    dense_layer(quantizer, packed, oracle).backward(dY)
    subsets = [set(names) for n in range(1, 7) for names in itertools.combinations(NAMES, n)]
    assert len(subsets) == 63
    for trains in subsets:
        t = make(torch.float64)
        for name, tensor in t.items():
            tensor.requires_grad_(name in trains)
        with tile_budget(2 * IN * 8):
            layer(quantizer, packed, t).backward(dY)
        assert {name for name, tensor in t.items() if tensor.grad is not None} == trains
        for name in trains:
            told = f"d{name} where {', '.join(sorted(trains))} train"
            torch.testing.assert_close(t[name].grad, oracle[name].grad, msg=told)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_output_and_gradients_equal_the_dense_layer_in_every_dtype(
    quantizer: Quantizer, packed: PackedWeight, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    t = make(dtype, leading)
    dY = torch.randn(*leading, OUT).to(dtype)
    with tile_budget(3 * IN * 4):
        y = layer(quantizer, packed, t)
        y.backward(dY)
    oracle = {name: tensor.detach().double().requires_grad_() for name, tensor in t.items()}
    expected = dense_layer(quantizer, packed, oracle)
    expected.backward(dY.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for name, tensor in t.items():
        assert tensor.grad is not None
        assert (tensor.grad.dtype, tensor.grad.shape) == (tensor.dtype, tensor.shape)
        # all but dX are sums over rows: the rounding of each adds up
        atol = TOLERANCE[dtype] * max(1, t["x"].numel() // IN)
        torch.testing.assert_close(tensor.grad.double(), oracle[name].grad, rtol=TOLERANCE[dtype], atol=atol, msg=name)  # fmt: skip


def test_gradients_of_16_bit_rows_are_summed_in_float32(
    quantizer: Quantizer, packed: PackedWeight
) -> None:
    """In bfloat16 a sum of ones ends at 256: 256 + 1 is 256 there."""
    x, dY = torch.ones(3001, IN, dtype=torch.bfloat16), torch.ones(3001, OUT, dtype=torch.bfloat16)
    u, v = torch.ones(IN, requires_grad=True), torch.ones(OUT, requires_grad=True)
    with tile_budget(500 * OUT * 4):
        lora_linear(x, quantizer, packed, input_scale=u, output_scale=v).backward(dY)
    W = quantizer.dequantize_tile(packed, (0, OUT), compute_dtype(torch.bfloat16, x.device)).float()
    torch.testing.assert_close(u.grad, 3001 * W.sum(0).bfloat16().float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(v.grad, 3001 * W.sum(1).bfloat16().float(), rtol=1e-5, atol=0)


def test_the_adapter_sees_the_unscaled_input_and_its_dropout(
    quantizer: Quantizer, packed: PackedWeight
) -> None:
    t = make(torch.float64, (40,))

    def adapter(scaled: tuple[str, ...]) -> Tensor:
        torch.manual_seed(3)
        with_adapter = layer(
            quantizer, packed, {name: t[name] for name in ("x", "A", "B", *scaled)}, 0.5
        )
        return with_adapter - layer(quantizer, packed, {name: t[name] for name in ("x", *scaled)})

    torch.testing.assert_close(adapter(("u", "v")), adapter(()))


def test_gradients_under_checkpointing_are_the_same(
    quantizer: Quantizer, packed: PackedWeight
) -> None:
    gradients = []
    for checkpointed in (False, True):
        t = make(torch.float32)
        torch.manual_seed(7)  # for the dropout

        def run(x: Tensor, t: dict[str, Tensor] = t) -> Tensor:
            return layer(quantizer, packed, {**t, "x": x}, 0.5)

        y = torch.utils.checkpoint.checkpoint(run, t["x"], use_reentrant=False) if checkpointed else run(t["x"])  # fmt: skip
        y.square().sum().backward()
        gradients.append([t[name].grad for name in NAMES])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize("trains", ["", "u", "v"])
def test_the_output_may_be_changed_in_place(
    quantizer: Quantizer, packed: PackedWeight, trains: str
) -> None:
    t = make(torch.float64)
    oracle = {name: tensor.detach().clone().requires_grad_() for name, tensor in t.items()}
    for name in {"u", "v"} - {trains}:
        t[name].requires_grad_(False)
    y = layer(quantizer, packed, t)
    y *= 2.0
    y.sum().backward()
    (2 * dense_layer(quantizer, packed, oracle)).sum().backward()
    for name in ("x", *trains):
        torch.testing.assert_close(t[name].grad, oracle[name].grad)


# what is saved


@pytest.mark.parametrize(
    ("trains", "saved"),
    [
        ("", []),
        ("x", ["u", "v"]),
        ("u", ["x", "v"]),
        ("v", ["Z"]),
        ("uv", ["x", "Z", "v"]),
    ],
)
def test_x_is_saved_if_u_trains_and_the_product_only_if_v_does(
    quantizer: Quantizer, packed: PackedWeight, trains: str, saved: list[str]
) -> None:
    t = {name: tensor for name, tensor in make(torch.float32).items() if name in "xuv"}
    for name, tensor in t.items():
        tensor.requires_grad_(name in trains)
    shapes = {"x": (5, IN), "Z": (5, OUT), "u": (IN,), "v": (OUT,)}
    seen: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(tuple(t.shape)), lambda t: t
    ):
        layer(quantizer, packed, t)
    assert sorted(seen) == sorted(shapes[name] for name in saved)


# what is refused


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"input_scale": torch.ones(OUT)}, r"input_scale of a \[11, 7\] weight: expected \[7\], got \[11\]"),
        ({"output_scale": torch.ones(OUT, 1)}, r"output_scale of a \[11, 7\] weight: expected \[11\], got \[11, 1\]"),
    ],
    ids=["input", "output"],
)  # fmt: skip
def test_scales_that_do_not_fit_are_refused(
    quantizer: Quantizer, packed: PackedWeight, scales: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        lora_linear(torch.ones(2, IN), quantizer, packed, **scales)  # type: ignore[arg-type]


def test_an_input_of_another_width_is_refused(quantizer: Quantizer, packed: PackedWeight) -> None:
    for scales in ({"input_scale": torch.ones(IN)}, {"output_scale": torch.ones(OUT)}):
        with pytest.raises(ShapeError, match=r"expected \[2, 7\], got \[2, 1\]"):
            lora_linear(torch.ones(2, 1), quantizer, packed, **scales)  # type: ignore[arg-type]


# the layer


@pytest.fixture
def weight(quantizer: Quantizer, packed: PackedWeight) -> PackedParameter:
    return PackedParameter(quantizer, packed)


def test_new_scales_are_float32_and_change_no_bit(weight: PackedParameter) -> None:
    scaled = LoRALinear(QuantLinear(weight))
    scaled.add_adapter("default", 2, alpha=4, channel_scales=True)
    assert {name: (tuple(p.shape), p.dtype) for name, p in scaled.parameters_of("default").items()} == {
        "lora_A": ((2, IN), torch.float32), "lora_B": ((OUT, 2), torch.float32),
        "input_scale": ((IN,), torch.float32), "output_scale": ((OUT,), torch.float32),
    }  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, IN).to(dtype)
        assert torch.equal(scaled(x), QuantLinear(weight)(x))


def test_scales_of_several_adapters_multiply_and_all_train(weight: PackedParameter) -> None:
    scaled = LoRALinear(QuantLinear(weight))
    for name in ("one", "two"):
        scaled.add_adapter(name, 1, alpha=1, channel_scales=True)
    scaled.add_adapter("plain", 1, alpha=1)
    vectors = [*scaled.input_scale.values(), *scaled.output_scale.values()]
    for vector in vectors:
        nn.init.uniform_(vector, 0.5, 2)
    x = torch.randn(4, IN)
    base = QuantLinear(weight)

    def expected(names: tuple[str, ...]) -> Tensor:
        y = x
        for name in names:
            y = y * scaled.input_scale[name]
        y = base(y)
        for name in names:
            y = y * scaled.output_scale[name]
        return y

    torch.testing.assert_close(scaled(x), expected(("one", "two")))
    scaled(x).sum().backward()
    assert all(vector.grad is not None and vector.grad.abs().sum() > 0 for vector in vectors)
    scaled.active.remove("one")
    torch.testing.assert_close(scaled(x), expected(("two",)))
