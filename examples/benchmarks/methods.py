"""Ways to hold the weight of a linear layer: dense, and packed by our quantizers.

:mod:`peers` has the other libraries. A method makes one layer from a dense weight, and loads a
whole model.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from modulora_core import LoRASettings, QuantLinear, add_lora, quantize, registry
from modulora_core.calibration import CalibrationConfig
from modulora_core.errors import ModuLoRAError
from modulora_core.inference.opened import open_to_run
from modulora_core.models.sites import find_sites
from modulora_core.packed_parameters import PackedParameter
from modulora_core.registry import Choice
from modulora_core.spec import Calibration, PackedWeight, Quantizer
from modulora_core.training.chunked_loss import chunked_loss

RANK, ALPHA = 8, 16.0
"""Rank and scale of the adapters, which have no dropout."""

BASE, BASE_DTYPE = "dense", "float32"
"""The method and the dtype that ratios refer to."""


@dataclass(frozen=True)
class ModelFiles:
    """The models of a run in one folder: dense in float32 with a tokenizer, and quantized ones."""

    folder: Path
    calibration: CalibrationConfig

    @property
    def dense(self) -> Path:
        return self.folder / "dense"

    def of(self, method: Method) -> Path:
        return self.folder / method.name.translate(str.maketrans(":,", "--", "= "))


@dataclass(frozen=True)
class Method:
    """One way to hold weights.

    Attributes:
        distributions: packages that must be installed.
        benchmarks: the scripts that it can take part in.
        copies: whether ``copy.deepcopy`` can copy its layers.
    """

    distributions: ClassVar[tuple[str, ...]] = ()
    benchmarks: ClassVar[frozenset[str]] = frozenset({"layer", "training", "decoding", "quality"})
    copies: ClassVar[bool] = True

    @property
    def name(self) -> str:
        raise NotImplementedError

    def missing(self) -> str | None:
        """The packages to install, in a sentence, or None."""
        lacking = [
            name
            for name in self.distributions
            if not any(importlib.metadata.distributions(name=name))
        ]
        names = " and ".join(lacking)
        return f"{names} isn't installed; pip install {' '.join(lacking)}" if lacking else None

    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        """A layer ``x Wᵀ`` on the weight's device.

        Args:
            weight: fp32 ``[out, in]``; it does not change.
            dtype: of the inputs.
            training: a backward follows.
        """
        raise NotImplementedError

    def prepare(self, files: ModelFiles) -> None:
        """Write the files that :meth:`load` reads, to ``files.of(self)``; by default none."""

    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        """The frozen model in evaluation mode, with activations in ``dtype``."""
        return with_linears(self, load_dense(files, dtype), dtype)

    def adapt(self, model: Any, targets: list[str]) -> Any:
        """The model in training mode, with an fp32 adapter of PEFT on the layers ``targets``."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        return get_peft_model(model, config).train()

    def loss(self, model: Any, ids: Tensor) -> Tensor:
        """The mean loss of predicting ``ids``, ``[batch, length]``."""
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def decode(self, model: Any, ids: Tensor, length: int) -> Tensor:
        """The ``length`` likeliest tokens after ``ids``, ``[1, prompt]``, one by one."""
        return greedy(model, ids, length)


def greedy(model: Any, ids: Tensor, length: int) -> Tensor:
    """Decode exactly ``length`` tokens with transformers' ``generate``."""
    output: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=length,
        max_new_tokens=length, pad_token_id=0, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    return output[0, ids.shape[1] :]


def load_dense(files: ModelFiles, dtype: torch.dtype, **options: Any) -> Any:
    """The dense model; ``options`` are those that its ``from_pretrained`` takes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files.dense, dtype=dtype, **options)
    return model.eval().requires_grad_(False)


def with_linears(method: Method, model: Any, dtype: torch.dtype) -> Any:
    """The model with each linear layer but the head made anew by ``method``."""
    for site in find_sites(model).linears:
        weight = model.get_submodule(site.module).weight.data.float()
        model.set_submodule(site.module, method.layer(weight, dtype))
    return model


def linear(weight: Tensor) -> nn.Linear:
    """A frozen layer on this very weight."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@dataclass(frozen=True)
class Dense(Method):
    """The weight in the dtype of the input."""

    @property
    @override
    def name(self) -> str:
        return BASE

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        return linear(weight.to(dtype))

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        return load_dense(files, dtype)


@dataclass(frozen=True)
class Packed(Method):
    """One of our quantizers.

    Attributes:
        words: ``NAME`` or ``NAME:option=value,option=value``.
        head: the quantizer of embeddings and head, in the same form.
    """

    words: str
    head: str | None = None

    @property
    @override
    def name(self) -> str:
        return self.words if self.head is None else f"{self.words}, head {self.head}"

    @override
    def missing(self) -> str | None:
        try:
            self.quantizer()
        except ModuLoRAError as error:
            return str(error)
        return None

    def quantizer(self) -> Quantizer:
        return Choice.parse(self.words).create()

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        quantizer = self.quantizer()
        return QuantLinear(PackedParameter(quantizer, pack(quantizer, weight)))

    @override
    def prepare(self, files: ModelFiles) -> None:
        quantizer = self.quantizer()
        calibration = None if quantizer.spec.calibration == "none" else files.calibration
        ends = None if self.head is None else Choice.parse(self.head)
        quantize(
            str(files.dense), files.of(self), quantizer.spec.name,
            quantizer.options.model_dump(mode="json"),
            calibration=calibration, head=ends, embeddings=ends,
        )  # fmt: skip

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        name = str(dtype).removeprefix("torch.")
        return open_to_run(str(files.of(self)), dtype=name, device="cpu").load()

    @override
    def adapt(self, model: Any, targets: list[str]) -> Any:
        add_lora(model, LoRASettings(rank=RANK, alpha=ALPHA, dropout=0.0, targets=targets))
        return model.train()

    @override
    def loss(self, model: Any, ids: Tensor) -> Tensor:
        with chunked_loss(model):  # as `modulora finetune` does
            return super().loss(model, ids)


def pack(quantizer: Quantizer, weight: Tensor) -> PackedWeight:
    """Pack on the weight's device. A calibrated quantizer gets H = I."""
    if quantizer.spec.calibration == "none":
        return quantizer.pack(weight)
    return quantizer.pack(weight, Calibration(torch.eye(weight.shape[1], device=weight.device), 1))


def promised() -> list[str]:
    """The installed quantizers, each in every configuration of its promises."""
    specs = [entry.spec for entry in registry.entries() if entry.status == "ok" and entry.spec]
    return [Choice(spec.name, promise.options).label for spec in specs for promise in spec.promises]
