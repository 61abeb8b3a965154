"""Broken where the core differentiates them: level 4 finds them."""

import weakref
from typing import ClassVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from modulora_zoo.healthy import Healthy, _ChangesProducts, changed


class OtherProductWithAGraph(_ChangesProducts):
    """Its product depends on requires_grad."""

    breaks = "test_output_and_gradients_equal_those_of_the_dense_layer"

    def product(self, y, x, packed, transpose):
        return y * 1.1 if x.requires_grad else y


class OtherKernelInBackward(_ChangesProducts):
    """During a backward it sums in another order: the recomputed forward has other bits."""

    breaks = "test_gradient_checkpointing_changes_no_bit"

    def product(self, y, x, packed, transpose):
        in_backward = torch._C._current_graph_task_id() != -1
        return y * (1 + 4e-7) if in_backward and not transpose else y


class ScratchOfInference(_ChangesProducts):
    """It keeps the memory of a product, made in the mode of the first one."""

    breaks = "test_inference_mode_leaves_nothing_behind"
    scratch: ClassVar = {}

    def product(self, y, x, packed, transpose):
        if transpose or len(x) > 2 or packed.shape != (28, 64):  # a mode of torch finds it too
            return y
        kept = self.scratch.setdefault((y.shape, y.dtype), torch.empty_like(y))
        return kept.copy_(y).clone()


class ScalesThatTrain(Healthy):
    breaks = "test_frozen_parts_get_no_gradient"

    def packed(self, codes, scale, zero, weight):
        return super().packed(codes, scale.requires_grad_(weight.requires_grad), zero, weight)


class ResultWithAGraph(Healthy):
    breaks = "test_a_product_of_frozen_operands_has_no_graph"

    def matmul(self, x, packed, transpose=False):
        one = torch.ones((), dtype=x.dtype, requires_grad=True)
        return super().matmul(x, packed, transpose) * one


class KeepsDecodedCodes(Healthy):
    """It keeps the first row's codes after the packed tensor was written to."""

    breaks = "test_a_changed_code_moves_forward_and_backward_alike"
    kept: ClassVar = WeakTensorKeyDictionary()

    def codes(self, packed, rows):
        codes = super().codes(packed, rows)
        if rows[0] == 0 < rows[1]:
            codes[0] = self.kept.setdefault(packed.tensors["codes"], codes[0].clone())
        return codes


class RemembersTheLastWeight(Healthy):
    """The transposed product uses the codes of the last forward of that shape."""

    breaks = "test_two_weights_in_one_graph_keep_apart"
    last = None

    def matmul(self, x, packed, transpose=False):
        if not transpose:
            self.last = {name: weakref.ref(tensor) for name, tensor in packed.tensors.items()}
        last = {name: tensor() for name, tensor in (self.last or {}).items()}
        if transpose and all(
            t is not None and t.shape == packed.tensors[name].shape for name, t in last.items()
        ):
            packed = changed(packed, **last)
        return super().matmul(x, packed, transpose)
