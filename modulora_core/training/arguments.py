"""Translate a config to transformers' TrainingArguments, and check the optimizer."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import trainer_log_levels
from transformers.utils import is_liger_kernel_available

from modulora_core.distributed import world_size
from modulora_core.errors import MissingExtraError, OptionError
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.devices import check_optimizer_name
from modulora_core.training.sharding import distributed_arguments
from modulora_core.training.trainer_options import trainer_options

logger = logging.getLogger(__name__)

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}

_SAVED_CHECKPOINTS = 2
"""The Trainer deletes the oldest before we seal the newest: with one, none would be whole then."""


class OneGPU:
    """Arguments of a Trainer that uses the GPU of its process alone."""

    n_gpu = 1  # with more, Trainer copies the model to each GPU that it sees (DataParallel)


class _Arguments(OneGPU, TrainingArguments): ...


def training_arguments(
    config: FinetuneConfig, folder: Path, steps: int, device: torch.device
) -> TrainingArguments:
    """Translate a config to transformers' arguments. Checkpoints go to ``folder``.

    Raises OptionError: transformers refuses a value of ``config.trainer``.
    """
    values = {**argument_values(config, folder, steps, device), **trainer_options(config.trainer)}
    try:
        arguments = _Arguments(**values)
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        if optimizer.__module__.startswith("torch."):  # it checks them without a model
            optimizer([torch.zeros(1)], **options)
        check_values(arguments, steps)
    except (ValueError, ImportError) as error:
        raise OptionError(f"trainer: {' '.join(str(error).split())}") from None
    # not accelerate's own setting: FSDP2 would cast packed scales, and dtype sets the precision
    arguments.mixed_precision = "fp16" if arguments.fp16 else "no"
    return arguments


def check_values(arguments: TrainingArguments, steps: int) -> None:
    """Refuse values that transformers reads only after the work has begun.

    Raises OptionError, MissingExtraError.
    """
    for name in ("log_level", "log_level_replica"):
        if (level := getattr(arguments, name)) not in trainer_log_levels:
            known = ", ".join(trainer_log_levels)
            raise OptionError(f"trainer {name}: expected one of {known}, got {level!r}")
    if arguments.torch_compile_mode is not None:
        try:
            torch.compile(torch.nn.Identity(), mode=arguments.torch_compile_mode)
        except RuntimeError as error:
            raise OptionError(f"trainer torch_compile_mode: {error}") from None
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise MissingExtraError(
            "trainer use_liger_kernel: its library is not installed; pip install liger-kernel"
        )
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise OptionError(
            f"trainer lr_scheduler_type {arguments.lr_scheduler_type}, lr_scheduler_kwargs: "
            f"expected values that it takes, got {' '.join(str(error).split()):.200}"
        ) from None


def argument_values(
    config: FinetuneConfig, folder: Path, steps: int, device: torch.device
) -> dict[str, Any]:
    """The fields of TrainingArguments that a config sets, by name."""
    on_gpu = device.type == "cuda"
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum,
        "optim": config.optim,
        "learning_rate": config.lr,
        "lr_scheduler_type": _SCHEDULES[config.scheduler],
        "warmup_steps": _warmup_steps(config, steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.seed,
        # float16 needs its loss scaler; bfloat16 needs no autocast, as activations have the model's
        # dtype and the adapter is float32
        "fp16": on_gpu and config.dtype == "float16",
        "use_cpu": not on_gpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "eval_strategy": "no" if config.eval_every is None else "steps",
        "eval_steps": config.eval_every,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "save_total_limit": _SAVED_CHECKPOINTS,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": on_gpu,
        "report_to": list(config.report_to) or "none",
        "disable_tqdm": True,
        **distributed_arguments(config),
    }


def total_steps(config: FinetuneConfig, examples: int, processes: int = 1) -> int:
    """Number of optimizer steps; the last batch of an epoch may be smaller."""
    if config.steps is not None:
        return config.steps
    batches = math.ceil(math.ceil(examples / config.batch_size) / processes)
    return max(1, math.ceil((config.epochs or 1) * math.ceil(batches / config.grad_accum)))


def _warmup_steps(config: FinetuneConfig, steps: int) -> int:
    # transformers rounds up, but the first warm-up step has a rate of 0, which wastes a short run
    return int(config.warmup) if config.warmup >= 1 else round(config.warmup * steps)


LEAST_TOKENS = 1000
"""Trained tokens below which an adapter learns little but those tokens by heart."""

LEAST_STEPS = 10
"""Steps below which an epoch, the default, is likely shorter than its user thinks."""

MOST_TIMES = 50.0
"""A learning rate this many times above or below the default is likely a slip of the exponent."""


def warn_of_warmup(config: FinetuneConfig, steps: int) -> None:
    """Log a warning if the learning rate never reaches its peak."""
    warmup = _warmup_steps(config, steps)
    if warmup >= steps:
        logger.warning(
            "warmup %g: it takes %d of the run's %d steps, so the learning rate never reaches its "
            "peak (lr %g); lower it or train longer",
            config.warmup, warmup, steps, config.lr,
        )  # fmt: skip


def warn_of_settings(config: FinetuneConfig, examples: Any, steps: int) -> None:
    """Log a warning if a run is too short to learn, or its learning rate looks wrong by tens."""
    warn_of_warmup(config, steps)
    tokens = getattr(getattr(examples, "report", None), "trained_tokens", LEAST_TOKENS)
    batch = config.batch_size * config.grad_accum
    reached = steps * batch * config.seq_len * world_size()
    if len(examples) < batch:
        logger.warning("data: %d examples, fewer than a batch of %d", len(examples), batch)
    if tokens < LEAST_TOKENS:
        logger.warning(
            "data: %d trained tokens; a run learns little from less than %d", tokens, LEAST_TOKENS
        )
    if config.steps is None and config.epochs is None and steps < LEAST_STEPS:
        logger.warning(
            "steps: one epoch of %d examples is %d steps, which change little; give more with "
            "--steps N or --epochs N", len(examples), steps,
        )  # fmt: skip
    elif len(examples) >= batch and reached < LEAST_TOKENS:
        logger.warning(
            "steps %d: the run reads at most %d tokens, and learns little from less than %d",
            steps, reached, LEAST_TOKENS,
        )  # fmt: skip
    usual = type(config).model_fields["lr"].default
    times = config.lr / usual
    if "adam" in config.optim and not 1 / MOST_TIMES < times < MOST_TIMES:
        logger.warning(
            "lr %g: it is %.3g times the default, %g; most runs with LoRA and AdamW take 1e-4 to "
            "1e-3", config.lr, times, usual,
        )  # fmt: skip


def check_optimizer(name: str) -> None:
    """Refuse an optimizer before work starts. Raises OptionError, MissingExtraError."""
    check_optimizer_name(name)
    # not TrainingArguments(): it resets accelerate, which another run of this process may use
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    arguments: Any = SimpleNamespace(**{**defaults, "optim": name})
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise MissingExtraError(f"optim {name}: {' '.join(str(error).split())}") from None
    except ValueError as error:  # for example, it also needs optim_target_modules
        raise OptionError(f"optim {name}: {' '.join(str(error).split())}") from None
