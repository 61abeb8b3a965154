"""Let transformers' ``from_pretrained`` load our checkpoints, or quantize a dense model.

Importing this file registers both classes: ``import modulora_core.hf`` does it.

transformers builds the skeleton on the meta device,
:func:`~modulora_core.checkpoints.packed_modules.install` puts packed modules into it, and
transformers' loader fills their tensors from the files. No dense weight exists at any moment.

The interface of HfQuantizer changed twice between transformers 4.57 and 5.24. We use only the
methods that have been stable since 5.0.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from modulora_core.arguments import checked
from modulora_core.checkpoints.packed_modules import install, unpack
from modulora_core.checkpoints.record import QUANT_METHOD, QuantizationRecord
from modulora_core.errors import ModelError
from modulora_core.hf.packed_model import PackedModel, packed_class
from modulora_core.hf.packing_on_load import PackOnLoad, data_free
from modulora_core.hf.reference import LOADED, refuse_reference
from modulora_core.layers import QuantLinear
from modulora_core.models.store import check_finite
from modulora_core.packed_parameters import check_scales
from modulora_core.registry import Choice


@register_quantization_config(QUANT_METHOD)
class ModuLoRAConfig(QuantizationConfigMixin):
    """Quantize a dense model while transformers loads it::

        config = ModuLoRAConfig("NAME", {"OPTION": 64})
        model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=config)

    The result equals :func:`modulora_core.quantize` with the same arguments, then ``load_model``,
    if ``dtype`` is the stored one: weights are cast to ``dtype`` first. Only quantizers without
    calibration work here. transformers also makes this object of a packed folder's record.

    Args:
        quantizer: a name of ``modulora list-quantizers``; options: of its ``Options``.
        include: quantize only modules whose dotted path matches one of these patterns (fnmatch).
        exclude: leave modules dense that match one of these patterns.
        seed: for random numbers of the quantizer.
        record: of a packed folder, instead of all others.
        mapped: for a packed folder: check the scales of each mapped block at its first use.
    """

    @checked
    def __init__(
        self,
        quantizer: str = "",
        options: Mapping[str, Any] | None = None,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        record: QuantizationRecord | None = None,
        mapped: bool = False,
    ) -> None:
        self.quant_method, self.mapped = QUANT_METHOD, mapped
        self.choice = Choice(quantizer, options or {})
        self.include, self.exclude, self.seed = list(include), list(exclude), seed
        self.record = record

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        record = config_dict.get("record")
        if isinstance(record, QuantizationRecord):  # of load_model, never of a file
            config = cls(record=record, mapped=config_dict["mapped"])
        elif "quantizer" in config_dict:
            config = cls(**{k: v for k, v in config_dict.items() if k != "quant_method"})
        else:
            config = cls(record=QuantizationRecord.from_json(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        if self.record is not None:
            return self.record.to_json()
        return {"quant_method": self.quant_method, "quantizer": self.choice.quantizer,
                "options": dict(self.choice.options), "include": self.include,
                "exclude": self.exclude, "seed": self.seed}  # fmt: skip

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class ModuLoRAHfQuantizer(HfQuantizer):
    """Put packed modules into the skeleton that transformers is about to fill.

    A dense model gets each packed module when its dense weight has been read.
    """

    is_trainable = True
    is_compileable = False
    quantization_config: ModuLoRAConfig

    def __init__(self, quantization_config: ModuLoRAConfig, **more: Any) -> None:
        super().__init__(quantization_config, **more)
        self.packer: PackOnLoad | None = None
        self._model: weakref.ref[PackedModel] | None = None
        self.quantizer = None if self.pre_quantized else data_free(quantization_config.choice)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        if model.get_output_embeddings() is not None:  # a reference is a language model
            refuse_reference(model.config.name_or_path)
        if self.quantizer is not None:
            wanted = self.quantization_config
            self.packer = PackOnLoad(
                model, self.quantizer, wanted.include, wanted.exclude, wanted.seed
            )
            self.quantization_config = ModuLoRAConfig(record=self.packer.record)
            return model
        install(model, self.record)
        base = f"{model.base_model_prefix}."
        guards = {f"{re.escape(name.removeprefix(base))}$" for name in self.record.guard}
        model._keys_to_ignore_on_load_unexpected |= guards
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Freeze what came from the checkpoint. A new head, such as a classifier's, can train."""
        if self.packer is not None:
            self.packer.check_complete(model)
        _refuse_offload(getattr(model, "hf_device_map", {}))
        for name, values in model.named_parameters():
            check_finite(values.detach(), name, type(model).__name__)
        if not self.quantization_config.mapped:
            check_scales(model)
        for part in (model.base_model, model.get_output_embeddings()):
            if part is not None:
                part.requires_grad_(False)
            if isinstance(part, QuantLinear):
                part.is_head = not part.packed_weight.transposed
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.__class__ = packed_class(type(part))
        self.follow(model)
        return model

    def follow(self, model: PackedModel) -> None:
        """Remember the model, which owns this quantizer: a weak reference is enough."""
        self._model = weakref.ref(model)
        LOADED.add(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # the copy of the model calls `follow`

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the Trainer accepts the model without an adapter of PEFT.

        The Trainer refuses a model in which nothing trains, and says to attach an adapter.
        """
        model = None if self._model is None else self._model()
        return model is None or any(parameter.requires_grad for parameter in model.parameters())

    @property
    def record(self) -> QuantizationRecord:
        """The model's record: it has packed modules, or is about to get them."""
        record = self.quantization_config.record
        assert record is not None
        return record

    def param_needs_quantization(self, _: Any, param_name: str, **__: Any) -> bool:
        return self.packer is not None and param_name in self.record.weights

    def get_quantize_ops(self) -> PackOnLoad | None:
        return self.packer

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per weight, for ``device_map="auto"``."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        return self.record.site(param_name).layout.bits_per_weight / 8

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted = dtype or model.dtype
        unpack(model, getattr(torch, wanted) if isinstance(wanted, str) else wanted)
        for part in model.modules():
            if isinstance(part, PackedModel):
                part.__class__ = type(part).__bases__[1]  # without PackedModel
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
        """The tensors of a checkpoint, with its guard."""
        guard = {
            name: torch.empty(layout.shape, dtype=getattr(torch, layout.dtype))
            for name, layout in self.record.guard.items()
        }
        return {**model.state_dict(), **guard}, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True


def _refuse_offload(device_map: Mapping[str, Any]) -> None:
    """Refuse parts on a device where they can't be used. Raises ModelError."""
    devices = {str(device) for device in device_map.values()}
    for place in ("disk", "cpu"):
        if place in devices and (place == "disk" or len(devices) > 1):
            raise ModelError(
                f"device_map: expected devices that hold their parts, got parts on {place}, which "
                "accelerate would load where they are needed, and it can't load packed weights; "
                "use more or larger devices, or on a CPU load_model(..., mapped=True)"
            )
