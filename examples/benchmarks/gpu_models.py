"""A Llama made on the device, its linear layers dense, packed by ours, or bitsandbytes' with PEFT; one LoRA step, and decoding.

Only times and memory are measured, which don't depend on the values: a weight of each shape is packed once, and every layer has a copy.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from modulora_conformance.bench.timing import in_turns
from torch import Tensor, nn
from turns import NotMeasuredError

from modulora_core.adapters.lora import LoRASettings, add_lora
from modulora_core.devices.memory import PeakMemory
from modulora_core.layers import PackedParameter, QuantLinear
from modulora_core.spec import PackedWeight, Quantizer

RANK, ALPHA = 8, 16.0


@dataclass(frozen=True)
class Recipe:
    """Which model, and how much of it is run.

    Attributes:
        model: anything that ``modulora finetune`` takes; None for a random Llama in the shapes of TinyLlama-1.1B.
        batch, tokens: of the training step; new_tokens: decoded greedily, after a prompt of 32.
        hidden, intermediate, layers, vocabulary: of the random Llama.
    """

    model: str | None = None
    batch: int = 2
    tokens: int = 512
    new_tokens: int = 64
    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 22
    vocabulary: int = 32000

    def __str__(self) -> str:
        name = (
            self.model
            or f"a random Llama of {self.layers} layers, hidden {self.hidden}, intermediate {self.intermediate}"
        )
        return f"{name}; step of {self.batch} x {self.tokens} tokens, rank {RANK}; {self.new_tokens} new tokens"


def dense_model(
    recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    if recipe.model is not None:
        from modulora_core.inference.loading import open_to_run

        name = str(dtype).removeprefix("torch.")
        loaded: nn.Module = open_to_run(recipe.model, dtype=name, device=str(device)).load()
        return loaded
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = max(1, recipe.hidden // 64)
    config = LlamaConfig(
        hidden_size=recipe.hidden, intermediate_size=recipe.intermediate, num_hidden_layers=recipe.layers, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8), vocab_size=recipe.vocabulary, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All but the output head, as ``modulora quantize`` chooses them."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not path.endswith("lm_head")
    }


def shapes(recipe: Recipe) -> list[tuple[int, int]]:
    """``(out, in)`` of the model's linear layers, each once."""
    found = [layer.weight.shape for layer in linears(_skeleton(recipe)).values()]
    return list(dict.fromkeys((shape[0], shape[1]) for shape in found))


def _skeleton(recipe: Recipe) -> nn.Module:
    if recipe.model is None:
        return dense_model(recipe, torch.device("meta"))
    from modulora_core.models import open_model

    skeleton: nn.Module = open_model(recipe.model).skeleton()
    return skeleton


def packed_model(
    recipe: Recipe,
    device: torch.device,
    quantizer: Quantizer,
    weights: Mapping[tuple[int, int], PackedWeight],
) -> nn.Module:
    """Ours, with a trainable adapter on every packed layer. Each layer has a copy of the packed weight of its shape."""
    model = dense_model(recipe, device)
    for path, layer in linears(model).items():
        packed = weights[layer.weight.shape[0], layer.weight.shape[1]]
        own = packed.layout.fill({name: tensor.clone() for name, tensor in packed.tensors.items()})
        model.set_submodule(path, QuantLinear(PackedParameter(quantizer, own), layer.bias))
    add_lora(model, LoRASettings(rank=RANK, alpha=ALPHA, dropout=0.0))
    return model


class PlainLoRA(nn.Module):
    """A dense layer with an adapter in float32, as PEFT computes it: where PEFT isn't installed."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        A = torch.empty(RANK, layer.in_features, device=layer.weight.device)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(A))
        self.B = nn.Parameter(A.new_zeros(layer.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + (ALPHA / RANK * ((x.to(self.A.dtype) @ self.A.T) @ self.B.T)).to(y.dtype)


def dense_lora_model(recipe: Recipe, device: torch.device) -> nn.Module:
    """Dense, with PEFT's adapters, or the same in plain torch."""
    model = dense_model(recipe, device)
    try:
        return _with_peft(model)
    except NotMeasuredError:
        model.requires_grad_(False)
        for path, layer in linears(model).items():
            model.set_submodule(path, PlainLoRA(layer))
        return model


def bitsandbytes_model(recipe: Recipe, device: torch.device) -> nn.Module:
    """What PEFT's users have: bitsandbytes' NF4 layers, computing in bf16."""
    import bitsandbytes as bnb

    model: Any = dense_model(recipe, device)
    for path, layer in linears(model).items():
        out_features, in_features = layer.weight.shape
        own = bnb.nn.Linear4bit(in_features, out_features, bias=False, quant_type="nf4", compress_statistics=False,
                                compute_dtype=torch.bfloat16)  # fmt: skip
        own.weight = bnb.nn.Params4bit(
            layer.weight.detach().cpu(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=False,
        )
        own.bias = layer.bias
        model.set_submodule(path, own.to(device))  # moving to the device is what quantizes
    model.is_loaded_in_4bit = True  # by which PEFT knows
    return _with_peft(model)


def _with_peft(model: nn.Module) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise NotMeasuredError(f"PEFT isn't installed ({error}): pip install peft") from None

    names = sorted({path.rpartition(".")[2] for path in linears(model) or _four_bit(model)})
    adapted: nn.Module = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names)
    )
    return adapted


def _four_bit(model: nn.Module) -> list[str]:
    return [path for path, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"]


def measure(model: Any, recipe: Recipe, device: torch.device, seconds: float) -> dict[str, Any]:
    """The median seconds of a LoRA step with AdamW and its peak memory, and the tokens a second of greedy decoding.

    Raises:
        NotMeasuredError: the loss isn't finite, or an adapter got no gradient: what was timed isn't training.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocabulary = model.config.vocab_size
    ids = torch.randint(
        vocabulary, (recipe.batch, recipe.tokens), generator=torch.Generator().manual_seed(0)
    ).to(device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    model.train()
    loss = step()
    without = sum(parameter.grad is None for parameter in trained)
    if not bool(loss.isfinite()) or without or not trained:
        raise NotMeasuredError(
            f"a loss of {float(loss):g}, {without} of {len(trained)} adapters' tensors without a gradient"
        )
    gc.collect()
    with PeakMemory(device) as peak:
        step()
        _wait(device)
        peak_bytes = peak.nbytes
    timing = in_turns({"step": step}, seconds=seconds, device=device, least=2, warm_up=0)["step"]
    optimizer.zero_grad(set_to_none=True)
    return {"step": timing.to_json(), "peak_memory_bytes": peak_bytes, "loss": float(loss),
            "tokens_per_second": _decoding_rate(model.eval(), recipe, ids, seconds)}  # fmt: skip


def _decoding_rate(model: Any, recipe: Recipe, ids: Tensor, seconds: float) -> float:
    """The best of the runs that fit: the host starts every kernel, so others on the machine only take from it."""
    prompt = ids[:1, :32]
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        rates = []
        for n in (2, recipe.new_tokens):  # the short one warms up what the prompt needs
            _wait(ids.device)
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n,
                               do_sample=False, pad_token_id=0)  # fmt: skip
            _wait(ids.device)
            rates.append(n / (time.perf_counter() - start))
        best = max(best, rates[-1])
        if time.perf_counter() >= end:
            return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
