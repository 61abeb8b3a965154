"""Write an adapter for vLLM, whose LoRA loader reads less of PEFT's format than PEFT does.

The rules are in vLLM's ``vllm/lora/lora_model.py`` and ``peft_helper.py``:

* A module has the name that it has in the model's own checkpoint. Experts that are stored one by
  one there have one adapter each, ``experts.0.gate_proj``; other experts have PEFT's layout.
* All modules have the scale α / r of adapter_config.json. Patterns of ranks and alphas are ignored,
  so s is multiplied into B and α is r.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modulora_core.checkpoints.foreign.writers import AdapterWriter
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import check_output, whole_or_nothing
from modulora_core.errors import AdapterError, OptionError
from modulora_core.hf.expert_format import Stack, stacks_of
from modulora_core.hf.load_adapter import adapter_for
from modulora_core.hf.peft_format import (
    AdapterDelta,
    SavedAdapter,
    write_adapter,
)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The adapter that was written.

    Attributes:
        modules: the number of adapted modules in the file; rank: the largest, for vLLM's
            ``--max-lora-rank``.
    """

    out: str
    modules: int
    rank: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class VLLMAdapter(AdapterWriter):
    """``modulora convert ADAPTER OUT --to vllm --model MODEL``."""

    def write_adapter(
        self, adapter: str, out: str | Path, *, model: str | None = None
    ) -> ExportResult:
        if model is None:
            raise OptionError(f"--to {self.spec.name}: expected --model MODEL beside it, got none")
        return export_for_vllm(adapter, out, model=model)


def export_for_vllm(adapter: str, out: str | Path, *, model: str) -> ExportResult:
    """Write ``adapter`` into the folder ``out``, as vLLM takes it.

    Args:
        adapter: a LoRA adapter in PEFT's format, a folder or Hub id.
        out: a new or empty folder.
        model: the packed model of the adapter, a folder or Hub id.

    Raises:
        AdapterError: it does not fit the model, or has channel scales, which vLLM doesn't know; or
            the model's checkpoint stores an adapted layer together with others.
        RequestError: the model can't be read, or ``out`` holds something else.
    """
    check_output(Path(out))
    checkpoint = open_packed(model)
    outline = checkpoint.outline
    stacks = stacks_of(outline)
    saved = adapter_for(checkpoint, adapter)
    if saved.has_channel_scales:
        raise AdapterError(
            f"adapter {adapter}: expected A and B only, got channel scales, which vLLM doesn't "
            "know; write the dense model with both by `modulora merge`"
        )
    names = _stored_names(outline)
    shared = Counter(names.values())
    deltas: dict[str, AdapterDelta] = {}
    fused: dict[str, Stack] = {}
    for path, delta in saved.deltas.items():
        scaled = AdapterDelta(delta.A, delta.B * delta.scale, 1.0)
        if path not in stacks:
            if shared[names[path]] > 1:
                raise AdapterError(
                    f"{path}: expected a weight of its own in the model's checkpoint, and "
                    f"{names[path]} holds other layers too; merge the adapter instead"
                )
            deltas[names[path]] = scaled
            continue
        experts = _experts(outline, path, scaled)
        if not experts:
            fused[path] = stacks[path]
        deltas |= experts or {path: scaled}
    rank = max(delta.rank for delta in deltas.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": saved.base_name,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({p.rpartition(".")[2] for p in deltas if p not in fused}),
    }
    if fused:
        config["target_parameters"] = sorted({".".join(p.split(".")[-2:]) for p in fused})
    with whole_or_nothing(Path(out)) as folder:
        write_adapter(SavedAdapter(folder, config, None, deltas), fused)
    return ExportResult(str(out), len(deltas), rank)


def stored_parts(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Take a parameter apart into the tensors of the model's own checkpoint, by their names.

    The last dimension of ``tensor`` may differ from the parameter's if the conversion leaves it
    alone.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parts: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return parts


def _stored_names(model: Any) -> dict[str, str]:
    """The name of each linear layer in the model's checkpoint. Layers stored as one share it."""
    names = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            shape = torch.empty(layer.out_features, layer.in_features, device="meta")
            first = next(iter(stored_parts(model, f"{path}.weight", shape)))
            names[path] = first.removesuffix(".weight")
    return names


def _experts(model: Any, path: str, delta: AdapterDelta) -> dict[str, AdapterDelta]:
    """The adapter of each matrix that the model's checkpoint has for a stack; empty if it has one.

    A stack of gates and ups is two matrices on top of each other: B is split, and both have A.
    """
    B = stored_parts(model, path, delta.B)  # [experts, out, r]
    if set(B) == {path}:
        return {}
    of_each = len(B) // len(delta.B)
    A = stored_parts(model, path, torch.cat([delta.A] * of_each, dim=1))  # [experts, r, in]
    experts = {name.removesuffix(".weight"): AdapterDelta(A[name], B[name], 1.0) for name in B}
    for name, expert in experts.items():
        if not expert.A.shape[0] == expert.B.shape[1] == delta.rank:
            raise AdapterError(
                f"{name}: expected A [{delta.rank}, in] and B [out, {delta.rank}], got "
                f"{list(expert.A.shape)} and {list(expert.B.shape)}; merge it instead"
            )
    return experts
