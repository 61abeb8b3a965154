"""Train an adapter on preferences with TRL's DPOTrainer (arXiv 2305.18290).

DPO compares the model with a reference: the model at the start. TRL computes the reference's
log-probabilities before the first step, so that no second model is in memory.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import PreTrainedModel, TrainingArguments
from typing_extensions import override

from modulora_core.arguments import checked
from modulora_core.data.sources import Source
from modulora_core.distributed import barrier, is_first, world_size
from modulora_core.errors import OptionError
from modulora_core.layers import LoRALinear
from modulora_core.training.arguments import OneGPU, argument_values, check_values
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import FinetuneResult, finetune
from modulora_core.training.methods import Method
from modulora_core.training.sharding import is_sharded
from modulora_core.training.trainer import AdapterRun, TrainerParts
from modulora_core.training.trainer_options import trainer_options
from modulora_dpo.config import PreferenceConfig
from modulora_dpo.preferences import load_preferences


@checked
def dpo(config: PreferenceConfig, *, resume: bool = False, **options: Any) -> FinetuneResult:
    """Train an adapter on preferences, and write it to ``config.out``.

    Args:
        config: the run.
        resume, options: as for :func:`~modulora_core.training.finetune.finetune`.

    Raises:
        DataError: a record has no prompt, chosen and rejected answer.
        ModuLoRAError: as ``finetune``.
    """
    return finetune(config, resume=resume, method=Preferences(), **options)


class _Arguments(OneGPU, trl.DPOConfig): ...


class PreferenceTrainer(AdapterRun, trl.DPOTrainer):
    """TRL's DPOTrainer, with checkpoints that hold the adapter alone."""


class Preferences(Method):
    """The method of a run of DPO."""

    in_words = " with TRL's DPOTrainer"

    @override
    def check(self, config: FinetuneConfig) -> None:
        if is_sharded(config):
            raise OptionError(
                "dpo: expected whole weights in each process, got shard; leave it out"
            )
        trainer_options(config.trainer, trl.DPOConfig)

    @override
    def examples(
        self, source: Source, config: FinetuneConfig, tokenizer: Any, vocabulary: int
    ) -> Any:
        return load_preferences(source, tokenizer, seq_len=config.seq_len, vocabulary=vocabulary)

    @override
    def arguments(
        self, config: FinetuneConfig, folder: Path, steps: int, device: torch.device
    ) -> TrainingArguments:
        values = argument_values(config, folder, steps, device)
        del values["label_names"]
        values |= {
            "bf16": False,
            "gradient_checkpointing": False,  # turned on by our own function
            "activation_offloading": config.offload_activations,
            "max_length": config.seq_len,
            "precompute_ref_log_probs": True,
            **trainer_options(config.trainer, trl.DPOConfig),
        }
        try:
            with _quiet():
                arguments = _Arguments(**values)
            check_values(arguments, steps)
        except (ValueError, ImportError) as error:
            raise OptionError(f"trainer: {' '.join(str(error).split())}") from None
        return arguments

    @override
    def check_model(self, model: PreTrainedModel, name: str) -> None:
        if isinstance(model.get_output_embeddings(), LoRALinear):
            raise OptionError(
                f"dpo: expected an output head without an adapter, since TRL multiplies by its "
                f"weight alone, got one on the head of {name}; leave the head out of targets"
            )

    @override
    def trainer(self, parts: TrainerParts) -> AdapterRun:
        arguments, rows = parts.arguments, parts.data
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
        seen = arguments.max_steps * batch * arguments.world_size
        train = list(rows["train"])
        if seen < len(train):  # a log-probability of a row that no step sees would be wasted
            train = random.Random(parts.config.seed).sample(train, seen)
        folder = Path(arguments.output_dir) / "preferences"
        with _quiet():  # TRL computes the reference's log-probabilities at once
            return PreferenceTrainer(
                model=parts.model,
                args=arguments,
                train_dataset=_dataset(train, folder / "train"),
                eval_dataset=_dataset(rows["eval"], folder / "eval") if "eval" in rows else None,
                processing_class=parts.tokenizer,
                **parts.of_run,
            )


def _dataset(rows: Sequence[dict[str, Any]], folder: Path) -> datasets.Dataset:
    """The rows as a dataset; of several processes in a folder, where TRL shares its results.

    Its columns are JSON: others would give each message the fields of all, and templates see them.
    """
    columns = datasets.Features({name: datasets.Json() for name in rows[0]})
    dataset = datasets.Dataset.from_list([*rows], features=columns)
    if world_size() == 1:
        return dataset
    if is_first():
        dataset.save_to_disk(folder)
    barrier()
    return datasets.load_from_disk(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let datasets and TRL draw no progress bars, and TRL use old names of transformers."""
    hidden, before = datasets.are_progress_bars_disabled(), os.environ.get("TQDM_DISABLE")
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
