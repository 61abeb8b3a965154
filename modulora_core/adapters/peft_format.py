"""Read and write LoRA adapters in PEFT's file format.

    adapter_config.json           PEFT's LoraConfig
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight  [r, in]
                                  base_model.model.<module>.lora_B.weight  [out, r]
    modulora.json                 ours, optional: the base (modulora_core.adapters.record)
    modulora_scales.safetensors   ours, optional: channel scales
                                  <module>.input_scale   u, [in]   float32
                                  <module>.output_scale  v, [out]  float32

An adapter changes a weight to ``diag(v) Ŵ diag(u) + s · B A``. s is α / r, or α / √r for rsLoRA
(Kalajdzievski 2023, arXiv 2312.03732). PEFT has no channel scales. A key of ours in
adapter_config.json makes PEFT warn that it ignores them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor

from modulora_core.adapters.record import RECORD_FILE, AdapterRecord
from modulora_core.checkpoints.outputs import write_file
from modulora_core.errors import AdapterError
from modulora_core.models.json_files import read_json
from modulora_core.models.quiet import first_line
from modulora_core.packed import ChannelScales

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SCALES_FILE = "modulora_scales.safetensors"
SCALES_KEY = "modulora_channel_scales"
"""The key of adapter_config.json that names the file of the channel scales."""

_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_UNSUPPORTED_FIELDS = (
    "use_dora", "modules_to_save", "lora_bias", "layer_replication", "use_qalora",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Fields of a LoraConfig with which a module no longer computes ``W x + s · B A x``."""

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Values of ``init_lora_weights`` that change the weights of the base too."""


@dataclass(frozen=True, slots=True)
class AdapterDelta:
    """The change that an adapter makes to one weight: ``diag(v) Ŵ diag(u) + s · B A``.

    Attributes:
        A: ``[r, in]``; B: ``[out, r]``, as stored.
        scale: s.
        channel_scales: u and v; None for ones.
    """

    A: Tensor
    B: Tensor
    scale: float
    channel_scales: ChannelScales | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter from disk. Read one with :func:`read_adapter`.

    Attributes:
        folder: the folder of its files.
        config: PEFT's LoraConfig.
        record: the contents of ``modulora.json``, or None.
        deltas: the change of each module, by path.
    """

    folder: Path
    config: Mapping[str, Any]
    record: AdapterRecord | None
    deltas: Mapping[str, AdapterDelta]

    @property
    def base_name(self) -> str:
        """The base that the adapter names, or ``"(unknown)"``."""
        return str(self.config.get("base_model_name_or_path") or "(unknown)")

    @property
    def dropout(self) -> float:
        return float(self.config.get("lora_dropout") or 0.0)

    @property
    def has_channel_scales(self) -> bool:
        return any(delta.channel_scales is not None for delta in self.deltas.values())


def read_adapter(path: str | Path) -> SavedAdapter:
    """Read an adapter. Only JSON and safetensors are read.

    Args:
        path: a folder, or a repository on the Hub (``org/name``).

    Raises:
        AdapterError: the folder is missing or malformed, or has more than A, B and channel scales.
    """
    folder = _find(path)
    config = read_json(folder / CONFIG_FILE, dict[str, Any], error=AdapterError)
    _check_config(config, f"adapter {folder}")
    record = None
    if (folder / RECORD_FILE).is_file():
        record = read_json(folder / RECORD_FILE, AdapterRecord, error=AdapterError)
    deltas = {
        module: AdapterDelta(A, B, _scale(config, module, A.shape[0], str(folder)))
        for module, (A, B) in _read_factors(folder / WEIGHTS_FILE).items()
    }
    if SCALES_KEY in config or (record is not None and record.channel_scales):
        deltas = _with_scales(deltas, folder / SCALES_FILE)
    return SavedAdapter(folder, config, record, deltas)


def _read_factors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{path}: expected names {_PREFIX}<module>.lora_[AB].weight, got {key}"
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
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}


def _with_scales(deltas: Mapping[str, AdapterDelta], path: Path) -> dict[str, AdapterDelta]:
    """Add the channel scales. The file has exactly two vectors for each module."""
    tensors = _read_tensors(path)
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    expected: dict[str, tuple[torch.dtype, list[int]]] = {}
    for module, delta in deltas.items():
        out_features, in_features = delta.shape
        expected[f"{module}.input_scale"] = torch.float32, [in_features]
        expected[f"{module}.output_scale"] = torch.float32, [out_features]
    for name in sorted(expected.keys() | found.keys()):
        if (wanted := expected.get(name)) != (got := found.get(name)):
            raise AdapterError(f"{path}: {name}: expected {wanted}, got {got}")
    return {
        module: replace(
            delta,
            channel_scales=ChannelScales(
                *(tensors[f"{module}.{k}_scale"] for k in ("input", "output"))
            ),
        )
        for module, delta in deltas.items()
    }


def _scale(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """s: α / r, or α / √r for rsLoRA."""
    pattern = config.get("alpha_pattern") or {}
    try:
        # PEFT's rule: the first key that matches the end of the path, as a regular expression
        key = next((k for k in pattern if re.match(rf"(.*\.)?({k})$", module)), None)
        alpha = float(config["lora_alpha"] if key is None else pattern[key])
    except (re.error, TypeError, ValueError) as error:
        raise AdapterError(f"{where}: malformed alpha_pattern in {CONFIG_FILE}: {error}") from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _find(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(path)):
            raise AdapterError(f"adapter {path}: expected a folder or a Hub id (org/name)")
        folder = _download(str(path))
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            f"adapter {path}: expected {CONFIG_FILE} in it, found none; an unfinished run has its "
            "adapters in checkpoints/checkpoint-N"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = " (adapter_model.bin is a pickle: load it with peft and save it again)"
        raise AdapterError(
            f"adapter {path}: expected {WEIGHTS_FILE} in it, found none{hint if pickled else ''}"
        )
    return folder


def _download(hub_id: str) -> Path:
    try:
        files = [CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, SCALES_FILE]
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except Exception as error:  # the Hub's client, the HTTP library and the system raise their own
        raise AdapterError(
            f"adapter {hub_id}: no such folder, and the Hugging Face Hub did not provide it "
            f"({type(error).__name__}: {first_line(error)}); check the name, or give a folder"
        ) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)  # type: ignore[no-any-return]
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: expected a readable safetensors file: {error}; fetch the whole adapter again"
        ) from None


def _check_config(config: Mapping[str, Any], subject: str) -> None:
    """Refuse an adapter that is more than LoRA."""
    init = str(config.get("init_lora_weights", True)).lower()
    refused = {
        "peft_type": config.get("peft_type") != "LORA",
        "bias": config.get("bias", "none") != "none",
        "lora_alpha": not isinstance(config.get("lora_alpha"), int | float),
        "init_lora_weights": init.startswith(_CHANGED_BASE),
        **{name: bool(config.get(name)) for name in _UNSUPPORTED_FIELDS},
    }
    for name in filter(refused.get, refused):
        hint = "; convert it with peft's path_initial_model_for_weight_conversion"
        raise AdapterError(
            f"{subject}: expected a LoRA adapter with factors A and B of linear layers only, got "
            f"{name} = {config.get(name)!r}{hint if name == 'init_lora_weights' else ''}"
        )


def write_adapter(adapter: SavedAdapter) -> None:
    """Write an adapter to its folder, in the place of an older one.

    ``adapter_config.json`` comes last, so that an unfinished folder is no adapter.
    """
    factors, scales = dict[str, Tensor](), dict[str, Tensor]()
    for module, delta in adapter.deltas.items():
        factors[f"{_PREFIX}{module}.lora_A.weight"] = delta.A
        factors[f"{_PREFIX}{module}.lora_B.weight"] = delta.B
        if delta.channel_scales is not None:
            scales[f"{module}.input_scale"] = delta.channel_scales.input.to(torch.float32)
            scales[f"{module}.output_scale"] = delta.channel_scales.output.to(torch.float32)
    config, folder = dict(adapter.config), adapter.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    _write_tensors(folder / WEIGHTS_FILE, factors)
    if scales:
        config[SCALES_KEY] = SCALES_FILE
        _write_tensors(folder / SCALES_FILE, scales)
    else:
        (folder / SCALES_FILE).unlink(missing_ok=True)
    if adapter.record is not None:
        write_file(folder / RECORD_FILE, adapter.record.model_dump_json(indent=2))
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2))


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, safetensors.torch.save(on_cpu, metadata={"format": "pt"}))


def lora_config(deltas: Mapping[str, AdapterDelta]) -> dict[str, Any]:
    """PEFT's LoraConfig for the ranks and scales of ``deltas``, with fields since PEFT 0.17."""
    ranks = {module: delta.rank for module, delta in deltas.items()}
    alphas = {module: _whole(delta.scale * delta.rank) for module, delta in deltas.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "bias": "none",
        "init_lora_weights": True,
    }


def _whole(alpha: float) -> int | float:
    """``16.0`` as ``16``, as PEFT writes it."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
