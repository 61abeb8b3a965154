"""Rewrite a packed checkpoint in another format: from another tool's to ours, or from ours.

Packed weights keep their values: nothing is quantized again. One layer is in memory at a time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modulora_core import registry
from modulora_core.arguments import checked
from modulora_core.checkpoints.foreign.writers import AdapterWriter, writer_of
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import (
    SMALL_FILES,
    check_disk_space,
    check_output,
    whole_or_nothing,
    write_digests,
)
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.checkpoints.record import QUANT_METHOD, PackedSite
from modulora_core.checkpoints.shards import MAX_SHARD_BYTES, ShardWriter, plan_shards
from modulora_core.errors import ModelError, OptionError, OutputError, ShapeError
from modulora_core.models import installed_formats
from modulora_core.models.formats import CheckpointFormat, StoredWeight
from modulora_core.models.system_errors import usable_path
from modulora_core.progress import Display, shown
from modulora_core.spec import TensorLayout


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """The result of :func:`convert`: ``weights`` are the logical ones, ``bytes`` of all tensors."""

    out: str
    format: str
    source_format: str
    weights: int
    bytes: int
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@checked
def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    revision: str | None = None,
    progress: Display = True,
) -> ConvertResult:
    """Write the packed checkpoint ``source`` to the folder ``out`` in another format.

    ::

        convert("org/model-of-another-tool", "packed", "modulora")

    Packed weights keep their values. The formats of other tools come with the installed quantizers.

    Args:
        source: a folder of ours or of a format that an installed plugin reads, or a Hub id.
        out: a new or empty folder. It appears whole or not at all.
        to: ``"modulora"``, or the name of an installed format.
        max_shard_bytes: the size of a file, in bytes.
        revision: a branch, tag or commit of a Hub repository.
        progress: called as ``progress("converting", done, total)`` after each parameter; by default
            a bar on a terminal, and False shows none.

    Raises:
        OptionError: no such format, or ``out`` can't be written in it, or ``source`` is in it.
        ModelError, ShapeError: ``source`` isn't packed, or the format can't hold the named weight.
        RequestError: ``source`` can't be read, or ``out`` holds something else or is too small.
            Every error is raised before any work.
    """
    started, source = time.perf_counter(), os.fspath(source)
    with PeakMemory("cpu") as peak, shown(progress, "converting", "parameters") as progress:
        out = usable_path(out, "output folder", OutputError)
        check_output(out)
        writer = None if to == QUANT_METHOD else installed_formats.create_writer(to)
        checkpoint = open_packed(source, revision=revision)
        if writer is None and checkpoint.format == QUANT_METHOD:
            raise OptionError(
                f"--to {to}: {source} is in this format already; expected another, one of "
                f"{', '.join(installed_formats.specs()) or '(none is installed)'}"
            )
        checkpoint.check_whole()
        parts = {name: _part(checkpoint, name, writer) for name in checkpoint.parameters}
        layouts = {name: t for part in parts.values() for name, t in part.layouts.items()}
        if writer is None:
            layouts |= checkpoint.record.guard
        shards = plan_shards(layouts, max_shard_bytes)
        nbytes = sum(shard.nbytes for shard in shards)
        check_disk_space(out, nbytes + SMALL_FILES)
        with whole_or_nothing(out) as folder, torch.no_grad():
            checkpoint.copy_tokenizer(folder)
            shard_writer = ShardWriter(folder, shards)
            for done, (name, part) in enumerate(parts.items(), 1):
                shard_writer.write(name, part.read())
                progress("converting", done, len(parts))
            shard_writer.finish()
            _write_config(checkpoint, writer, folder)
            write_digests(folder)
    weights = sum(site.numel for _, site in checkpoint.record.items())
    seconds = time.perf_counter() - started
    return ConvertResult(str(out), to, checkpoint.format, weights, nbytes, seconds, peak.nbytes)


@dataclass(frozen=True, slots=True)
class _Part:
    """The tensors that store one parameter: known from headers, and read on request."""

    layouts: Mapping[str, TensorLayout]
    read: Callable[[], Mapping[str, Tensor]]


def adapter_writer(name: str) -> AdapterWriter | None:
    """The writer of adapters in the format ``name``; None if no installed plugin writes such ones.

    Raises PluginError: the plugin can't be used, or several plugins have this format.
    """
    named = [entry for entry in registry.formats() if entry.name == name]
    if not named:
        return None
    entry = registry.usable(named)
    assert entry.spec is not None  # usable() returns usable entries only
    found = installed_formats.InstalledFormat(entry.spec, entry)
    if not entry.spec.adapters:
        return writer_of(found)
    return found.create(entry.spec.location, AdapterWriter)  # type: ignore[type-abstract]


def _part(checkpoint: PackedCheckpoint, name: str, writer: CheckpointFormat | None) -> _Part:
    stored = checkpoint.parameters[name]
    if not isinstance(stored, PackedSite):
        return _Part({name: stored}, lambda: {name: checkpoint.tensor(name)})
    if writer is None:
        return _Part(dict(stored.tensors(name)), lambda: _as_it_is(checkpoint, name, stored))
    weight = _stored_weight(checkpoint, name, stored, writer)
    try:
        layouts = writer.plan(weight)
    except (ModelError, ShapeError) as error:
        raise type(error)(f"{weight.module}: {error}") from None
    prefix = f"{weight.module}{'_' if weight.experts else '.'}"

    def read() -> dict[str, Tensor]:
        for _ in checkpoint.packed(name):  # refuses scales that are NaN or infinite
            pass
        return {prefix + part: tensor for part, tensor in writer.tensors(weight).items()}

    return _Part({prefix + part: layout for part, layout in layouts.items()}, read)


def _as_it_is(checkpoint: PackedCheckpoint, name: str, site: PackedSite) -> dict[str, Tensor]:
    return {
        f"{prefix}.{part}": tensor
        for prefix, weight in zip(site.prefixes(name), checkpoint.packed(name), strict=True)
        for part, tensor in weight.tensors.items()
    }


def _stored_weight(
    checkpoint: PackedCheckpoint, name: str, site: PackedSite, writer: CheckpointFormat
) -> StoredWeight:
    refused = {
        "embedding": "a packed input embedding",
        "experts": None if writer.stacks else f"a stack of {site.experts} experts in one parameter",
        "conv1d": None if writer.conv1d else "a Conv1D layer",
    }
    got = refused.get(site.kind)
    if got is not None:
        raise ModelError(
            f"{name}: {got}, which the format {writer.spec.name} doesn't hold, so this model can't "
            "be written in it"
        )
    module = name.removesuffix(".weight")
    bias = checkpoint.parameters.get(f"{module}.bias")
    return StoredWeight(
        module=module,
        quantizer=checkpoint.quantizer(site),
        layout=site.layout,
        read=lambda part: checkpoint.tensor(f"{name}.{part}"),
        experts=site.experts,
        transposed=site.transposed,
        bias=bias if isinstance(bias, TensorLayout) else None,
    )


def _write_config(
    checkpoint: PackedCheckpoint, writer: CheckpointFormat | None, folder: Path
) -> None:
    config = {**checkpoint.config, "quantization_config": checkpoint.record.to_json()}
    if writer is not None:
        weights = [
            _stored_weight(checkpoint, name, site, writer)
            for name, site in checkpoint.record.items()
        ]
        kept = [
            name.removesuffix(".weight")
            for name, stored in checkpoint.parameters.items()
            if name.endswith(".weight")
            and isinstance(stored, TensorLayout)
            and len(stored.shape) == 2
        ]
        config["quantization_config"] = writer.config(weights, kept)
        if writer.dtype is not None:
            config.pop("torch_dtype", None)  # the older name
            config["dtype"] = writer.dtype
        for file in writer.spec.config_files:
            (folder / file).write_text(json.dumps(config["quantization_config"], indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
