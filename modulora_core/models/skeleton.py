"""The model of a config on the meta device, without memory, and what its class says of weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn

from modulora_core.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PACK_IN_PYTHON = (
    "a model of another kind is packed in Python, with its own class: "
    "CLASS.from_pretrained(MODEL, quantization_config=modulora_core.ModuLoRAConfig(NAME))"
)


def build_skeleton(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    buffers: bool = False,
    auto: str = "AutoModelForCausalLM",
) -> PreTrainedModel:
    """Build the causal language model of a config on the meta device: it takes no memory.

    Args:
        config: of the model; it isn't changed.
        dtype: the dtype that the model is loaded in.
        buffers: compute buffers, such as rotary frequencies, on the CPU, not on the meta device.
        auto: transformers' name of another kind of model, such as a classifier.

    Raises:
        ModelError: transformers has no causal language model for this config, or can't build it.
    """
    import transformers
    from accelerate import init_empty_weights

    config = deepcopy(config)
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            kind = getattr(transformers, auto)
            model = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        # a config may hold any nonsense, and the classes raise what they like
        raise ModelError(
            f"model_type {config.model_type!r}: transformers can't build a causal language model "
            f"of this config: {first_line(error).rstrip('.:')}; {PACK_IN_PYTHON}"
        ) from error
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise ModelError(
                f"model_type {config.model_type!r}: expected positive sizes in its config, got the "
                f"shape {list(parameter.shape)} of {name}"
            )
    return model


def untie(model: PreTrainedModel) -> None:
    """Change a skeleton so that its head and its embedding are two tensors."""
    tied = tied_names(model)
    for part in (model.config, model.config.get_text_config()):
        part.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    for name in tied.keys() - tied_names(model).keys():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, leaf, nn.Parameter(torch.empty_like(module.get_parameter(leaf))))


def load_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every parameter and buffer if transformers loads the model in ``dtype``.

    It is the skeleton's dtype, or fp32 if the model's class asks for that.
    """
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype not in (torch.float16, torch.bfloat16):
        keep = set()
    patterns = [key.replace("*", ".*") for key in keep]
    return {
        name: torch.float32 if has_any(name, patterns) else tensor.dtype
        for name, tensor in model.state_dict().items()
    }


def without_optional(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Drop the names that may be missing from a file, as the model's class says."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [name for name in names if not has_any(name, patterns)]


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """``{name: the name whose tensor it shares}``, such as an output head and its embedding."""
    return dict(model.all_tied_weights_keys)


def has_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of these regular expressions is in a name."""
    return any(re.search(pattern, name) for pattern in patterns)
