"""Write a packed checkpoint, with or without an adapter, as a dense folder for plain transformers.

    W = diag(v) Ŵ diag(u) + s · B A      in fp32, one tile of rows at a time, rounded once

u and v are one for an adapter without channel scales. One parameter is dense at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modulora_core.arguments import checked
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import (
    DIGESTS,
    SMALL_FILES,
    check_digests,
    check_disk_space,
    check_output,
    whole_or_nothing,
    write_digests,
)
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.checkpoints.record import PackedSite
from modulora_core.checkpoints.shards import ShardWriter, plan_shards
from modulora_core.errors import OptionError, OutputError, WeightError
from modulora_core.hf.load_adapter import adapter_for, outline_with
from modulora_core.hf.peft_format import AdapterDelta
from modulora_core.models.store import is_finite
from modulora_core.models.system_errors import usable_path
from modulora_core.progress import Display, shown
from modulora_core.spec import PackedWeight, Quantizer, TensorLayout
from modulora_core.tiles import tile_bytes, tile_ranges

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The folder that was written.

    Attributes:
        bytes: size of all tensors; adapted: number of parameters that the adapter changed.
        task: transformers' class with the head of the adapter's task; None for a language model.
    """

    out: str
    dtype: str
    bytes: int
    adapted: int
    seconds: float
    peak_memory_bytes: int
    task: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@checked
def merge(
    model: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "bfloat16",
    progress: Display = True,
) -> MergeResult:
    """Write the weights of ``model``, with ``adapter`` merged in, as a dense folder.

    Args:
        model: a quantized MODEL: a folder, a file, or a Hub id. Another quantization of
            the adapter's base is allowed, and logs a warning.
        out: the folder to write; new or empty.
        adapter: a LoRA adapter in PEFT's format, a folder or Hub id. With the head of a task, such
            as a classifier's, the folder holds the model of that task.
        dtype: dtype of the written weights: float16, bfloat16 or float32.
        progress: called as ``progress("merging", done, total)`` after each parameter; by default a
            bar on a terminal, and False shows none.

    Raises:
        OptionError: an unknown dtype.
        AdapterError: the adapter does not fit the model.
        PluginError: the quantizer of the model is missing or cannot be used.
        RequestError: the model is not packed or cannot be read, its files of weights differ from
            their recorded SHA-256, or ``out`` holds something else.
        WeightError: a merged value is NaN or infinite in ``dtype``.
    """
    started, model = time.perf_counter(), os.fspath(model)
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise OptionError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    with PeakMemory("cpu") as peak, shown(progress, "merging", "parameters") as progress:
        out = usable_path(out, "output folder", OutputError)
        check_output(out)
        checkpoint = open_packed(model)
        checkpoint.check_whole()
        saved = None if adapter is None else adapter_for(checkpoint, adapter, heads=True)
        deltas, heads = ({}, {}) if saved is None else (saved.deltas, saved.heads)
        task = outline_with(checkpoint, saved) if saved is not None and heads else None
        layouts = dict(_dense_layouts(checkpoint, dtype))
        if task is not None:  # without the head of the language model
            base = checkpoint.record.base
            layouts = {name: layouts[name] for name in layouts if name.startswith(base)}
            layouts |= {name: TensorLayout(dtype, tuple(W.shape)) for name, W in heads.items()}
        shards = plan_shards(layouts)
        nbytes = sum(shard.nbytes for shard in shards)
        check_disk_space(out, nbytes + SMALL_FILES)
        if (checkpoint.path / DIGESTS).is_file():
            check_digests(checkpoint.path, ".safetensors", progress)
        with whole_or_nothing(out) as folder:
            checkpoint.copy_tokenizer(folder)
            writer = ShardWriter(folder, shards)
            for done, name in enumerate(layouts, 1):
                if name in heads:
                    W = heads[name].to(getattr(torch, dtype))
                else:
                    delta = delta_of(checkpoint, name, deltas)
                    W = merged_parameter(checkpoint, name, delta, getattr(torch, dtype))
                writer.write(name, {name: W})
                del W
                progress("merging", done, len(layouts))
            writer.finish()
            checkpoint.write_dense_config(folder, dtype, task)
            write_digests(folder)
    seconds = time.perf_counter() - started
    kind = None if task is None else type(task).__name__
    return MergeResult(str(out), dtype, nbytes, len(deltas), seconds, peak.nbytes, kind)


def _dense_layouts(checkpoint: PackedCheckpoint, dtype: str) -> Iterator[tuple[str, TensorLayout]]:
    for name, stored in checkpoint.parameters.items():
        if isinstance(stored, PackedSite):
            yield name, TensorLayout(dtype, stored.parameter_shape)
        else:
            is_float = getattr(torch, stored.dtype).is_floating_point
            yield name, TensorLayout(dtype, stored.shape) if is_float else stored


def delta_of(
    checkpoint: PackedCheckpoint, name: str, deltas: Mapping[str, AdapterDelta]
) -> AdapterDelta | None:
    """The adapter's change of a parameter; a stack of experts has the parameter's own name."""
    stored = checkpoint.parameters[name]
    is_stack = isinstance(stored, PackedSite) and stored.experts is not None
    return deltas.get(name if is_stack else name.removesuffix(".weight"))


def merged_parameter(
    checkpoint: PackedCheckpoint, name: str, delta: AdapterDelta | None, dtype: torch.dtype
) -> Tensor:
    """A parameter as the dense model has it, with the adapter's change. Raises WeightError."""
    W = _merged(checkpoint, name, delta, dtype)
    if is_finite(W):
        return W
    raise WeightError(
        f"{name}: expected finite values in {str(dtype).removeprefix('torch.')}, got NaN or Inf; "
        "choose a dtype of a wider range, or download or quantize the model again"
    )


def _merged(
    checkpoint: PackedCheckpoint, name: str, delta: AdapterDelta | None, dtype: torch.dtype
) -> Tensor:
    stored = checkpoint.parameters[name]
    if not isinstance(stored, PackedSite):
        tensor = checkpoint.tensor(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    quantizer = checkpoint.quantizer(stored)
    W = torch.empty(stored.parameter_shape, dtype=dtype)
    matrices = [W] if stored.experts is None else W
    changes = [None] * len(matrices) if delta is None else delta.matrices()
    for packed, matrix, change in zip(checkpoint.packed(name), matrices, changes, strict=True):
        _merge_matrix(quantizer, packed, change, matrix.t() if stored.transposed else matrix)
    return W


def _merge_matrix(
    quantizer: Quantizer, packed: PackedWeight, delta: AdapterDelta | None, W: Tensor
) -> None:
    """Write diag(v) Ŵ diag(u) + s · B A to ``W``, ``[out, in]`` of any strides, tile by tile."""
    out_features, in_features = packed.shape
    for start, stop in tile_ranges(out_features, in_features * 4, tile_bytes(W.device)):
        tile = quantizer.dequantize_tile(packed, (start, stop), torch.float32)
        if delta is not None:
            if delta.channel_scales is not None:
                tile = delta.channel_scales.of_rows(start, stop, tile)
            B = delta.B[start:stop].float()
            tile = torch.addmm(tile, B, delta.A.float(), alpha=delta.scale)
        W[start:stop] = tile
