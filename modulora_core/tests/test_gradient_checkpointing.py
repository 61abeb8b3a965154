"""A checkpointed model has the gradients that it has without, whatever its blocks hand on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from modulora_core.gradient_checkpointing import checkpoint_activations
from modulora_core.tests.tiny_models import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
SIZES: Any = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip


def gradients(model: Any) -> dict[str, Tensor | None]:
    torch.manual_seed(0)  # of dropout
    model.zero_grad()
    model.train()
    model.config.use_cache = False
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    model(input_ids=IDS, labels=IDS, **more).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_the_same_with_checkpointing(model: Any) -> None:
    expected = gradients(model)
    checkpoint_activations(model)
    for step in range(2):
        for name, gradient in gradients(model).items():
            if expected[name] is None:
                assert gradient is None
            else:
                assert torch.equal(gradient, expected[name]), f"{name}, step {step}"  # type: ignore[arg-type]


def made_again(model: Any) -> int:
    """By how many blocks, as one node of the graph each."""
    nodes, todo = set(), [model(input_ids=IDS, labels=IDS).loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ == "_RecomputedBackward" for node in nodes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_same_bits(architecture: str) -> None:
    model = tiny_model(architecture)
    assert_the_same_with_checkpointing(model)
    assert made_again(model) == model.config.num_hidden_layers


HAND_ON_MORE = {
    "router logits, seen by hooks": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}),
    "keys and values, in an argument": ("Gemma4Text", {
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
}  # fmt: skip


@pytest.mark.parametrize("what", HAND_ON_MORE)
def test_what_blocks_hand_on_beside_their_outputs_has_a_gradient(what: str) -> None:
    name, options = HAND_ON_MORE[what]
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"this transformers has no {name}Config")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**SIZES, **options))
    assert_the_same_with_checkpointing(model)
    assert made_again(model) == 0, "or nothing here hands on more"


@pytest.mark.parametrize("first", [0, 1], ids=["from the first step on", "from the second one on"])
def test_what_a_block_leaves_in_an_attribute_has_a_gradient(first: int) -> None:
    class Leaves(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp, self.power, self.leaves = mlp, torch.zeros(()), False

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.mlp(x)
            if self.leaves:
                self.power = y.square().mean()
            return y

    found = []
    for checkpointed in (False, True):
        model: Any = tiny_model("llama").train()
        leaver = model.model.layers[0].mlp = Leaves(model.model.layers[0].mlp)
        if checkpointed:
            checkpoint_activations(model)
        for step in range(first + 1):
            leaver.leaves = step == first
            model(input_ids=IDS, use_cache=False)  # whose output isn't looked at
        leaver.power.backward()
        found.append(leaver.mlp.down_proj.weight.grad)
    assert torch.equal(*found)


def test_a_compiler_sees_torchs_checkpointing() -> None:
    model: Any = tiny_model("llama")
    expected = gradients(model)
    checkpoint_activations(model, products="rounded")
    model.zero_grad()
    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    torch._dynamo.reset()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
