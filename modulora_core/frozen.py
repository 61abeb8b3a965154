"""Refuse to train a packed weight, or to use it as a dense tensor, and say what to do.

FrozenParameter   a tensor of a packed weight
PEFTParameter     a packed weight, which PEFT and a model's code take for a tensor
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modulora_core.errors import DenseWeightError, ModelError
from modulora_core.spec import PackedLayout

_NEED_DENSE = (
    "DoRA, PiSSA, OLoRA, CorDA, MiCA, LoftQ, HRA, SHiRA, DeLoRA, OSF, new tokens and merging in "
    'place need dense weights: train LoRA with init_lora_weights=True, "gaussian", "orthogonal" or '
    '"eva", or call model.dequantize() first; `modulora merge` writes a merged model'
)


class FrozenParameter(nn.Parameter):
    """A tensor of a packed weight, which can't train."""

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Freeze it. True raises ModelError."""
        if requires_grad:
            raise ModelError(
                "requires_grad_(True), or PEFT's modules_to_save: expected dense weights, got a "
                "packed one, which can't train; train an adapter with add_lora or PEFT, leave the "
                "layer dense while quantizing, or call model.dequantize() first"
            )
        return super().requires_grad_(False)


class _NamedByPEFT(type):
    """The type of a packed weight, which PEFT prints if DoRA can't read the weight."""

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}'> ({_NEED_DENSE})"


class PEFTParameter(nn.Module, metaclass=_NamedByPEFT):
    """Refuses to be used as the tensor that PEFT or a model's code takes a weight for."""

    layout: PackedLayout

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(Tensor, name):
                raise self._without(name) from None
            raise

    def __getitem__(self, rows: Any) -> Any:
        raise self._without("rows to read")

    def to(self, *where: Any, **more: Any) -> Any:
        """Move the tensors. A dtype, as PEFT's methods give to read W, raises ModelError."""
        if any(isinstance(each, torch.dtype) for each in (*where, *more.values())):
            raise self._without("other dtype")
        return super().to(*where, **more)

    def _without(self, name: str) -> DenseWeightError:
        return DenseWeightError(
            f"packed weight of {self.layout.quantizer}: it has no {name}; {_NEED_DENSE}"
        )
