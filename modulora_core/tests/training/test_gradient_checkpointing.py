"""Gradient checkpointing changes no gradient and repeats as few packed products as possible."""

from collections import Counter

import pytest
import torch

from modulora_core.hf.load_model import load_model
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.training.gradient_checkpointing import checkpoint_activations

pytestmark = pytest.mark.usefixtures("one_thread")


BLOCKS = 2
LINEARS = {"llama": 7, "gemma3_text": 7, "gpt2": 4, "mixtral": 4}
"""Number of packed linear layers in a block."""

FIRST = {"llama": 3, "gemma3_text": 3, "gpt2": 1}
"""Number of layers whose input is the embedding, which has no gradient."""

LAST_IS_NEEDED = {"gemma3_text", "gpt2"}
"""A step after a block's last product saves a tensor: a norm its input, a dropout its mask."""


@pytest.fixture
def products(toy, monkeypatch):
    """Counts products with packed weights: the key False is forward, True is transposed."""
    counts = Counter()
    matmul = toy.Toy.matmul

    def counted(self, x, packed, transpose=False):
        counts[transpose] += 1
        return matmul(self, x, packed, transpose)

    monkeypatch.setattr(toy.Toy, "matmul", counted)
    return counts


def adapted(folder, **options):
    """A packed model in training, with an adapter whose B is not zero."""
    torch.manual_seed(0)
    model = load_model(folder)
    add_lora(model, LoRASettings(rank=2, dropout=0.1, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter) / 8)
    model.config.use_cache = False
    return model.train()


def step(model):
    """The loss, and the gradient of each parameter that trains."""
    torch.manual_seed(4)  # dropout
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()  # not autograd.grad, which would skip gradients that nobody asks for
    return loss.item(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("keep_products", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("architecture", LINEARS)
def test_gradients_are_the_same_bits(architecture, keep_products, pack):
    model = adapted(pack(architecture, "toy")[1], train_scales=True)
    loss, expected = step(model)
    checkpoint_activations(model, keep_products=keep_products)
    for _ in range(2):
        again, gradients = step(model)
        assert again == loss
        assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_a_blocks_last_product_is_not_repeated_if_no_later_step_saves_a_tensor(
    architecture, pack, products
):
    model = adapted(pack(architecture, "toy")[1])
    checkpoint_activations(model)
    step(model)
    linears = LINEARS[architecture]
    again = linears if architecture in LAST_IS_NEEDED else linears - 1
    assert products[False] == BLOCKS * (linears + again)
    assert products[True] == BLOCKS * linears - FIRST[architecture]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_kept_products_are_computed_once(architecture, pack, products):
    model = adapted(pack(architecture, "toy")[1])
    checkpoint_activations(model, keep_products=True)
    step(model)
    assert products[False] == BLOCKS * LINEARS[architecture]


def test_blocks_below_the_first_that_trains_are_not_recomputed(pack, products):
    model = adapted(pack("llama", "toy")[1], targets="layers.1.self_attn.o_proj")
    checkpoint_activations(model)
    step(model)
    # the second block recomputes all products but its last; gradients stop at its MLP
    assert products == {False: BLOCKS * LINEARS["llama"] + LINEARS["llama"] - 1, True: 3}


# where an earlier test left graphs, dynamo enters a block from outside and reads its input's .grad;
# torch hides that warning by `showwarning`, which a filter that raises never reaches
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("keep_products", [False, True], ids=["recomputed", "kept"])
def test_a_compiled_model_checkpoints_too(keep_products, pack):
    model = adapted(pack("llama", "toy")[1])
    for _, layer in adapter_layers(model):
        layer.dropout["default"].p = 0.0
    loss, expected = step(model)
    checkpoint_activations(model, keep_products=keep_products)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    again, gradients = step(compiled)
    torch._dynamo.reset()
    assert again == pytest.approx(loss)
    for gradient, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, exact)
