"""Choose the code that reads a packed weight: Triton, numba or plain torch.

A plugin keeps its compiled code in a package with two modules, which are imported on first use::

    mine/kernels/cpu.py     numba, for tensors on a CPU
    mine/kernels/gpu.py     Triton, for tensors on a GPU; with TRITON_INTERPRET=1 on a CPU

Either may be missing: plain torch then decodes tiles, and torch multiplies by them.

Each module has two functions of a packed weight Ŵ, ``[out, in]``::

    tile(packed, rows, dtype)          rows [start, stop) of Ŵ, in any float dtype
    product(x, packed, transpose)      x Ŵᵀ, or x Ŵ when transpose; None to multiply by tiles

:class:`modulora_kernels.cpu.CPUKernels` and :mod:`modulora_kernels.triton` make both
functions from a decoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from modulora_core.packed import PackedLayout, PackedWeight, TensorLayout, check_rows
from modulora_core.spec import Quantizer
from modulora_core.tiles import tiled_matmul
from modulora_kernels import compiled, parity
from modulora_kernels.launching import check_layout, check_tensors, launch


class KernelQuantizer(Quantizer):
    """A quantizer with kernels: write ``pack``, :meth:`tensors` and :meth:`reference_tile`.

    A subclass that stores columns in another order overrides both :meth:`dequantize_tile` and
    :meth:`matmul`, and permutes around ``super()``'s. ``super().matmul`` decodes columns as they
    are stored.

    Attributes:
        kernels: the name of the plugin's package of kernels, such as ``"mine.kernels"``.
        row_tensors: names of the tensors whose row o belongs to row o of Ŵ alone. With them
            :meth:`lookup` gathers packed rows and decodes each of them once.
    """

    kernels: ClassVar[str]
    row_tensors: ClassVar[tuple[str, ...]] = ()

    def column_block(self, packed: PackedWeight) -> int | None:
        """The columns of a block, if each of ``row_tensors`` has its blocks side by side in a row.

        :meth:`sliced` then cuts columns too, between blocks.
        """
        del packed
        return None

    def sliced(self, packed: PackedWeight, dim: int, start: int, stop: int) -> PackedWeight | None:
        block = 1 if dim == 0 else self.column_block(packed)
        if not self.row_tensors or block is None or start % block or stop % block:
            return None
        blocks = packed.shape[dim] // block  # each has an equal part of a tensor's length
        parts = {
            name: tensor
            if name not in self.row_tensors
            else tensor.narrow(
                dim,
                start // block * tensor.shape[dim] // blocks,
                (stop - start) // block * tensor.shape[dim] // blocks,
            )
            for name, tensor in packed.tensors.items()
        }
        shape = (stop - start, packed.shape[1]) if dim == 0 else (packed.shape[0], stop - start)
        return PackedWeight(packed.quantizer, packed.format, shape, parts, packed.metadata)

    @staticmethod
    @abstractmethod
    def tensors(shape: tuple[int, int], **metadata: Any) -> Mapping[str, TensorLayout]:
        """The packed tensors of a weight of this shape, by name.

        Called before every product: cache it. Kernels do not check bounds, so tensors that do not
        match are refused (:func:`modulora_kernels.check_tensors`).

        Raises:
            TypeError, ValueError: metadata that this plugin does not write.
        """

    @abstractmethod
    def reference_tile(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        """Rows ``[start, stop)`` of Ŵ in plain torch, fp32 ``[stop - start, in]``."""

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        metadata = self.options.model_dump()
        tensors = self.tensors(shape, **metadata)
        return PackedLayout(self.spec.name, self.format, shape, tensors, metadata)

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        super().check_format(packed)
        check_layout(packed, self.tensors)

    def check_kernels(self, packed: PackedWeight, dtype: torch.dtype) -> list[str]:
        return parity.differences(self, packed, dtype)

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        check_rows(packed, rows)
        check_tensors(packed, self.tensors)
        module = compiled.for_device(self.kernels, packed.device)
        if module is None:
            return self.reference_tile(packed, rows).to(dtype)
        tile: Tensor = module.tile(packed, rows, dtype)
        return tile

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        check_tensors(packed, self.tensors)
        module = compiled.for_device(self.kernels, packed.device)
        y: Tensor | None = None if module is None else module.product(x, packed, transpose)
        if y is not None:
            return y

        def tile(start: int, stop: int, dtype: torch.dtype) -> Tensor:
            # not self.dequantize_tile: a subclass permutes columns around this product itself
            return KernelQuantizer.dequantize_tile(self, packed, (start, stop), dtype)

        return tiled_matmul(x, tile, packed.shape, transpose)

    def lookup(self, ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        if not self.row_tensors:
            return super().lookup(ids, packed, dtype)
        check_tensors(packed, self.tensors)
        rows, in_features = packed.shape
        flat = ids.detach().reshape(-1).to(torch.int64)  # [n]
        if flat.is_cpu and len(flat):  # on a GPU the host does not wait: index_select checks them
            low, high = (int(end) for end in flat.aminmax())
            if not 0 <= low <= high < rows:
                raise IndexError(
                    f"ids of rows of a {list(packed.shape)} table: expected 0 to {rows - 1}, "
                    f"got {low} to {high}"
                )
        gathered = {
            name: tensor.detach().index_select(0, flat) if name in self.row_tensors else tensor
            for name, tensor in packed.tensors.items()
        }
        shape = (len(flat), in_features)
        table = PackedWeight(packed.quantizer, packed.format, shape, gathered, packed.metadata)
        return self.dequantize_tile(table, (0, len(flat)), dtype).view(*ids.shape, in_features)

    def run_on_cpu(self, kernel: str, *arguments: Any) -> bool:
        """Run a kernel of the plugin's module for CPUs, by its name.

        Args:
            arguments: a tensor, then tensors and numbers (:func:`modulora_kernels.launch`).

        Returns:
            False where numba can't run: plain torch must do the work.
        """
        module: ModuleType | None = compiled.load(f"{self.kernels}.cpu", arguments[0].device)
        if module is None:
            return False
        launch(getattr(module, kernel), *arguments)
        return True
