"""transformers' ``from_pretrained`` for our checkpoints.

``register()`` makes ``AutoModelForCausalLM.from_pretrained(folder)`` build a model whose linear layers are packed:
transformers builds the skeleton on the meta device, :func:`install` puts packed modules into it, and transformers'
loader fills their buffers from the files. No dense weight exists at any moment.

HfQuantizer's interface changed twice between transformers 4.57 and 5.24. Only what has been stable since 5.0 is used
here: ``_process_model_before_weight_loading(model, **kwargs)``, ``get_state_dict_and_metadata(model)``, by which
``save_pretrained`` asks what to write, and the capability properties.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from modulora_core.checkpoints.record import QUANT_METHOD, PackedSite, QuantizationRecord
from modulora_core.devices.dense_products import DenseLinear
from modulora_core.errors import AdapterError, CheckpointError
from modulora_core.layers import (
    LoRALinear,
    PackedParameter,
    PackedStack,
    PackedTable,
    QuantLinear,
    TiedHead,
)
from modulora_core.spec import Quantizer


class ModuLoRAConfig(QuantizationConfigMixin):
    """The ``quantization_config`` as transformers wants it: an object around our record."""

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
    """Puts packed modules into the skeleton that transformers is about to fill."""

    requires_calibration = (
        True  # packing is done by `modulora quantize`; from_pretrained only reads
    )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        install(model, self.quantization_config.record)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, Any]]:
        """Refuse what ``save_pretrained`` would write of a model with an adapter: no checkpoint has a place for A and B.

        Raises:
            AdapterError: there is an adapter on the model.
        """
        path = next(
            (p for p, m in model.named_modules() if isinstance(m, LoRALinear) and m.lora_A), None
        )
        if path is not None:
            raise AdapterError(
                f"save_pretrained: expected a packed model without an adapter, got one with, on {path}; save the adapter with "
                "modulora_core.save_adapter(model, OUT), or write a dense model with both by `modulora merge`"
            )
        return None, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        # transformers' Trainer accepts a quantized model with PEFT's adapters or with a quantizer that trains
        # by itself. Ours are the second: the adapters are LoRALinear modules
        return True

    @property
    def is_compileable(self) -> bool:
        return False


def register() -> None:
    """Make transformers know our checkpoints. Does nothing the second time."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(ModuLoRAConfig)
        register_quantizer(QUANT_METHOD)(ModuLoRAHfQuantizer)


def install(model: nn.Module, record: QuantizationRecord) -> None:
    """Replace the parameters that ``record`` names by packed ones on the meta device.

    Linear layers that stay dense become :class:`modulora_core.layers.DenseLinear`.

    Raises:
        CheckpointError: the model has no such parameter, or one of another shape, or a quantizer doesn't read its packed format.
        PluginError: a quantizer isn't installed or can't be used.
    """
    quantizers = [recipe.create() for recipe in record.recipes]
    for parameter, site in record.items():
        parent_name, _, leaf = parameter.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            dense = parent.get_parameter(leaf)
        except AttributeError:
            raise CheckpointError(
                f"{parameter}: packed in this checkpoint, but {type(model).__name__} has no such parameter"
            ) from None
        _check_shape(parameter, site, tuple(dense.shape))
        if site.kind == "experts":
            _install_experts(model, parent, leaf, site, quantizers[site.recipe])
        elif site.kind == "embedding":
            _install_table(model, parent_name, site, quantizers[site.recipe], dense.dtype)
        else:
            linear = QuantLinear(_packed(site, quantizers[site.recipe]), parent._parameters["bias"])
            linear._is_hf_initialized = True  # type: ignore[assignment]  # transformers' mark: not to be filled with noise
            model.set_submodule(parent_name, linear)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:  # a subclass may compute something else
            model.set_submodule(path, DenseLinear.of(module))


def _check_shape(parameter: str, site: PackedSite, found: tuple[int, ...]) -> None:
    if found != site.parameter_shape:
        raise CheckpointError(
            f"{parameter}: config.json's model has shape {list(found)}, its packed weight is of {list(site.parameter_shape)}"
        )


def _packed(site: PackedSite, quantizer: Quantizer) -> PackedParameter:
    # a Conv1D becomes a QuantLinear, whose forward knows the orientation: only stacks are used by foreign code
    transposed = site.transposed and site.kind == "experts"
    quantizer.check_format(site.layout)
    return PackedParameter(
        quantizer, site.layout.empty(torch.device("meta")), transposed=transposed
    )


def _install_experts(
    model: nn.Module, parent: nn.Module, leaf: str, site: PackedSite, quantizer: Quantizer
) -> None:
    del parent._parameters[leaf]
    parent.add_module(leaf, PackedStack(_packed(site, quantizer) for _ in range(site.experts or 0)))
    parent._is_hf_initialized = True  # type: ignore[assignment]  # see above
    use_eager_experts(model)


def _install_table(
    model: nn.Module, path: str, site: PackedSite, quantizer: Quantizer, dtype: torch.dtype
) -> None:
    """Put a packed table into the embedding at ``path``, and into the heads that the model ties to it."""
    quantizer.check_format(site.layout)
    table = PackedTable(quantizer, site.layout.empty(torch.device("meta")), dtype)
    embedding = model.get_submodule(path)
    if not isinstance(embedding, nn.Embedding):
        raise CheckpointError(
            f"{path}: packed as an input embedding: expected nn.Embedding, got {type(embedding).__name__}"
        )
    for head in _untie(model, f"{path}.weight"):
        linear = model.get_submodule(head)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"{head}: tied to the packed embedding {path}: expected nn.Linear, got {type(linear).__name__}"
            )
        tied = TiedHead(table, linear.bias)
        tied._is_hf_initialized = True  # type: ignore[assignment]  # see above
        model.set_submodule(head, tied)
    del embedding._parameters["weight"]
    table._is_hf_initialized = True  # type: ignore[assignment]  # not the embedding's: it may have buffers to be computed
    embedding.add_module("weight", table)


def _untie(model: Any, parameter: str) -> list[str]:
    """The modules whose weight is tied to ``parameter``. transformers forgets these ties, as no parameters are left to tie."""
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    tied = [name for name, other in ties.items() if other == parameter]
    left = {name: other for name, other in ties.items() if name not in tied}
    model.all_tied_weights_keys = model._tied_weights_keys = (
        left  # of this object: the class keeps its own
    )
    return [name.rpartition(".")[0] for name in tied]


def use_eager_experts(module: nn.Module) -> None:
    """Let the experts in ``module`` multiply one by one: the batched implementations want the stack as one dense tensor."""
    configs = (getattr(owner, "config", None) for owner in module.modules())
    for config in {id(config): config for config in configs if config is not None}.values():
        config._experts_implementation = "eager"
