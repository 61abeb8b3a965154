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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from modulora_core.errors import CheckpointError, OptionError, PluginError, ShapeError, WeightError
from modulora_core.format_spec import LOCATION, FormatSpec
from modulora_core.packed import PackedLayout, PackedWeight, TensorLayout, check_rows
from modulora_core.promise import Promise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "PROTOCOL",
    "SUPPORTED_PROTOCOLS",
    "Calibration",
    "FormatSpec",
    "NoOptions",
    "PackedLayout",
    "PackedWeight",
    "Promise",
    "Quantizer",
    "QuantizerSpec",
    "TensorLayout",
    "check_hessian",
    "check_rows",
]

PROTOCOL = 1
"""The version of this contract that the core speaks."""

SUPPORTED_PROTOCOLS = range(1, 2)
"""The versions of plugins that this core can use."""

QUANTIZER_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""What a quantizer may be called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerSpec:
    """What is known of a quantizer without importing torch. ``modulora list-quantizers`` prints from this alone.

    Attributes:
        name: how users ask for it: lower case letters, digits and single hyphens, such as ``"my-rounding"``.
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
        formats: checkpoint formats of other tools that hold this quantizer's weights (:mod:`modulora_core.formats`).
        rescales: whether :meth:`Quantizer.rescaled` is there, which tuning asks for (docs/calibration.md).
        promises: what the quantizer keeps with which options: the configurations that the conformance kit runs.

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
    formats: tuple[FormatSpec, ...] = ()
    rescales: bool = False
    promises: tuple[Promise, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and QUANTIZER_NAME.fullmatch(self.name)):
            raise ValueError(
                f"name: expected lower case letters, digits and single hyphens, got {self.name!r}"
            )
        if not (isinstance(self.location, str) and LOCATION.fullmatch(self.location)):
            raise ValueError(f"location: expected 'package.module:Class', got {self.location!r}")
        for name in ("bits", "devices", "formats", "promises"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(  # noqa: TRY004 - as every malformed field
                    f"{name}: expected a tuple, such as (4,) for one value, got {getattr(self, name)!r}"
                )
        if not self.bits or not all(isinstance(b, (int, float)) and 0 < b <= 32 for b in self.bits):
            raise ValueError(f"bits: expected one or more widths in (0, 32], got {self.bits!r}")
        if self.calibration not in ("none", "optional", "required"):
            raise ValueError(
                f"calibration: expected 'none', 'optional' or 'required', got {self.calibration!r}"
            )
        if not self.devices or not all(isinstance(device, str) for device in self.devices):
            raise ValueError(
                f"devices: expected torch's names of device types, such as 'cpu', got {self.devices!r}"
            )
        for name in ("protocol", "out_multiple", "in_multiple"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive whole number, got {value!r}")
        if not all(isinstance(item, FormatSpec) for item in self.formats):
            raise ValueError(f"formats: expected values of FormatSpec, got {self.formats!r}")
        if self.rescales not in (True, False):
            raise ValueError(f"rescales: expected True or False, got {self.rescales!r}")
        if not all(isinstance(item, Promise) for item in self.promises):
            raise ValueError(f"promises: expected values of Promise, got {self.promises!r}")

    def next_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The least ``(out, in)`` from this one on whose sizes are multiples of :attr:`out_multiple` and :attr:`in_multiple`."""
        (out_features, in_features), (a, b) = shape, (self.out_multiple, self.in_multiple)
        return -(-out_features // a) * a, -(-in_features // b) * b


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibration saw of one layer.

    Attributes:
        hessian: H = E[xxᵀ], ``[in, in]``, fp32, symmetric: the second moment of the layer's inputs.
        samples: how many input vectors the mean is over.
    """

    hessian: Tensor
    samples: int


def check_hessian(quantizer: str, weight: Tensor, hessian: Tensor) -> None:
    """Refuse a weight and its H that can't be quantized together.

    Args:
        quantizer: its name, for messages.
        weight: ``[out, in]``; hessian: ``[in, in]``, of any float dtype each.

    Raises:
        ShapeError: ``hessian`` doesn't fit ``weight``.
        WeightError: NaN or Inf in either, or a negative number on ``hessian``'s diagonal.
    """
    import torch

    columns = weight.shape[1]
    if tuple(hessian.shape) != (columns, columns):
        raise ShapeError(f"{quantizer}: expected a second moment of shape [{columns}, {columns}] for a weight of shape "
                         f"{list(weight.shape)}, got {list(hessian.shape)}")  # fmt: skip
    for what, tensor in (("weight", weight), ("second moment", hessian)):
        if not math.isfinite(
            float(tensor.detach().sum(dtype=torch.float64))
        ):  # one bad value makes the sum bad
            raise WeightError(
                f"{quantizer}: expected a finite {what}, got NaN or Inf in one of shape {list(tensor.shape)}"
            )
    if bool((hessian.diagonal() < 0).any()):
        raise WeightError(f"{quantizer}: expected a second moment, whose diagonal isn't negative, got "
                          f"{float(hessian.diagonal().min()):g} on it; calibrate again")  # fmt: skip


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
                tile holds the values of the float32 one: that is what gradients are proven against. Where a
                tile is a sum, as in a rotated basis, compute a float64 one in fp64, as :meth:`matmul` does.

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

    def lookup(self, ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` of Ŵ, where it is the table of an embedding: ``[*ids.shape, in]`` in ``dtype``.

        This one works for every quantizer, by :meth:`dequantize_tile`; it waits for the ids, and each of many ids that are far apart
        costs a call. Override it where packed rows can be gathered. It has no gradient.

        Args:
            ids: any shape, an integer dtype, on the device of ``packed``.

        Raises:
            IndexError: an id below 0, or beyond the last row.
        """
        from modulora_core.tiles import looked_up

        def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
            return self.dequantize_tile(packed, (start, stop), dtype)

        return looked_up(ids, tile, packed.shape, dtype)

    def rescaled(self, packed: PackedWeight, input_scale: Tensor, output_scale: Tensor) -> PackedWeight:  # noqa: ARG002
        """The packed weight of diag(output_scale) Ŵ diag(input_scale), for a spec that says ``rescales=True``.

        For formats that keep a vector for each side of Ŵ: the scales are multiplied into those. Rounding them to their
        dtype is fine; codes stay. Tuning trains the scales while a model is quantized.

        Args:
            packed: what :meth:`pack` returned.
            input_scale: ``[in]``, fp32; output_scale: ``[out]``, fp32; on the device of ``packed``. Near 1.

        Returns:
            a packed weight of the same layout.

        Raises:
            PluginError: by default: this quantizer has no place for such scales.
        """
        raise PluginError(
            f"{self.spec.name}: expected a quantizer whose packed weights can be rescaled (rescales=True in its spec), got one that "
            "has no rescaled(); quantize without tuning"
        )

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Refuse a shape that can't be packed, before any work.

        Raises:
            ShapeError: by default when ``spec.out_multiple`` or ``spec.in_multiple`` doesn't divide it.
        """
        multiples = (self.spec.out_multiple, self.spec.in_multiple)
        for name, size, multiple in zip(("out_features", "in_features"), shape, multiples, strict=True):
            if size % multiple:
                raise ShapeError(f"{self.spec.name}: {name} {size} is not a multiple of {multiple}")

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        """Refuse a packed weight of a format that this version doesn't read; asked before a checkpoint is loaded.

        Override it if the other methods read older formats too, by ``packed.format``.

        Raises:
            CheckpointError: by default when the format isn't the one that :meth:`pack` writes.
        """
        if packed.format != self.format:
            raise CheckpointError(
                f"packed weight of {packed.quantizer}: expected format {self.format}, which the installed version reads, got format "
                f"{packed.format}; install the version of the plugin that wrote it, or quantize again"
            )

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        """What :meth:`pack` would return for this shape, without the bytes: for plans and disk-space checks.

        This one packs a weight of that shape (and an identity H where calibration is required): exact for a
        format whose size doesn't depend on the values, and slow. Override it where arithmetic will do.
        """
        import torch

        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        needs_calibration = self.spec.calibration == "required"
        return self.pack(weight, Calibration(torch.eye(shape[1]), 1) if needs_calibration else None).layout
