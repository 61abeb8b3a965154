"""The contract: what a quantizer plugin is. This is the file to read before writing one.

A plugin gives a :class:`QuantizerSpec` (metadata, known without importing torch) and a :class:`Quantizer` with three
methods. The core does the rest: it differentiates the product (Yin et al. 2023, arXiv 2309.16119, section 3),
stores the packed tensors, loads them, finetunes on top of them, and draws the command line's options from
the plugin's ``Options``::

    class Mine(Quantizer):
        spec = SPEC                                                 # the same object that the hook returns
        Options = MineOptions                                       # a frozen pydantic model, or leave it out

        def pack(self, weight, calibration=None): ...               # [out, in] float  ->  PackedWeight
        def dequantize_tile(self, packed, rows, dtype): ...         # rows (start, stop)  ->  [stop - start, in]
        # matmul comes with the base class, tile by tile; override it when you know better

Importing this module does not import torch.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from modulora_core.errors import CheckpointError, OptionError, ShapeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROTOCOL = 1
"""The version of this contract that the core speaks."""

SUPPORTED_PROTOCOLS = range(1, 2)
"""The versions of plugins that this core can use."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LOCATION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_TENSOR_NAME = re.compile(r"[a-z][a-z0-9_]*")

BITS_OF_DTYPE: Mapping[str, int] = MappingProxyType(
    {"bool": 8, "uint8": 8, "int8": 8, "int16": 16, "uint16": 16, "float16": 16, "bfloat16": 16, "int32": 32,
     "uint32": 32, "float32": 32, "int64": 64, "uint64": 64, "float64": 64}
)  # fmt: skip
"""The dtypes that a packed tensor may have, by torch's name, and their widths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerSpec:
    """What is known of a quantizer without importing torch. ``modulora list-quantizers`` prints from this alone.

    Attributes:
        name: how users ask for it: lower case letters, digits and single hyphens, such as ``"half-quadratic"``.
        summary: one line.
        location: where the class is: ``"package.module:Class"``. Imported only when it is used.
        protocol: the version of this contract that the plugin was written for. Write the number, do not import
            :data:`PROTOCOL`: it says what *you* tested.
        bits: the widths offered, in bits for a weight, without scales.
        calibration: whether ``pack`` wants the layer's second-moment matrix: ``"none"``, ``"optional"``, ``"required"``.
        devices: the torch device types that the plugin has a kernel for. Elsewhere plain torch is expected to work.
        out_multiple: ``out_features`` must be divisible by this.
        in_multiple: ``in_features`` must be divisible by this.
        url: the paper or the project's page.

    Raises:
        ValueError: a field is malformed; the message names it.
    """

    name: str
    summary: str
    location: str
    protocol: int
    bits: tuple[float, ...]
    calibration: Literal["none", "optional", "required"] = "none"
    devices: tuple[str, ...] = ("cpu",)
    out_multiple: int = 1
    in_multiple: int = 1
    url: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise ValueError(
                f"name: expected lower case letters, digits and single hyphens, got {self.name!r}"
            )
        if not (isinstance(self.location, str) and _LOCATION.fullmatch(self.location)):
            raise ValueError(f"location: expected 'package.module:Class', got {self.location!r}")
        if not self.bits or not all(isinstance(b, (int, float)) and 0 < b <= 32 for b in self.bits):
            raise ValueError(f"bits: expected one or more widths in (0, 32], got {self.bits!r}")
        if self.calibration not in ("none", "optional", "required"):
            raise ValueError(
                f"calibration: expected 'none', 'optional' or 'required', got {self.calibration!r}"
            )
        for name in ("protocol", "out_multiple", "in_multiple"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive whole number, got {value!r}")


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
            raise CheckpointError(f"shape of a packed tensor: expected whole numbers, got {self.shape!r}")

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

    Raises:
        CheckpointError: a tensor's name isn't ``[a-z][a-z0-9_]*``.
    """

    quantizer: str
    format: int
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.tensors:
            if not _TENSOR_NAME.fullmatch(name):
                raise CheckpointError(f"name of a packed tensor: expected [a-z][a-z0-9_]*, got {name!r}")
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        object.__setattr__(
            self, "tensors", MappingProxyType({n: t.contiguous() for n, t in self.tensors.items()})
        )
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

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

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, device: str | torch.device) -> PackedWeight:
        """The same weight on another device. Dtypes never change."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return PackedWeight(self.quantizer, self.format, self.shape, moved, self.metadata)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibration saw of one layer.

    Attributes:
        hessian: H = E[xxᵀ], ``[in, in]``, fp32, symmetric: the second moment of the layer's inputs.
        samples: how many input vectors the mean is over.
    """

    hessian: Tensor
    samples: int


class NoOptions(BaseModel):
    """The ``Options`` of a quantizer that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Quantizer(ABC):
    """A black box that packs a weight, gives tiles of it back, and multiplies by it. Subclass this.

    An instance is cheap, holds only its options, and is shared between layers: keep no state in it. It is
    constructed with the options that are recorded in a checkpoint, also when the checkpoint is only read.

    Attributes:
        spec: the plugin's :class:`QuantizerSpec`.
        format: the number of the packed format that :meth:`pack` writes.
        Options: a frozen pydantic model, every field with a default, a type and a description. The command line's
            ``-o key=value``, the checkpoint's record and the docs are derived from it.
    """

    spec: ClassVar[QuantizerSpec]
    format: ClassVar[int] = 1
    Options: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = self.Options() if options is None else options
        if not isinstance(self.options, self.Options):
            raise OptionError(
                f"{self.spec.name}: expected options of {self.Options.__name__}, got {options!r}"
            )

    @abstractmethod
    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Quantize ``weight``.

        Args:
            weight: ``[out, in]``, any float dtype, any strides, finite. It must not be changed, nor kept.
            calibration: the layer's :class:`Calibration` where ``spec.calibration`` asks for one.

        Returns:
            the packed weight on the same device; the same bytes for the same input, every time.
        """

    @abstractmethod
    def dequantize_tile(self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Rows ``[start, stop)`` of Ŵ in the original basis.

        Args:
            packed: what :meth:`pack` returned, perhaps on another device.
            rows: ``(start, stop)`` with ``0 <= start <= stop <= out``; :func:`check_rows` refuses others.
            dtype: float32, float16, bfloat16 or float64. Compute in fp32 and round once, so that a float64
                tile holds the values of the float32 one: that is what gradients are proven against.

        Returns:
            ``[stop - start, in]`` on the device of ``packed``; bit-identical to the same rows of the whole,
            whatever the range. The caller owns it.
        """

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """``x Ŵᵀ`` for ``x: [..., in]``, or ``x Ŵ`` for ``x: [..., out]`` when ``transpose``; in ``x``'s dtype.

        This one works for every quantizer: tile by tile within a byte budget (:mod:`modulora_core.tiles`).
        Override it for a fused kernel or a rotated basis. Both directions must use the same Ŵ, and one that
        ``dequantize_tile`` agrees with. It is not differentiated through: the core calls it both ways.
        """
        from modulora_core.tiles import tiled_matmul

        def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
            return self.dequantize_tile(packed, (start, stop), dtype)

        return tiled_matmul(x, tile, packed.shape, transpose)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Refuse a shape that can't be packed, before any work.

        Raises:
            ShapeError: by default when ``spec.out_multiple`` or ``spec.in_multiple`` doesn't divide it.
        """
        multiples = (self.spec.out_multiple, self.spec.in_multiple)
        for name, size, multiple in zip(("out_features", "in_features"), shape, multiples, strict=True):
            if size % multiple:
                raise ShapeError(f"{self.spec.name}: {name} {size} is not a multiple of {multiple}")

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        """What :meth:`pack` would return for this shape, without the bytes: for plans and disk-space checks.

        This one packs a weight of that shape (and an identity H where calibration is required): exact for a
        format whose size doesn't depend on the values, and slow. Override it where arithmetic will do.
        """
        import torch

        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        needs_calibration = self.spec.calibration == "required"
        return self.pack(weight, Calibration(torch.eye(shape[1]), 1) if needs_calibration else None).layout


def check_rows(packed: PackedWeight, rows: tuple[int, int]) -> None:
    """Refuse a row range outside of ``packed``. Raises ShapeError."""
    start, stop = rows
    if not 0 <= start <= stop <= packed.shape[0]:
        raise ShapeError(f"rows of a {list(packed.shape)} weight: expected 0 <= start <= stop <= {packed.shape[0]}, "
                         f"got ({start}, {stop})")  # fmt: skip
