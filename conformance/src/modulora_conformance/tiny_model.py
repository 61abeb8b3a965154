"""Quantizes a tiny random Llama once for all checks, and trains it beside its dense twin.

transformers is imported on first use: it takes two seconds, and levels 0 to 5 do without.
"""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modulora_conformance.cases import accepts, generator, tile
from modulora_conformance.memo import once
from modulora_conformance.oracle import relative_error
from modulora_conformance.results import Measurements
from modulora_core.layers import QuantLinear
from modulora_core.progress import quiet
from modulora_core.spec import Quantizer

HEADS = 4
SMALLEST = 64
VOCABULARY = 130
IDS = torch.arange(3, 43).view(2, 20)
"""Token ids, ``[2, 20]``."""

PACKED_LAYERS = 14
"""Seven linear layers in each of two blocks."""

TOLERANCE = 1e-5
"""The relative error of logits: fp32 sums in another order through two blocks, some 100 ulps."""

LEARNING_RATE = 0.1


class TinyModel(NamedTuple):
    """The folders of the dense and the quantized model. They are deleted when the process ends."""

    dense: Path
    packed: Path


@once(most=64)
def tiny_model(quantizer: Quantizer) -> TinyModel:
    """The model, quantized by the installed quantizer of this name with the same options."""
    root = Path(tempfile.mkdtemp(prefix="modulora-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    _save_dense(root / "dense", _hidden_size(quantizer))
    return TinyModel(root / "dense", _quantize(root / "dense", root / "packed", quantizer))


def _quantize(dense: Path, out: Path, quantizer: Quantizer) -> Path:
    from modulora_core import quantize
    from modulora_core.calibration import CalibrationConfig

    text = CalibrationConfig("pydoc[:2%]", samples=8, seq_len=32)
    options = quantizer.options.model_dump(mode="json")
    calibration = text if quantizer.wants_calibration else None
    quantize(str(dense), out, quantizer.spec.name, options, calibration=calibration)
    return out


def _hidden_size(quantizer: Quantizer) -> int:
    """The smallest size whose square, wide and tall matrices the quantizer accepts."""
    step = math.lcm(quantizer.spec.out_multiple, quantizer.spec.in_multiple, 2 * HEADS)
    first = step * math.ceil(SMALLEST / step)
    for n in range(first, first + 64 * step, step):
        if all(accepts(quantizer, shape) for shape in ((n, n), (2 * n, n), (n, 2 * n))):
            return n
    return first  # quantize() reports the fault


@once(most=8)
def servable_model(quantizer: Quantizer) -> TinyModel:
    """The same with two wide heads: vLLM's kernels know few sizes of heads."""
    root = Path(tempfile.mkdtemp(prefix="modulora-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    size = _hidden_size(quantizer)
    _save_dense(root / "dense", size, head_dim=size, heads=2)
    return TinyModel(root / "dense", _quantize(root / "dense", root / "packed", quantizer))


def _save_dense(
    folder: Path, hidden_size: int, head_dim: int | None = None, heads: int = HEADS
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    letters = {chr(i): i for i in range(128)} | {"<unk>": 128}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def load_model(folder: Path) -> nn.Module:
    """The packed model of a folder, on the CPU."""
    from modulora_core.hf.load_model import load_model

    model: nn.Module = load_model(folder, device="cpu")
    return model


def packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The packed linear layers of a loaded model, by path."""
    modules = model.named_modules()
    return {path: module for path, module in modules if isinstance(module, QuantLinear)}


def dense_twin(model: nn.Module, folder: Path) -> nn.Module:
    """The dense model of ``folder``, fp32, with the Ŵ of ``model``'s packed layers as weights."""
    from transformers import AutoModelForCausalLM

    with quiet():
        dense: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, layer in packed_layers(model).items():
            weight = dense.get_parameter(f"{path}.weight")
            weight.copy_(tile(layer.weight.quantizer, layer.weight.packed))
    return dense


def logits_of(model: nn.Module) -> Tensor:
    """The logits of :data:`IDS`, in evaluation mode, without a graph."""
    with torch.no_grad():
        logits: Tensor = model.eval()(IDS).logits
    return logits


def adapted_loss(
    dense: nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """Loss and logits of the dense model with W + s B A, for A ``[r, in]`` and B ``[out, r]``."""
    weights = {
        f"{path}.weight": dense.get_parameter(f"{path}.weight").detach() + scale * B @ A
        for path, (A, B) in adapters.items()
    }
    inputs = {"input_ids": IDS, "labels": IDS}
    result: Any = torch.func.functional_call(dense, weights, kwargs=inputs)
    return result.loss, result.logits


def check_training_step(saved: TinyModel, folder: Path, measurements: Measurements) -> None:
    """Train one step beside the dense twin. Compare gradients, logits, and a reloaded adapter.

    Gradients go through the model twice, so they have ten times the tolerance of logits.
    """
    from modulora_core import LoRASettings, add_lora, load_adapter, save_adapter
    from modulora_core.lora.adapted import adapter_layers

    settings = LoRASettings(rank=2, alpha=4.0, dropout=0.0)
    model = load_model(saved.packed)
    dense = dense_twin(model, saved.dense)
    add_lora(model, settings)
    own = {path: _randomised(layer, i) for i, (path, layer) in enumerate(adapter_layers(model))}
    twins = {
        path: (A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_())
        for path, (A, B) in own.items()
    }
    parameters, leaves = ([p for pair in d.values() for p in pair] for d in (own, twins))
    scale = settings.alpha / settings.rank

    expected = torch.autograd.grad(adapted_loss(dense, twins, scale)[0], leaves)
    model.train()(IDS, labels=IDS).loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None, "an adapter: expected a gradient, got none"
        error = relative_error(parameter.grad, gradient)
        measurements.at_most("gradients of adapters", error, 10 * TOLERANCE)

    torch.optim.SGD(parameters, lr=LEARNING_RATE).step()
    with torch.no_grad():
        for leaf, gradient in zip(leaves, expected, strict=True):
            leaf -= LEARNING_RATE * gradient
        _, exact = adapted_loss(dense, twins, scale)
    logits = logits_of(model)
    error = relative_error(logits, exact)
    measurements.at_most("logits after a step", error, 10 * TOLERANCE)

    save_adapter(model, folder, settings=settings)
    again = load_model(saved.packed)
    load_adapter(again, folder)
    assert torch.equal(logits_of(again), logits), (
        "expected the same logits bit for bit from the reloaded model and adapter, got others"
    )


def _randomised(layer: Any, seed: int) -> tuple[Tensor, Tensor]:
    """A and B of a layer, after B gets values: A would get no gradient from B = 0."""
    A, B = (layer.parameters_of("default")[name] for name in ("lora_A", "lora_B"))
    with torch.no_grad():
        B.copy_(0.1 * torch.randn(B.shape, generator=generator(seed)))
    return A, B
