"""The loss in chunks is the loss, gradients included, whatever the model does with its logits; and the logits are never whole."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from modulora_core.devices.memory import Allocations
from modulora_core.layers import LoRALinear, PackedParameter, QuantLinear
from modulora_core.training.chunked_loss import chunked_loss, deferred_logits, token_losses
from modulora_core.training.deferred_logits import DeferredLogits, deferred_head

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased head": ("phi", {}),
    "soft cap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "multiplied": ("cohere", {"logit_scale": 0.3}),
    "divided": ("granite", {"logits_scaling": 3.0}),
    "made contiguous": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "another name of the head": ("gpt_neox", {}),
    "experts": ("mixtral", EXPERTS),
    "experts, divided": ("granitemoe", {**EXPERTS, "logits_scaling": 3.0}),
}
IDS = torch.arange(5, 37).view(2, 16)
LABELS = IDS.clone()
LABELS[0, :6] = LABELS[1, 11:] = -100
ROWS = 5
"""At a time: the 25 trained rows aren't a multiple of it with every label, and are with some."""

CHUNK = ROWS * VOCABULARY * 8
EXACT = {"rtol": 1e-9, "atol": 1e-11}
"""float64, summed in another order."""


def randomized(model: nn.Module) -> Any:
    """Every parameter random, training, in float64."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.double().train()


def made(kind: str) -> Any:
    model_type, options = MODELS[kind]
    config = CONFIG_MAPPING[model_type](**SIZES | options)
    config._experts_implementation = "eager"  # the fused kernels know no float64
    return randomized(AutoModelForCausalLM.from_config(config))


def plain_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **options: Any
) -> Tensor:
    """As in a textbook. transformers' own rounds to fp32, so it can't be what float64 is compared with."""
    goals = pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    total = cross_entropy(logits.reshape(-1, vocab_size), goals, ignore_index=-100, reduction="sum")
    return total / ((goals != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss: Tensor = model(input_ids=IDS, use_cache=False, **{"labels": LABELS, **inputs}).loss
    (loss * 3).backward()  # as a loss scaler does: the gradient that comes in isn't one
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(model: Any, **inputs: Any) -> None:
    """The loss in chunks equals the plain one, and so do the gradients of all that trains."""
    model.loss_function = plain_loss
    expected, expected_gradients = loss_and_gradients(model, **inputs)
    del model._loss_function
    with chunked_loss(model, CHUNK):
        found, gradients = loss_and_gradients(model, **inputs)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(gradients, expected_gradients, **EXACT)
    assert model.loss_function.__name__ == "ForCausalLMLoss", "the block leaves the model as it was"


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_whole_logits(kind: str) -> None:
    model = made(kind)
    assert_same(model)
    with chunked_loss(model):
        logits = model(input_ids=IDS, labels=LABELS, use_cache=False).logits
    assert isinstance(logits, DeferredLogits)
    assert not logits.is_whole


@pytest.mark.parametrize(
    "inputs",
    [
        {"labels": IDS},
        {"num_items_in_batch": torch.tensor(40)},
        {"num_items_in_batch": 40},
        {"logits_to_keep": 16},
    ],
    ids=["every label", "accumulated", "accumulated, a number", "slice of the states"],
)
def test_labels_and_their_number_are_the_callers(inputs: dict[str, Any]) -> None:
    assert_same(made("plain"), **inputs)


def test_where_every_label_is_ignored_there_is_no_gradient() -> None:
    model = made("plain")
    with chunked_loss(model, CHUNK):
        loss, gradients = loss_and_gradients(
            model, labels=torch.full_like(IDS, -100), num_items_in_batch=7
        )
        mean = model(input_ids=IDS, labels=torch.full_like(IDS, -100)).loss
    assert float(loss) == 0
    assert all(not gradient.any() for gradient in gradients.values())
    assert mean.isnan(), "as transformers' own: a mean over nothing"


@pytest.mark.parametrize("frozen", ["head", "all but the head"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    model = made("plain")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head") != (frozen == "head"))
    assert_same(model)


@pytest.mark.parametrize("adapter", [False, True], ids=["frozen", "with an adapter"])
def test_a_packed_head_works_too(toy: ModuleType, adapter: bool) -> None:
    model = made("plain")
    quantizer = toy.Verbatim(None)
    head = QuantLinear(PackedParameter(quantizer, quantizer.pack(model.lm_head.weight.detach())))
    model.lm_head = head
    if adapter:
        model.lm_head = LoRALinear(head)
        model.lm_head.add_adapter("default", 4, alpha=8, dtype=torch.float64)
        model.lm_head.lora_B["default"].data.normal_(generator=torch.Generator().manual_seed(1))
    assert_same(model)


class Whimsical(LlamaForCausalLM):  # type: ignore[misc]
    """Does to its logits what isn't pointwise, changes them in place, or looks at them after the loss."""

    def __init__(self, config: Any, kind: str) -> None:
        super().__init__(config)
        self.kind = kind
        self.temperature = nn.Parameter(torch.ones(VOCABULARY))

    def forward(self, input_ids: Tensor, labels: Tensor, **options: Any) -> Any:
        options.pop("use_cache")
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        if self.kind == "tensor":
            logits = logits * self.temperature
        elif self.kind == "in place":
            logits *= 0.5
            logits[..., 7] = -1e4
        elif self.kind == "centred":
            logits = (
                logits
                - logits.mean(-1, keepdim=True)
                + torch.cat([logits[:, :1], logits[:, 1:]], dim=1).tanh()
            )
        loss = self.loss_function(logits, labels, VOCABULARY, **options)
        if self.kind == "penalty":  # z-loss, as PaLM's
            loss = loss + 1e-2 * logits.logsumexp(-1).square().mean()
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", ["tensor", "in place", "centred", "penalty"])
def test_a_model_that_needs_its_logits_whole_has_them(kind: str) -> None:
    assert_same_but_for_fp32 = {
        "rtol": 1e-5,
        "atol": 1e-6,
    }  # transformers' own loss, which then holds
    model = randomized(Whimsical(LlamaConfig(**SIZES), kind))
    expected, expected_gradients = loss_and_gradients(model)
    with chunked_loss(model, CHUNK):
        found, gradients = loss_and_gradients(model)
    torch.testing.assert_close(found, expected, **assert_same_but_for_fp32)
    torch.testing.assert_close(gradients, expected_gradients, **assert_same_but_for_fp32)


def test_a_head_with_a_hook_and_a_loss_of_its_own_are_left_alone() -> None:
    model = made("plain")
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_same_loss = model(input_ids=IDS, labels=LABELS).loss
    with chunked_loss(model):
        assert model(input_ids=IDS, labels=LABELS).loss == assert_same_loss
    assert not any(isinstance(output, DeferredLogits) for output in seen)
    handle.remove()
    model.loss_function = lambda logits, labels, **options: logits.square().sum()
    with chunked_loss(model):
        assert (
            model(input_ids=IDS, labels=LABELS).loss == model(input_ids=IDS).logits.square().sum()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_lose_no_more_than_their_own_rounding(dtype: torch.dtype) -> None:
    """Against float64 on the same rounded weights. Logits and their gradient are rounded to the dtype, as in the plain loss, whose
    error is the measure; in float16 that one needs a loss scaler, and this one does not.
    """
    model = made("plain").to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "model.norm.weight")
    exact = made("plain").double()
    exact.load_state_dict(model.state_dict())
    exact.loss_function = plain_loss
    _, truth = loss_and_gradients(exact)
    scale = 3.0 if dtype == torch.bfloat16 else 3.0 * 128

    def error(run: Callable[[], Any], scale: float) -> float:
        model.zero_grad()
        (run().loss * scale).backward()
        gradient = model.model.norm.weight.grad.double() * (3 / scale)
        return float(
            (gradient - truth["model.norm.weight"]).norm() / truth["model.norm.weight"].norm()
        )

    def run() -> Any:
        return model(input_ids=IDS, labels=LABELS)

    whole = error(run, scale)
    with chunked_loss(model, CHUNK):
        assert error(run, scale) < 1.5 * whole + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", ["forward", "evaluation"])
def test_no_more_logits_than_a_chunk_are_alive(step: str, dtype: torch.dtype) -> None:
    """256 rows of a vocabulary of 8192: 8 MiB in fp32, and a chunk is a sixteenth. The plain loss is the control."""
    torch.manual_seed(0)
    wide = LlamaConfig(
        **{**SIZES, "vocab_size": 8192, "num_hidden_layers": 1, "max_position_embeddings": 128}
    )
    model: Any = LlamaForCausalLM(wide).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(
            parameter.dim() == 1
        )  # the norms: the head's gradient is no part of this
    ids = torch.randint(3, 8192, (2, 128))
    whole = 256 * 8192 * 4

    def peak() -> int:
        with Allocations(before=[*model.parameters(), *model.buffers()]) as followed:
            if step == "forward":
                model(input_ids=ids, labels=ids).loss.backward()
            else:
                with torch.no_grad():
                    token_losses(model(input_ids=ids).logits, ids, whole // 16)
        return followed.peak

    assert peak() > whole * dtype.itemsize // 4
    with chunked_loss(model, whole // 16):
        # z, then p in its place, in 16 bits with a quarter of it in fp32, and what the model itself keeps of 256 × 32 states
        chunk = 1.5 if dtype == torch.float32 else 0.5 + 0.25 + 0.25
        assert peak() < chunk * whole / 16 + 40 * 256 * 32 * 4


def test_the_losses_of_tokens_are_those_of_the_whole_logits() -> None:
    model = made("soft cap").eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    log_p = logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).squeeze(-1)
    expected = torch.where(LABELS[:, 1:] != -100, -log_p, 0)
    with deferred_logits(model):
        later = model(input_ids=IDS).logits
    assert isinstance(later, DeferredLogits)
    torch.testing.assert_close(token_losses(later, LABELS, CHUNK), expected, **EXACT)
    torch.testing.assert_close(token_losses(logits, LABELS, CHUNK), expected, **EXACT)
    torch.testing.assert_close(later + 0 * logits, logits, **EXACT)


def test_a_head_is_as_it_was_after_the_block() -> None:
    head = nn.Linear(4, 6)
    x = torch.randn(2, 4)
    with pytest.raises(KeyError), deferred_head(head):
        assert isinstance(head(x), DeferredLogits)
        raise KeyError
    assert type(head(x)) is Tensor
    assert "forward" not in vars(head)
    replaced = vars(head)["forward"] = lambda x: x  # as accelerate does
    with deferred_head(head):
        pass
    assert head.forward is replaced
