"""Turn the tensors of a file into a model's parameters in memory, as transformers does.

transformers ≥ 5 renames and fuses tensors while it loads. A Mixtral folder holds ``w1``, ``w2`` and
``w3`` of every expert; the model holds ``gate_up_proj`` and ``down_proj`` of all experts. We use
transformers' own tables and operations, one conversion at a time instead of all at once. The order
follows ``core_model_loading.convert_and_load_state_dict_in_model``. These tables are semi-private:
the only other file that uses them is ``hf/packing_on_load.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError
from modulora_core.models.skeleton import has_any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modulora_core.models.store import StoredTensor


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors of a file, ``names``, that become one or more parameters together.

    ``target`` is transformers' name of the conversion. ``rule`` is its WeightConverter, or None if
    one tensor only gets another name. ``patterns`` are the patterns of the rule that the names
    match.
    """

    target: str
    names: list[str]
    patterns: list[str | None]
    rule: Any = None

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters, by their names in memory. ``read`` reads a tensor of the file."""
        if self.rule is None:
            return {self.target: read(self.names[0])}
        rule = deepcopy(self.rule)  # it collects tensors in itself
        for name, pattern in zip(self.names, self.patterns, strict=True):
            rule.add_tensor(self.target, name, pattern, partial(read, name))
        converted = rule.convert(self.target, model=model, config=model.config)
        return {n: value[0] if isinstance(value, list) else value for n, value in converted.items()}


def plan_conversions(
    model: PreTrainedModel, names: Iterable[str], transforms: list[Any] | None = None
) -> tuple[list[Conversion], list[str]]:
    """Group the tensors of a file, ``names``, by the parameters that they become.

    ``transforms`` are transformers' weight transforms; by default the class's.

    Returns:
        all conversions in the model's order, and the tensors that the model has no place for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model) if transforms is None else transforms
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    rules = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()

    found: dict[str, Conversion] = {}
    unexpected = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            conversion = Conversion(target, [], [], rules.get(pattern))
            conversion = found.setdefault(target, conversion)
            conversion.names.append(name)
            conversion.patterns.append(pattern)
        else:
            unexpected.append(name)
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}  # old files' buffers
    patterns |= {r"\.[kv]_scale$"}  # of a cache in 8 bits, which is a choice of serving
    unexpected = [name for name in unexpected if not has_any(name, patterns)]
    return [found[target] for target in state if target in found], unexpected


def converted_shapes(
    model: PreTrainedModel, conversion: Conversion, stored: Mapping[str, StoredTensor]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that a conversion gives; it runs on the meta device.

    Raises:
        CheckpointError: the tensors can't be combined.
    """

    def read(name: str) -> Tensor:
        return torch.empty(stored[name].shape, dtype=stored[name].dtype, device="meta")

    try:
        converted = conversion.run(model, read)
    except Exception as error:  # an operation raises anything for shapes that don't fit together
        shapes = ", ".join(f"{name} {list(stored[name].shape)}" for name in conversion.names[:4])
        raise CheckpointError(
            f"{conversion.target}: its {len(conversion.names)} tensors in the files can't be "
            f"combined ({shapes}, ...): {error}"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in converted.items()}


def stored_parts(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Take a parameter apart into the tensors of the model's own checkpoint, by their names.

    The last dimension of ``tensor`` may differ from the parameter's if the conversion leaves it
    alone.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parts: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return parts
