"""Read one tensor of a GGUF file at a time: dequantized, or the bytes of its rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modulora_core.errors import CheckpointError
from modulora_gguf.file.header import Header, TensorInfo
from modulora_gguf.file.types import FLOATS


class FileTensor:
    """One tensor of the file.

    Attributes:
        info: its place in the file, its type and its shape.
        scale: the factor of the weight, if the file has one; of a stack one for each matrix.
    """

    def __init__(self, info: TensorInfo, scale: FileTensor | None = None) -> None:
        self.info, self.scale = info, scale
        matrices = math.prod(info.shape[:-2])
        if scale is not None and (scale.info.numel, scale.info.type) != (matrices, "F32"):
            raise CheckpointError(
                f"{scale.info.name}: expected {matrices} factors of {info.name} in F32, got "
                f"{scale.info.numel} in {scale.info.type}"
            )

    @property
    def is_float(self) -> bool:
        return self.info.type in FLOATS

    def read(self, *, as_stored: bool) -> Tensor:
        """The tensor, dequantized to fp32; with ``as_stored`` floats keep their dtype."""
        raw, type = self._bytes(), self.info.type
        if as_stored and self.is_float and self.scale is None:
            return torch.from_numpy(raw).view(FLOATS[type])
        from gguf import dequantize
        from gguf.constants import GGMLQuantizationType

        values = torch.from_numpy(dequantize(raw, GGMLQuantizationType[type]))
        if self.scale is None:
            return values
        factors = self.scale.read(as_stored=False)
        return values * (factors.view(-1, 1, 1) if values.dim() > 2 else factors)

    def blocks(self) -> Tensor:
        """The bytes of all rows: uint8 ``[rows, row bytes]``.

        They are mapped from the file, which must not change while they live; writes stay private.
        """
        info = self.info
        if info.offset + info.nbytes > info.path.stat().st_size:
            raise CheckpointError(f"{info.path}: {info.name} is truncated; download it again")
        mapped = np.memmap(info.path, np.uint8, "c", info.offset, (info.nbytes,))
        return torch.from_numpy(mapped).view(info.numel // info.shape[-1], -1)

    def row_numbers(self, first: int) -> Tensor:
        """The number of each row, from ``first`` on, fp32: as a tensor whose rows have one value.

        The values of a vector are its rows.
        """
        shape = self.info.shape
        rows = math.prod(shape[:-1] or shape)
        numbers = torch.arange(first, first + rows, dtype=torch.float32)
        return numbers.view(*shape[:-1], 1) if len(shape) > 1 else numbers

    def _bytes(self) -> Any:
        """All bytes, in new memory: uint8 ``[..., row bytes]``."""
        info = self.info
        raw = np.fromfile(info.path, np.uint8, info.nbytes, offset=info.offset)
        if raw.size != info.nbytes:
            raise CheckpointError(
                f"{info.path}: expected {info.nbytes} bytes of {info.name}, got {raw.size}; "
                "the file was changed"
            )
        return raw.reshape(*info.shape[:-1], -1)


def tensors_of(header: Header) -> dict[str, FileTensor]:
    """The tensors of a file by their names there; a weight knows its factor.

    Raises:
        CheckpointError: a weight has another number of factors than it has matrices.
    """
    infos = {info.name: info for info in header.tensors}
    found: dict[str, FileTensor] = {}
    for name, info in infos.items():
        scale = infos.get(scale_of(name))
        found[name] = FileTensor(info, None if scale is None else FileTensor(scale))
    return found


def scale_of(name: str) -> str:
    """The name of the factor of a weight in a file: ``blk.0.attn_q.scale``; "" for other names."""
    stem = name.removesuffix(".weight")
    return "" if stem == name else f"{stem}.scale"
