"""LoRA adapters in PEFT's file format: what is in the folder, without a model.

    adapter_config.json           PEFT's LoraConfig
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight  [r, in]
                                  base_model.model.<module>.lora_B.weight  [out, r]
    modulora.json                 ours, and optional: which base the adapter was made for
    modulora_scales.safetensors   ours, and optional: channel scales (:mod:`modulora_core.adapters.scales_format`)

An adapter changes a module's weight by ``s · B A``, with ``s = α / r``, or ``α / √r`` for rsLoRA
(Kalajdzievski 2023, arXiv 2312.03732). PEFT has no channel scales: a key of ours in adapter_config.json makes it
warn that it leaves something out.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modulora_core.adapters.record import RECORD_FILE, AdapterRecord
from modulora_core.adapters.scales_format import SCALES_FILE, ScalesFile, write_scales
from modulora_core.checkpoints.outputs import write_file
from modulora_core.errors import AdapterError
from modulora_core.packed import ChannelScales

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SCALES_KEY = "modulora_channel_scales"
"""Names the file of the channel scales in adapter_config.json. PEFT's warning of an unknown key shows it."""

_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_UNSUPPORTED_FIELDS = (
    "use_dora", "modules_to_save", "lora_bias", "layer_replication", "use_qalora", "trainable_token_indices",
    "target_parameters", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
"""Fields of a LoraConfig with which a module no longer computes ``W x + s · B A x``."""

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Values of ``init_lora_weights`` that change the base's weights, so that the base alone isn't enough."""


@dataclass(frozen=True, slots=True)
class AdapterDelta:
    """What an adapter adds to one module's weight: ``s · B A``, ``[out, in]``; and what scales that weight before.

    Attributes:
        A: ``[r, in]``; B: ``[out, r]``, as stored.
        scale: s.
        channel_scales: u and v of diag(v) Ŵ diag(u) + s · B A; None stands for ones.
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


class AdapterFolder(Mapping[str, AdapterDelta]):
    """An adapter on disk: module path → :class:`AdapterDelta`, read from the file when it is asked for.

    Args:
        path: a folder, or a repository on the Hub (``org/name``). Only safetensors are read.

    Attributes:
        config: PEFT's LoraConfig.
        record: ``modulora.json``, where there is one.
        shapes: ``(out, r, in)`` of each module.
        scales: s of each module.
        has_channel_scales: whether each module has channel scales.

    Raises:
        AdapterError: nothing is there, it is malformed, or it is more than a LoRA adapter and channel scales.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = _find(path)
        self.config = _read_json(self.folder / CONFIG_FILE)
        _check_config(self.config, str(self.folder))
        self.record: AdapterRecord | None = None
        if (self.folder / RECORD_FILE).is_file():
            self.record = AdapterRecord.from_json(
                _read_json(self.folder / RECORD_FILE), str(self.folder)
            )
        self._open_weights()
        self.has_channel_scales = self._says_scales()
        shapes = {module: (out, in_) for module, (out, _, in_) in self.shapes.items()}
        self._channel_scales = ScalesFile(self.folder, shapes) if self.has_channel_scales else None

    def _says_scales(self) -> bool:
        """Whether there are channel scales, in which both JSON files must agree."""
        recorded = self.record is not None and self.record.channel_scales
        if recorded != bool(self.config.get(SCALES_KEY)):
            named, other = (RECORD_FILE, CONFIG_FILE) if recorded else (CONFIG_FILE, RECORD_FILE)
            raise AdapterError(
                f"adapter {self.folder}: {named} says that it has channel scales, {other} doesn't; the files are "
                "of different adapters, or one is missing: fetch the adapter again, whole"
            )
        return recorded

    def _open_weights(self) -> None:
        weights = self.folder / WEIGHTS_FILE
        try:
            self._file = safe_open(weights, framework="pt")
            shapes = {
                key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()
            }  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{weights}: not a readable safetensors file: {error}") from None
        self.shapes = _module_shapes(shapes, str(weights))
        self.scales = {
            module: self._scale(module, rank) for module, (_, rank, _) in self.shapes.items()
        }

    def _scale(self, module: str, rank: int) -> float:
        pattern = self.config.get("alpha_pattern") or {}
        try:
            # PEFT's rule: the first key that matches the end of the path, as a regular expression
            key = next((k for k in pattern if re.match(rf"(.*\.)?({k})$", module)), None)
            alpha = float(self.config["lora_alpha"] if key is None else pattern[key])
        except (re.error, TypeError, ValueError) as error:
            raise AdapterError(
                f"{self.folder}: malformed alpha_pattern in {CONFIG_FILE}: {error}"
            ) from None
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def base_name(self) -> str:
        """The base that the adapter names, or ``"(unknown)"``."""
        return str(self.config.get("base_model_name_or_path") or "(unknown)")

    def __getitem__(self, module: str) -> AdapterDelta:
        if module not in self.shapes:
            raise KeyError(module)
        A, B = (self._file.get_tensor(f"{_PREFIX}{module}.lora_{factor}.weight") for factor in "AB")
        scales = None if self._channel_scales is None else self._channel_scales[module]
        return AdapterDelta(A, B, self.scales[module], scales)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def adapter_deltas(path: str | Path) -> AdapterFolder:
    """Module path → :class:`AdapterDelta` of an adapter folder or Hub id, each read when it is asked for.

    Raises:
        AdapterError: see :class:`AdapterFolder`.
    """
    return AdapterFolder(path)


def _find(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(path)):
            raise AdapterError(
                f"adapter {path}: no such folder, and it doesn't look like a Hub id (org/name)"
            )
        folder = _download(str(path))
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            f"adapter {path}: expected {CONFIG_FILE} in it, found none; an unfinished run has its adapters "
            "in checkpoints/checkpoint-N"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        pickle = " (adapter_model.bin is a pickle, which is not read: load it with peft and save it again)"
        hint = pickle if (folder / "adapter_model.bin").is_file() else ""
        raise AdapterError(f"adapter {path}: expected {WEIGHTS_FILE} in it, found none{hint}")
    return folder


def _download(hub_id: str) -> Path:
    try:
        files = [CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, SCALES_FILE]
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except (
        Exception
    ) as error:  # the Hub's client raises its own, the HTTP library's and the system's errors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise AdapterError(
            f"adapter {hub_id}: no such folder here, and the Hugging Face Hub didn't give it "
            f"({type(error).__name__}: {reason}); check the name, or give a folder"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path}: expected an object, got {type(data).__name__}")
    return data


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse what is more than LoRA."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(
            f"adapter {where}: expected peft_type LORA, got {peft_type!r}; only LoRA is supported"
        )
    for name in _UNSUPPORTED_FIELDS:
        if config.get(name):
            raise AdapterError(
                f"adapter {where}: it has {name} = {config[name]!r}, which isn't supported; only the factors "
                "A and B of linear layers are"
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"adapter {where}: expected bias 'none', got {config['bias']!r}: it trained biases too"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGED_BASE):
        raise AdapterError(
            f"adapter {where}: it was initialised by {init!r}, which changes the base's weights too; convert "
            "it with peft's path_initial_model_for_weight_conversion"
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise AdapterError(
            f"adapter {where}: lora_alpha: expected a number, got {config.get('lora_alpha')!r}"
        )


def _module_shapes(
    shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, tuple[int, int, int]]:
    """``(out, r, in)`` of each module, from the shapes of the tensors."""
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{where}: expected names {_PREFIX}<module>.lora_[AB].weight, got {key}"
            )
        factors.setdefault(match["module"], {})[match["factor"]] = shape
    for module, found in factors.items():
        A, B = found.get("A"), found.get("B")
        if A is None or B is None or len(A) != 2 or len(B) != 2 or A[0] != B[1] or A[0] == 0:
            got = " and ".join("none" if shape is None else str(list(shape)) for shape in (A, B))
            raise AdapterError(
                f"{where}: {module}: expected lora_A [r, in] and lora_B [out, r], got {got}"
            )
    if not factors:
        raise AdapterError(f"{where}: it holds no tensors")
    return {
        module: (found["B"][0], found["A"][0], found["A"][1]) for module, found in factors.items()
    }


def write_adapter(
    folder: Path,
    deltas: Mapping[str, AdapterDelta],
    record: AdapterRecord,
    *,
    target_modules: list[str],
    dropout: float,
    fan_in_fan_out: bool,
) -> None:
    """Write an adapter. ``adapter_config.json`` comes last: a folder without it isn't an adapter.

    Args:
        folder: it may exist; an adapter in it is replaced.
        deltas: of each module.
        record: for ``modulora.json``; its base's name is also PEFT's ``base_model_name_or_path``. Where it says
            that there are channel scales, each of ``deltas`` has them.
        target_modules: names that select exactly these modules in the base, by PEFT's rules.
        dropout: for training on.
        fan_in_fan_out: whether the modules are ``Conv1D`` in the dense model.
    """
    config = _config(deltas, record.base.name, target_modules, dropout, fan_in_fan_out)
    if record.channel_scales:
        config[SCALES_KEY] = SCALES_FILE
    tensors = {f"{_PREFIX}{module}.lora_{factor}.weight": getattr(delta, factor).detach().cpu().contiguous()
               for module, delta in deltas.items() for factor in "AB"}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    write_file(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_scales(
        folder, {m: d.channel_scales for m, d in deltas.items() if d.channel_scales is not None}
    )
    write_file(folder / RECORD_FILE, json.dumps(record.to_json(), indent=2))
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2))


def _config(
    deltas: Mapping[str, AdapterDelta],
    base: str,
    target_modules: list[str],
    dropout: float,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """PEFT's LoraConfig, with fields that PEFT knows since 0.17; those left out have their defaults there."""
    ranks = {module: delta.rank for module, delta in deltas.items()}
    alphas = {module: _whole(delta.scale * delta.rank) for module, delta in deltas.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "target_modules": target_modules,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _whole(alpha: float) -> int | float:
    """``16.0`` as ``16``, as PEFT writes it. An α of rsLoRA stays as it is."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
