"""The parts of a run that differ by method; here, supervised finetuning.

A plugin's own method is a subclass of :class:`Method`, for ``finetune(config, method=...)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from modulora_core.data import Collator, load_examples
from modulora_core.data.sources import Source, source_name
from modulora_core.data.templates import Template
from modulora_core.errors import ModuLoRAError, OptionError
from modulora_core.progress import Display
from modulora_core.training.arguments import training_arguments
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.trainer import AdapterRun, AdapterTrainer, TrainerParts
from modulora_core.training.trainer_options import trainer_options


class Method:
    """Supervised finetuning on next tokens. Subclasses replace the parts in which they differ.

    A run calls the methods in their order here. A subclass of AdapterTrainer may have another loss
    (:meth:`~modulora_core.training.trainer.AdapterTrainer.row_loss`).

    Attributes:
        trainer_class: the class of the trainer.
        in_words: how the model card describes it: ``" with TRL's DPOTrainer"``.
        nbytes: number of bytes that :meth:`prepare` writes, known after :meth:`begin`.
    """

    trainer_class: type[AdapterTrainer] = AdapterTrainer
    in_words = ""
    nbytes = 0

    def check(self, config: FinetuneConfig) -> None:
        """Check the options before the model is opened. Raises RequestError."""
        trainer_options(config.trainer)

    def examples(
        self, source: Source, config: FinetuneConfig, tokenizer: Any, vocabulary: int
    ) -> Any:
        """Read a source as examples for the trainer. Raises RequestError."""
        template = Template.of(config.prompt, config.completion)
        examples = load_examples(
            source, tokenizer, format=config.format, seq_len=config.seq_len, template=template
        )
        examples.check_ids(vocabulary, source_name(source))
        return examples

    def begin(
        self,
        config: FinetuneConfig,
        examples: Any,
        steps: int,
        tokenizer: Any,
        vocabulary: int,
        folder: Path,
    ) -> None:
        """Check the request with the training examples, before weights are loaded.

        Args:
            config: the run; steps: the number of its optimizer steps.
            examples: the training examples.
            tokenizer: the model's; vocabulary: the number of tokens that the model knows.
            folder: the folder of the checkpoints, for files until the end of the run.

        Raises RequestError: something can't be used.
        """

    def arguments(
        self, config: FinetuneConfig, folder: Path, steps: int, device: torch.device
    ) -> TrainingArguments:
        """The Trainer's arguments."""
        return training_arguments(config, folder, steps, device)

    def check_model(self, model: PreTrainedModel, name: str) -> None:
        """Check the loaded model. Raises OptionError."""

    def trainer(self, parts: TrainerParts) -> AdapterRun:
        """Make the trainer."""
        # any id will do to pad: attention and labels mask it
        pads = (parts.tokenizer.pad_token_id, parts.tokenizer.eos_token_id, 0)
        return self.trainer_class(
            model=parts.model,
            args=parts.arguments,
            data_collator=Collator(next(int(pad) for pad in pads if pad is not None)),
            train_dataset=parts.data["train"],
            eval_dataset=parts.data.get("eval"),
            offload_activations=parts.config.offload_activations,
            group_by_length=parts.data["train"].report.format != "text",
            **parts.of_run,
        )

    def prepare(self, device: torch.device, progress: Display) -> None:
        """Compute what the training reads from files; in the first process only."""


@contextmanager
def trainer_refused(given: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Refuse values of ``--trainer`` with which the Trainer, which makes ``folder``, can't be made.

    Raises OptionError: the Trainer raised an error.
    """
    try:
        yield
    except ModuLoRAError:
        raise
    except Exception as error:  # each field is read in its own way
        with suppress(OSError):  # it has the checkpoints of a run that is resumed
            folder.rmdir()
        if not given:
            raise
        reason = " ".join(str(error).split()) or "none"
        raise OptionError(
            f"trainer {', '.join(given)}: expected values that transformers' Trainer takes, got "
            f"{type(error).__name__}: {reason:.300}"
        ) from error
