"""Read and write LoRA adapters in PEFT's file format.

    adapter_config.json           PEFT's LoraConfig
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight  [r, in]
                                  base_model.model.<module>.lora_B.weight  [out, r]
                                  base_model.model.<name>  a parameter of a task's head
    modulora.json                 ours, optional: the base (modulora_core.hf.base_record)
    modulora_scales.safetensors   ours, optional: channel scales
                                  <module>.input_scale   u, [in]   float32
                                  <module>.output_scale  v, [out]  float32

Adapters on fused experts are laid out as :mod:`modulora_core.hf.expert_format` says.

An adapter changes a weight to ``diag(v) Ŵ diag(u) + s · B A``. s is α / r, or α / √r for rsLoRA
(Kalajdzievski 2023, arXiv 2312.03732). PEFT has no channel scales. A key of ours in
adapter_config.json makes PEFT warn that it ignores them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from torch import Tensor

from modulora_core.checkpoints.outputs import write_file
from modulora_core.errors import AdapterError
from modulora_core.hf.base_record import AdapterRecord, Dropout
from modulora_core.hf.expert_format import Factors, Stack, from_file, to_file
from modulora_core.hf.peft_config import check_config, check_rank, scale_of
from modulora_core.layers import ChannelScales
from modulora_core.models.folders import (
    ADAPTER_CONFIG,
    RECORD_FILE,
    SCALES_FILE,
    WEIGHTS_FILE,
)
from modulora_core.models.json_files import check_json, read_json
from modulora_core.models.locate import find_adapter
from modulora_core.models.store import is_finite

SCALES_KEY = "modulora_channel_scales"
"""The key of adapter_config.json that names the file of the channel scales."""

WITH_PEFT = "load it with peft: PeftModel.from_pretrained(load_model(MODEL), ADAPTER)"
"""Advice for adapters of PEFT that change more than packed layers and the head of a task."""

_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


class _Fields(BaseModel):
    """Fields of adapter_config.json that are used, and not checked elsewhere."""

    r: Annotated[int, Field(ge=1)] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_parameters: list[str] | None = None
    lora_dropout: Dropout | None = None


@dataclass(frozen=True, slots=True)
class AdapterDelta:
    """The change that an adapter makes to one weight: ``diag(v) Ŵ diag(u) + s · B A``.

    Attributes:
        A: ``[r, in]``, of experts ``[experts, r, in]``; B: ``[out, r]``, of experts
            ``[experts, out, r]``.
        scale: s.
        channel_scales: u and v; None for ones.
    """

    A: Tensor
    B: Tensor
    scale: float
    channel_scales: ChannelScales | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``, of experts ``(experts, out, in)``."""
        return *self.B.shape[:-1], self.A.shape[-1]

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def matrices(self) -> list[AdapterDelta]:
        """The change of each expert's matrix, or of the one matrix."""
        if self.A.dim() == 2:
            return [self]
        return [replace(self, A=A, B=B) for A, B in zip(self.A, self.B, strict=True)]


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter from disk. Read one with :func:`read_adapter`.

    Attributes:
        record: the contents of ``modulora.json``, or None.
        deltas: the change of each weight, by the path of its module, or of the stack of experts.
        heads: the parameters of a task's head, such as a classifier's, by name: PEFT's
            ``modules_to_save``.
    """

    folder: Path
    config: Mapping[str, Any]
    record: AdapterRecord | None
    deltas: Mapping[str, AdapterDelta]
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def base_name(self) -> str:
        """The base that the adapter names, or ``"(unknown)"``."""
        return str(self.config.get("base_model_name_or_path") or "(unknown)")

    @property
    def dropout(self) -> float:
        """The dropout of training (:func:`modulora_core.hf.peft_config.lora_config`)."""
        recorded = None if self.record is None else self.record.settings.dropout
        return float(recorded or self.config.get("lora_dropout") or 0.0)

    @property
    def ranks(self) -> list[int]:
        """The ranks by the config; of experts the file's matrices have more rows."""
        found = {self.config.get("r"), *(self.config.get("rank_pattern") or {}).values()}
        return sorted(rank for rank in found if isinstance(rank, int))

    @property
    def parameters(self) -> int:
        """The number of trained values."""
        return sum(
            delta.A.numel() + delta.B.numel() + (sum(delta.shape) if delta.channel_scales else 0)
            for delta in self.deltas.values()
        ) + sum(head.numel() for head in self.heads.values())

    @property
    def has_channel_scales(self) -> bool:
        return any(delta.channel_scales is not None for delta in self.deltas.values())


def read_adapter(
    path: str | Path, stacks: Mapping[str, Stack] | None = None, *, heads: bool = False
) -> SavedAdapter:
    """Read an adapter. Only JSON and safetensors are read.

    Args:
        path: a folder, or a repository on the Hub (``org/name``).
        stacks: the packed experts of the model, by path. Without them, an adapter on experts stays
            as in the file: one pair of matrices for all experts.
        heads: whether the caller can use the head of a task; else an adapter with one is refused.

    Raises AdapterError.
    """
    folder = find_adapter(path)
    config_file, weights_file = str(folder / ADAPTER_CONFIG), folder / WEIGHTS_FILE
    config = read_json(folder / ADAPTER_CONFIG, dict[str, Any], error=AdapterError)
    check_json(config, _Fields, config_file, error=AdapterError)
    check_config(config, f"adapter {folder}", heads=heads)
    record = None
    if (folder / RECORD_FILE).is_file():
        record = read_json(folder / RECORD_FILE, AdapterRecord, error=AdapterError)
    factors, saved_heads = _read_weights(weights_file, config.get("modules_to_save") or ())
    if stacks is not None:
        targets = config.get("target_parameters") or ()
        factors = from_file(factors, stacks, targets, str(weights_file))
        for module, (A, _) in factors.items():
            check_rank(config, module, A.shape[-2], config_file)
    deltas = {
        module: AdapterDelta(A, B, scale_of(config, module, A.shape[-2], config_file))
        for module, (A, B) in factors.items()
    }
    if SCALES_KEY in config or (record is not None and record.channel_scales):
        deltas = _with_scales(deltas, folder / SCALES_FILE)
    return SavedAdapter(folder, config, record, deltas, saved_heads)


def _read_weights(
    path: Path, modules_to_save: Sequence[str]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """A and B of each module, and the parameters of heads by name."""
    found: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for key, tensor in _read_tensors(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            name = key.removeprefix(_PREFIX)
            if name != key and any(f"{m}." in name for m in modules_to_save):
                heads[name] = tensor
                continue
            raise AdapterError(
                f"{path}: expected names {_PREFIX}<module>.lora_[AB].weight, got {key}; {WITH_PEFT}"
            )
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    if not found:
        raise AdapterError(f"{path}: expected tensors, found none")
    for module, factors in found.items():
        A, B = (list(factors[name].shape) if name in factors else None for name in "AB")
        if A is None or B is None or len(A) != 2 or len(B) != 2 or A[0] != B[1] or A[0] == 0:
            raise AdapterError(
                f"{path}: {module}: expected lora_A [r, in] and lora_B [out, r], got {A} and {B}"
            )
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}, heads


def _with_scales(deltas: Mapping[str, AdapterDelta], path: Path) -> dict[str, AdapterDelta]:
    """Add the channel scales. The file has exactly two vectors for each linear layer."""
    tensors = _read_tensors(path)
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    expected: dict[str, tuple[torch.dtype, list[int]]] = {}
    linear = {module: delta for module, delta in deltas.items() if delta.A.dim() == 2}
    for module, delta in linear.items():
        for kind, size in zip(("output", "input"), delta.shape, strict=True):
            expected[f"{module}.{kind}_scale"] = torch.float32, [size]
    for name in sorted(expected.keys() | found.keys()):
        if (wanted := expected.get(name)) != (got := found.get(name)):
            raise AdapterError(f"{path}: {name}: expected {wanted}, got {got}")
    scales = {
        module: ChannelScales(tensors[f"{module}.input_scale"], tensors[f"{module}.output_scale"])
        for module in linear
    }
    return {
        module: replace(delta, channel_scales=scales.get(module))
        for module, delta in deltas.items()
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        stored = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: expected a readable safetensors file: {error}; fetch the whole adapter again"
        ) from None
    # peft saves the base of an adapted head or embedding too
    tensors = {n: t for n, t in stored.items() if ".lora_" in n or ".base_layer." not in n}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not is_finite(tensor):
            got = "NaN or Inf" if tensor.is_floating_point() else tensor.dtype
            raise AdapterError(
                f"{path}: {name}: expected finite floats, got {got}; the file is damaged, or the "
                "training that wrote it diverged"
            )
    return tensors


def write_adapter(adapter: SavedAdapter, stacks: Mapping[str, Stack]) -> None:
    """Write an adapter to its folder, in the place of an older one.

    ``adapter_config.json`` comes last, so that an unfinished folder is no adapter.
    """
    factors, scales = dict[str, Tensor](), dict[str, Tensor]()
    laid = to_file({module: (d.A, d.B) for module, d in adapter.deltas.items()}, stacks)
    for module, (A, B) in laid.items():
        factors[f"{_PREFIX}{module}.lora_A.weight"] = A
        factors[f"{_PREFIX}{module}.lora_B.weight"] = B
    factors |= {f"{_PREFIX}{name}": values for name, values in adapter.heads.items()}
    for module, delta in adapter.deltas.items():
        if delta.channel_scales is not None:
            scales[f"{module}.input_scale"] = delta.channel_scales.input.to(torch.float32)
            scales[f"{module}.output_scale"] = delta.channel_scales.output.to(torch.float32)
    config, folder = dict(adapter.config), adapter.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
    _write_tensors(folder / WEIGHTS_FILE, factors)
    if scales:
        config[SCALES_KEY] = SCALES_FILE
        _write_tensors(folder / SCALES_FILE, scales)
    else:
        (folder / SCALES_FILE).unlink(missing_ok=True)
    if adapter.record is not None:
        write_file(folder / RECORD_FILE, adapter.record.model_dump_json(indent=2))
    write_file(folder / ADAPTER_CONFIG, json.dumps(config, indent=2))


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, safetensors.torch.save(on_cpu, metadata={"format": "pt"}))
