"""Dense weights that tell what they are multiplied by, in the places where packed weights will be.

They stand where packed weights stand in a packed model (:mod:`modulora_core.layers`), experts in the same modules, so that
``nn.Linear``, ``Conv1D`` and experts that index a stack are observed in one way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modulora_core.devices.dense_products import linear
from modulora_core.layers import PackedParameter, PackedStack
from modulora_core.packed import ChannelScales
from modulora_core.models.sites import LinearSite
from modulora_core.spec import PROTOCOL, Calibration, PackedWeight, Quantizer, QuantizerSpec


@dataclass(frozen=True, slots=True)
class Key:
    """One matrix of a block: the parameter's name inside of the block, and which expert of a stack."""

    name: str
    index: int = 0


Listener = Callable[[Key, Tensor], None]
"""``listener(key, x)`` is called before ``x Ŵᵀ`` is computed, ``x: [..., in]``."""


def ignore(key: Key, x: Tensor) -> None:
    """The listener that does nothing."""


class ObservedWeight:
    """One dense matrix ``[out, in]``, which may be exchanged for its quantized values.

    ``scales`` multiply it while they are tuned: v ⊙ (W (u ⊙ x)) + b, differentiable in u, v, x and b.
    ``watch`` is given the gradient of what the product gives, ``[..., out]``, where there is one.
    """

    def __init__(self, key: Key, weight: Tensor, listener: Listener) -> None:
        self.key, self.weight, self._listener = key, weight, listener
        self.scales: ChannelScales | None = None
        self.watch: Callable[[Tensor], None] | None = None

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x Wᵀ + b``."""
        self._listener(self.key, x)
        if self.scales is None:
            y = linear(x, self.weight, bias)
            if self.watch is not None and y.requires_grad:
                y.register_hook(self.watch)
            return y
        y = linear((x * self.scales.input).to(x.dtype), self.weight) * self.scales.output
        return (y if bias is None else y + bias).to(x.dtype)


class ObservedLinear(nn.Module):
    """Stands for an ``nn.Linear`` or a ``Conv1D``. Plain Python between the block's forward and the listener: the
    listener may leave it in the middle and come back (:mod:`modulora_core.calibration.walk`).
    """

    def __init__(self, observed: ObservedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.observed = observed
        self.out_features, self.in_features = observed.weight.shape
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """Some models read the weight's dtype."""
        return self.observed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.observed.multiply(x, self.bias)


class _Observed(Quantizer):
    """A quantizer that quantizes nothing: what a stack of experts multiplies with."""

    spec: ClassVar[QuantizerSpec] = QuantizerSpec(
        name="observed", summary="dense, for calibration", location="modulora_core.calibration.observe:_Observed",
        protocol=PROTOCOL, bits=(32,),
    )  # fmt: skip

    def __init__(self, observed: ObservedWeight) -> None:
        super().__init__()
        self._observed = observed

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:  # noqa: ARG002
        out_features, in_features = weight.shape
        return PackedWeight(
            self.spec.name, self.format, (out_features, in_features), {"weight": weight}
        )

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        return packed.tensors["weight"][rows[0] : rows[1]].to(dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:  # noqa: ARG002
        if transpose:  # only the backward asks for it
            if self._observed.watch is not None:
                self._observed.watch(x)
            return linear(x, self._observed.weight.t())
        return self._observed.multiply(x)


def observe(
    block: nn.Module, name: str, site: LinearSite, weight: Tensor, listener: Listener
) -> list[ObservedWeight]:
    """Put observed weights in the place of a block's parameter.

    Args:
        block: the decoder block, whose other parameters are filled in.
        name: of the parameter inside of ``block``; site: what it is.
        weight: the parameter as the model stores it.
        listener: see :data:`Listener`.

    Returns:
        the matrices, ``[out, in]`` each: one, or one for each expert.
    """
    matrices = list(weight) if site.experts is not None else [weight]
    oriented = [matrix.t().contiguous() if site.transposed else matrix for matrix in matrices]
    observed = [ObservedWeight(Key(name, i), matrix, listener) for i, matrix in enumerate(oriented)]
    path, _, parameter = name.rpartition(".")
    parent = block.get_submodule(path)
    if site.experts is None:
        block.set_submodule(path, ObservedLinear(observed[0], parent._parameters["bias"]))
    else:
        del parent._parameters[parameter]
        parent.add_module(parameter, PackedStack(_stacked(each, site) for each in observed))
    return observed


def _stacked(observed: ObservedWeight, site: LinearSite) -> PackedParameter:
    quantizer = _Observed(observed)
    return PackedParameter(quantizer, quantizer.pack(observed.weight), transposed=site.transposed)
