"""Read and write GPTQ checkpoints, v1 and v2, as GPTQModel, AutoGPTQ, vLLM and transformers do.

Tensors of a linear layer ``M``, whose weight is ``[out, in]`` with G groups of columns;
:mod:`modulora_optq.formats.words` has the arrangement of the words::

    M.qweight   int32 [in · bits / 32, out]    codes, columns in the weight's own order
    M.qzeros    int32 [G, out · bits / 32]     zero points; v1 stores each less one
    M.scales    fp16  [G, out]
    M.g_idx     int32 [in]                     the group of each column, by default i // group size

v1 can't hold a zero of 0. With act-order, columns are not in the order of their groups. Our packed
weight has them sorted by group; a written file has them in their own order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError, ShapeError
from modulora_core.models.formats import (
    CheckpointFormat,
    ForeignWeight,
    Read,
    StoredWeight,
    check_tensors,
    read_finite,
)
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_optq import SPEC, packing
from modulora_optq.formats import words
from modulora_optq.formats.config import Config, Layer, compose
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, from_solution, to_solution
from modulora_optq.reference import Solution

V1, V2 = "gptq", "gptq_v2"

READABLE_ZEROS = "gptqmodel:0.9.0:compatible"
"""A writer that GPTQModel demands of an asymmetric v1 folder: it lost no zero of 0."""


class GPTQ(CheckpointFormat):
    """GPTQ v1 and v2. It reads both, and writes the version that its spec names."""

    def check(self, config: Mapping[str, Any]) -> None:
        Config.of(config)

    def weights(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout], read: Read
    ) -> dict[str, ForeignWeight]:
        whole = Config.of(config)
        modules = (n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight"))
        found, quantizers = dict[str, ForeignWeight](), dict[Options, OPTQ]()
        for module in modules:
            layer = whole.layer(module)
            if layer is None:
                raise CheckpointError(
                    f"{module}.qweight: expected a dense weight, by the config's dynamic; the "
                    "config does not belong to these files"
                )
            shape = _check_shapes(module, layer, tensors)
            size = layer.group(shape[1])
            permutation = permutation_of(f"{module}.g_idx", size, shape[1], tensors, read)
            zeros = partial(_zeros, module, layer.bits, whole)
            options = _options(layer, zeros(read), permutation, shape[1])
            quantizer = quantizers.setdefault(options, OPTQ(options))
            parts = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
            names = tuple(name for name in parts if name in tensors)
            unpack = partial(_unpack, module, options, permutation, zeros)
            found[module] = ForeignWeight(names, quantizer, quantizer.layout(shape), unpack)
        return found

    def plan(self, weight: StoredWeight) -> dict[str, TensorLayout]:
        self.check_packed_by(SPEC.name, weight)
        (out_features, in_features), metadata = weight.layout.shape, weight.layout.metadata
        bits, groups = metadata["bits"], weight.layout.tensors["scales"].shape[1]
        rows, columns = (words.words_for(n, bits) for n in (in_features, out_features))
        if rows is None or columns is None:
            raise ShapeError(
                f"shape {[out_features, in_features]} at {bits} bits: {self.spec.name} has words "
                f"of 32 bits, so out_features · {bits} and in_features · {bits} must be multiples "
                "of 32. Quantize with another width, or leave this layer out with --exclude"
            )
        if self.spec.name == V1 and not metadata["symmetric"]:
            _check_storable(weight.read("zeros"), bits, groups)
        return {
            "qweight": TensorLayout("int32", (rows, out_features)),
            "qzeros": TensorLayout("int32", (groups, columns)),
            "scales": TensorLayout("float16", (groups, out_features)),
            "g_idx": TensorLayout("int32", (in_features,)),
        }

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        solution, options = to_solution(weight.packed()), Options.of(**weight.layout.metadata)
        codes, columns = solution.codes, weight.layout.shape[1]
        g_idx = torch.arange(columns, dtype=torch.int32) // options.group(columns)
        if solution.permutation is not None:
            places = torch.argsort(solution.permutation)
            codes, g_idx = codes.index_select(1, places), g_idx.index_select(0, places)
        zeros = solution.zeros - 1 if self.spec.name == V1 else solution.zeros
        return {
            "qweight": words.pack(codes.t(), options.bits),
            "qzeros": words.pack(zeros, options.bits).t().contiguous(),
            "scales": solution.scales.t().contiguous(),
            "g_idx": g_idx,
        }

    def config(self, weights: list[StoredWeight], kept: list[str]) -> dict[str, Any]:
        permuted = any(weight.layout.metadata["permuted"] for weight in weights)
        layers = {weight.module: _layer(weight.layout.metadata, permuted) for weight in weights}
        writers = [f"modulora-optq:{_version()}"]
        if self.spec.name == V1 and not all(layer.sym for layer in layers.values()):
            writers.append(READABLE_ZEROS)
        return compose(layers, kept, self.spec.name, writers)


def _check_shapes(
    module: str, layer: Layer, tensors: Mapping[str, TensorLayout]
) -> tuple[int, int]:
    """``(out, in)`` of a layer. Raises CheckpointError if its tensors or the config disagree."""
    bits, qweight = layer.bits, tensors[f"{module}.qweight"]
    if qweight.dtype != "int32" or len(qweight.shape) != 2:
        raise CheckpointError(
            f"{module}.qweight: expected int32 [in · bits / 32, out], got {qweight.dtype} "
            f"{list(qweight.shape)}"
        )
    rows, out_features = qweight.shape
    in_features = rows * words.WORD_BITS // bits
    groups = -(-in_features // layer.group(in_features)) if in_features else 0
    expected = {
        f"{module}.qzeros": TensorLayout("int32", (groups, out_features * bits // words.WORD_BITS)),
        f"{module}.scales": TensorLayout("float16", (groups, out_features)),
    }
    if not _is_absent(tensors.get(f"{module}.g_idx")):
        expected[f"{module}.g_idx"] = TensorLayout("int32", (in_features,))
    by = f"qweight and the config ({bits} bits, group size {layer.group_size})"
    check_tensors(expected, tensors, by)
    return out_features, in_features


def _is_absent(g_idx: TensorLayout | None) -> bool:
    return g_idx is None or g_idx.shape == (0,)


def permutation_of(
    name: str, size: int, columns: int, tensors: Mapping[str, TensorLayout], read: Read
) -> Tensor | None:
    """The columns sorted by group, int32 ``[in]``; None if they are sorted already.

    Args:
        name: of the tensor with the group of each column, which may be absent.
        size: columns of a group.

    Raises:
        CheckpointError: groups of other sizes.
    """
    if _is_absent(tensors.get(name)):
        return None
    g_idx = read(name)
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], torch.arange(columns, dtype=torch.int32) // size):
        groups, counts = g_idx.unique(return_counts=True)
        pairs = zip(counts.tolist()[:4], groups.tolist(), strict=False)
        raise CheckpointError(
            f"{name}: expected {size} columns in each group (fewer in the last), got "
            f"{', '.join(f'{n} (group {g})' for n, g in pairs)}, ...; such groups can't be read"
        )
    return None if bool((order.diff() == 1).all()) else order.to(torch.int32)


def _zeros(module: str, bits: int, config: Config, read: Read) -> Tensor:
    """The zero points, uint8 ``[out, G]``."""
    stored = read(f"{module}.qzeros")
    if config.stores_less_one and config.borrows:
        return words.unpack(words.add_one(stored, bits).t(), bits)
    zeros = words.unpack(stored.t(), bits)
    if not config.stores_less_one:
        return zeros
    lost = int((zeros == 2**bits - 1).sum())
    if lost:
        raise CheckpointError(
            f"{module}.qzeros: {lost} of {zeros.numel()} zeros are stored as {2**bits - 1}, which "
            "has no meaning in v1: they were 0, and storing 0 less one changed their neighbours. "
            f"Quantize the model again, or take its {V2} folder"
        )
    return zeros + 1


def _options(layer: Layer, zeros: Tensor, permutation: Tensor | None, columns: int) -> Options:
    return Options(
        bits=layer.bits,
        group_size=layer.group_size,
        symmetric=bool((zeros == 2 ** (layer.bits - 1)).all()),
        act_order=layer.desc_act or permutation is not None,
        static_groups=layer.desc_act and permutation is None and layer.group(columns) < columns,
        range_search=False,
    )


def _unpack(
    module: str,
    options: Options,
    permutation: Tensor | None,
    zeros: Callable[[Read], Tensor],
    read: Read,
) -> PackedWeight:
    scales = read_finite(read, f"{module}.scales").t().contiguous()
    codes = words.unpack(read(f"{module}.qweight"), options.bits)
    codes = codes if permutation is None else codes.index_select(0, permutation)
    return from_solution(Solution(codes.t(), scales, zeros(read), permutation), options)


def _check_storable(zeros: Tensor, bits: int, groups: int) -> None:
    lost = int((packing.unpack(zeros, bits, groups) == 0).sum())
    if lost:
        raise ModelError(
            f"{lost} zero points are 0; {V1} (v1) stores them less one, which would change their "
            f"neighbours. Write {V2} instead: --to {V2}"
        )


def _layer(metadata: Mapping[str, Any], permuted: bool) -> Layer:
    bits, size, sym = (metadata[name] for name in ("bits", "group_size", "symmetric"))
    return Layer(bits=bits, group_size=size, sym=sym, desc_act=permuted)


def _version() -> str:
    try:
        return version("modulora-optq")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0"
