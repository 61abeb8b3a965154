"""The interchange with GPTQ checkpoints, v1 and v2, as GPTQModel, AutoGPTQ, vLLM and transformers have them.

For each linear layer ``M``, whose weight is ``[out, in]`` with G groups of columns (:mod:`modulora_optq.gptq_words` has
the arrangement of the words)::

    M.qweight   int32 [in · bits / 32, out]    codes, columns in the weight's own order
    M.qzeros    int32 [G, out · bits / 32]     zero points; v1 stores each less one, v2 as it is
    M.scales    fp16  [G, out]
    M.g_idx     int32 [in]                     the group of each column; without it column i is of group i // group size

A zero of 0 can't be held by v1. Where columns aren't in the order of their groups (act-order), they are stored here
sorted by group, so that products need no gather, and written back in their own order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError, OptionError, ShapeError
from modulora_core.models.formats import CheckpointFormat, ForeignWeight, Read, StoredWeight
from modulora_core.options import validate_model
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_optq import SPEC, gptq_words, packing
from modulora_optq.gptq_config import Config, Layer, compose
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, codes_of, from_solution, middle
from modulora_optq.reference import Solution

V1, V2 = "gptq", "gptq_v2"

READABLE_ZEROS = "gptqmodel:0.9.0:compatible"
"""What an asymmetric v1 folder says in ``meta.quantizer`` beside who wrote it. GPTQModel loads such a folder only if it says
GPTQModel ≥ 0.9: that no zero of 0 was lost. None is here."""


class GPTQ(CheckpointFormat):
    """GPTQ v1 and v2: either is read, the one that is asked for is written."""

    def weights(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout], read: Read
    ) -> dict[str, ForeignWeight]:
        whole = Config.of(config)
        quantizers: dict[Options, OPTQ] = {}
        found: dict[str, ForeignWeight] = {}
        for module in (
            name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")
        ):
            layer = whole.layer(module)
            if layer is None:
                raise CheckpointError(f"{module}.qweight: the files have it, and the config's dynamic says that {module} isn't "
                                      "quantized; the config doesn't belong to these files")  # fmt: skip
            shape = _check_shapes(module, layer, tensors)
            permutation = _permutation(module, layer, shape[1], tensors, read)
            zeros = partial(_zeros, module, layer, whole)
            symmetric = bool((zeros(read) == middle(layer.bits)).all())
            options = _options(module, layer, symmetric, permutation, shape[1])
            quantizer = quantizers.setdefault(options, OPTQ(options))
            names = [name for part in ("qweight", "qzeros", "scales", "g_idx")
                     if (name := f"{module}.{part}") in tensors]  # fmt: skip
            unpack = partial(_unpack, module, options, permutation, zeros)
            found[module] = ForeignWeight(tuple(names), quantizer, quantizer.layout(shape), unpack)
        return found

    def plan(self, weight: StoredWeight) -> dict[str, TensorLayout]:
        if weight.quantizer.spec.name != SPEC.name:
            raise ModelError(f"packed by {weight.quantizer.spec.name}; {self.spec.name} holds weights of {SPEC.name} only. "
                             "Unpack the model with `modulora merge`, and quantize it again")  # fmt: skip
        out_features, in_features = weight.layout.shape
        metadata = weight.layout.metadata
        bits, groups = metadata["bits"], weight.layout.tensors["scales"].shape[1]
        rows, columns = (gptq_words.words_for(n, bits) for n in (in_features, out_features))
        if rows is None or columns is None:
            raise ShapeError(f"shape {[out_features, in_features]} at {bits} bits: {self.spec.name} has words of 32 bits, so "
                             f"out_features · {bits} and in_features · {bits} must be multiples of 32. Quantize the "
                             "model with another width, or leave this layer out with --exclude")  # fmt: skip
        if self.spec.name == V1 and not metadata["symmetric"]:
            _check_storable(weight.read("zeros"), bits, groups)
        return {
            "qweight": TensorLayout("int32", (rows, out_features)),
            "qzeros": TensorLayout("int32", (groups, columns)),
            "scales": TensorLayout("float16", (groups, out_features)),
            "g_idx": TensorLayout("int32", (in_features,)),
        }

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        solution, metadata = codes_of(weight.packed()), weight.layout.metadata
        bits, in_features = metadata["bits"], weight.layout.shape[1]
        columns = Options.model_validate({"group_size": metadata["group_size"]}).group(in_features)
        codes = solution.codes
        g_idx = torch.arange(in_features, dtype=torch.int32) // columns
        if solution.permutation is not None:
            own = torch.argsort(
                solution.permutation
            )  # where each of the weight's own columns is stored
            codes, g_idx = codes.index_select(1, own), g_idx.index_select(0, own)
        zeros = solution.zeros - 1 if self.spec.name == V1 else solution.zeros
        return {
            "qweight": gptq_words.pack(codes.t().contiguous(), bits),
            "qzeros": gptq_words.pack(zeros.contiguous(), bits).t().contiguous(),
            "scales": solution.scales.t().contiguous(),
            "g_idx": g_idx,
        }

    def config(self, weights: list[StoredWeight], kept: list[str]) -> dict[str, Any]:
        permuted = any(weight.layout.metadata["permuted"] for weight in weights)
        layers = {weight.module: _layer(weight.layout.metadata, permuted) for weight in weights}
        writers = [f"modulora-optq:{_version()}"]
        if self.spec.name == V1 and not all(layer.symmetric for layer in layers.values()):
            writers.append(READABLE_ZEROS)
        return compose(layers, kept, self.spec.name, {"quantizer": writers})


def _check_shapes(
    module: str, layer: Layer, tensors: Mapping[str, TensorLayout]
) -> tuple[int, int]:
    """``(out, in)`` of a layer, whose tensors agree with each other and the config."""
    qweight = tensors[f"{module}.qweight"]
    if qweight.dtype != "int32" or len(qweight.shape) != 2:
        raise CheckpointError(
            f"{module}.qweight: expected int32 [in · bits / 32, out], got {qweight.dtype} {list(qweight.shape)}"
        )
    words, out_features = qweight.shape
    in_features = words * gptq_words.WORD_BITS // layer.bits
    groups = -(-in_features // (in_features if layer.group_size == -1 else layer.group_size))
    expected = {"qzeros": ("int32", (groups, out_features * layer.bits // gptq_words.WORD_BITS)),
                "scales": ("float16", (groups, out_features)), "g_idx": ("int32", (in_features,))}  # fmt: skip
    for part, (dtype, shape) in expected.items():
        found = tensors.get(f"{module}.{part}")
        if part == "g_idx" and (found is None or found.shape == (0,)):
            continue
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise CheckpointError(f"{module}.{part}: expected {dtype} {list(shape)} by qweight and the config ({layer.bits} bits, "
                                  f"group size {layer.group_size}), got {got}")  # fmt: skip
    return out_features, in_features


def _permutation(
    module: str, layer: Layer, in_features: int, tensors: Mapping[str, TensorLayout], read: Read
) -> Tensor | None:
    """The columns sorted by group, int32 ``[in]``; None where they are already."""
    stored = tensors.get(f"{module}.g_idx")
    if stored is None or stored.shape == (0,):
        return None
    g_idx = read(f"{module}.g_idx")
    order = torch.argsort(g_idx, stable=True)
    columns = in_features if layer.group_size == -1 else layer.group_size
    if not torch.equal(g_idx[order], torch.arange(in_features, dtype=torch.int32) // columns):
        raise CheckpointError(f"{module}.g_idx: expected {columns} columns in each group (fewer in the last), got groups of "
                              f"{_sizes(g_idx)}; such groups can't be read")  # fmt: skip
    return None if bool((order.diff() == 1).all()) else order.to(torch.int32)


def _sizes(g_idx: Tensor) -> str:
    groups, counts = g_idx.unique(return_counts=True)
    pairs = [
        f"{count} (group {group})"
        for group, count in zip(groups.tolist(), counts.tolist(), strict=True)
    ]
    return ", ".join(pairs[:4]) + (", ..." if len(pairs) > 4 else "")


def _zeros(module: str, layer: Layer, config: Config, read: Read) -> Tensor:
    """The zero points, uint8 ``[out, G]``."""
    words = read(f"{module}.qzeros")
    if config.stored_less_one and config.borrows:
        return gptq_words.unpack(gptq_words.add_one(words, layer.bits).t(), layer.bits)
    zeros = gptq_words.unpack(words.t(), layer.bits)
    if not config.stored_less_one:
        return zeros
    levels = 2**layer.bits - 1
    if zeros.numel() and int(zeros.max()) == levels:
        raise CheckpointError(
            f"{module}.qzeros: {int((zeros == levels).sum())} of {zeros.numel()} zeros are stored as {levels}, which v1 of the "
            f"format has no meaning for: they were 0, and storing 0 less one changed their neighbours too. Quantize the "
            f"model again, or take a {V2} folder of it"
        )
    return zeros + 1


def _options(
    module: str, layer: Layer, symmetric: bool, permutation: Tensor | None, in_features: int
) -> Options:
    one_group = layer.group_size == -1 or layer.group_size >= in_features
    values = {"bits": layer.bits, "group_size": layer.group_size, "symmetric": symmetric, "range_search": False,
              "act_order": layer.act_order or permutation is not None,
              "static_groups": layer.act_order and permutation is None and not one_group}  # fmt: skip
    try:
        return validate_model(module, Options, values)
    except OptionError as error:
        raise ModelError(f"{error}; it isn't implemented") from None


def _unpack(
    module: str, options: Options, permutation: Tensor | None, zeros: Any, read: Read
) -> PackedWeight:
    scales = read(f"{module}.scales").t().contiguous()
    if not bool(scales.isfinite().all()):
        raise CheckpointError(
            f"{module}.scales: expected finite values, got NaN or Inf; the file is damaged"
        )
    codes = gptq_words.unpack(read(f"{module}.qweight"), options.bits)
    codes = (codes if permutation is None else codes.index_select(0, permutation)).t().contiguous()
    return from_solution(Solution(codes, scales, zeros(read), permutation), options)


def _check_storable(zeros: Tensor, bits: int, groups: int) -> None:
    lost = int((packing.unpack(zeros, bits, groups) == 0).sum())
    if lost:
        raise ModelError(f"{lost} zero points are 0; {V1} (v1) stores them less one, which would change their neighbours. "
                         f"Write {V2} instead: --to {V2}")  # fmt: skip


def _layer(metadata: Mapping[str, Any], permuted: bool) -> Layer:
    return Layer.model_validate({"bits": metadata["bits"], "group_size": metadata["group_size"],
                                 "sym": metadata["symmetric"], "desc_act": permuted})  # fmt: skip


def _version() -> str:
    try:
        return version("modulora-optq")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0"
