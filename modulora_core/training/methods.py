"""The parts of a run that differ by method: supervised finetuning, or DPO on preferences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from modulora_core.data import Collator, load_examples
from modulora_core.data.preferences import load_preferences
from modulora_core.data.sources import Source, source_name
from modulora_core.data.templates import Template
from modulora_core.errors import ModuLoRAError, OptionError
from modulora_core.training.arguments import training_arguments
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.distillation import Distilled, DistilledCollator, Predictions
from modulora_core.training.gradient_checkpointing import checkpoint_activations
from modulora_core.training.trainer import AdapterRun, AdapterTrainer


def method_examples(source: Source, config: FinetuneConfig, tokenizer: Any, vocabulary: int) -> Any:
    """Read a source as examples for the trainer of the method. Raises RequestError."""
    if config.method == "dpo":
        return load_preferences(source, tokenizer, seq_len=config.seq_len, vocabulary=vocabulary)
    template = Template.of(config.prompt, config.completion)
    examples = load_examples(
        source, tokenizer, format=config.format, seq_len=config.seq_len, template=template
    )
    examples.check_ids(vocabulary, source_name(source))
    return examples


def method_arguments(
    config: FinetuneConfig, folder: Path, steps: int, device: torch.device
) -> TrainingArguments:
    """The Trainer's arguments for the method of ``config``."""
    if config.method == "dpo":
        from modulora_core.training.preference import preference_arguments

        return preference_arguments(config, folder, steps, device)
    return training_arguments(config, folder, steps, device)


def method_trainer(
    model: PreTrainedModel,
    config: FinetuneConfig,
    arguments: TrainingArguments,
    data: Mapping[str, Any],
    tokenizer: Any,
    predictions: Predictions | None,
    **common: Any,
) -> AdapterRun:
    """The trainer of the method, with the model's gradient checkpointing turned on."""
    if config.method == "dpo":
        from modulora_core.training.preference import preference_trainer

        trainer = preference_trainer(model, config, arguments, data, tokenizer, **common)
    else:
        # any id will do to pad: attention and labels mask it
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        collator = Collator(next(int(pad) for pad in pads if pad is not None))
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            data_collator=DistilledCollator(collator) if predictions else collator,
            train_dataset=Distilled(predictions) if predictions else data["train"],
            eval_dataset=data.get("eval"),
            offload_activations=config.offload_activations,
            group_by_length=data["train"].report.format != "text",
            distill_weight=config.distill_weight,
            **common,
        )
    if config.gradient_checkpointing:
        checkpoint_activations(model, keep_products=config.keep_products)
    return trainer


@contextmanager
def trainer_refused(given: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Refuse values of ``--trainer`` with which the Trainer, which makes ``folder``, can't be made.

    Raises:
        OptionError: the Trainer raised an error.
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
