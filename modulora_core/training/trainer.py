"""Train an adapter on packed weights with transformers' Trainer.

:class:`AdapterRun` saves and restores the adapter only. :class:`AdapterTrainer` also computes the
loss in chunks (:mod:`modulora_core.training.chunked_loss`), and averages the evaluation loss over
tokens. A checkpoint is an adapter folder beside the states of optimizer, schedule and random
numbers. transformers reads these with ``weights_only``: no code is unpickled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput
from typing_extensions import override

from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.data.examples import longest_first
from modulora_core.data.formats import IGNORED
from modulora_core.distributed import barrier, world_size
from modulora_core.errors import WorkError
from modulora_core.hf.load_adapter import restore_adapter
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.settings import LoRASettings
from modulora_core.progress import Progress
from modulora_core.training.batches import SimilarLengths, attending_within_parts
from modulora_core.training.checkpoints import is_sealed, seal, trainer_state
from modulora_core.training.chunked_loss import (
    RowLoss,
    chunked_loss,
    cross_entropy,
    token_losses,
)
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.interruption import Interruption, Stopped
from modulora_core.training.loss_trend import divergence
from modulora_core.training.optimizer_files import load_optimizer, save_optimizer
from modulora_core.training.readout import read_out
from modulora_core.training.sharding import split_without_gpus


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """An optimizer step, for ``on_step``.

    Attributes:
        step: its number, from 1 to ``total``.
        tokens: number of tokens since the run began, without padding.
        grad_norm: norm of the gradient before clipping; None if it is not measured.
        memory_bytes: peak memory of the run so far
            (:class:`modulora_core.checkpoints.peak_memory.PeakMemory`).
    """

    step: int
    total: int
    loss: float
    learning_rate: float
    tokens: int
    grad_norm: float | None
    tokens_per_second: float
    memory_bytes: int

    @property
    def line(self) -> str:
        """``loss 2.31, 1,234 tok/s, peak 2.1 GiB``: beside its bar it fits into 80 columns."""
        peak = self.memory_bytes / 2**30
        return f"loss {self.loss:.2f}, {self.tokens_per_second:,.0f} tok/s, peak {peak:.1f} GiB"


OnStep = Callable[[TrainingStep], None]
OnEval = Callable[[int, float], None]
"""Called with the step and the loss on the evaluation data."""


@dataclass(frozen=True, slots=True)
class TrainerParts:
    """The parts of which a method makes its trainer.

    Attributes:
        model: with its adapter.
        config: the run.
        arguments: the Trainer's.
        data: the examples of ``"train"``, and perhaps of ``"eval"``.
        tokenizer: the model's.
        of_run: other arguments of :class:`AdapterRun`: settings, memory, callbacks.
    """

    model: PreTrainedModel
    config: FinetuneConfig
    arguments: TrainingArguments
    data: Mapping[str, Any]
    tokenizer: Any
    of_run: Mapping[str, Any]


class AdapterRun(Trainer):
    """A Trainer whose checkpoints hold the adapter without the frozen base.

    Args:
        settings: the settings of a new adapter, recorded in the checkpoints.
        memory: measures the run; its peak is in the logs.
    """

    def __init__(
        self, *, settings: LoRASettings | None, memory: PeakMemory, **arguments: Any
    ) -> None:
        self._settings, self._memory = settings, memory
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)  # it prints to stdout, where --json prints

    @override
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            split_without_gpus(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled: bool = True

    def run(self, resume_from: Path | None) -> int:
        """Train, or resume from a whole checkpoint. Returns the number of tokens of this call.

        Raises:
            Stopped: a signal came; a checkpoint has the last whole step.
        """
        before = TrainerState() if resume_from is None else trainer_state(resume_from)
        self._clock, self._tokens = time.perf_counter(), before.num_input_tokens_seen
        if resume_from is None or before.global_step < self.args.max_steps:
            try:
                self.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
            except Stopped:
                if self.state.global_step > before.global_step:
                    self._save_last_step()
                raise
        else:  # Trainer would make one more step
            restore_adapter(self.model, resume_from)
            self.state: TrainerState = before
        return int(self.state.num_input_tokens_seen - before.num_input_tokens_seen)

    def _save_last_step(self) -> None:
        """Save a checkpoint of the last whole step, as if no work had followed it."""
        if not is_sealed(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            self.state.num_input_tokens_seen = self._tokens
            torch.set_rng_state(self._random[0])
            torch.cuda.set_rng_state_all(self._random[1:])
            self._save_checkpoint(self.model, None)
            self.callback_handler.on_save(self.args, self.state, self.control)

    def final_eval_loss(self) -> float:
        """The loss on the evaluation data after the last step, measured now unless it just was."""
        found = last_eval_loss(self.state)
        return float(self.evaluate()["eval_loss"]) if found is None else found

    def padding(self) -> float | None:
        """The share of padding in this process's training batches of this call, if counted."""
        return None

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_adapter(self.model, output_dir or self.args.output_dir, settings=self._settings)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_adapter(self.model, resume_from_checkpoint)

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:  # Trainer would write the frozen model too
            save_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled and checkpoint is not None:
            load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        now, tokens = time.perf_counter(), int(self.state.num_input_tokens_seen)
        if "loss" in logs:  # after each step, since ``logging_steps`` is 1
            logs["tokens_per_second"] = (tokens - self._tokens) / (now - self._clock)
            logs["memory_bytes"] = self._memory.nbytes
        super().log(logs, start_time)
        self._clock, self._tokens = now, tokens
        self._random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]

    @override
    def evaluation_loop(self, *arguments: Any, **options: Any) -> EvalLoopOutput:
        with torch.random.fork_rng([]):  # a run that is resumed behind it draws the same numbers
            return super().evaluation_loop(*arguments, **options)

    @override
    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: the run writes its own (:mod:`modulora_core.training.model_card`)."""

    @override
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # channel scales, the only vectors that train, stay near one: no decay towards zero
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    @override
    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers estimates it from parameters, and packed weights are none


def last_eval_loss(state: TrainerState) -> float | None:
    """The loss on the evaluation data after the last step; None if it was not measured."""
    found = [e for e in state.log_history if "eval_loss" in e and e["step"] == state.global_step]
    return float(found[-1]["eval_loss"]) if found else None


class AdapterTrainer(AdapterRun):
    """The trainer of next tokens.

    Args:
        offload_activations: keep the activations of training in CPU memory.
        group_by_length: batch examples of similar length.
    """

    def __init__(
        self, *, offload_activations: bool, group_by_length: bool, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._offload, self._group = offload_activations, group_by_length
        self._positions = self._padding = 0

    def row_loss(self, inputs: dict[str, Any]) -> RowLoss:  # noqa: ARG002  # a subclass reads it
        """The loss of the rows of a training batch. It takes entries of its own from ``inputs``."""
        return cross_entropy

    @override
    def padding(self) -> float:
        return self._padding / max(1, self._positions)

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._group:
            return super()._get_train_sampler(train_dataset)
        lengths = (train_dataset or self.train_dataset).lengths
        batches = self.args.gradient_accumulation_steps * self.args.world_size
        return SimilarLengths(lengths, self.args.train_batch_size * batches, self.args.seed)

    @override
    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return longest_first([len(eval_dataset[i]["input_ids"]) for i in range(len(eval_dataset))])

    @override
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Any:
        if model.training:
            mask = inputs["attention_mask"]
            self._positions += mask.numel()
            self._padding += int((mask == 0).sum())
        inputs = attending_within_parts(inputs)
        offload, row_loss = self._offload and model.training, self.row_loss(inputs)
        with (
            chunked_loss(self.model, row_loss=row_loss),
            save_on_cpu(pin_memory=True) if offload else nullcontext(),
        ):
            return super().compute_loss(model, inputs, *arguments, **options)

    @override
    def evaluation_loop(self, *arguments: Any, **options: Any) -> EvalLoopOutput:
        # transformers averages over batches; we average over tokens
        self._nll, self._predicted = 0.0, 0
        output = super().evaluation_loop(*arguments, **options)
        output.metrics["eval_loss"] = self._nll / self._predicted
        return output

    @override
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = attending_within_parts(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")
        with (
            torch.no_grad(), read_out(self.model) as readout, self.compute_loss_context_manager()
        ):  # fmt: skip
            model(**inputs)
            losses = token_losses(readout, labels).sum(1, dtype=torch.float64)
        counts = (labels[:, 1:] != IGNORED).sum(1)
        # of all processes, without the examples that fill up the last batch
        losses, counts = self.gather_function((losses, counts))
        self._nll += float(losses.sum())
        self._predicted += int(counts.sum())
        return losses.sum() / counts.sum(), None, None


class Watcher(TrainerCallback):
    """Reports each step and evaluation, seals checkpoints, and stops a run.

    It stops at a signal, at NaN, and when the model does no better than a guess.

    Attributes:
        show: shows the steps; vocabulary: the tokens of the model. Both are set before training: a
            Trainer takes callbacks when it is made.
    """

    show: Progress
    vocabulary: int

    def __init__(
        self, on_step: OnStep | None, on_eval: OnEval | None, interruption: Interruption
    ) -> None:
        self._on_step, self._on_eval, self._interruption = on_step, on_eval, interruption

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._interruption.asked():
            control.should_save = control.should_training_stop = True

    @override
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._interruption.check()

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise WorkError(
                f"step {state.global_step}: the loss is {loss}; lower the learning rate, or use "
                "another dtype"
            )
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        guessing = "" if loss is None else divergence(logged, self.vocabulary)
        if guessing:
            raise WorkError(
                f"step {state.global_step}: the run diverged: {guessing}; lower the learning rate "
                f"(lr {args.learning_rate:g})"
            )
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs and self._on_eval is not None:
            self._on_eval(state.global_step, logs["eval_loss"])
        if loss is None:
            return
        norm = logs.get("grad_norm")
        step = TrainingStep(
            step=state.global_step,
            total=state.max_steps,
            loss=loss,
            learning_rate=logs["learning_rate"],
            tokens=state.num_input_tokens_seen,
            grad_norm=None if norm is None else float(norm),
            tokens_per_second=logs["tokens_per_second"],
            memory_bytes=int(logs["memory_bytes"]),
        )
        self.show(step.line, step.step, step.total)
        if self._on_step is not None:
            self._on_step(step)

    @override
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._interruption.check()
        if state.is_world_process_zero:
            self.show("evaluating", state.global_step, state.max_steps)

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        barrier()  # the others have written their random states
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", world_size())
