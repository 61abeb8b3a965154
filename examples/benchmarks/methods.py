"""What is compared: ways to hold the weight of a linear layer. Here are the dense one and ours; ``peers.py`` has the others.

A method makes one layer from a dense weight, for benchmarks of layers, and loads a whole model, for those of models.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from modulora_core import registry
from modulora_core.calibration import CalibrationConfig
from modulora_core.errors import ModuLoRAError
from modulora_core.registry import Choice
from modulora_core.spec import Calibration
from modulora_core.tiles import tile_budget

RANK, ALPHA = 8, 16.0
"""Of the adapters that are trained, without dropout."""

BASE = "dense"
BASE_DTYPE = "float32"
"""Ratios are to the dense method in float32."""


@dataclass(frozen=True)
class ModelFiles:
    """Where the models of a run are: the dense one, in float32 with a tokenizer, and what methods make of it."""

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
        distributions: what must be installed, by the names that pip knows.
        benchmarks: the scripts that it can take part in.
    """

    distributions: ClassVar[tuple[str, ...]] = ()
    benchmarks: ClassVar[frozenset[str]] = frozenset(
        {"layer", "training", "decoding", "quantization", "memory"}
    )

    @property
    def name(self) -> str:
        raise NotImplementedError

    def missing(self) -> str | None:
        """What to install, or None."""
        lacking = [
            name
            for name in self.distributions
            if not any(importlib.metadata.distributions(name=name))
        ]
        return (
            f"{' and '.join(lacking)} isn't installed; pip install {' '.join(lacking)}"
            if lacking
            else None
        )

    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        """A layer ``x Wᵀ`` for inputs of ``dtype``. weight: fp32 ``[out, in]``, left as it is."""
        raise NotImplementedError

    def copies(
        self,
        layer: nn.Module,
        weight: Tensor,  # noqa: ARG002 - the last three are for a layer that must be made anew
        dtype: torch.dtype,  # noqa: ARG002
        *,
        training: bool,  # noqa: ARG002
    ) -> Iterator[nn.Module]:
        """The layer again and again, each on memory of its own."""
        while True:
            yield copy.deepcopy(layer)

    def running(self, *, training: bool) -> AbstractContextManager[None]:  # noqa: ARG002 - for those that care
        """What must hold while its layers run."""
        return contextlib.nullcontext()

    def prepare(self, files: ModelFiles) -> None:
        """Write what :meth:`load` reads into ``files.of(self)``. By default it reads the dense model."""

    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        """The model, frozen and in evaluation mode, with activations in ``dtype``."""
        raise NotImplementedError

    def quantize_model(self, files: ModelFiles) -> object:
        """Quantize the whole dense model; by default loading does."""
        return self.load(files, torch.float32)

    def adapt(self, model: Any, targets: list[str]) -> Any:
        """The model with a LoRA adapter on the layers named ``targets`` (fp32, rank :data:`RANK`), in training mode."""
        return with_peft(model, targets)

    def loss(self, model: Any, ids: Tensor) -> Tensor:
        """The mean loss of predicting ``ids``, ``[batch, length]``."""
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def decode(self, model: Any, ids: Tensor, length: int) -> Tensor:
        """``length`` tokens that follow ``ids``, ``[1, prompt]``, each the likeliest."""
        output: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=length, max_new_tokens=length,
            pad_token_id=0, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        return output[0, ids.shape[1] :]


def with_peft(model: Any, targets: list[str]) -> Any:
    """A LoRA adapter of PEFT, as its users put it on."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, bias="none"
    )
    return get_peft_model(model, config).train()


def load_dense(files: ModelFiles, dtype: torch.dtype, **options: Any) -> Any:
    """The dense model by transformers; ``options`` as its ``from_pretrained`` takes them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(files.dense, dtype=dtype, **options).eval().requires_grad_(False)  # fmt: skip


@dataclass(frozen=True)
class Dense(Method):
    """The weight as it is, in the dtype of the input."""

    distributions: ClassVar[tuple[str, ...]] = ()

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


def linear(weight: Tensor) -> nn.Linear:
    """A layer on this very weight, frozen."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@dataclass(frozen=True)
class Packed(Method):
    """A quantizer of ours: ``words`` is ``NAME`` or ``NAME:option=value,option=value``, and so is ``head``, for embeddings and head."""

    words: str
    tile_kib: int | None = None
    head: str | None = None

    @property
    @override
    def name(self) -> str:
        tiles = "" if self.tile_kib is None else f", tiles of {self.tile_kib} KiB"
        return self.words + tiles + ("" if self.head is None else f", head {self.head}")

    @override
    def missing(self) -> str | None:
        try:
            self.quantizer()
        except ModuLoRAError as error:
            return str(error)
        return None

    def quantizer(self) -> Any:
        return Choice.parse(self.words).create()

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        from modulora_core.layers import PackedParameter, QuantLinear

        quantizer = self.quantizer()
        # values make no difference to the time, so what wants calibration gets the identity for H
        seen = (
            None
            if quantizer.spec.calibration == "none"
            else Calibration(torch.eye(weight.shape[1]), 1)
        )
        return QuantLinear(PackedParameter(quantizer, quantizer.pack(weight, seen)))

    @contextlib.contextmanager
    @override
    def running(self, *, training: bool) -> Iterator[None]:
        if self.tile_kib is None:
            yield
            return
        with tile_budget(self.tile_kib * 1024):
            yield

    @override
    def prepare(self, files: ModelFiles) -> None:
        from modulora_core.quantization.quantize import quantize

        quantizer = self.quantizer()
        options = quantizer.options.model_dump(mode="json")
        calibration = None if quantizer.spec.calibration == "none" else files.calibration
        ends = None if self.head is None else Choice.parse(self.head)
        quantize(
            str(files.dense), files.of(self), quantizer.spec.name, options,
            calibration=calibration, head=ends, embeddings=ends,
        )  # fmt: skip

    @override
    def quantize_model(self, files: ModelFiles) -> object:
        return self.prepare(files)

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        from modulora_core.inference.loading import open_to_run

        return open_to_run(
            str(files.of(self)), dtype=str(dtype).removeprefix("torch."), device="cpu"
        ).load()

    @override
    def adapt(self, model: Any, targets: list[str]) -> Any:
        from modulora_core.adapters.lora import LoRASettings, add_lora

        add_lora(model, LoRASettings(rank=RANK, alpha=ALPHA, dropout=0.0, targets=targets))
        return model.train()

    @override
    def loss(self, model: Any, ids: Tensor) -> Tensor:
        from modulora_core.training.chunked_loss import chunked_loss

        with chunked_loss(model):  # as `modulora finetune` does
            return super().loss(model, ids)


def promised() -> list[str]:
    """The installed quantizers, each with every configuration that it promises to hold."""
    words = []
    for entry in registry.entries():
        if entry.status == "ok" and entry.spec is not None:
            for promise in entry.spec.promises:
                options = ",".join(f"{name}={value}" for name, value in promise.options.items())
                words.append(f"{entry.spec.name}:{options}" if options else entry.spec.name)
    return words
