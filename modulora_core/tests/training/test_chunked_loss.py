"""The loss in chunks equals the loss of whole logits, with its gradients, in bounded memory."""

from contextlib import nullcontext

import pytest
import torch
from modulora_conformance.allocations import Allocations
from torch import nn
from torch.nn.functional import cross_entropy, pad
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from modulora_core.layers import LoRALinear, QuantLinear
from modulora_core.packed_parameters import PackedParameter
from modulora_core.training.chunked_loss import chunked_loss, token_losses
from modulora_core.training.readout import WHOLE, Readout, read_out

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
MODELS = {
    "plain": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased head": ("phi", {}),
    "soft cap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "multiplied": ("cohere", {"logit_scale": 0.3}),
    "made contiguous": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "experts, divided": ("granitemoe", {**EXPERTS, "logits_scaling": 3.0}),
}
IDS = torch.arange(5, 37).view(2, 16)
LABELS = IDS.clone()
LABELS[0, :6] = LABELS[1, 11:] = -100
CHUNK = 5 * VOCABULARY * 8
"""Five rows at a time; the 20 trained rows are a multiple of it, the 30 of all labels too."""

EXACT = {"rtol": 1e-9, "atol": 1e-11}
"""float64, summed in another order."""


def randomized(model):
    """Every parameter random, in training mode, in float64."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.double().train()


def made(kind):
    model_type, options = MODELS[kind]
    config = CONFIG_MAPPING[model_type](**SIZES | options)
    config._experts_implementation = "eager"  # the fused kernels have no float64
    return randomized(AutoModelForCausalLM.from_config(config))


def plain_loss(logits, labels, vocab_size, num_items_in_batch=None, **_):
    """The textbook loss in float64. transformers' own rounds to fp32."""
    goals = pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    total = cross_entropy(logits.reshape(-1, vocab_size), goals, ignore_index=-100, reduction="sum")
    return total / ((goals != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(input_ids=IDS, use_cache=False, **{"labels": LABELS, **inputs}).loss
    (loss * 3).backward()  # a loss scaler's factor
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(model, **inputs):
    model.loss_function = plain_loss
    expected = loss_and_gradients(model, **inputs)
    del model._loss_function
    with chunked_loss(model, CHUNK):
        found = loss_and_gradients(model, **inputs)
    torch.testing.assert_close(found, expected, **EXACT)
    assert model.loss_function.__name__ == "ForCausalLMLoss", "the block restores the model"


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_equal_those_of_whole_logits(kind):
    model = made(kind)
    assert_same(model)
    with chunked_loss(model):
        logits = model(input_ids=IDS, labels=LABELS, use_cache=False).logits
    assert logits.shape == (2, 1, VOCABULARY), "one position of each row"


@pytest.mark.parametrize("adapter", [False, True], ids=["frozen", "with an adapter"])
def test_a_packed_head_gives_the_same_loss(toy, adapter):
    model = made("plain")
    quantizer = toy.Verbatim(None)
    head = QuantLinear(PackedParameter(quantizer, quantizer.pack(model.lm_head.weight.detach())))
    model.lm_head = head
    if adapter:
        model.lm_head = LoRALinear(head)
        model.lm_head.add_adapter("default", 4, alpha=8, dtype=torch.float64)
        model.lm_head.lora_B["default"].data.normal_(generator=torch.Generator().manual_seed(1))
    assert_same(model)


class Whimsical(LlamaForCausalLM):
    """Its logits are not only scaled and capped, or its head gets something else, or it has a loss
    of its own."""

    def __init__(self, config, kind):
        super().__init__(config)
        self.kind = kind
        self.temperature = nn.Parameter(torch.linspace(0.5, 2, VOCABULARY))

    def forward(self, input_ids, labels=None, logits_to_keep=0, use_cache=False, **options):
        decode = self.model.forward if self.kind == "past the hooks" else self.model
        hidden = decode(input_ids).last_hidden_state
        if self.kind == "before the head":
            hidden = hidden * 0.5
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        if self.kind == "tensor":
            logits = logits * self.temperature
        elif self.kind == "in place":
            logits *= 0.5
            logits[..., 7] = -1e4
        elif self.kind == "tanh":
            logits = logits.tanh()
        elif self.kind == "mean":
            logits = logits - logits.mean(-1, keepdim=True)
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = self.loss_function(logits, labels, VOCABULARY, **options)
        if self.kind == "penalty":  # a part of the loss that needs no logits
            loss = loss + 1e-2 * hidden.square().mean()
        return CausalLMOutput(loss=loss, logits=logits)


CHANGES = ["past the hooks", "before the head", "tensor", "in place", "tanh", "mean"]


@pytest.mark.parametrize("kind", [*CHANGES, "penalty"])
def test_a_model_may_do_anything_with_its_logits(kind):
    model = randomized(Whimsical(LlamaConfig(**SIZES), kind))
    expected = loss_and_gradients(model)
    for _ in range(2):
        with chunked_loss(model, CHUNK):
            found = loss_and_gradients(model)
        # transformers' own loss computes in fp32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    with torch.no_grad(), read_out(model) as readout:
        model(input_ids=IDS)
    assert (readout.head is WHOLE) == (kind in CHANGES)
    torch.testing.assert_close(readout.head(readout.hidden), model(input_ids=IDS).logits, **EXACT)


def test_a_head_with_hooks_and_another_loss_are_left_alone():
    model = made("plain")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = model(input_ids=IDS, labels=LABELS).loss
    with chunked_loss(model):
        assert model(input_ids=IDS, labels=LABELS).loss == expected
    assert [output.shape[1] for output in seen] == [16, 16]
    handle.remove()
    model.loss_function = lambda logits, labels, **_: logits.square().sum()
    with chunked_loss(model):
        loss = model(input_ids=IDS, labels=LABELS).loss
    assert loss == model(input_ids=IDS).logits.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["training", "evaluation"])
def test_no_more_logits_than_a_chunk_are_alive(case, dtype):
    """256 rows × 32,768 take 32 MiB in fp32, a chunk a quarter. The plain loss is the control."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32768, "num_hidden_layers": 1, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)  # no gradient of the head
    ids = torch.randint(3, 32768, (2, 128))
    whole = 256 * 32768 * 4

    def training():
        model(input_ids=ids, labels=ids).loss.backward()

    def evaluation():
        with torch.no_grad():
            with read_out(model) if chunked else nullcontext(Readout()) as readout:
                logits = model(input_ids=ids).logits
            token_losses(readout if chunked else logits, ids, whole // 4)

    def peak(step):
        with Allocations(before=[*model.parameters(), *model.buffers()]) as followed:
            step()
        return followed.peak

    chunked, step = False, evaluation if case == "evaluation" else training
    assert peak(step) > whole * dtype.itemsize // 4
    chunked = True
    with chunked_loss(model, whole // 4) if case == "training" else nullcontext():
        # z, overwritten by p; in 16 bits also a quarter of it in fp32; and the model's own states
        chunk = 1 if dtype == torch.float32 else 0.5 + 0.25
        assert peak(step) < chunk * whole / 4 + 40 * 256 * 32 * 4


def test_the_losses_of_tokens_equal_those_of_whole_logits():
    model = made("soft cap").eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    log_p = logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).squeeze(-1)
    expected = torch.where(LABELS[:, 1:] != -100, -log_p, 0)
    with read_out(model) as readout:
        model(input_ids=IDS)
    assert readout.hidden.shape == (2, 16, SIZES["hidden_size"])
    torch.testing.assert_close(token_losses(readout, LABELS, CHUNK), expected, **EXACT)
    torch.testing.assert_close(token_losses(logits, LABELS, CHUNK), expected, **EXACT)
    torch.testing.assert_close(readout.head(readout.hidden), logits, **EXACT)
