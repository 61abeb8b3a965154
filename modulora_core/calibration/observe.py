"""Puts dense weights that report their inputs in the place of a block's linear weights.

Experts get the same modules as packed ones (:mod:`modulora_core.packed_parameters`). So
``nn.Linear``, ``Conv1D`` and experts that index a stack are observed alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modulora_core.dense_products import linear
from modulora_core.layers import ChannelScales
from modulora_core.models.sites import LinearSite
from modulora_core.packed_parameters import PackedParameter, PackedStack
from modulora_core.spec import PROTOCOL, Calibration, PackedWeight, Quantizer, QuantizerSpec


@dataclass(frozen=True, slots=True)
class Key:
    """One matrix of a model: the parameter's name, and the expert's index."""

    name: str
    index: int = 0


Listener = Callable[[Key, Tensor], None]
"""``listener(key, x)`` is called before ``x Wᵀ`` is computed; ``x: [..., in]``."""


def ignore(key: Key, x: Tensor) -> None:
    """The listener that does nothing."""


@dataclass(eq=False)
class ObservedWeight:
    """One dense matrix, ``[out, in]``; its values may be replaced by quantized ones.

    Attributes:
        listener: gets each input before it is multiplied.
        scales: multiply the matrix while they are tuned: ``v ⊙ (W (u ⊙ x)) + b``, differentiable
            in u, v, x and b.
        watch: gets the gradient of each product, ``[..., out]``.
    """

    key: Key
    weight: Tensor
    listener: Listener = ignore
    scales: ChannelScales | None = None
    watch: Callable[[Tensor], None] | None = None

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x Wᵀ + b``."""
        self.listener(self.key, x)
        if self.scales is None:
            y = linear(x, self.weight, bias)
            if self.watch is not None and y.requires_grad:
                y.register_hook(self.watch)
            return y
        y = linear((x * self.scales.input).to(x.dtype), self.weight) * self.scales.output
        return (y if bias is None else y + bias).to(x.dtype)


class ObservedLinear(nn.Module):
    """Replaces an ``nn.Linear`` or a ``Conv1D``."""

    def __init__(self, observed: ObservedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.observed = observed
        self.out_features, self.in_features = observed.weight.shape
        self.bias: Tensor | None
        self.register_buffer("weight", observed.weight)  # some models read its dtype
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.observed.multiply(x, self.bias)


class _Observed(Quantizer):
    """Multiplies by one expert's dense matrix, in the place of a quantizer."""

    spec: ClassVar[QuantizerSpec] = QuantizerSpec(
        name="observed",
        summary="dense, for calibration",
        location="modulora_core.calibration.observe:_Observed",
        protocol=PROTOCOL,
        bits=(32,),
    )

    def __init__(self, observed: ObservedWeight) -> None:
        super().__init__()
        self._observed = observed

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        del calibration
        rows, columns = weight.shape
        return PackedWeight(self.spec.name, self.format, (rows, columns), {"weight": weight})

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        return packed.tensors["weight"][slice(*rows)].to(dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        del packed
        if not transpose:
            return self._observed.multiply(x)
        if self._observed.watch is not None:  # only the backward asks for it
            self._observed.watch(x)
        return linear(x, self._observed.weight.t())


def observe(
    block: nn.Module, inside: str, site: LinearSite, weight: Tensor
) -> list[ObservedWeight]:
    """Replace one linear weight of a decoder block by observed weights.

    Args:
        inside: the parameter's name inside ``block``; site: its place in the model.

    Returns:
        the matrices, ``[out, in]`` each: one, or one for each expert.
    """
    matrices = list(weight) if site.experts is not None else [weight]
    oriented = [matrix.t().contiguous() if site.transposed else matrix for matrix in matrices]
    observed = [ObservedWeight(Key(site.name, i), matrix) for i, matrix in enumerate(oriented)]
    path, _, parameter = inside.rpartition(".")
    owner = block.get_submodule(path)
    if site.experts is None:
        block.set_submodule(path, ObservedLinear(observed[0], owner._parameters["bias"]))
    else:
        del owner._parameters[parameter]
        fakes = [(_Observed(each), each.weight) for each in observed]
        owner.add_module(parameter, PackedStack(
            PackedParameter(fake, fake.pack(weight), transposed=site.transposed)
            for fake, weight in fakes
        ))  # fmt: skip
    return observed
