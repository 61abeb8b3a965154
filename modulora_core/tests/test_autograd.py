"""The backward equals the dense layer's in float64."""

import itertools

import pytest
import torch

from modulora_core.autograd import FrozenWeight, lora_linear
from modulora_core.errors import ShapeError
from modulora_core.tiles import tile_budget

pytestmark = pytest.mark.usefixtures("one_thread")

OUT, IN, RANK = 11, 7, 3
NAMES = ("x", "bias", "A", "B", "u", "v")
SCALE = 0.5

TOLERANCE = {
    torch.float64: 1e-12,  # the order of sums
    torch.float32: 2e-5,  # the order of sums
    # 16-bit activations round x ⊙ u, the product, the adapter's two products and each sum.
    # That is about six roundings of 2^-11 (2^-8) each, of values of magnitude 8.
    torch.float16: 1e-2,
    torch.bfloat16: 8e-2,
}


@pytest.fixture
def quantizer(toy):
    return toy.Toy()


@pytest.fixture
def packed(quantizer):
    torch.manual_seed(0)
    return quantizer.pack(torch.randn(OUT, IN))


def leaves(dtype, leading=(5,), names=NAMES):
    """Tensors that require gradients; adapter and scales are float32 beside 16-bit activations."""
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
    return {name: tensors[name].requires_grad_() for name in NAMES if name in names}


def layer(quantizer, packed, t, dropout=0.0):
    return lora_linear(
        t["x"],
        FrozenWeight(quantizer, packed),
        t.get("bias"),
        t.get("A"),
        t.get("B"),
        scale=SCALE,
        dropout=dropout,
        input_scale=t.get("u"),
        output_scale=t.get("v"),
    )


def whole(quantizer, packed):
    return quantizer.dequantize_tile(packed, (0, OUT), torch.float64)


def dense_layer(W, t):
    """The oracle: diag(v) W diag(u) as a dense matrix, through torch's own autograd."""
    scaled = W * t.get("u", torch.ones(IN)) * t.get("v", torch.ones(OUT))[:, None]
    y = t["x"] @ scaled.t() + t.get("bias", 0)
    return y + SCALE * (t["x"] @ t["A"].t()) @ t["B"].t() if "A" in t else y


# --- values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("names", ["x", "x bias A B", "x u", "x v A B", "x bias A B u v"])
def test_gradients_equal_finite_differences_twice(quantizer, packed, names, leading, dropout):
    t = leaves(torch.float64, leading, names.split())

    def output(*values):
        torch.manual_seed(3)  # the same mask each time
        return layer(quantizer, packed, dict(zip(t, values, strict=True)), dropout)

    with tile_budget(2 * IN * 8):  # two rows a tile: seams inside
        assert torch.autograd.gradcheck(output, tuple(t.values()))
        if names == "x bias A B u v":
            assert torch.autograd.gradgradcheck(output, tuple(t.values()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 3, 4), (2, 0)], ids=str)
@pytest.mark.parametrize("scales", ["", "u v"])
def test_output_and_gradients_equal_the_dense_layer(quantizer, packed, dtype, leading, scales):
    t = leaves(dtype, leading, ["x", "bias", "A", "B", *scales.split()])
    dY = torch.randn(*leading, OUT).to(dtype)
    with tile_budget(3 * IN * 4):
        y = layer(quantizer, packed, t)
        y.backward(dY)
    oracle = {name: tensor.detach().double().requires_grad_() for name, tensor in t.items()}
    expected = dense_layer(whole(quantizer, packed), oracle)
    expected.backward(dY.double())
    assert y.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    # all gradients but dX are sums over rows, whose roundings add up
    atol = tolerance * max(1, t["x"].numel() // IN)
    for name, tensor in t.items():
        assert (tensor.grad.dtype, tensor.grad.shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(
            tensor.grad.double(), oracle[name].grad, rtol=tolerance, atol=atol, msg=name
        )


def test_every_subset_that_trains_gets_the_dense_gradients_and_the_rest_none(quantizer, packed):
    torch.manual_seed(2)
    dY = torch.randn(5, OUT, dtype=torch.float64)
    oracle = leaves(torch.float64)
    dense_layer(whole(quantizer, packed), oracle).backward(dY)
    for trains in itertools.chain.from_iterable(
        itertools.combinations(NAMES, n) for n in range(1, 7)
    ):
        t = leaves(torch.float64)
        for name, tensor in t.items():
            tensor.requires_grad_(name in trains)
        layer(quantizer, packed, t).backward(dY)
        assert tuple(name for name in NAMES if t[name].grad is not None) == trains
        for name in trains:
            torch.testing.assert_close(t[name].grad, oracle[name].grad, msg=f"{name} of {trains}")


def test_dropout_applies_to_the_adapters_input_alone_in_both_directions(quantizer, packed):
    t = leaves(torch.float64, (200,), ["x", "A", "B"])
    t["A"].data.zero_()[:, 0] = 1.0  # the adapter sees the first input feature only
    y = layer(quantizer, packed, t, dropout=0.4)
    W = whole(quantizer, packed)
    adapter = y - t["x"] @ W.t()
    kept = adapter.abs().sum(1) > 1e-9
    assert 80 < kept.sum() < 160, f"{kept.sum()} of 200 kept, expected about 120"
    plain = SCALE * (t["x"] @ t["A"].t()) @ t["B"].t()
    torch.testing.assert_close(adapter[kept], plain[kept] / 0.6)
    y.sum().backward()
    through_adapter = t["x"].grad - W.sum(0)  # it has a gradient
    expected = torch.zeros_like(through_adapter)
    expected[kept, 0] = SCALE * t["B"].sum() / 0.6
    torch.testing.assert_close(through_adapter, expected)


@pytest.mark.parametrize("names", ["x", "x u v", "x A B"])
def test_the_output_may_be_changed_in_place(quantizer, packed, names):
    t = leaves(torch.float64, (2, 3), names.split())
    oracle = {name: tensor.detach().clone().requires_grad_() for name, tensor in t.items()}
    y = layer(quantizer, packed, t)
    y *= 2.0
    y.sum().backward()
    (2 * dense_layer(whole(quantizer, packed), oracle)).sum().backward()
    for name in t:
        torch.testing.assert_close(t[name].grad, oracle[name].grad)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "trains", "saved"),
    [
        ("x A B", "x A B", ["x", "U", "A", "B"]),
        ("x A B", "A", ["x", "B"]),
        ("x A B", "B", ["U"]),
        ("x A B", "", []),
        ("x", "x", []),
        ("x u v", "x u v", ["x", "Z", "u", "v"]),
        ("x u v", "u", ["x", "v"]),
        ("x u v", "v", ["Z"]),
    ],
)
def test_autograd_saves_the_operands_of_the_formulas(quantizer, packed, names, trains, saved):
    """No dense weight is among them."""
    t = leaves(torch.float32, names=names.split())
    for name, tensor in t.items():
        tensor.requires_grad_(name in trains.split())
    sizes = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda s: sizes.append(s.numel()), lambda s: s)
    with keep:
        layer(quantizer, packed, t)
    results = {"U": 5 * RANK, "Z": 5 * OUT}  # U = x Aᵀ, Z = (x ⊙ u) Ŵᵀ
    assert sorted(sizes) == sorted(results.get(name) or t[name].numel() for name in saved)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [False, True], ids=["forward", "backward"])
def test_an_exception_of_a_plugin_names_the_plugin(quantizer, packed, monkeypatch, direction):
    product = quantizer.matmul

    def fails(x, packed, transpose=False):
        if transpose == direction:
            raise RuntimeError("boom")
        return product(x, packed, transpose)

    monkeypatch.setattr(quantizer, "matmul", fails)
    x = torch.randn(2, IN, requires_grad=True)
    with pytest.raises(RuntimeError, match="boom") as raised:
        lora_linear(x, FrozenWeight(quantizer, packed)).sum().backward()
    (note,) = raised.value.__notes__
    kind = "transposed product" if direction else "product"
    assert note.startswith(f"{kind} of a layer of [11, 7], by toy;"), note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 1)}, r"input of a \[11, 7\] weight: expected \[2, 7\], got \[2, 1\]"),
        ({"A": (3, 8)}, r"A of a \[11, 7\] weight: expected \[3, 7\], got \[3, 8\]"),
        ({"B": (11, 2)}, r"B of a \[11, 7\] weight: expected \[11, 3\], got \[11, 2\]"),
        ({"B": None}, "expected both A and B"),
        ({"u": (11,)}, r"input_scale of a \[11, 7\] weight: expected \[7\], got \[11\]"),
        ({"v": (11, 1)}, r"output_scale of a \[11, 7\] weight: expected \[11\], got \[11, 1\]"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(quantizer, packed, change, message):
    t = leaves(torch.float32)
    for name, shape in change.items():
        if shape is None:
            del t[name]
        else:
            t[name] = torch.ones(shape)
    with pytest.raises(ShapeError, match=message):
        layer(quantizer, packed, t)
