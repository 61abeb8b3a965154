"""Train on preferences with TRL's DPOTrainer (arXiv 2305.18290).

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
from trl import DPOConfig, DPOTrainer

from modulora_core.distributed import barrier, is_first, world_size
from modulora_core.errors import OptionError
from modulora_core.training.arguments import OneGPU, argument_values, check_values
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.trainer import AdapterRun, TrainerParts
from modulora_core.training.trainer_options import trainer_options


class _Arguments(OneGPU, DPOConfig): ...


class PreferenceTrainer(AdapterRun, DPOTrainer):
    """TRL's DPOTrainer, with checkpoints that hold the adapter alone."""


def preference_arguments(
    config: FinetuneConfig, folder: Path, steps: int, device: torch.device
) -> DPOConfig:
    """Translate a config to TRL's arguments, as :func:`training_arguments` does to transformers'.

    Raises:
        OptionError: TRL or transformers refuses a value of ``config.trainer``.
    """
    values = argument_values(config, folder, steps, device)
    del values["label_names"]
    values |= {
        "bf16": False,
        "gradient_checkpointing": False,  # turned on by our own function
        "activation_offloading": config.offload_activations,
        "max_length": config.seq_len,
        "precompute_ref_log_probs": True,
        **trainer_options(config.trainer, DPOConfig),
    }
    try:
        with _quiet():
            arguments = _Arguments(**values)
        check_values(arguments, steps)
    except (ValueError, ImportError) as error:
        raise OptionError(f"trainer: {' '.join(str(error).split())}") from None
    return arguments


def preference_trainer(parts: TrainerParts) -> PreferenceTrainer:
    """Make the trainer, which computes the reference's log-probabilities at once.

    Its data are rows of :mod:`modulora_core.data.preferences`.
    """
    arguments, rows = parts.arguments, parts.data
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    seen = arguments.max_steps * batch * arguments.world_size
    train = list(rows["train"])
    if seen < len(train):  # a log-probability of a row that no step sees would be wasted
        train = random.Random(parts.config.seed).sample(train, seen)
    folder = Path(arguments.output_dir) / "preferences"
    with _quiet():
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
