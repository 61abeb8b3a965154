"""A packed weight as a value: named tensors, a shape, and the quantizer that reads it.

Importing this module does not import torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from modulora_core.errors import CheckpointError, ShapeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TENSOR_NAME = re.compile(r"[a-z][a-z0-9_]*")

BITS_OF_DTYPE: Mapping[str, int] = MappingProxyType(
    {"bool": 8, "uint8": 8, "int8": 8, "int16": 16, "uint16": 16, "float16": 16, "bfloat16": 16,
     "int32": 32, "uint32": 32, "float32": 32, "int64": 64, "uint64": 64, "float64": 64,
     "float8_e4m3fn": 8, "float8_e8m0fnu": 8}
)  # fmt: skip
"""The dtypes that a packed tensor may have, by torch's names, and their widths."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The dtype (torch's name, ``"uint8"``) and the shape of one packed tensor."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if str(self.dtype) not in BITS_OF_DTYPE:
            known = ", ".join(BITS_OF_DTYPE)
            raise CheckpointError(
                f"dtype of a packed tensor: expected one of {known}, got {self.dtype!r:.80}"
            )
        whole = isinstance(self.shape, tuple) and all(isinstance(n, int) for n in self.shape)
        if not whole or min(self.shape, default=0) < 0:
            raise CheckpointError(
                f"shape of a packed tensor: expected whole numbers, got {self.shape!r:.80}"
            )

    def __str__(self) -> str:
        """As messages show it: ``int16 [2, 32]``."""
        return f"{self.dtype} {list(self.shape)}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS_OF_DTYPE[self.dtype] // 8

    @classmethod
    def of(cls, tensor: Any) -> TensorLayout:
        """The layout of a tensor, or of any value with its dtype and shape."""
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """A packed weight without its bytes, as config.json records it; fields as in PackedWeight."""

    quantizer: str
    format: int
    shape: tuple[int, int]
    tensors: Mapping[str, TensorLayout]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors, scales included."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """``8 · nbytes / (out · in)``."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def to_json(self) -> dict[str, Any]:
        tensors = {name: [t.dtype, list(t.shape)] for name, t in self.tensors.items()}
        return {"quantizer": self.quantizer, "format": self.format, "shape": list(self.shape),
                "tensors": tensors, "metadata": dict(self.metadata)}  # fmt: skip

    def differences(self, other: PackedLayout) -> str:
        """The fields in which another layout differs, with both values."""
        mine, theirs = (
            {"format": each.format, "shape": each.shape, "quantizer": each.quantizer}
            | {f"tensor {n}": f"{t.dtype} {list(t.shape)}" for n, t in each.tensors.items()}
            | {f"metadata {name}": value for name, value in each.metadata.items()}
            for each in (self, other)
        )
        return "; ".join(
            f"{name}: expected {mine.get(name, 'none')}, got {theirs.get(name, 'none')}"
            for name in {**mine, **theirs}
            if mine.get(name) != theirs.get(name)
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PackedLayout:
        """Raises CheckpointError: ``data`` is not a result of :meth:`to_json`."""
        try:
            out_features, in_features = data["shape"]
            shape = (int(out_features), int(in_features))
            tensors = {
                str(name): TensorLayout(dtype, tuple(sizes))
                for name, (dtype, sizes) in dict(data["tensors"]).items()
            }
            quantizer, number = str(data["quantizer"]), int(data["format"])
            return cls(quantizer, number, shape, tensors, dict(data["metadata"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                "layout of a packed weight: expected quantizer, format, shape, tensors, metadata; "
                f"{error!r} in {data!r}"
            ) from None

    def empty(self, device: str | torch.device = "meta") -> PackedWeight:
        """A packed weight with uninitialised tensors, by default without memory."""
        import torch

        tensors = {
            name: torch.empty(t.shape, dtype=getattr(torch, t.dtype), device=device)
            for name, t in self.tensors.items()
        }
        return self.fill(tensors)

    def fill(self, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """The packed weight with these tensors. Raises CheckpointError: they do not match."""
        packed = PackedWeight(self.quantizer, self.format, self.shape, tensors, self.metadata)
        if packed.layout.tensors != self.tensors:
            raise CheckpointError(
                f"packed tensors of a {self.quantizer} weight: expected {dict(self.tensors)}, "
                f"got {dict(packed.layout.tensors)}"
            )
        return packed


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class PackedWeight:
    """A quantized weight, a frozen value. Caches may have it as a key: two are never equal.

    Attributes:
        quantizer: the name in the plugin's spec.
        format: the plugin's number for its packed format; raise it when tensors change meaning.
        shape: ``(out_features, in_features)`` of the weight.
        tensors: named packed tensors on one device, contiguous, with dtypes of
            :data:`BITS_OF_DTYPE`. Each value that differs between layers belongs here, scalars too.
        metadata: JSON-able facts that layers of one shape and one set of options share.

    Raises CheckpointError: there is no tensor, or a name does not match ``[a-z][a-z0-9_]*``.
    """

    quantizer: str
    format: int
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        subject = f"packed tensors of a {self.quantizer} weight"
        if not self.tensors:
            raise CheckpointError(f"{subject}: expected at least one, got none")
        for name in self.tensors:
            if not _TENSOR_NAME.fullmatch(name):
                raise CheckpointError(f"{subject}: expected names [a-z][a-z0-9_]*, got {name!r}")
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        values = {
            "shape": (int(self.shape[0]), int(self.shape[1])),
            "tensors": MappingProxyType(tensors),
            "metadata": MappingProxyType(dict(self.metadata)),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(iter(self.tensors.values())).device

    @property
    def layout(self) -> PackedLayout:
        tensors = {name: TensorLayout.of(tensor) for name, tensor in self.tensors.items()}
        return PackedLayout(self.quantizer, self.format, self.shape, tensors, dict(self.metadata))

    def __reduce__(self) -> tuple[Any, ...]:  # for copy.deepcopy, which cannot copy a mapping proxy
        tensors, metadata = dict(self.tensors), dict(self.metadata)
        return PackedWeight, (self.quantizer, self.format, self.shape, tensors, metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors, scales included."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """``8 · nbytes / (out · in)``."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def to(self, device: str | torch.device) -> PackedWeight:
        """The same weight on another device; dtypes never change."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return PackedWeight(self.quantizer, self.format, self.shape, moved, self.metadata)


def check_rows(packed: PackedWeight, rows: tuple[int, int]) -> None:
    """Refuse a row range outside of ``packed``. Raises ShapeError."""
    start, stop = rows
    if not 0 <= start <= stop <= packed.shape[0]:
        raise ShapeError(
            f"rows of a {list(packed.shape)} weight: expected 0 <= start <= stop <= "
            f"{packed.shape[0]}, got ({start}, {stop})"
        )
