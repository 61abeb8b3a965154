"""The contract of a quantizer plugin. Read this file before you write one.

A plugin gives a :class:`QuantizerSpec`, which is known without importing torch, and a
:class:`Quantizer` with three methods::

    class Mine(Quantizer):
        spec = SPEC                                          # as the hook returns it
        Options = MineOptions                                # a frozen pydantic model, if any

        def pack(self, weight, calibration=None): ...        # [out, in] float -> PackedWeight
        def dequantize_tile(self, packed, rows, dtype): ...  # -> rows [start, stop) of Ŵ
        # matmul has a default that multiplies tile by tile; override it with a kernel

The core does the rest. It differentiates ``matmul`` (arXiv 2309.16119, section 3), stores the
packed tensors, loads them, finetunes on top of them, and derives command-line options from
``Options``. Importing this module does not import torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints

from modulora_core.errors import CheckpointError, OptionError, PluginError, ShapeError
from modulora_core.hessians import check_hessian
from modulora_core.packed import PackedLayout, PackedWeight, TensorLayout, check_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "PROTOCOL", "QUANTIZER_NAME", "SUPPORTED_PROTOCOLS", "Calibration", "NoOptions",
    "PackedLayout", "PackedWeight", "PluginSpec", "Promise", "Quantizer", "QuantizerSpec",
    "TensorLayout", "check_hessian", "check_rows", "column_importance", "titled",
]  # fmt: skip

PROTOCOL = 2
"""The version of this contract that the core speaks."""

SUPPORTED_PROTOCOLS = range(2, 3)
"""The versions that a plugin may be written for."""

QUANTIZER_NAME = "[a-z][a-z0-9]*(-[a-z0-9]+)*"
"""The pattern of a quantizer's name."""

Name = Annotated[str, StringConstraints(pattern=f"^{QUANTIZER_NAME}$")]
Location = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
_Bits = Annotated[float, Field(gt=0, le=32)]
_RelativeError = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PluginSpec(_Fact):
    """The facts that every hook gives: of a quantizer, a format or a command."""

    name: str
    """The name that users give."""
    summary: str
    """One line."""
    location: Location
    """``"package.module:name"``, imported on first use."""
    protocol: PositiveInt
    """The version of this contract that the plugin was written for. Write the number and do not
    import :data:`PROTOCOL`: it says which version *you* tested."""


class Promise(_Fact):
    """The size and the error that a quantizer promises with some options; the conformance kit
    checks them.

    An error is relative, ``‖W − Ŵ‖ / ‖W‖`` (Frobenius), of a weight of about ``[256, 512]`` that
    was packed without calibration data. For Gaussian weights no quantizer of b bits is below 2⁻ᵇ
    (rate-distortion bound). Raises ValueError: a number is not finite, or out of its range.
    """

    options: Mapping[str, Any] = {}
    """Names and values of options; the others have their defaults."""
    bits_per_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The most bits that a ``[2048, 2048]`` layer takes per weight, scales included."""
    gaussian: _RelativeError
    """The error for independent normal values."""
    heavy_tailed: _RelativeError
    """The error for Student's t with 3 degrees of freedom."""
    outlier_columns: _RelativeError
    """The error for normal values with every 64th column 20 times as large."""
    constant: _RelativeError
    """The error for a weight of equal values."""

    @property
    def title(self) -> str:
        """The options in one line, such as ``"bits=2, group_size=64"``, or ``"defaults"``."""
        return titled(self.options)


def titled(options: Mapping[str, Any]) -> str:
    """Options in one line, as in :attr:`Promise.title`."""
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "defaults"


class QuantizerSpec(PluginSpec):
    """The facts of a quantizer that ``modulora list-quantizers`` prints.

    Raises ValueError: a field is malformed; the message names it.
    """

    name: Name
    """The name that users give: lower case letters, digits, single hyphens: ``"my-rounding"``."""
    location: Location
    """``"package.module:Class"``, imported on first use."""
    bits: Annotated[tuple[_Bits, ...], Field(min_length=1)]
    """The widths that it offers, in bits per weight without scales."""
    calibration: Literal["none", "optional", "required"] = "none"
    """Whether ``pack`` wants the second moment of the layer's inputs."""
    output_hessian: bool = False
    """Whether ``pack`` uses :attr:`Calibration.output_hessian` where it is given."""
    devices: Annotated[tuple[str, ...], Field(min_length=1)] = ("cpu",)
    """The torch device types that it has kernels for. On others plain torch must work."""
    out_multiple: PositiveInt = 1
    """``out_features`` must be a multiple of this number."""
    in_multiple: PositiveInt = 1
    """``in_features`` must be a multiple of this number."""
    url: str = ""
    """The paper, or the project's page."""
    packing_memory: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    """The peak of ``pack`` above its arguments, in units of the weight (and H, if any) in fp32."""
    rescales: bool = False
    """Whether it implements :meth:`Quantizer.rescaled`, which tuning needs."""
    capturable: bool = False
    """Whether a CUDA graph can record ``x Ŵᵀ``: it waits for no value, and copies none."""
    promises: tuple[Promise, ...] = ()
    """Its promises, one for each configuration that the conformance kit runs."""
    qualities: Mapping[Literal["fast", "best"], Mapping[str, Any]] = {}
    """Its options for ``--quality fast`` and ``--quality best``, for packed weights of the same
    size. ``balanced``, the default, has the defaults."""

    def check_text(self, text: str | None) -> None:
        """Raise OptionError if calibration is required, and ``text`` names no source for it."""
        if self.calibration == "required" and text is None:
            raise OptionError(
                f"{self.name}: expected a calibration text, got none; give one: --calibration "
                "SOURCE, such as a .txt file, or pydoc"
            )

    def next_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The smallest ``(out, in)`` from ``shape`` on that its multiples divide."""
        (out_features, in_features), (a, b) = shape, (self.out_multiple, self.in_multiple)
        return -(-out_features // a) * a, -(-in_features // b) * b


@dataclass(frozen=True, slots=True)
class Calibration:
    """The statistics of one layer's inputs, and of the gradients in its outputs.

    Attributes:
        hessian: H = E[xxᵀ], ``[in, in]``, fp32, symmetric: the second moment. The user may weight
            tokens by the loss: H = E[w xxᵀ], and E[w] = 1.
        samples: the number of input vectors.
        output_hessian: H_O = E[ggᵀ / ‖g‖], ``[out, out]``, fp32, symmetric, for gradients g of the
            loss in the outputs. Only its ratios matter: errors E = W − Ŵ increase the loss in
            proportion to tr(H_O E H Eᵀ). None for experts, and unless the user weights by the loss.
        progress: a ``pack`` of many seconds calls it with the finished share of its work, 0 to 1,
            so that a bar moves. Others need not.
    """

    hessian: Tensor
    samples: int
    output_hessian: Tensor | None = field(default=None, kw_only=True)
    progress: Callable[[float], None] | None = field(default=None, kw_only=True)


def column_importance(quantizer: str, weight: Tensor, calibration: Calibration | None) -> Tensor:
    """How much the squared error of each column counts: H's diagonal, scaled to a mean of 1.

    All columns count 1 without a calibration, or if all inputs are zero. 1e-4 is added, so that
    columns without inputs keep a small weight.

    Args:
        quantizer: its name, for messages.
        weight: ``[out, in]``, any float dtype.
        calibration: of the inputs of ``weight``.

    Returns:
        fp32 ``[in]``, on the device of ``weight``.

    Raises ShapeError, WeightError: as :func:`check_hessian` does.
    """
    import torch

    importance = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    if calibration is not None:
        check_hessian(quantizer, weight, calibration.hessian)
        diagonal = calibration.hessian.diagonal().to(importance)
        mean = float(diagonal.mean())
        importance = diagonal / mean + 1e-4 if mean > 0 else importance
    return importance


class NoOptions(BaseModel):
    """The ``Options`` of a quantizer that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Quantizer(ABC):
    """A black box that packs a weight, gives tiles of it back, and multiplies by it. Subclass it.

    An instance is cheap and shared by all layers: it holds its options and no other state. A
    checkpoint that is only read constructs it too, with the recorded options.

    Attributes:
        spec: the plugin's :class:`QuantizerSpec`.
        format: the number of the packed format that :meth:`pack` writes.
        Options: a frozen pydantic model; every field has a default, a type and a description. The
            command line's ``-o key=value``, the checkpoint's record and the docs are derived from
            it.
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

    @property
    def wants_calibration(self) -> bool:
        """Whether ``pack`` uses a calibration with these options. Override it if some use none."""
        return self.spec.calibration != "none"

    @abstractmethod
    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        """Quantize ``weight``.

        Args:
            weight: ``[out, in]``, any float dtype, any strides, finite. Do not change it, and do
                not keep it.
            calibration: the layer's :class:`Calibration` where ``spec.calibration`` asks for one.

        Returns:
            the packed weight on the same device; the same bytes for the same input.
        """

    @abstractmethod
    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Rows ``[start, stop)`` of Ŵ in the original basis.

        Args:
            packed: a result of :meth:`pack`, perhaps on another device.
            rows: ``(start, stop)``; :func:`check_rows` refuses a range outside of the weight.
            dtype: float32, float16, bfloat16 or float64. Compute in fp32 and round once: a float64
                tile has the values of the float32 tile. But if values are sums, as in a rotated
                basis, add them up in fp64 for a float64 tile: tests check gradients with it.

        Returns:
            ``[stop - start, in]`` on the device of ``packed``, owned by the caller. A row has the
            same bits in every range.
        """

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """``x Ŵᵀ`` for ``x: [..., in]``, or ``x Ŵ`` for ``x: [..., out]`` when ``transpose``; in
        ``x``'s dtype.

        The default multiplies tile by tile within a byte budget (:mod:`modulora_core.tiles`).
        Override it for a fused kernel or a rotated basis. Both directions must use the Ŵ of
        :meth:`dequantize_tile`. The core differentiates it, so it needs no gradient."""
        from modulora_core.tiles import tiled_matmul

        return tiled_matmul(x, self._tile_of(packed), packed.shape, transpose)

    def lookup(self, ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` of Ŵ, the table of an embedding: ``[*ids.shape, in]`` in ``dtype``, without
        a gradient.

        The default uses :meth:`dequantize_tile`; it waits for the ids, and distant ids cost a call
        each. Override it where packed rows can be gathered.

        Args:
            ids: any shape, an integer dtype, on the device of ``packed``.

        Raises IndexError: an id below 0, or beyond the last row.
        """
        from modulora_core.tiles import looked_up

        return looked_up(ids, self._tile_of(packed), packed.shape, dtype)

    def _tile_of(self, packed: PackedWeight) -> Callable[[int, int, torch.dtype], Tensor]:
        return lambda start, stop, dtype: self.dequantize_tile(packed, (start, stop), dtype)

    def rescaled(
        self, packed: PackedWeight, input_scale: Tensor, output_scale: Tensor
    ) -> PackedWeight:
        """The packed weight of diag(output_scale) Ŵ diag(input_scale); implement it if
        ``spec.rescales``.

        It is for formats that keep a vector for each side of Ŵ. Multiply the scales into these,
        rounded to their dtype, and keep the codes. Tuning trains the scales.

        Args:
            packed: a result of :meth:`pack`.
            input_scale, output_scale: ``[in]`` and ``[out]``, fp32, near 1, on its device.

        Returns:
            a packed weight of the same layout.

        Raises PluginError: the default: this quantizer has no place for scales.
        """
        del packed, input_scale, output_scale
        name = self.spec.name
        raise PluginError(f"{name}: expected rescales=True, got a quantizer without; don't tune")

    @property
    def snaps(self) -> bool:
        """Whether :meth:`snap` and :meth:`snapped` work with these options, as merging needs."""
        return False

    def snap(
        self, packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int], V: Tensor
    ) -> Tensor:
        """The points nearest to V, fp32, that rows and columns ``[start, stop)`` of Ŵ can take by
        other codes. Scales, zeros and signs stay. A point is its own nearest point. V and the
        result are ``[rows, columns]``; merging asks for one column after the other."""
        del packed, rows, columns, V
        raise PluginError(f"{self.spec.name}: expected a quantizer that snaps; merge dense weights")

    def snapped(self, packed: PackedWeight, V: Tensor) -> PackedWeight:
        """``packed`` with the codes of the points nearest to V, fp32 ``[out, in]``. Its layout, its
        scales and so its grid stay."""
        del packed, V
        raise PluginError(f"{self.spec.name}: expected a quantizer that snaps; merge dense weights")

    def sliced(self, packed: PackedWeight, dim: int, start: int, stop: int) -> PackedWeight | None:
        """The packed weight of rows (``dim`` 0) or columns (1) ``[start, stop)`` of Ŵ, bit for bit.

        Tensor parallelism gives each process such a part. None, the default, refuses a cut.
        """
        del packed, dim, start, stop
        return None

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Refuse a shape that cannot be packed, before any work.

        Raises ShapeError: the default: a side is 0, or a multiple of the spec does not divide it.
        """
        multiples = {"out_features": self.spec.out_multiple, "in_features": self.spec.in_multiple}
        for size, (name, multiple) in zip(shape, multiples.items(), strict=True):
            if size == 0 or size % multiple:
                reason = f"{name} {size} is not a positive multiple of {multiple}"
                raise ShapeError(f"{self.spec.name}: {reason}")

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        """Refuse a packed format that this version doesn't read, before a checkpoint is loaded.

        Override it if the other methods read older formats too, by ``packed.format``.

        Raises CheckpointError: the default: the format differs from :meth:`pack`'s.
        """
        if packed.format != self.format:
            raise CheckpointError(
                f"packed weight of {packed.quantizer}: expected format {self.format}, which the "
                f"installed version reads, got format {packed.format}; install the version of the "
                "plugin that wrote it, or quantize again"
            )

    def check_values(self, packed: PackedWeight, subject: str) -> None:  # noqa: B027
        """Refuse scales that are NaN or infinite. The default checks nothing.

        The core checks float tensors itself, and calls this when a weight is loaded, merged or
        converted. Override it if integers hold scales. Tiles of such a weight stay finite.

        Raises CheckpointError: a scale is NaN or infinite; the message begins with ``subject``.
        """

    def check_kernels(self, packed: PackedWeight, dtype: torch.dtype) -> list[str]:
        """Compare kernels with a reference for this weight, where it is, and drop wrong ones.

        The core calls it once for each layout of packed weights that a model loads on a GPU, and
        warns of each sentence. The default has no kernels to compare.

        Args:
            packed: a result of :meth:`pack`.
            dtype: of the tiles and products to compare.

        Returns:
            a sentence for each kernel that differs. This process does not use it again.
        """
        del packed, dtype
        return []

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        """The layout of :meth:`pack`'s result for this shape, for plans and disk-space checks.

        The default packs a random weight, with the identity as H if calibration is required. That
        is slow, and exact if the size depends on the shape alone. Override it with arithmetic."""
        import torch

        weight = torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
        identity = Calibration(torch.eye(shape[1], dtype=torch.float32), samples=1)
        calibration = identity if self.spec.calibration == "required" else None
        return self.pack(weight, calibration).layout
