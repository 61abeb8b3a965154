"""A packed checkpoint, with or without an adapter, back to a dense folder that plain transformers loads.

    W = diag(v) Ŵ diag(u) + s · B A        in fp32, a tile of rows at a time, rounded once to the output's dtype

u and v are one but for an adapter with channel scales.

One parameter is dense at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modulora_core.adapters.lora import AdapterDelta, AdapterFolder, adapter_deltas
from modulora_core.adapters.record import describe_base
from modulora_core.checkpoints.checkpoint import PackedCheckpoint, open_checkpoint
from modulora_core.checkpoints.hf_quantizer import ModuLoRAConfig, install
from modulora_core.checkpoints.outputs import (
    SMALL_FILES,
    check_disk_space,
    check_output,
    whole_or_nothing,
)
from modulora_core.checkpoints.record import PackedSite
from modulora_core.checkpoints.shards import ShardWriter, plan_shards
from modulora_core.devices.memory import PeakMemory
from modulora_core.errors import AdapterError, OptionError
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.progress import Progress
from modulora_core.models.quiet import quiet
from modulora_core.spec import PackedWeight, Quantizer, TensorLayout
from modulora_core.tiles import tile_bytes, tile_ranges

DTYPES = ("float16", "bfloat16", "float32")

logger = logging.getLogger(__name__)


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

    ``model`` may be another quantization of the adapter's base than the one that it was trained on: then a warning is logged.

    Raises:
        OptionError: another dtype than float16, bfloat16, float32.
        AdapterError: the adapter has modules that the model hasn't, or of other shapes, or was made for another architecture.
        PluginError: what packed the model isn't installed, or can't be used.
        RequestError: the model isn't packed, can't be read, or ``out`` holds something else.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise OptionError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    with PeakMemory("cpu") as peak:
        out = Path(out)
        check_output(out)
        checkpoint = open_checkpoint(model)
        for site in checkpoint.record.sites:
            checkpoint.quantizer(site)  # a missing plugin is told before anything is written
        deltas: Mapping[str, AdapterDelta] = {} if adapter is None else _deltas(checkpoint, adapter)
        shards = plan_shards(dict(_dense_tensors(checkpoint, dtype)))
        nbytes = sum(shard.nbytes for shard in shards)
        check_disk_space(out, nbytes + SMALL_FILES)
        with whole_or_nothing(out) as folder:
            writer = ShardWriter(folder, shards)
            for done, (name, tensor) in enumerate(
                _merged(checkpoint, deltas, getattr(torch, dtype)), 1
            ):
                writer.write(name, {name: tensor})
                if progress is not None:
                    progress("merging", done, len(checkpoint.parameters))
            writer.finish()
            checkpoint.write_dense_config(folder, dtype)
            checkpoint.copy_tokenizer(folder)
    return MergeResult(
        str(out), dtype, nbytes, len(deltas), time.perf_counter() - started, peak.nbytes
    )


def _deltas(checkpoint: PackedCheckpoint, adapter: str) -> AdapterFolder:
    """What ``adapter`` changes. Raises AdapterError where it doesn't fit the model; warns where it was made for another one like it."""
    deltas = adapter_deltas(adapter)
    for module, (out_features, _, in_features) in deltas.shapes.items():
        index = checkpoint.record.weights.get(f"{module}.weight")
        if index is None:
            raise AdapterError(
                f"adapter {adapter}: it adapts {module}, which {checkpoint.folder} has no packed weight of"
            )
        shape = checkpoint.record.sites[index].layout.shape
        if (out_features, in_features) != shape:
            raise AdapterError(
                f"adapter {adapter}: {module} is {[out_features, in_features]} there and {list(shape)} in {checkpoint.folder}"
            )
    if deltas.record is None:  # peft's own: nothing more is known of its base
        return deltas
    made_for, here = (
        deltas.record.base,
        describe_base(_small_parts(checkpoint), str(checkpoint.folder)),
    )
    if made_for.architecture != here.architecture:
        raise AdapterError(f"adapter {adapter}: made for the base {made_for.name}, which has other linear layers beside the adapter's than "
                           f"{checkpoint.folder}; give the model that it was trained on")  # fmt: skip
    difference = made_for.difference(here)
    if difference:
        logger.warning("adapter %s: %s", adapter, difference)
    return deltas


def _small_parts(checkpoint: PackedCheckpoint) -> nn.Module:
    """The model on the meta device, of which only norms and biases have values: all that a base is known by."""
    from transformers import AutoConfig

    with quiet():
        config = (
            checkpoint.foreign.source.config
            if checkpoint.foreign is not None
            else AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        )
        skeleton = build_skeleton(config, torch.float32)
    skeleton.config.quantization_config = ModuLoRAConfig(
        **checkpoint.record.to_json()
    )  # as in a loaded model, which is asked for it
    model: nn.Module = skeleton
    install(model, checkpoint.record)
    for name in [name for name, parameter in model.named_parameters() if parameter.dim() == 1]:
        path, _, leaf = name.rpartition(".")
        value = nn.Parameter(checkpoint.tensor(name), requires_grad=False)
        model.get_submodule(path).register_parameter(leaf, value)
    return model


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
        for packed, matrix in zip(
            checkpoint.packed(name), [W] if stored.experts is None else W, strict=True
        ):
            _unpack(quantizer, packed, delta, matrix.t() if stored.transposed else matrix)
        yield name, W


def _unpack(
    quantizer: Quantizer, packed: PackedWeight, delta: AdapterDelta | None, W: Tensor
) -> None:
    """Write diag(v) Ŵ diag(u) + s · B A to ``W``, ``[out, in]`` of any strides; fp32 exists for one tile only."""
    out_features, in_features = packed.shape
    for start, stop in tile_ranges(out_features, in_features * 4, tile_bytes(W.device)):
        tile = quantizer.dequantize_tile(packed, (start, stop), torch.float32)
        if delta is not None:
            if delta.channel_scales is not None:
                tile = delta.channel_scales.of_rows(start, stop, tile)
            tile = torch.addmm(
                tile, delta.B[start:stop].float(), delta.A.float(), alpha=delta.scale
            )
        W[start:stop] = tile
