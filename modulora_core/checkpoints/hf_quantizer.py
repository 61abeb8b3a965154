"""Let transformers' ``from_pretrained`` load our checkpoints.

transformers builds the skeleton on the meta device,
:func:`~modulora_core.checkpoints.packed_modules.install` puts packed modules into it, and
transformers' loader fills their tensors from the files. No dense weight exists at any moment.

The interface of HfQuantizer changed twice between transformers 4.57 and 5.24. We use only the
methods that have been stable since 5.0.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from modulora_core.checkpoints.packed_model import PackedModel, with_methods
from modulora_core.checkpoints.packed_modules import install, unpack
from modulora_core.checkpoints.record import QUANT_METHOD, QuantizationRecord


class ModuLoRAConfig(QuantizationConfigMixin):
    """The ``quantization_config`` for transformers: an object around our record."""

    def __init__(self, **record: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.record = QuantizationRecord.from_json({"quant_method": QUANT_METHOD, **record})

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.record.to_json()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class ModuLoRAHfQuantizer(HfQuantizer):
    """Put packed modules into the skeleton that transformers is about to fill."""

    requires_calibration = True  # from_pretrained only reads; `modulora quantize` packs
    is_trainable = True
    is_qat_trainable = True  # the Trainer then accepts a quantized model without PEFT's adapters
    is_compileable = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        record: QuantizationRecord = self.quantization_config.record
        install(model, record)
        base = f"{model.base_model_prefix}."
        guards = {f"{re.escape(name.removeprefix(base))}$" for name in record.guard}
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *guards,
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Freeze what came from the checkpoint. A new head, such as a classifier's, can train."""
        from transformers import PreTrainedModel  # its import registers us

        for part in (model.base_model, model.get_output_embeddings()):
            if part is not None:
                part.requires_grad_(False)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.__class__ = with_methods(PackedModel, type(part))
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted = dtype or model.dtype
        unpack(model, getattr(torch, wanted) if isinstance(wanted, str) else wanted)
        for part in model.modules():
            if isinstance(part, PackedModel):
                part.__class__ = type(part).__bases__[1]  # without PackedModel
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
        """The tensors of a checkpoint, with its guard."""
        record: QuantizationRecord = self.quantization_config.record
        guard = {
            name: torch.empty(layout.shape, dtype=getattr(torch, layout.dtype))
            for name, layout in record.guard.items()
        }
        return {**model.state_dict(), **guard}, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True


def register() -> None:
    """Let ``AutoModelForCausalLM.from_pretrained`` load folders that ``modulora quantize`` wrote.

    ::

        modulora_core.register()
        model = AutoModelForCausalLM.from_pretrained("smollm2-packed")

    The weights stay packed. A second call does nothing.
    """
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(ModuLoRAConfig)
        register_quantizer(QUANT_METHOD)(ModuLoRAHfQuantizer)
