"""From a dense model to a packed checkpoint, one parameter at a time.

:func:`plan_quantization` does all that can be refused, and knows every byte that will be written;
:func:`quantize` then streams: a parameter is read (memory-mapped), packed, written to its place, and dropped.
"""

from __future__ import annotations

import fnmatch
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modulora_core
from modulora_core import registry
from modulora_core.devices import pick_device
from modulora_core.errors import CheckpointError, OptionError, ShapeError, WorkError
from modulora_core.memory import PeakMemory
from modulora_core.outputs import check_disk_space, check_output, partial_name, whole_or_nothing, write_file
from modulora_core.record import PackedSite, QuantizationRecord, Recipe
from modulora_core.shards import MAX_SHARD_BYTES, Shard, ShardWriter, plan_shards
from modulora_core.sites import LinearSite, find_sites
from modulora_core.sources import ModelSource, open_model
from modulora_core.spec import PackedLayout, Quantizer, TensorLayout

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)`` in bytes of the source."""

REQUEST = "request.json"
"""In an unfinished folder: what was asked for, so that ``resume`` notices another request."""

SMALL_FILES = 64 * 2**20
"""Room for config, tokenizer and index when disk space is checked."""


@dataclass(frozen=True, slots=True)
class Override:
    """Another quantizer for the modules that match ``pattern`` (fnmatch on the dotted module path)."""

    pattern: str
    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What was written.

    Attributes:
        bits_per_weight: of the ``weights`` packed weights, everything counted.
        bytes: of all tensors written; source_bytes: of the same parameters before.
        kept: what was not quantized: reason → names.
    """

    out: str
    quantizer: str
    options: dict[str, Any]
    bits_per_weight: float
    bytes: int
    seconds: float
    peak_memory_bytes: int
    weights: int
    source_bytes: int
    kept: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is known before work: the record, a quantizer for each packed parameter, and the files."""

    record: QuantizationRecord
    quantizers: tuple[Quantizer, ...]
    shards: tuple[Shard, ...]

    def quantizer(self, site: PackedSite) -> Quantizer:
        return self.quantizers[site.recipe]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def plan_quantization(
    source: ModelSource,
    quantizer: str,
    options: Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[Override] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Plan:
    """Decide for every parameter how it is stored. Reads no weight.

    Raises:
        PluginError, OptionError: a quantizer or an option of it can't be used; a pattern matches nothing.
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
    """
    found = find_sites(source.skeleton(), include=include, exclude=exclude)
    choices = [
        registry.create(quantizer, options),
        *(registry.create(o.quantizer, o.options) for o in overrides),
    ]
    _check_patterns(overrides, found.linears)
    recipes = [Recipe.of(choice) for choice in choices]
    layouts: dict[tuple[int, tuple[int, int]], PackedLayout] = {}
    sites: list[PackedSite] = []
    weights: dict[str, int] = {}
    for linear in found.linears:
        recipe = _choose(linear, overrides)
        shape = (linear.out_features, linear.in_features)
        if (recipe, shape) not in layouts:
            layouts[recipe, shape] = _layout(choices[recipe], shape, linear)
        site = PackedSite(recipe, layouts[recipe, shape], linear.kind, linear.experts, linear.transposed)
        if site not in sites:
            sites.append(site)
        weights[linear.name] = sites.index(site)
    record = QuantizationRecord(tuple(recipes), tuple(sites), weights, _by_reason(found.kept), source.identity(), seed,
                                modulora_core.__version__)  # fmt: skip
    tensors = dict(_stored_tensors(source, record))
    return Plan(record, tuple(choices), tuple(plan_shards(tensors, max_shard_bytes)))


def _check_patterns(overrides: Sequence[Override], linears: Sequence[LinearSite]) -> None:
    for override in overrides:
        if not any(fnmatch.fnmatchcase(linear.module, override.pattern) for linear in linears):
            raise OptionError(f"override {override.pattern!r}: matches none of the {len(linears)} linear layers, "
                              f"such as {linears[0].module if linears else '(none)'}")  # fmt: skip


def _choose(linear: LinearSite, overrides: Sequence[Override]) -> int:
    """Index of the recipe: the last override that matches, else 0."""
    matching = [i for i, o in enumerate(overrides, 1) if fnmatch.fnmatchcase(linear.module, o.pattern)]
    return matching[-1] if matching else 0


def _layout(quantizer: Quantizer, shape: tuple[int, int], linear: LinearSite) -> PackedLayout:
    if quantizer.spec.calibration == "required":
        raise OptionError(
            f"{quantizer.spec.name}: needs calibration data, which `modulora quantize` does not gather yet"
        )
    try:
        quantizer.check_shape(shape)
    except ShapeError as error:
        raise ShapeError(
            f"{error} ({linear.module}); leave it out with --exclude or choose another quantizer"
        ) from None
    return quantizer.layout(shape)


def _by_reason(kept: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _stored_tensors(source: ModelSource, record: QuantizationRecord) -> Iterator[tuple[str, TensorLayout]]:
    for name, info in source.parameters.items():
        if name in record.weights:
            yield from record.sites[record.weights[name]].tensors(name)
        else:
            yield name, TensorLayout(str(info.dtype).removeprefix("torch."), tuple(info.shape))


def quantize(
    model: str,
    out: str | Path,
    quantizer: str,
    options: Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[Override] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resume: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize ``model`` into the folder ``out``.

    Args:
        model: a Hub id, a folder of safetensors, a ``.gguf`` file, or ``package:NAME``.
        out: a new or empty folder. It appears whole or not at all.
        quantizer: the plugin's name; options: of its ``Options``.
        overrides: other quantizers for some modules; the last that matches holds.
        include, exclude: fnmatch patterns on module paths (:func:`modulora_core.sites.find_sites`).
        device: where packing is computed. The checkpoint is the same kind of folder whatever the device.
        seed: for quantizers that draw random numbers; each parameter has its own stream.
        resume: go on with ``out.partial`` of a killed run of the same request.

    Raises:
        RequestError: anything that can be known beforehand, before any work. WorkError: what can't.
    """
    started = time.perf_counter()
    where = pick_device(device)
    with PeakMemory(where) as peak:
        out = Path(out)
        check_output(out)
        source = open_model(model, revision=revision)
        plan = plan_quantization(
            source, quantizer, options, overrides=overrides, include=include, exclude=exclude, seed=seed,
            max_shard_bytes=max_shard_bytes,
        )  # fmt: skip
        if resume:
            _check_same_request(partial_name(out), plan)
        check_disk_space(out, plan.nbytes + SMALL_FILES)
        source.validate()
        source.check_finite(_named(progress, "checking"))
        with whole_or_nothing(out, resume=resume) as folder:
            write_file(folder / REQUEST, json.dumps(plan.record.to_json()))
            writer = ShardWriter(folder, plan.shards, resume=resume)
            _pack_all(source, plan, writer, where, progress)
            writer.finish()
            _write_config(source, plan.record, folder)
            source.copy_tokenizer(folder)
            (folder / REQUEST).unlink()
    first = plan.record.recipes[0]
    return QuantizeResult(
        out=str(out), quantizer=first.quantizer, options=dict(first.options),
        bits_per_weight=plan.record.bits_per_weight, bytes=plan.nbytes, seconds=time.perf_counter() - started,
        peak_memory_bytes=peak.nbytes, weights=sum(site.weights for _, site in plan.record.items()),
        source_bytes=sum(info.nbytes for info in source.parameters.values()),
        kept=dict(plan.record.kept),
    )  # fmt: skip


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def _check_same_request(folder: Path, plan: Plan) -> None:
    """Compare with the request that an unfinished folder was begun with, if there is one."""
    path = folder / REQUEST
    if not path.is_file():
        return
    request, before = plan.record.to_json(), json.loads(path.read_text())
    changed = [key for key in request if request[key] != before.get(key)]
    if changed:
        raise CheckpointError(f"{folder}: an unfinished run of another request (differs in {', '.join(changed)}); "
                              "start again without --resume")  # fmt: skip


def _pack_all(
    source: ModelSource, plan: Plan, writer: ShardWriter, device: torch.device, progress: Progress | None
) -> None:
    total = sum(info.nbytes for info in source.parameters.values())
    done = 0
    for name, tensor in source.tensors():
        if name not in writer.done:
            writer.write(name, _packed_tensors(name, tensor, plan, device))
        done += source.parameters[name].nbytes
        if progress is not None:
            progress("packing", done, total)


def _packed_tensors(name: str, tensor: Tensor, plan: Plan, device: torch.device) -> dict[str, Tensor]:
    index = plan.record.weights.get(name)
    if index is None:
        return {name: tensor}
    site = plan.record.sites[index]
    quantizer = plan.quantizer(site)
    stored: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(
            zlib.crc32(f"{plan.record.seed} {name}".encode())
        )  # its own stream, also when resumed
        for prefix, matrix in zip(site.prefixes(name), _matrices(tensor, site), strict=True):
            packed = quantizer.pack(matrix.to(device))
            if packed.layout != site.layout:
                raise WorkError(f"{name}: {quantizer.spec.name} packed it as {packed.layout}, but its layout() "
                                f"promised {site.layout}; report it to the plugin's author")  # fmt: skip
            stored |= {f"{prefix}.{key}": value.cpu() for key, value in packed.tensors.items()}
    return stored


def _matrices(tensor: Tensor, site: PackedSite) -> Iterator[Tensor]:
    """The ``[out, in]`` matrices of a parameter as the model stores it."""
    for matrix in [tensor] if site.experts is None else tensor:
        yield matrix.t() if site.transposed else matrix


def _write_config(source: ModelSource, record: QuantizationRecord, folder: Path) -> None:
    config = source.config
    config.architectures = [type(source.skeleton()).__name__]
    config.quantization_config = record.to_json()
    config.save_pretrained(folder)
