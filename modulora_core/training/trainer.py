"""A run of transformers.Trainer for an adapter on packed weights.

What it is told, who watches, and what it came to; a loss that isn't a number ends it. The Trainer itself is in
:mod:`modulora_core.training.adapter_trainer`. A checkpoint is an adapter folder in PEFT's format beside the state of
optimizer, schedule and random numbers, which transformers reads with ``weights_only``: nothing but tensors
and numbers is unpickled.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames
from typing_extensions import override

from modulora_core.devices.dense_products import matmul_precision
from modulora_core.errors import MissingExtraError, OptionError, WorkError
from modulora_core.training.adapter_trainer import AdapterFiles, AdapterTrainer
from modulora_core.training.checkpoints import TRAINER_STATE, seal
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.gradient_checkpointing import checkpoint_activations

logger = logging.getLogger(__name__)

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}

_KEPT_CHECKPOINTS = 2
"""The oldest is deleted before the newest is sealed: if one were kept, none would be whole for a moment."""


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One optimizer step, as it is told to whoever watches.

    Attributes:
        step: of ``total``, from 1.
        loss: mean over the trained tokens of the step's batch.
        learning_rate: that the step was made with.
        tokens: without padding, since the run began.
    """

    step: int
    total: int
    loss: float
    learning_rate: float
    tokens: int


OnStep = Callable[[TrainingStep], None]
OnEval = Callable[[int, float], None]
"""Gets the step and the loss on the evaluation data."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training came to.

    Attributes:
        losses: of every step, also of those before a resume.
        eval_loss: mean over the trained tokens of the evaluation data, after the last step.
        seconds: of this call alone; tokens: those that it trained on, without padding.
    """

    losses: list[float]
    eval_loss: float | None
    seconds: float
    tokens: int


class _Watcher(TrainerCallback):
    """Tells each step and evaluation, notices NaN, and seals checkpoints."""

    def __init__(self, on_step: OnStep | None, on_eval: OnEval | None) -> None:
        self._on_step = on_step
        self._on_eval = on_eval
        self.tokens_before = 0

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens_before = state.num_input_tokens_seen

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs and self._on_eval is not None and state.is_world_process_zero:
            self._on_eval(state.global_step, logs["eval_loss"])
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise WorkError(
                f"step {state.global_step}: the loss is {loss}; lower the learning rate, or use another dtype"
            )
        if self._on_step is not None and state.is_world_process_zero:
            step = TrainingStep(
                state.global_step,
                state.max_steps,
                loss,
                logs["learning_rate"],
                state.num_input_tokens_seen,
            )
            self._on_step(step)

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def total_steps(config: FinetuneConfig, examples: int) -> int:
    """Optimizer steps of a run over ``examples`` examples; the last batch of an epoch may be smaller."""
    if config.steps is not None:
        return config.steps
    batches = math.ceil(examples / config.batch_size)
    return max(1, math.ceil((config.epochs or 1) * math.ceil(batches / config.grad_accum)))


def _warmup_steps(config: FinetuneConfig, steps: int) -> int:
    # transformers rounds up. The first step of a warm-up has a rate of 0, and a short run can't spare it
    return int(config.warmup) if config.warmup >= 1 else round(config.warmup * steps)


def _warn_of_warmup(config: FinetuneConfig, steps: int) -> None:
    warmup = _warmup_steps(config, steps)
    if warmup >= steps:
        logger.warning("warmup %g: it takes %d of the run's %d steps, so the learning rate never reaches its peak (lr %g); lower it "
                       "or train longer", config.warmup, warmup, steps, config.lr)  # fmt: skip


def training_arguments(
    config: FinetuneConfig, folder: Path, steps: int, device: torch.device
) -> TrainingArguments:
    """A config in transformers' words. ``folder`` is where checkpoints go."""
    on_gpu = device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        optim=config.optim,
        learning_rate=config.lr,
        lr_scheduler_type=_SCHEDULES[config.scheduler],
        warmup_steps=_warmup_steps(config, steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        # bfloat16 needs no autocast: the activations have the model's dtype and the adapter is in float32;
        # float16 needs its loss scaler
        fp16=on_gpu and config.dtype == "float16",
        use_cpu=not on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="no" if config.eval_every is None else "steps",
        eval_steps=config.eval_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=_KEPT_CHECKPOINTS,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=on_gpu,
        report_to="none",
        disable_tqdm=True,
    )
    # a process trains on one device: Trainer would copy the model to every GPU that it sees (DataParallel)
    _ = arguments.device
    arguments._n_gpu = min(1, arguments._n_gpu)
    return arguments


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that transformers doesn't know, or whose library is missing.

    Raises:
        OptionError: transformers has no optimizer of that name; the message has near misses.
        MissingExtraError: its library isn't installed.
    """
    names = [known.value for known in OptimizerNames]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}"
        )
        raise OptionError(f"optim {name!r}: transformers has no such optimizer; {hint}")
    # not TrainingArguments itself: making one resets accelerate, which another run of this process may use
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    arguments: Any = SimpleNamespace(**{**defaults, "optim": name})
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise MissingExtraError(f"optim {name}: {' '.join(str(error).split())}") from None
    except ValueError as error:  # such as one that also needs optim_target_modules
        raise OptionError(f"optim {name}: {' '.join(str(error).split())}") from None


def train(
    model: PreTrainedModel,
    examples: Dataset[Any],
    collator: Callable[[Sequence[Any]], Any],
    config: FinetuneConfig,
    folder: Path,
    *,
    files: AdapterFiles,
    eval_examples: Dataset[Any] | None = None,
    resume_from: Path | None = None,
    on_step: OnStep | None = None,
    on_eval: OnEval | None = None,
) -> Outcome:
    """Train the parameters of ``model`` that require a gradient.

    Args:
        model: on the device where it trains.
        examples: of :func:`modulora_core.data.load_examples`.
        collator: makes a batch of examples.
        config: of the run.
        folder: for checkpoints.
        files: how the adapter is saved and restored.
        eval_examples: to measure the loss on.
        resume_from: a whole checkpoint of the same run; its steps are not repeated, and the rest goes as it
            would have gone.
        on_step: is called after every optimizer step.
        on_eval: is called after every evaluation.

    Raises:
        WorkError: the loss became NaN or infinite.
    """
    started = time.perf_counter()
    model.config.use_cache = False
    if config.gradient_checkpointing:
        checkpoint_activations(model, keep_products=config.keep_products)
    steps = total_steps(config, len(examples))  # type: ignore[arg-type]  # torch's Dataset has no __len__
    _warn_of_warmup(config, steps)
    watcher = _Watcher(on_step, on_eval)
    trainer = AdapterTrainer(
        model=model,
        args=training_arguments(config, folder, steps, model.device),
        data_collator=collator,
        train_dataset=examples,
        eval_dataset=eval_examples,
        callbacks=[watcher],
        files=files,
        config=config,
    )
    with matmul_precision(config.matmul_precision):
        if resume_from is not None and _steps_done(resume_from) >= steps:
            # Trainer would make one more step
            files.restore(resume_from)
            trainer.state = TrainerState.load_from_json(str(resume_from / TRAINER_STATE))
            watcher.tokens_before = trainer.state.num_input_tokens_seen
        else:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        state = trainer.state
        seconds = time.perf_counter() - started
        eval_loss = None if eval_examples is None else _final_eval_loss(trainer)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return Outcome(losses, eval_loss, seconds, state.num_input_tokens_seen - watcher.tokens_before)


def _steps_done(checkpoint: Path) -> int:
    return int(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE)).global_step)


def _final_eval_loss(trainer: Trainer) -> float:
    """The loss on the evaluation data after the last step, measured unless it just was."""
    for entry in trainer.state.log_history:
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return float(entry["eval_loss"])
    return float(trainer.evaluate()["eval_loss"])
