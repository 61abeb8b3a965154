"""Read and write PEFT's ``adapter_config.json``.

s is α / r, or α / √r for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from modulora_core.errors import AdapterError
from modulora_core.lora.targets import shortest_names
from modulora_core.models.json_files import matches

_UNSUPPORTED_FIELDS = (
    "use_dora", "lora_bias", "layer_replication", "use_qalora",
    "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
"""Fields of a LoraConfig with which a module no longer computes ``W x + s · B A x``."""

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Values of ``init_lora_weights`` that change the weights of the base too."""


_OLD_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names in which PEFT 0.21 sees experts of transformers 4, before they were fused.

In a mixture of experts PEFT replaces target modules of these names by the fused experts
(``peft.utils.transformers_weight_conversion``). A shared expert or a dense layer is then left out.
PEFT finds it as a target parameter, ``NAME.weight``.
"""


TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
         "ForQuestionAnswering": "QUESTION_ANS"}  # fmt: skip
"""PEFT's name of the task of a class with a head, by the end of the class's name."""


def check_config(config: Mapping[str, Any], subject: str, *, heads: bool = False) -> None:
    """Refuse an adapter that is more than LoRA, or than LoRA and ``heads``. Raises AdapterError."""
    init = str(config.get("init_lora_weights", True)).lower()
    refused = {
        "peft_type": config.get("peft_type") != "LORA",
        "bias": config.get("bias", "none") != "none",
        "lora_alpha": not isinstance(config.get("lora_alpha"), int | float),
        "init_lora_weights": init.startswith(_CHANGED_BASE),
        "modules_to_save": bool(config.get("modules_to_save")) and not heads,
        **{name: bool(config.get(name)) for name in _UNSUPPORTED_FIELDS},
    }
    for name in filter(refused.get, refused):
        hint = "; convert it with peft's path_initial_model_for_weight_conversion"
        raise AdapterError(
            f"{subject}: expected a LoRA adapter with factors A and B of linear layers only, got "
            f"{name} = {config.get(name)!r}{hint if name == 'init_lora_weights' else ''}"
        )


def scale_of(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """Compute s of a module. Raises AdapterError for a malformed pattern, or a bad alpha."""
    alpha = float(_field_of(config, "lora_alpha", "alpha_pattern", module, where))
    if not math.isfinite(alpha):
        raise AdapterError(f"{where}: expected a finite alpha, got {alpha}; save the adapter again")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_rank(config: Mapping[str, Any], module: str, rank: int, where: str) -> None:
    """Refuse factors of another rank than the config's, as PEFT does. Raises AdapterError."""
    expected = _field_of(config, "r", "rank_pattern", module, where)
    if expected not in (None, rank):
        raise AdapterError(
            f"{where}: {module}: expected rank {expected} by r and rank_pattern, got {rank} in the "
            "file of weights; save the adapter again"
        )


def _field_of(config: Mapping[str, Any], name: str, patterns: str, module: str, where: str) -> Any:
    """A field of the config, or the value of the first pattern that selects the module."""
    pattern = config.get(patterns) or {}
    try:
        key = next((k for k in pattern if _selects(k, module)), None)
    except ValueError as error:
        raise AdapterError(f"{where}: malformed {patterns}: {error}") from None
    return config.get(name) if key is None else pattern[key]


def _selects(pattern: str, module: str) -> bool:
    """PEFT's rule: a regular expression that matches the end of the path.

    Raises ValueError, as :func:`modulora_core.models.json_files.matches`.
    """
    return matches(rf"(.*\.)?({pattern})$", module)


def lora_config(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    dropout: float,
    targets: Mapping[str, list[str]],
) -> dict[str, Any]:
    """PEFT's LoraConfig of an adapter, with fields since PEFT 0.17.

    Dropout on an expert's input is the same here as on any other layer's. PEFT has none there, and
    refuses ``lora_dropout`` beside ``target_parameters``. So the config then says 0, and
    ``modulora.json`` has the true value.

    Args:
        ranks: r of each adapted layer or stack, by path.
        scales: s of each.
    """
    parameters = bool(targets["target_parameters"])
    # PEFT matches the name of a target parameter, which ends with .weight in a linear layer
    key = r"{}(\.weight)?" if parameters else "{}"
    alphas = {path: _whole(scales[path] * r) for path, r in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {key.format(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {key.format(path): a for path, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0 if parameters else dropout,
        "bias": "none",
        "init_lora_weights": True,
        **targets,
    }


def peft_targets(
    paths: Iterable[str], stacks: Collection[str], modules: Iterable[str], parameters: Iterable[str]
) -> dict[str, list[str]]:
    """PEFT's ``target_modules`` and ``target_parameters`` that select exactly ``paths``.

    Args:
        modules, parameters: all names of the model, which a short name must not select.
    """
    modules = list(modules)
    layers = [path for path in paths if path not in stacks]
    old = [path for path in layers if stacks and path.rpartition(".")[2] in _OLD_NAMES]
    weights = [f"{path}.weight" for path in modules if path not in stacks]
    others = [*stacks, *weights, *parameters]
    adapted = [path for path in paths if path in stacks]
    return {
        "target_modules": shortest_names([p for p in layers if p not in old], modules),
        "target_parameters": shortest_names(adapted, others, parts=2)
        + shortest_names([f"{path}.weight" for path in old], others, parts=2),
    }


def _whole(alpha: float) -> int | float:
    """``16.0`` as ``16``, as PEFT writes it."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
