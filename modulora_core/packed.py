"""A packed weight as a value: named tensors, a shape, and who can read it.

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
    {"bool": 8, "uint8": 8, "int8": 8, "int16": 16, "uint16": 16, "float16": 16, "bfloat16": 16, "int32": 32,
     "uint32": 32, "float32": 32, "int64": 64, "uint64": 64, "float64": 64}
)  # fmt: skip
"""The dtypes that a packed tensor may have, by torch's name, and their widths."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The dtype (torch's name, ``"uint8"``) and shape of one packed tensor."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in BITS_OF_DTYPE:
            raise CheckpointError(
                f"dtype of a packed tensor: expected one of {', '.join(BITS_OF_DTYPE)}, got {self.dtype!r}"
            )
        if not all(isinstance(n, int) and n >= 0 for n in self.shape):
            raise CheckpointError(
                f"shape of a packed tensor: expected whole numbers, got {self.shape!r}"
            )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS_OF_DTYPE[self.dtype] // 8

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLayout:
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Everything about a packed weight but the bytes: what a checkpoint's config.json records, and what a
    memory plan needs. See :class:`PackedWeight` for the fields.
    """

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
        """``8 · nbytes / (out · in)``, everything counted."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def to_json(self) -> dict[str, Any]:
        tensors = {name: [t.dtype, list(t.shape)] for name, t in self.tensors.items()}
        return {"quantizer": self.quantizer, "format": self.format, "shape": list(self.shape),
                "tensors": tensors, "metadata": dict(self.metadata)}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PackedLayout:
        """Raises CheckpointError when ``data`` isn't what :meth:`to_json` writes."""
        try:
            out_features, in_features = data["shape"]
            tensors = {
                str(name): TensorLayout(dtype, tuple(shape))
                for name, (dtype, shape) in data["tensors"].items()
            }
            return cls(str(data["quantizer"]), int(data["format"]), (int(out_features), int(in_features)), tensors,
                       dict(data["metadata"]))  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"layout of a packed weight: expected quantizer, format, shape, tensors, metadata; {error!r} in {data!r}"
            ) from None

    def empty(self, device: str | torch.device = "meta") -> PackedWeight:
        """A packed weight of this layout with uninitialised tensors, by default on the meta device: no memory."""
        import torch

        tensors = {
            n: torch.empty(t.shape, dtype=getattr(torch, t.dtype), device=device)
            for n, t in self.tensors.items()
        }
        return self.fill(tensors)

    def fill(self, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """The packed weight of this layout with these tensors. Raises CheckpointError if they don't match it."""
        packed = PackedWeight(self.quantizer, self.format, self.shape, tensors, self.metadata)
        if packed.layout.tensors != self.tensors:
            raise CheckpointError(
                f"packed tensors of a {self.quantizer} weight: expected {dict(self.tensors)}, got {dict(packed.layout.tensors)}"
            )
        return packed


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantized weight: a frozen value that knows its shape, its bytes and who can read it.

    Attributes:
        quantizer: the name in the plugin's spec.
        format: the plugin's number for its packed format. Raise it when the meaning of the tensors changes.
        shape: ``(out_features, in_features)`` of the logical weight.
        tensors: named packed tensors, any dtype of :data:`BITS_OF_DTYPE`, all on one device; kept contiguous. Everything
            that differs from layer to layer belongs here, scalars too.
        metadata: JSON-able structure that layers of one shape and one set of options share, such as a block size.
        device: where the tensors are.

    Raises:
        CheckpointError: there is no tensor, or a tensor's name isn't ``[a-z][a-z0-9_]*``.
    """

    quantizer: str
    format: int
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(init=False, repr=False, compare=False)
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What kernels keep beside it (:func:`modulora_core.kernels.operands`): made from the rest, and never stored."""

    def __post_init__(self) -> None:
        if not self.tensors:
            raise CheckpointError(
                f"packed tensors of a {self.quantizer} weight: expected one at least, got none"
            )
        for name in self.tensors:
            if not _TENSOR_NAME.fullmatch(name):
                raise CheckpointError(
                    f"name of a packed tensor: expected [a-z][a-z0-9_]*, got {name!r}"
                )
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        object.__setattr__(
            self, "tensors", MappingProxyType({n: t.contiguous() for n, t in self.tensors.items()})
        )
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        # not a property: decoding asks for it several times a layer and token
        object.__setattr__(self, "device", next(iter(self.tensors.values())).device)

    @property
    def layout(self) -> PackedLayout:
        tensors = {name: TensorLayout.of(tensor) for name, tensor in self.tensors.items()}
        return PackedLayout(self.quantizer, self.format, self.shape, tensors, dict(self.metadata))

    def __reduce__(self) -> tuple[Any, ...]:  # for copy.deepcopy: a mapping proxy can't be copied
        fields = (self.quantizer, self.format, self.shape, dict(self.tensors), dict(self.metadata))
        return PackedWeight, fields

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors, scales included."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """``8 · nbytes / (out · in)``, everything counted."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def to(self, device: str | torch.device) -> PackedWeight:
        """The same weight on another device. Dtypes never change."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return PackedWeight(self.quantizer, self.format, self.shape, moved, self.metadata)


def check_rows(packed: PackedWeight, rows: tuple[int, int]) -> None:
    """Refuse a row range outside of ``packed``. Raises ShapeError."""
    start, stop = rows
    if not 0 <= start <= stop <= packed.shape[0]:
        raise ShapeError(f"rows of a {list(packed.shape)} weight: expected 0 <= start <= stop <= {packed.shape[0]}, "
                         f"got ({start}, {stop})")  # fmt: skip


def check_operands(
    packed: PackedWeight,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
) -> None:
    """Refuse an input, an adapter or channel scales whose shapes do not fit ``packed``.

    Raises:
        ShapeError: names the operand, its expected shape and its shape.
    """
    if (A is None) != (B is None):
        raise ShapeError("LoRA adapter: expected both A and B, got one of them")
    (out_features, in_features), rank = packed.shape, () if A is None else A.shape[:1]
    for name, tensor, *shape in (
        ("input", x, *x.shape[:-1], in_features),
        ("A", A, *rank, in_features),
        ("B", B, out_features, *rank),
        ("input_scale", u, in_features),
        ("output_scale", v, out_features),
    ):
        if tensor is not None and list(tensor.shape) != shape:
            raise ShapeError(
                f"{name} of a {list(packed.shape)} weight: expected {shape}, got {list(tensor.shape)}"
            )
