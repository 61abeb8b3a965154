"""A quantizer whose codes are in a rotated basis: products without Ŵ, tiles by strips of columns.

    Ŵ = unit · diag(s_out) H_out C H_inᵀ diag(s_in)          C: the decoded codes

H_n is the matrix of :mod:`modulora_kernels.rotation`. Plugins write ``pack``, the packed
tensors, and how a part of C is decoded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from modulora_core.dense_products import compute_dtype
from modulora_core.hessians import check_hessian
from modulora_core.packed import PackedLayout, PackedWeight, TensorLayout, check_rows
from modulora_core.tiles import tile_bytes, tile_ranges, tiled_matmul
from modulora_kernels import compiled, feedback, incoherence, parity
from modulora_kernels.launching import check_layout, check_tensors
from modulora_kernels.rotation import rotate

ROUNDED_ROWS = 256
"""Rows of bf16 from which rotated inputs are rounded to bf16: fewer may be multiplied in fp32."""

_CODES: WeakKeyDictionary[PackedWeight, PackedWeight] = WeakKeyDictionary()
"""C of each weight."""


class RotatedQuantizer(feedback.RoundsBlocks):
    """A quantizer of rotated weights.

    The plugin's modules of kernels have three functions, each of which may give None::

        tile(C, rows, dtype)                  rows of C
        multiply(x, C, transpose, dtype)      x Cᵀ or x C of rotated inputs, for a layer of dtype
        product_of_one(x, packed, transpose)  x Ŵᵀ or x Ŵ of one row, rotations included

    Attributes:
        kernels: the name of the plugin's package of kernels.
        code_tensors: names of the packed tensors that C is decoded from.
        scales: names of s_in and s_out, fp16, as long as the rows and columns of C without padding.
        unit: the name of the unit, fp32 ``[1]``, which a weight may lack.
        strip: columns of C come in groups of so many.
        strip_dim: the dimension of the code tensors that counts the groups.
        code_rows: rows of C that have their codes together.
        tensors: a static method, as :meth:`modulora_kernels.KernelQuantizer.tensors`.
    """

    kernels: ClassVar[str]
    code_tensors: ClassVar[tuple[str, ...]]
    scales: ClassVar[tuple[str, str]]
    unit: ClassVar[str] = "scale"
    strip: ClassVar[int]
    strip_dim: ClassVar[int]
    code_rows: ClassVar[int]
    tensors: ClassVar[Callable[..., Mapping[str, TensorLayout]]]

    @abstractmethod
    def codes(self, packed: PackedWeight, held: Mapping[str, Tensor]) -> PackedWeight:
        """C as a weight of its own; ``held`` are its :attr:`code_tensors`. It is cached."""

    @abstractmethod
    def strip_of(self, C: PackedWeight, a: int, b: int) -> PackedWeight:
        """The groups ``[a, b)`` of columns of C."""

    @abstractmethod
    def reference_codes(self, C: PackedWeight, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of C in plain torch, fp32."""

    @abstractmethod
    def nearest(self, V: Tensor, C: PackedWeight) -> tuple[Mapping[str, Tensor], Tensor]:
        """Codes of a group of columns, by the names of the code tensors, and their points, fp32.

        The points are those nearest to V, fp32 ``[rows, strip]``, that weights like C can have."""

    def block(self, packed: PackedWeight) -> int | None:  # noqa: ARG002
        """The order of Hadamard matrices side by side, or None for one of the whole dimension."""
        return None

    def first_row(self, packed: PackedWeight) -> int:  # noqa: ARG002
        """The row of H_out C at which Ŵ begins."""
        return 0

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        super().check_format(packed)
        check_layout(packed, self.tensors)

    def check_kernels(self, packed: PackedWeight, dtype: torch.dtype) -> list[str]:
        return parity.differences(self, packed, dtype)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        """The product in the rotated basis, without Ŵ; in fp32, or in fp64 for fp64.

        x Ŵᵀ = (((x ⊙ s_in) H_in) Cᵀ) H_outᵀ ⊙ s_out
        x Ŵ  = (((x ⊙ s_out) H_out) C) H_inᵀ ⊙ s_in
        """
        check_tensors(packed, self.tensors)
        given, wanted = packed.shape if transpose else packed.shape[::-1]
        if x.dim() == 0 or x.shape[-1] != given:
            return super().matmul(x, packed, transpose)  # refuses it
        inputs = packed.tensors[self.scales[0]], None
        outputs = packed.tensors[self.scales[1]], packed.tensors.get(self.unit)
        before, after = (outputs, inputs) if transpose else (inputs, outputs)
        first = self.first_row(packed)
        x = _padded(x, first if transpose else 0, len(before[0]))
        module = compiled.for_device(self.kernels, packed.device)
        y: Tensor | None = None
        if module is not None:
            y = module.product_of_one(x, packed, transpose)
        if y is None:
            y = self._product(x, packed, before, after, transpose)
        start = 0 if transpose else first
        return y if y.shape[-1] == wanted else y[..., start : start + wanted]

    def _product(
        self, x: Tensor, packed: PackedWeight, before: Any, after: Any, transpose: bool
    ) -> Tensor:
        block, C = self.block(packed), self._codes(packed)
        many = x.numel() > ROUNDED_ROWS * x.shape[-1]
        rounded = compute_dtype(x.dtype, x.device) if many and x.dtype == torch.bfloat16 else None
        turned = rotate(x, *before, dtype=rounded, block=block)
        z = self._product_with_codes(turned, C, transpose, x.dtype)[..., : len(after[0])]
        result = x.dtype if x.dtype == torch.bfloat16 else None
        y = rotate(z, *after, after=True, transpose=True, in_place=True, dtype=result, block=block)
        return y.to(x.dtype)

    def _product_with_codes(
        self, x: Tensor, C: PackedWeight, transpose: bool, dtype: torch.dtype
    ) -> Tensor:
        """``x Cᵀ``, or ``x C``, of rotated inputs, for a layer whose inputs are of ``dtype``."""
        x = _padded(x, 0, C.shape[0 if transpose else 1])
        module = compiled.for_device(self.kernels, C.device)
        y: Tensor | None = None if module is None else module.multiply(x, C, transpose, dtype)
        if y is not None:
            return y
        if dtype == torch.bfloat16:  # as coarse as the inputs, and faster
            x = x.to(compute_dtype(dtype, x.device))
        return tiled_matmul(x, lambda a, b, of: self._tile(C, a, b, of), C.shape, transpose)

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Rows of Ŵ in the original basis; in fp64 computed in fp64.

        Every row of Ŵ needs all of C. A strip of its columns at a time is decoded and rotated, and
        only ``rows`` are kept. So one row costs as much as all, and products never ask for it.
        """
        check_rows(packed, rows)
        check_tensors(packed, self.tensors)
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        first, block = self.first_row(packed), self.block(packed)
        kept = slice(first + rows[0], first + rows[1])
        s_in, s_out = (packed.tensors[name] for name in self.scales)
        C, whole, columns = self._codes(packed), len(s_out), len(s_in)
        out = torch.empty(rows[1] - rows[0], columns, dtype=computed, device=packed.device)
        if out.numel() == 0:
            return out[:, : packed.shape[1]].to(dtype)
        budget = tile_bytes(packed.device) // 2  # a strip and its transpose
        groups = -(-columns // self.strip)
        for a, b in tile_ranges(groups, self.strip * whole * computed.itemsize, budget):
            at, stop = a * self.strip, min(b * self.strip, columns)
            strip = self.strip_of(C, a, b)
            values = self._tile(strip, 0, strip.shape[0], computed)[:whole, : stop - at]
            turned = rotate(  # (H_out C)ᵀ
                values.T.contiguous(), transpose=True, in_place=True, block=block
            )
            out[:, at:stop] = turned[:, kept].T
        out = rotate(out, s_in, after=True, transpose=True, in_place=True, block=block)
        scales = s_out[kept].to(computed)
        if self.unit in packed.tensors:
            scales = scales * packed.tensors[self.unit].to(computed)
        return out[:, : packed.shape[1]].mul_(scales[:, None]).to(dtype)

    def rescaled(
        self, packed: PackedWeight, input_scale: Tensor, output_scale: Tensor
    ) -> PackedWeight:
        """The same codes, with the scales multiplied in: exact but for rounding to fp16."""
        check_tensors(packed, self.tensors)
        stored = dict(packed.tensors)
        unit = stored.get(self.unit)
        for name, factor in zip(self.scales, (input_scale, output_scale), strict=True):
            scale = stored[name].to(torch.float32)
            more = len(scale) - len(factor)
            vector = scale * F.pad(factor.to(scale), (0, more), value=1.0)
            if unit is not None:
                mean = vector.abs().mean()  # keeps fp16 far from its ends
                mean = mean.clamp(min=torch.finfo(torch.float32).tiny)
                vector, unit = vector / mean, unit * mean
            stored[name] = vector.to(torch.float16)
        if unit is not None:
            stored[self.unit] = unit
        return PackedWeight(packed.quantizer, packed.format, packed.shape, stored, packed.metadata)

    def rounded(
        self, packed: PackedWeight, V: Tensor, hessian: Tensor, *, damping: float, sweeps: int
    ) -> PackedWeight:
        """As ``RoundsBlocks``, in the rotated basis: C + D rounded with the rotated H.

            D = H_outᵀ diag(1 / (unit s_out)) (V − Ŵ) diag(1 / s_in) H_in

        Rows of C count alike in the error, as if s_out had one magnitude. Codes change only where
        the new point is nearer.
        """
        check_tensors(packed, self.tensors)
        check_hessian(self.spec.name, V, hessian)
        like, block, strip = self._codes(packed), self.block(packed), self.strip
        s_in, s_out = (packed.tensors[name] for name in self.scales)
        more = [len(s) - n for s, n in zip((s_in, s_out), packed.shape[::-1], strict=True)]
        D = V - self.dequantize_tile(packed, (0, len(V)), torch.float32)
        D = F.pad(D, (0, more[0], 0, more[1])) * _reciprocal(s_in)
        D = rotate(D, in_place=True, block=block).T * _reciprocal(s_out)
        if self.unit in packed.tensors:
            D = D * _reciprocal(packed.tensors[self.unit])
        D = rotate(D.contiguous(), in_place=True, block=block).T
        H = F.pad(hessian.to(V), (0, more[0], 0, more[0]))
        H = incoherence.rotated(H, s_in, block)

        wide = -(-len(s_in) // strip) * strip  # the last group may have more columns than Ŵ
        whole = PackedWeight(
            like.quantizer, like.format, (like.shape[0], wide), like.tensors, like.metadata
        )
        C = self.reference_codes(whole, 0, like.shape[0])
        target = C + F.pad(D, (0, wide - D.shape[1], 0, len(C) - len(D)))
        held = {name: tensor.clone() for name, tensor in like.tensors.items()}

        def snap(j: int, T: Tensor) -> Tensor:
            codes, points = self.nearest(T.contiguous(), whole)
            now = C[:, j : j + strip]
            gain = (now - T).square() - (points - T).square()
            nearer = gain.unflatten(0, (-1, self.code_rows)).sum((1, 2)) > 0
            for name, new in codes.items():
                held[name].select(self.strip_dim, j // strip)[nearer] = new[nearer]
            rows = nearer.repeat_interleave(self.code_rows)
            now[rows] = points[rows]
            return now

        H = F.pad(H, (0, wide - len(H)) * 2)
        feedback.rounded(
            self.spec.name, target, H, snap, block=strip, damping=damping, sweeps=sweeps
        )
        tensors = {**packed.tensors, **held}
        return PackedWeight(packed.quantizer, packed.format, packed.shape, tensors, packed.metadata)

    def _codes(self, packed: PackedWeight) -> PackedWeight:
        held = {n: packed.tensors[n] for n in self.code_tensors if n in packed.tensors}
        C = _CODES.get(packed)
        if C is None or any(C.tensors[name] is not tensor for name, tensor in held.items()):
            C = self.codes(packed, held)
            _CODES[packed] = C
        return C

    def _tile(self, C: PackedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``[start, stop)`` of C, ``[stop - start, columns of C]``."""
        module = compiled.for_device(self.kernels, C.device)
        if module is not None:
            tile: Tensor = module.tile(C, (start, stop), dtype)
            return tile
        return self.reference_codes(C, start, stop).to(dtype)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / s in fp32, and 0 for a scale of 0, under which no code has an effect."""
    scale = scale.to(torch.float32)
    return torch.where(scale == 0, scale, 1 / scale)


def _padded(x: Tensor, start: int, features: int) -> Tensor:
    """Pad ``x`` with zeros to ``features`` columns; it begins at column ``start``."""
    if x.shape[-1] == features:
        return x
    return F.pad(x.detach(), (start, features - start - x.shape[-1]))
