"""A tiny Llama of random weights, quantized once for all checks of a configuration, and the dense model that it must equal."""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modulora_core.calibration import CalibrationConfig
from modulora_core.errors import ShapeError
from modulora_core.layers import QuantLinear
from modulora_core.models.quiet import quiet
from modulora_core.quantization.quantize import quantize
from modulora_core.spec import Quantizer

HEADS = 4
SMALLEST = 64
VOCABULARY = 130
IDS = torch.arange(3, 43).view(2, 20)
"""Token ids, ``[2, 20]``."""

CALIBRATION = CalibrationConfig("pydoc[:2%]", samples=8, seq_len=32)
"""For a quantizer that asks for one."""

PACKED_LAYERS = 14
"""Seven linear layers in each of two blocks."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class TinyModel:
    """Folders of the dense and of the quantized model; they live as long as this does."""

    root: Path = field(
        default_factory=lambda: Path(tempfile.mkdtemp(prefix="modulora-conformance-"))
    )

    def __post_init__(self) -> None:
        # not a TemporaryDirectory: where the cache forgets one it warns, which is an error in some author's CI
        weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)

    @property
    def dense(self) -> Path:
        return self.root / "dense"

    @property
    def packed(self) -> Path:
        return self.root / "packed"


def tiny_model(quantizer: Quantizer) -> TinyModel:
    """The model quantized with the quantizer that is installed under this name, with the same options."""
    options = quantizer.options.model_dump_json()
    return _tiny_model(
        quantizer.spec.name, options, quantizer.spec.calibration != "none", _hidden_size(quantizer)
    )


@functools.lru_cache(maxsize=16)
def _tiny_model(name: str, options: str, calibrated: bool, hidden_size: int) -> TinyModel:
    model = TinyModel()
    _save_dense(model.dense, hidden_size)
    _quantize(model.dense, model.packed, name, options, calibrated)
    return model


def quantized_again(quantizer: Quantizer, out: Path) -> Path:
    """``out``, where the same model was quantized in the same way."""
    options = quantizer.options.model_dump_json()
    calibrated = quantizer.spec.calibration != "none"
    return _quantize(tiny_model(quantizer).dense, out, quantizer.spec.name, options, calibrated)


def _quantize(dense: Path, out: Path, name: str, options: str, calibrated: bool) -> Path:
    text = CALIBRATION if calibrated else None
    quantize(str(dense), out, name, json.loads(options), calibration=text)
    return out


def _hidden_size(quantizer: Quantizer) -> int:
    """The smallest that the quantizer takes for a layer's square, wide and tall matrices."""
    step = math.lcm(quantizer.spec.out_multiple, quantizer.spec.in_multiple, 2 * HEADS)
    first = step * math.ceil(SMALLEST / step)
    for size in range(first, first + 64 * step, step):
        try:
            for shape in ((size, size), (2 * size, size), (size, 2 * size)):
                quantizer.check_shape(shape)
        except ShapeError:
            continue
        return size
    return first  # quantize() tells what is wrong with it


def _save_dense(folder: Path, hidden_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.1,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    letters = {chr(i): i for i in range(128)} | {"<unk>": 128}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The packed linear layers of a loaded model, by path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)
    }


def dense_twin(model: nn.Module, folder: Path) -> nn.Module:
    """The dense model of ``folder`` with Ŵ of ``model``'s packed layers in the place of its weights, fp32."""
    from transformers import AutoModelForCausalLM

    with quiet():
        dense: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, layer in packed_layers(model).items():
            packed = layer.weight.packed
            tile = layer.weight.quantizer.dequantize_tile(
                packed, (0, packed.shape[0]), torch.float32
            )
            dense.get_parameter(f"{path}.weight").copy_(tile)
    return dense


def adapted_loss(
    dense: nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """Loss and logits of the dense model with W + s B A for each path's (A ``[r, in]``, B ``[out, r]``)."""
    weights = {f"{path}.weight": dense.get_parameter(f"{path}.weight").detach() + scale * B @ A
               for path, (A, B) in adapters.items()}  # fmt: skip
    result: Any = torch.func.functional_call(
        dense, weights, kwargs={"input_ids": IDS, "labels": IDS}
    )
    return result.loss, result.logits


def logits_of(model: nn.Module) -> Tensor:
    """Of :data:`IDS`, in evaluation mode, without a graph."""
    with torch.no_grad():
        result: Tensor = model.eval()(IDS).logits
    return result
