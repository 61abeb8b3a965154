"""Check ``--trainer KEY=VALUE`` and ``--report-to`` before work starts.

A key is a field of transformers' TrainingArguments, and its value is parsed to the field's type.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from modulora_core.errors import MissingExtraError, OptionError

_OWNED: Mapping[str, str] = {
    "output_dir": "OUT",
    "max_steps": "--steps",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--grad-accum",
    "max_length": "--seq-len",
    "learning_rate": "--lr",
    "warmup_steps": "--warmup",
    "warmup_ratio": "--warmup",
    "weight_decay": "--weight-decay",
    "max_grad_norm": "--max-grad-norm",
    "optim": "--optim",
    "seed": "--seed",
    "fp16": "--dtype",
    "bf16": "--dtype",
    "gradient_checkpointing": "--gradient-checkpointing",
    "activation_offloading": "--offload-activations",
    "eval_strategy": "--eval-every",
    "eval_steps": "--eval-every",
    "save_strategy": "--save-every",
    "save_steps": "--save-every",
    "report_to": "--report-to",
    "fsdp": "--shard",
    "fsdp_config": "--shard",
    "resume_from_checkpoint": "--resume",
}
"""Fields that an option of ours sets."""

_FIXED = (
    "remove_unused_columns", "label_names", "include_num_input_tokens_seen", "logging_steps",
    "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "prediction_loss_only",
    "disable_tqdm", "load_best_model_at_end", "save_total_limit", "save_only_model", "use_cpu",
    "gradient_checkpointing_kwargs", "push_to_hub", "eval_on_start", "precompute_ref_log_probs",
    "model_init_kwargs", "sync_ref_model", "deepspeed",
)  # fmt: skip
"""Fields that the run depends on."""

_FORMS: Mapping[str, tuple[str, str]] = {
    "lr_scheduler_kwargs": ("{", 'a JSON object such as {"num_cycles": 2}'),
    "optim_args": ("=", "KEY=VALUE,..."),
}
"""Text that a value has, of fields that transformers parses later, and their form."""

_UNLISTED = ("flyte",)
"""Trackers that transformers knows and never lists as installed."""


def trainer_options(
    given: Mapping[str, Any], kind: type[TrainingArguments] = TrainingArguments
) -> dict[str, Any]:
    """Parse values by the types of the fields of ``kind``; strings may spell any type."""
    types = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    return {key: _parsed(key, value, names, types) for key, value in given.items()}


def _parsed(key: str, value: Any, names: Sequence[str], types: Mapping[str, Any]) -> Any:
    if key in _OWNED:
        raise OptionError(f"trainer {key}: expected {_OWNED[key]} instead, which sets it")
    if key in _FIXED:
        raise OptionError(f"trainer {key}: the run depends on its own value; leave it out")
    if key not in names:
        near = difflib.get_close_matches(key, names)
        hint = f"did you mean {' or '.join(near)}?" if near else "see its documentation"
        raise OptionError(
            f"trainer {key}: transformers' TrainingArguments has no such field; {hint}"
        )
    adapter = TypeAdapter(types[key])
    try:
        return _in_range(key, adapter.validate_python(value))
    except ValidationError as error:
        expected = error.errors(include_url=False)[0]["msg"].replace("Input should be", "expected")
    try:
        return adapter.validate_python(str(value).split(","))
    except ValidationError:
        raise OptionError(f"trainer {key}: {expected}, got {value!r}") from None


def _in_range(key: str, value: Any) -> Any:
    """Return the value. Raises OptionError: the Trainer would fail on it after it has begun."""
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"trainer {key}: expected a finite number, got {value}")
    part, form = _FORMS.get(key, ("", ""))
    if isinstance(value, str) and part not in value:
        raise OptionError(f"trainer {key}: expected {form}, got {value!r}")
    counts = key.startswith("dataloader_") or key == "neftune_noise_alpha"
    if counts and isinstance(value, int | float) and value < 0:
        raise OptionError(f"trainer {key}: expected 0 or more, got {value}")
    return value


def check_reporters(names: Sequence[str]) -> None:
    """Refuse an experiment tracker that transformers does not know or that is not installed."""
    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            known = str(error).partition("only ")[2].removesuffix(" are supported.")
            near = difflib.get_close_matches(name, known.split(", "))
            raise OptionError(
                f"report_to {name!r}: transformers has no such tracker; expected "
                f"{' or '.join(near) or 'one of ' + known}"
            ) from None
        if name not in (*get_available_reporting_integrations(), *_UNLISTED):
            raise MissingExtraError(
                f"report_to {name}: its library is not installed; pip install {name}"
            )
