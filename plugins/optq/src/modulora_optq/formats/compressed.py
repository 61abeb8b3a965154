"""Read and write ``pack-quantized`` folders of compressed-tensors, as llm-compressor writes them.

Tensors of a linear layer ``M``, whose weight is ``[out, in]`` with G groups of columns;
:mod:`modulora_optq.formats.words` has the arrangement of the words::

    M.weight_packed        int32 [out, in · bits / 32]    codes along a row
    M.weight_zero_point    int32 [out · bits / 32, G]     zero points along a column, if asymmetric
    M.weight_scale         [out, G]                       fp16, bf16 or fp32
    M.weight_shape         int64 [2]                      out and in
    M.weight_g_idx         int32 [in]                     the group of each column, with act-order

All integers are stored with half of their range added. Scales become fp16: the same numbers if they
are fp16, or bf16 from 2⁻¹⁷ on. Scales in fp32 are rounded, by 0.05 % at most. Scales that fp16
would round by more are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from modulora_kernels.grouped_format import ALL_LINEAR, GroupedFormat
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError, ShapeError
from modulora_core.models.formats import (
    ForeignWeight,
    Read,
    StoredWeight,
    check_tensors,
    read_finite,
)
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_optq import SPEC
from modulora_optq.formats import words
from modulora_optq.formats.gptq import permutation_of
from modulora_optq.options import SMALLEST_GROUP, WHOLE_ROW, Options
from modulora_optq.quantizer import OPTQ, from_solution, to_solution
from modulora_optq.reference import Solution

_FLOATS = ("float16", "bfloat16", "float32")


class PackQuantized(GroupedFormat):
    """Integers of 2, 3, 4 or 8 bits with a scale for each group, or for each row."""

    def weights(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout], read: Read
    ) -> dict[str, ForeignWeight]:
        self.check(config)
        found, quantizers = dict[str, ForeignWeight](), dict[Options, OPTQ]()
        for name in tensors:
            module, _, part = name.rpartition(".")
            if part != "weight_packed":
                continue
            shape, bits = _shape(module, tensors, read)
            size = _check_shapes(module, shape, bits, tensors)
            group = shape[1] if size == WHOLE_ROW else size
            g_idx = f"{module}.weight_g_idx"
            permutation = permutation_of(g_idx, group, shape[1], tensors, read)
            options = Options.model_validate(
                {
                    "bits": bits,
                    "group_size": size,
                    "symmetric": f"{module}.weight_zero_point" not in tensors,
                    "act_order": permutation is not None,
                    "static_groups": False,
                    "range_search": False,
                }
            )
            quantizer = quantizers.setdefault(options, OPTQ(options))
            parts = ("packed", "scale", "shape", "zero_point", "g_idx")
            names = (f"{module}.weight_{part}" for part in parts)
            present = tuple(name for name in names if name in tensors)
            unpack = partial(_unpack, module, shape, options, permutation)
            found[module] = ForeignWeight(present, quantizer, quantizer.layout(shape), unpack)
        return found

    def plan(self, weight: StoredWeight) -> dict[str, TensorLayout]:
        self.check_packed_by(SPEC.name, weight)
        (rows, columns), options = weight.layout.shape, Options.of(**weight.layout.metadata)
        if weight.layout.metadata["permuted"]:
            raise ModelError(
                f"its columns are in the order of act_order; {self.spec.name} needs the weight's "
                "own. Quantize with static_groups=true, or write another format"
            )
        group, bits = options.group(columns), options.bits
        if columns % group or columns * bits % words.WORD_BITS or rows * bits % words.WORD_BITS:
            raise ShapeError(
                f"shape {[rows, columns]} at {bits} bits: {self.spec.name} has whole groups of "
                f"{group} columns, and words of 32 bits. Quantize with another group_size, or "
                "leave this layer out with --exclude"
            )
        layouts = {
            "weight_packed": TensorLayout("int32", (rows, columns * bits // words.WORD_BITS)),
            "weight_scale": TensorLayout("float16", (rows, columns // group)),
            "weight_shape": TensorLayout("int64", (2,)),
        }
        if not options.symmetric:
            shape = (rows * bits // words.WORD_BITS, columns // group)
            layouts["weight_zero_point"] = TensorLayout("int32", shape)
        return layouts

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        solution, options = to_solution(weight.packed()), Options.of(**weight.layout.metadata)
        made = {
            "weight_packed": words.pack(solution.codes.t(), options.bits).t().contiguous(),
            "weight_scale": solution.scales,
            "weight_shape": torch.tensor(weight.layout.shape),
        }
        if not options.symmetric:
            made["weight_zero_point"] = words.pack(solution.zeros, options.bits)
        return made

    def groups(self, weights: list[StoredWeight]) -> list[tuple[Sequence[str], dict[str, Any]]]:
        modules: dict[Options, list[str]] = {}
        for weight in weights:
            modules.setdefault(Options.of(**weight.layout.metadata), []).append(weight.module)
        return [
            (ALL_LINEAR if len(modules) == 1 else names, _facts(options))
            for options, names in modules.items()
        ]


def _facts(options: Options) -> dict[str, Any]:
    """The arguments of weights, by compressed-tensors' names."""
    by_row = options.group_size == WHOLE_ROW
    return {
        "num_bits": options.bits, "type": "int", "symmetric": options.symmetric, "dynamic": False,
        "strategy": "channel" if by_row else "group",
        "group_size": None if by_row else options.group_size,
    }  # fmt: skip


def _shape(
    module: str, tensors: Mapping[str, TensorLayout], read: Read
) -> tuple[tuple[int, int], int]:
    """``(out, in)`` of a layer, and its bits. Raises CheckpointError if its tensors disagree."""
    name, packed = f"{module}.weight_shape", tensors[f"{module}.weight_packed"]
    stored = tensors.get(name)
    if stored is None or stored.dtype not in ("int64", "int32") or stored.shape != (2,):
        raise CheckpointError(f"{name}: expected int64 [2], got {stored or 'nothing'}")
    rows, columns = read(name).tolist()
    for bits in (4, 8, 3, 2):
        count = -(-columns * bits // words.WORD_BITS)
        fits = min(rows, columns) > 0 and (bits != 3 or columns % words.WORD_BITS == 0)
        if fits and packed == TensorLayout("int32", (rows, count)):
            return (rows, columns), bits
    raise CheckpointError(
        f"{module}.weight_packed: expected int32 words of 2, 3, 4 or 8 bits a weight of "
        f"{[rows, columns]} by {name}, got {packed.dtype} {list(packed.shape)}"
    )


def _check_shapes(
    module: str, shape: tuple[int, int], bits: int, tensors: Mapping[str, TensorLayout]
) -> int:
    """The columns of a group. Raises CheckpointError if scales or zero points don't fit."""
    rows, columns = shape
    scale = tensors.get(f"{module}.weight_scale")
    groups = scale.shape[-1] if scale is not None and scale.shape else 0
    size = WHOLE_ROW if groups == 1 else columns // max(1, groups)
    expected = (rows, max(1, groups))
    whole = columns % max(1, groups) == 0 and (size == WHOLE_ROW or size >= SMALLEST_GROUP)
    if scale is None or scale.dtype not in _FLOATS or scale.shape != expected or not whole:
        raise CheckpointError(
            f"{module}.weight_scale: expected floats [{rows}, groups] of equal groups of "
            f"{SMALLEST_GROUP} or more of {columns} columns, got {scale or 'nothing'}"
        )
    if f"{module}.weight_zero_point" in tensors:
        count = -(-rows * bits // words.WORD_BITS)
        zeros = {f"{module}.weight_zero_point": TensorLayout("int32", (count, groups))}
        check_tensors(zeros, tensors, "weight_packed and weight_scale")
    if f"{module}.weight_g_idx" in tensors:
        g_idx = {f"{module}.weight_g_idx": TensorLayout("int32", (columns,))}
        check_tensors(g_idx, tensors, "weight_shape")
    return size


def _unpack(
    module: str, shape: tuple[int, int], options: Options, permutation: Tensor | None, read: Read
) -> PackedWeight:
    name = f"{module}.weight_scale"
    stored = read_finite(read, name)
    scales = stored.to(torch.float16)
    lost = (scales.double() - stored.double()).abs() > stored.double().abs() * 2**-11
    if bool(lost.any()):
        raise CheckpointError(
            f"{name}: expected scales that fp16 can hold to 0.05 %, got {float(stored[lost][0]):g}"
        )
    codes = words.unpack(read(f"{module}.weight_packed").t(), options.bits)[: shape[1]]
    codes = codes if permutation is None else codes.index_select(0, permutation)
    zeros = torch.full(scales.shape, options.middle, dtype=torch.uint8)
    if not options.symmetric:
        zeros = words.unpack(read(f"{module}.weight_zero_point"), options.bits)[: shape[0]]
    return from_solution(Solution(codes.t(), scales, zeros, permutation), options)
