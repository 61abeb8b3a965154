"""Let transformers' ``from_pretrained`` load our checkpoints.

transformers builds the skeleton on the meta device,
:func:`~modulora_core.checkpoints.packed_modules.install` puts packed modules into it, and
transformers' loader fills their buffers from the files. No dense weight exists at any moment.

The interface of HfQuantizer changed twice between transformers 4.57 and 5.24. We use only the
methods that have been stable since 5.0.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from modulora_core.checkpoints.packed_modules import install
from modulora_core.checkpoints.record import QUANT_METHOD, QuantizationRecord
from modulora_core.errors import AdapterError
from modulora_core.layers import LoRALinear


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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        install(model, self.quantization_config.record)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, Any]]:
        """Refuse to save a model with an adapter: a checkpoint has no place for A and B.

        Raises:
            AdapterError: there is an adapter on the model.
        """
        layers = (p for p, m in model.named_modules() if isinstance(m, LoRALinear) and m.lora_A)
        path = next(layers, None)
        if path is not None:
            raise AdapterError(
                f"save_pretrained: expected a packed model without an adapter, got one on {path}; "
                "save the adapter with modulora_core.save_adapter(model, OUT), or write a dense "
                "model with both by `modulora merge`"
            )
        return None, {}

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
