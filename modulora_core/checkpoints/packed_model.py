"""Correct the methods of a transformers model that would count packed weights wrongly."""

from __future__ import annotations

from typing import Any

from torch import nn

from modulora_core.layers import PackedParameter, PackedTable


class PackedModel:
    """The methods of a transformers model with packed weights that differ from its own."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of logical weights: a packed matrix has out × in, whatever its bits."""
        model: Any = super()
        count: int = model.num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        assert isinstance(self, nn.Module)
        for module in self.modules():
            left_out = exclude_embeddings and isinstance(module, PackedTable)
            if isinstance(module, PackedParameter) and not left_out:
                out_features, in_features = module.layout.shape
                count += out_features * in_features
        return count


_CLASSES: dict[tuple[type, type], type] = {}


def with_methods(methods: type, model_class: type) -> type:
    """A subclass of a model's class, of the same name, with the methods of another class.

    An object may change to such a class, as torch's ``fully_shard`` does. Nothing else changes.
    """
    namespace = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    made = type(model_class.__name__, (methods, model_class), namespace)
    return _CLASSES.setdefault((methods, model_class), made)
