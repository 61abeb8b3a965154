"""Override the methods of a transformers model that miscount packed weights, or fail on them."""

from __future__ import annotations

import copyreg
import math
from typing import Any

import torch
from torch import nn

from modulora_core.errors import ModelError
from modulora_core.hf.adapted_model import AdaptedModel
from modulora_core.hf.publishing import Publishing
from modulora_core.packed_parameters import PackedParameter, PackedTable


class PackedModel(AdaptedModel, Publishing, nn.Module):
    """The methods of a transformers model with packed weights that differ from its own."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "hf_quantizer" in state:  # the models inside of it have none
            state["hf_quantizer"].follow(self)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *more: Any, **options: Any
    ) -> nn.Module:
        """Resize the embedding and the output head.

        Raises:
            ModelError: one of them is packed, and its size would change.
        """
        model: Any = super()
        embedding: nn.Module = model.get_input_embeddings()
        multiple = next(iter(more), options.get("pad_to_multiple_of"))
        for part in (embedding, model.get_output_embeddings()):
            weight = getattr(part, "packed_weight", getattr(part, "weight", None))
            if not isinstance(weight, PackedParameter):
                continue
            if new_num_tokens not in (None, weight.layout.shape[0]) or multiple is not None:
                raise ModelError(
                    f"resize_token_embeddings({new_num_tokens}): expected a dense embedding and "
                    f"output head, got a packed one of {weight.layout.quantizer} with "
                    f"{weight.layout.shape[0]} rows; resize the dense model, then quantize it, or "
                    "leave both dense while quantizing"
                )
            return embedding
        resized: nn.Module = model.resize_token_embeddings(new_num_tokens, *more, **options)
        return resized

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of logical weights: a packed matrix has out × in, whatever its bits."""
        model: Any = super()
        count: int = model.num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        for module in self.modules():
            if isinstance(module, PackedParameter):
                count -= sum(parameter.numel() for parameter in module.parameters())
                if not (exclude_embeddings and isinstance(module, PackedTable)):
                    count += math.prod(module.layout.shape)
        return count

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The packed tensors, by their names here and in PEFT's wrapper.

        DDP would broadcast them once, and no backend can broadcast all of their dtypes. Each
        process has read them from the same files.
        """
        names = [
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, PackedParameter)
            for name in module.layout.tensors
        ]
        return [*names, *(f"base_model.model.{name}" for name in names)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense parameters; a packed weight's scales keep their own."""
        dense = (m for m in self.modules() if not isinstance(m, PackedParameter))
        parameters = (p for module in dense for p in module.parameters(recurse=False))
        return next(p.dtype for p in parameters if p.is_floating_point())


_CLASSES: dict[type, type] = {}


class _PackedClass(type):
    """The metaclass of :func:`packed_class`' classes, which pickle makes by calling it."""


def packed_class(model_class: type) -> type:
    """Make a subclass of a model's class that has its name and the methods of PackedModel.

    A loaded model changes to it by ``__class__``, as torch's ``fully_shard`` does. The second base
    is the model's own class.
    """
    namespace = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    made = _PackedClass(model_class.__name__, (PackedModel, model_class), namespace)
    return _CLASSES.setdefault(model_class, made)


def _reduce(made: type) -> Any:
    return packed_class, (made.__bases__[1],)


copyreg.pickle(_PackedClass, _reduce)
