"""The interface between the walk, which calibrates blocks, and its caller, which packs them."""

# ruff: noqa: ARG002  # the base class ignores its arguments

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_core.errors import WorkError
from modulora_core.layers import ChannelScales
from modulora_core.spec import Calibration, PackedWeight, Quantizer


@dataclass(frozen=True, slots=True)
class HeldOutCalibration(Calibration):
    """The calibration of one layer, with H of held-out samples that judge the result.

    Attributes:
        held_out: H of the held-out samples, with weighted inputs; it has 0 ``samples`` if no token
            reached the expert.
    """

    held_out: Calibration


@dataclass(frozen=True, slots=True)
class PackedMatrices:
    """A packed parameter: one matrix, or one for each expert."""

    name: str
    quantizer: Quantizer
    matrices: Sequence[PackedWeight]

    def values(self) -> Iterator[Tensor]:
        """The quantized matrices, fp32 ``[out, in]``, one at a time."""
        for packed in self.matrices:
            yield self.quantizer.dequantize_tile(packed, (0, packed.shape[0]), torch.float32)

    def rescaled(self, scales: ChannelScales) -> PackedMatrices:
        """The parameter with ``scales`` folded into its only matrix. Raises WorkError."""
        [before] = self.matrices
        after = self.quantizer.rescaled(before, scales.input, scales.output)
        if after.layout != before.layout:
            raise WorkError(
                f"{self.name}: {after.quantizer} rescaled it as {after.layout}, expected "
                f"{before.layout} as it was packed; report it to the plugin's author"
            )
        return PackedMatrices(self.name, self.quantizer, [after])


class BlockVisitor:
    """Decides about each parameter of a block on the walk. This base leaves all of them dense."""

    def is_written(self, name: str) -> bool:
        """Whether an earlier run wrote the parameter."""
        return False

    def write_dense(self, name: str, tensor: Tensor) -> None:
        """Write a parameter that is not packed, unless it is written."""

    def wants_calibration(self, name: str) -> bool:
        """Whether :meth:`pack` needs H."""
        return True

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> PackedMatrices | None:
        """Pack a parameter's matrices, ``[out, in]`` each; None leaves them dense."""
        return None

    def received(self, name: str, matrices: Sequence[PackedWeight]) -> PackedMatrices | None:
        """A parameter that another process of a distributed run packed."""
        return None

    def write(self, packed: PackedMatrices) -> None:
        """Write a packed parameter, unless it is written."""

    def read(self, name: str) -> PackedMatrices | None:
        """Read a packed parameter that is written; None leaves it dense."""
        return None

    def read_dense(self, name: str) -> Tensor:
        """Read a written parameter that is not packed."""
        raise NotImplementedError
