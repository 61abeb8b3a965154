"""torch.compile around packed layers: the packed product is one operation of the graph."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from modulora_core.layers import LoRALinear, QuantLinear
from modulora_core.packed_parameters import PackedParameter, PackedTable


@pytest.fixture
def layer(toy):
    quantizer = toy.Toy()
    torch.manual_seed(0)
    packed = quantizer.pack(torch.randn(11, 7))
    layer = LoRALinear(
        QuantLinear(PackedParameter(quantizer, packed), nn.Parameter(torch.randn(11)))
    )
    layer.add_adapter("default", 2, alpha=4)
    nn.init.normal_(layer.lora_B["default"])
    return layer


def compiled(layer):
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


EAGER = """
import sys
import torch
from modulora_core.autograd import FrozenWeight, lora_linear
from modulora_core.spec import PackedWeight, Quantizer

class Ones(Quantizer):
    def pack(self, weight, calibration=None):
        return PackedWeight("ones", 1, tuple(weight.shape), {"nothing": torch.empty(0)})

    def dequantize_tile(self, packed, rows, dtype):
        return torch.ones(rows[1] - rows[0], packed.shape[1], dtype=dtype)

x = torch.ones(2, 3, requires_grad=True)
y = lora_linear(x, FrozenWeight(Ones(), Ones().pack(torch.ones(4, 3))))
y.sum().backward()
print(y[0, 0].item(), x.grad[0, 0].item(), "torch._dynamo" in sys.modules)
"""


def test_a_product_that_is_not_compiled_imports_no_compiler():
    """Importing it takes seconds."""
    done = subprocess.run([sys.executable, "-c", EAGER], capture_output=True, text=True)
    assert done.stdout.split() == ["3.0", "4.0", "False"], done.stderr


# torch 2.15's check reads it itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_products_operation_keeps_torchs_rules(layer):
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch checks them."""
    x = torch.randn(3, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.modulora.product.default, (x, layer.weight.number, False))


def test_a_compiled_lookup_gives_the_eager_rows(toy):
    quantizer = toy.Toy()
    table = PackedTable(quantizer, quantizer.pack(torch.randn(11, 7)))
    ids = torch.tensor([[0, 10], [3, 3]])
    compiled = torch.compile(lambda ids: table.lookup(ids) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids), table.lookup(ids) + 1)
    torch._dynamo.reset()
