"""How transformers turns the tensors of a file into the parameters of a model in memory.

transformers ≥ 5 renames and fuses tensors while it loads: a Mixtral folder holds ``w1``, ``w2`` and ``w3`` of
every expert, the model holds ``gate_up_proj`` and ``down_proj`` of all of them. Its own tables and
operations are used here, one conversion at a time instead of all at once. They are semi-private and move
between versions: every use is in this file, and the steps follow
``core_model_loading.convert_and_load_state_dict_in_model``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError, WorkError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from modulora_core.models.store import StoredTensor


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors of a file that become one or more parameters together.

    Attributes:
        target: the name in memory that transformers files this conversion under.
        sources: names in the file with the pattern of the rule that each matched.
        rule: transformers' WeightConverter; None where the one source is only renamed.
    """

    target: str
    sources: tuple[tuple[str, str | None], ...]
    rule: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the file."""
        return tuple(name for name, _ in self.sources)

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters, by their names in memory. ``read`` gives a tensor of the file."""
        if self.rule is None:
            return {self.target: read(self.names[0])}
        rule = deepcopy(self.rule)  # it collects tensors in itself
        for name, pattern in self.sources:
            rule.add_tensor(self.target, name, pattern, partial(read, name))
        converted = rule.convert(self.target, model=model, config=model.config)
        if isinstance(converted, tuple):  # transformers 5.0 returns its errors beside them
            converted = converted[0]
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """All conversions of a file, in the model's order, and the tensors that the model has no place for."""

    conversions: tuple[Conversion, ...]
    unexpected: tuple[str, ...]


def plan_conversions(
    model: PreTrainedModel, names: Iterable[str], transforms: list[Any] | None = None
) -> Plan:
    """Group the tensors of a file by the parameters that they become.

    Args:
        model: the model on the meta device.
        names: the tensors' names in the file.
        transforms: transformers' weight transforms; by default those of the model's class.
    """
    loading = _loading()
    if transforms is None:
        transforms = loading.get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
    rules = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    prefix, state = model.base_model_prefix, model.state_dict()

    sources: dict[str, list[tuple[str, str | None]]] = {}
    unexpected = []
    for name in sorted(names, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = loading.rename_source_key(name, [], [], prefix, state)
        if target in state:
            sources.setdefault(target, []).append((name, pattern))
        else:
            unexpected.append(name)
    order = {name: position for position, name in enumerate(state)}
    conversions = [
        Conversion(target, tuple(found), rules[found[0][1]] if found[0][1] is not None else None)
        for target, found in sorted(sources.items(), key=lambda item: order[item[0]])
    ]
    return Plan(tuple(conversions), tuple(_without_ignored(model, unexpected)))


def converted_shapes(
    model: PreTrainedModel, conversion: Conversion, stored: Mapping[str, StoredTensor]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that a conversion gives, from headers alone: it runs on the meta device.

    Raises:
        CheckpointError: the tensors can't be combined.
    """

    def read(name: str) -> Tensor:
        return torch.empty(stored[name].shape, dtype=stored[name].dtype, device="meta")

    try:
        converted = conversion.run(model, read)
    except (
        Exception
    ) as error:  # whatever an operation of transformers raises on shapes that don't fit together
        shapes = ", ".join(f"{name} {list(stored[name].shape)}" for name in conversion.names[:4])
        raise CheckpointError(
            f"{conversion.target}: its {len(conversion.names)} tensors in the files can't be combined "
            f"({shapes}, ...): {error}"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in converted.items()}


def load_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that transformers gives every parameter and buffer when the model is loaded in ``dtype``.

    It is the dtype that the class made it with, but fp32 where the class asks to keep a module so.
    """
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    patterns = (
        [key.replace("*", ".*") for key in keep] if dtype in (torch.float16, torch.bfloat16) else []
    )
    return {
        name: torch.float32
        if any(re.search(pattern, name) for pattern in patterns)
        else tensor.dtype
        for name, tensor in model.state_dict().items()
    }


def optional_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those of the names that the model's class says may be missing from a file."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """``{name: the name whose tensor it shares}``: ``{"lm_head.weight": "model.embed_tokens.weight"}``."""
    return dict(model.all_tied_weights_keys)


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, *, buffers: bool = False
) -> PreTrainedModel:
    """The causal language model of a config on the meta device: it takes no memory.

    Args:
        config: of the model; it isn't changed.
        dtype: what the model is loaded in.
        buffers: give buffers their values, as rotary frequencies have them, on the CPU; by default they are on
            the meta device too.

    Raises:
        ModelError: transformers has no causal language model for this config, or can't build it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = deepcopy(config)
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            model.tie_weights()  # transformers 5.0 doesn't on the meta device
            return model
    except (
        Exception
    ) as error:  # a config may hold any nonsense, and the classes raise what they like
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"model_type {config.model_type!r}: transformers can't build a causal language model "
            f"of this config: {reason}"
        ) from error


def _without_ignored(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Drop what transformers ignores: old buffers which are computed now, and what the class lists."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


@dataclass(frozen=True, slots=True)
class _Loading:
    get_model_conversion_mapping: Callable[..., list[Any]]
    rename_source_key: Callable[..., tuple[str, str | None]]
    dot_natural_key: Callable[[str], Any]
    WeightRenaming: Any
    WeightConverter: Any


def _loading() -> _Loading:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        import transformers

        raise WorkError(
            f"transformers {transformers.__version__} has moved the weight conversion that this version of "
            f"modulora-core was written for (5.0 to 5.24): {error}; install transformers 5.24, and tell us"
        ) from error
    return _Loading(
        get_model_conversion_mapping,
        rename_source_key,
        dot_natural_key,
        WeightRenaming,
        WeightConverter,
    )
