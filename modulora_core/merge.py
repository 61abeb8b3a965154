"""A packed checkpoint, with or without an adapter, back to a dense folder that plain transformers loads.

    W = diag(v) Ŵ diag(u) + s · B A        in fp32, a tile of rows at a time, rounded once to the output's dtype

u and v are one but for an adapter with channel scales.

One parameter is dense at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modulora_core.adapters import AdapterDelta, adapter_deltas
from modulora_core.checkpoint import PackedCheckpoint, open_checkpoint
from modulora_core.errors import AdapterError, OptionError
from modulora_core.memory import PeakMemory
from modulora_core.outputs import check_disk_space, check_output, whole_or_nothing
from modulora_core.quantize import SMALL_FILES, Progress
from modulora_core.record import PackedSite
from modulora_core.shards import ShardWriter, plan_shards
from modulora_core.spec import PackedWeight, Quantizer, TensorLayout
from modulora_core.tiles import tile_bytes, tile_ranges

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was written."""

    out: str
    dtype: str
    bytes: int
    adapted: int
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def merge(
    model: str,
    out: str | Path,
    *,
    adapter: str | None = None,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
) -> MergeResult:
    """Write ``model``'s weights, with ``adapter`` merged in, as a dense folder of ``dtype``.

    Raises:
        OptionError: another dtype than float16, bfloat16, float32.
        AdapterError: the adapter has modules that the model hasn't, or of other shapes.
        RequestError: the model isn't packed, can't be read, or ``out`` holds something else.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise OptionError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    with PeakMemory("cpu") as peak:
        out = Path(out)
        check_output(out)
        checkpoint = open_checkpoint(model)
        deltas = {} if adapter is None else adapter_deltas(adapter)
        _check_deltas(checkpoint, deltas, adapter)
        shards = plan_shards(dict(_dense_tensors(checkpoint, dtype)))
        nbytes = sum(shard.nbytes for shard in shards)
        check_disk_space(out, nbytes + SMALL_FILES)
        with whole_or_nothing(out) as folder:
            writer = ShardWriter(folder, shards)
            for done, (name, tensor) in enumerate(_merged(checkpoint, deltas, getattr(torch, dtype)), 1):
                writer.write(name, {name: tensor})
                if progress is not None:
                    progress("merging", done, len(checkpoint.parameters))
            writer.finish()
            checkpoint.write_dense_config(folder, dtype)
            checkpoint.copy_tokenizer(folder)
    return MergeResult(str(out), dtype, nbytes, len(deltas), time.perf_counter() - started, peak.nbytes)


def _check_deltas(
    checkpoint: PackedCheckpoint, deltas: Mapping[str, AdapterDelta], adapter: str | None
) -> None:
    for module, delta in deltas.items():
        index = checkpoint.record.weights.get(f"{module}.weight")
        if index is None:
            raise AdapterError(
                f"adapter {adapter}: it adapts {module}, which {checkpoint.folder} has no packed weight of"
            )
        shape = checkpoint.record.sites[index].layout.shape
        if delta.shape != shape:
            raise AdapterError(
                f"adapter {adapter}: {module} is {list(delta.shape)} there and {list(shape)} in {checkpoint.folder}"
            )


def _dense_tensors(checkpoint: PackedCheckpoint, dtype: str) -> Iterator[tuple[str, TensorLayout]]:
    for name, stored in checkpoint.parameters.items():
        if isinstance(stored, PackedSite):
            yield name, TensorLayout(dtype, stored.parameter_shape)
        else:
            is_float = getattr(torch, stored.dtype).is_floating_point
            yield name, TensorLayout(dtype, stored.shape) if is_float else stored


def _merged(
    checkpoint: PackedCheckpoint, deltas: Mapping[str, AdapterDelta], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, stored in checkpoint.parameters.items():
        if not isinstance(stored, PackedSite):
            tensor = checkpoint.tensor(name)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
            continue
        delta = deltas.get(name.removesuffix(".weight"))
        quantizer = checkpoint.quantizer(stored)
        W = torch.empty(stored.parameter_shape, dtype=dtype)
        for packed, matrix in zip(checkpoint.packed(name), [W] if stored.experts is None else W, strict=True):
            _unpack(quantizer, packed, delta, matrix.t() if stored.transposed else matrix)
        yield name, W


def _unpack(quantizer: Quantizer, packed: PackedWeight, delta: AdapterDelta | None, W: Tensor) -> None:
    """Write diag(v) Ŵ diag(u) + s · B A to ``W``, ``[out, in]`` of any strides; fp32 exists for one tile only."""
    out_features, in_features = packed.shape
    for start, stop in tile_ranges(out_features, in_features * 4, tile_bytes(W.device)):
        tile = quantizer.dequantize_tile(packed, (start, stop), torch.float32)
        if delta is not None:
            if delta.channel_scales is not None:
                tile = delta.channel_scales.of_rows(start, stop, tile)
            tile = torch.addmm(tile, delta.B[start:stop].float(), delta.A.float(), alpha=delta.scale)
        W[start:stop] = tile
