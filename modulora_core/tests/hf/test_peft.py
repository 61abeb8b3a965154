"""PEFT puts its adapters on packed layers, and saves no dense weight for the backward."""

import pytest
import torch
from modulora_conformance.allocations import Allocations
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter

from modulora_core.errors import ModelError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.tests.adapted_models import IDS, logits
from modulora_core.tiles import tile_budget


@pytest.fixture
def packed(pack):
    return lambda: load_model(pack("llama", "toy")[1], device="cpu")


def adapted(model, **options):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
    return get_peft_model(model, config)


def losses(model, steps=4):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "gaussian"}],
    ids=str,
)
def test_losses_are_the_dense_models(packed, options):
    found = losses(adapted(packed(), **options))
    assert found == pytest.approx(losses(adapted(packed().dequantize(), **options)), rel=1e-5)
    assert found[-1] < found[0]


def test_adapters_are_added_switched_and_loaded_again(packed, tmp_path):
    model = adapted(packed())
    losses(model)
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    losses(model)
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(packed()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed(), str(tmp_path))
    assert torch.equal(logits(again), first)
    ours = packed()
    load_adapter(ours, tmp_path)
    assert torch.allclose(logits(ours), first, atol=1e-5)


def test_merging_needs_a_dense_model(packed):
    model = adapted(packed())
    losses(model)
    expected = logits(model)
    with pytest.raises(ModelError, match=r"^data of a .*model\.dequantize.*`modulora merge`"):
        model.merge_and_unload()
    model.get_base_model().dequantize()
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.allclose(logits(merged), expected, atol=1e-4)


def test_an_adapter_is_swapped_in_place(packed, tmp_path):
    first, second = adapted(packed()), adapted(packed())
    losses(first)
    losses(second, steps=8)
    expected = logits(second)
    assert not torch.equal(logits(first), expected)
    second.save_pretrained(tmp_path)
    weights = [parameter.data_ptr() for parameter in first.parameters()]
    hotswap_adapter(first, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert [parameter.data_ptr() for parameter in first.parameters()] == weights
    assert torch.equal(logits(first), expected)


def test_a_step_holds_few_tiles(pack):
    """A model with weights of 6 KiB in tiles of 512 bytes."""
    model = adapted(load_model(pack("llama", "toy")[1], device="cpu"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 32, requires_grad=True)
    with tile_budget(512), Allocations([x, *model.parameters()]) as allocations:
        layer(x).sum().backward()
    weight = 48 * 32 * 4
    # y, dy and the gradients of A and B take 2 KiB
    assert allocations.peak < weight * 0.9, f"{allocations.peak} bytes"
    assert allocations.alive < weight / 2
