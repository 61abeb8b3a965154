"""Modules that hold packed weights: products, moves, casts, copies, adapters and scales."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modulora_core.errors import DenseWeightError
from modulora_core.layers import LoRALinear, QuantLinear
from modulora_core.packed_parameters import PackedParameter
from modulora_core.spec import PackedWeight


@pytest.fixture
def weight(toy):
    torch.manual_seed(0)
    quantizer = toy.Toy()
    return PackedParameter(quantizer, quantizer.pack(torch.randn(6, 4)))


def dense(weight):
    return weight.quantizer.dequantize_tile(weight.packed, (0, 6), torch.float32)


def test_quant_linear_equals_the_linear_layer_of_its_dequantized_weight(weight):
    bias = nn.Parameter(torch.randn(6))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(QuantLinear(weight, bias)(x), F.linear(x, dense(weight), bias))


def test_tensors_are_parameters_without_a_gradient(toy):
    """DDP broadcasts buffers at each forward; FSDP2 shards parameters of at least one dimension."""
    tensors = {"codes": torch.ones(6, 4, dtype=torch.int8), "scale": torch.ones(6, 1).half()}
    packed = PackedWeight("toy", 1, (6, 4), {**tensors, "offset": torch.tensor(1.5)})
    weight = PackedParameter(toy.Toy(), packed)
    assert {name: p.requires_grad for name, p in weight.named_parameters()} == {
        "codes": False,
        "scale": False,
    }
    assert [name for name, _ in weight.named_buffers()] == ["offset"]


def test_widened_tensors_are_narrowed_again(toy):
    """PEFT's prepare_model_for_kbit_training widens every 16-bit parameter in place."""
    tensors = {"codes": torch.ones(6, 4, dtype=torch.int8), "scale": torch.rand(6, 1).half()}
    weight = PackedParameter(toy.Toy(), PackedWeight("toy", 1, (6, 4), tensors))
    weight.scale.data = weight.scale.data.float()
    assert torch.equal(weight.packed.tensors["scale"], tensors["scale"])
    assert weight.packed.tensors["scale"].dtype is torch.float16


def test_a_stack_of_experts_is_indexed_and_multiplied_as_a_tensor_is(toy):
    quantizer = toy.Toy()
    packed = [quantizer.pack(torch.randn(6, 4)) for _ in range(3)]
    stack = nn.ModuleList(PackedParameter(quantizer, p) for p in packed)
    seen_transposed = nn.ModuleList(PackedParameter(quantizer, p, transposed=True) for p in packed)
    x = torch.randn(5, 4, requires_grad=True)
    bias = torch.randn(6)
    for i in range(3):
        W = quantizer.dequantize_tile(packed[i], (0, 6), torch.float32)
        index = torch.tensor(i)  # as the eager forward of transformers' experts does it
        torch.testing.assert_close(F.linear(x, stack[index], bias), F.linear(x, W, bias))
        torch.testing.assert_close(x @ seen_transposed[index], x @ W.t())
        torch.testing.assert_close(torch.matmul(x, seen_transposed[index]), x @ W.t())
        y = torch.randn(5, 6)
        torch.testing.assert_close(y @ stack[index], y @ W)
    F.linear(x, stack[0]).sum().backward()
    assert x.grad is not None
    assert stack[0].shape == (6, 4)
    assert seen_transposed[0].shape == (4, 6)


def test_another_torch_function_on_a_packed_weight_says_so(weight):
    for function, *operands in (
        (torch.add, torch.ones(6, 4), weight),
        (torch.matmul, weight, torch.ones(4, 2)),
        (F.linear, weight, torch.ones(2, 4)),
    ):
        name = function.__name__
        with pytest.raises(DenseWeightError, match=f"^{name} of a 6x4 weight packed by toy: "):
            function(*operands)


def test_several_adapters_of_different_ranks_add_up(weight):
    base = QuantLinear(weight)
    layer = LoRALinear(base)
    layer.add_adapter("one", 1, alpha=3)
    layer.add_adapter("two", 4, alpha=2)
    for B in layer.lora_B.values():
        nn.init.normal_(B)
    x = torch.randn(3, 4)
    expected = base(x)
    for name, scale in (("one", 3.0), ("two", 0.5)):
        expected = expected + scale * (x @ layer.lora_A[name].t()) @ layer.lora_B[name].t()
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in (*layer.lora_A.values(), *layer.lora_B.values()))
    layer.active.remove("one")
    torch.testing.assert_close(
        layer(x), base(x) + 0.5 * (x @ layer.lora_A["two"].t()) @ layer.lora_B["two"].t()
    )


def test_scales_of_several_adapters_multiply_and_all_train(weight):
    scaled = LoRALinear(QuantLinear(weight))
    for name in ("one", "two"):
        scaled.add_adapter(name, 1, alpha=1, channel_scales=True)
    scaled.add_adapter("plain", 1, alpha=1)
    vectors = [*scaled.input_scale.values(), *scaled.output_scale.values()]
    for vector in vectors:
        nn.init.uniform_(vector, 0.5, 2)
    x = torch.randn(4, 4)
    base = QuantLinear(weight)

    def expected(names):
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
