"""Broken where the core differentiates them: level 4 finds them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from modulora_core.packed import PackedWeight
from modulora_zoo.healthy import Healthy


class _Sealed(Tensor):
    """A result that ignores what is added to it in place."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (Tensor.__iadd__, Tensor.add_):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


class DropsTheBias(Healthy):
    """Its results can't be added to, and the layer adds its bias in place."""

    breaks = "test_output_and_gradients_equal_those_of_the_dense_layer"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        return y if transpose else y.as_subclass(_Sealed)


class OtherKernelInBackward(Healthy):
    """Takes a kernel that sums in another order where a backward is running: the recomputed forward has other bits."""

    breaks = "test_gradient_checkpointing_changes_no_bit"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        in_backward = torch._C._current_graph_task_id() != -1
        return y * (1 + 4e-7) if in_backward and not transpose else y


class ScalesThatTrain(Healthy):
    """The gradient of a frozen part: its scales are parameters."""

    breaks = "test_frozen_parts_get_no_gradient"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        return super().packed(codes, scale.requires_grad_(weight.requires_grad), zero, weight)


class ResultWithAGraph(Healthy):
    """Multiplies by a constant of its own that requires a gradient."""

    breaks = "test_a_product_of_frozen_operands_has_no_graph"

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        return super().matmul(x, packed, transpose) * torch.ones(
            (), dtype=x.dtype, requires_grad=True
        )


class KeepsDecodedCodes(Healthy):
    """Keeps the first row's unpacked codes as long as the packed tensor lives, also when it is written to."""

    breaks = "test_a_changed_code_moves_forward_and_backward_alike"
    kept: ClassVar[Any] = WeakTensorKeyDictionary()

    def codes(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        codes = super().codes(packed, rows)
        if rows[0] == 0 < rows[1]:
            codes[0] = self.kept.setdefault(packed.tensors["codes"], codes[0].clone())
        return codes


class RemembersTheLastWeight(Healthy):
    """The transposed product takes the codes of the last forward of that shape."""

    breaks = "test_two_weights_in_one_graph_keep_apart"
    last: Any = None

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        if not transpose:
            self.last = {name: weakref.ref(tensor) for name, tensor in packed.tensors.items()}
        remembered = {name: tensor() for name, tensor in (self.last or {}).items()}
        if (
            transpose
            and remembered
            and all(
                t is not None and t.shape == packed.tensors[n].shape for n, t in remembered.items()
            )
        ):
            packed = PackedWeight(packed.quantizer, 1, packed.shape, remembered, packed.metadata)
        return super().matmul(x, packed, transpose)


class ScratchOfInference(Healthy):
    """Keeps the memory of a product, which is made in whatever mode the first one is in."""

    breaks = "test_inference_mode_leaves_nothing_behind"
    scratch: ClassVar[dict[Any, Tensor]] = {}

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        y = super().matmul(x, packed, transpose)
        if transpose or len(x) > 2:
            return y
        kept = self.scratch.setdefault((packed.shape, y.shape, y.dtype), torch.empty_like(y))
        return kept.copy_(y).clone()
