"""Train an adapter so that the packed model predicts as the dense model does.

It is a run of :func:`~modulora_core.training.finetune.finetune` with another loss
(:mod:`modulora_recover.loss`). Before its first step the dense model's predictions are computed
once, block by block, and stay in ``OUT/checkpoints/predictions-*`` until the run is finished.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from typing_extensions import override

from modulora_core.arguments import checked
from modulora_core.distributed import is_first, together, world_size
from modulora_core.errors import OptionError
from modulora_core.models import ModelSource, open_dense
from modulora_core.models.config import window_of
from modulora_core.progress import Display, shown
from modulora_core.training.chunked_loss import RowLoss
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import FinetuneResult, finetune
from modulora_core.training.methods import Method
from modulora_core.training.resuming import CHECKPOINTS
from modulora_core.training.trainer import AdapterRun, AdapterTrainer, TrainerParts
from modulora_recover.config import RecoverConfig
from modulora_recover.loss import TeacherLoss
from modulora_recover.predictions import TEACHER, Distilled, DistilledCollator, Predictions

logger = logging.getLogger(__name__)


@checked
def recover(config: RecoverConfig, *, resume: bool = False, **options: Any) -> FinetuneResult:
    """Train an adapter on the dense model's predictions, and write it to ``config.out``.

    ``finetune`` trains it further as its ``adapter``.

    Args:
        config: the run.
        resume, options: as for :func:`~modulora_core.training.finetune.finetune`.

    Raises:
        OptionError: the dense model has another tokenizer or vocabulary, or too short a context.
        ModelError, CheckpointError: it cannot be opened.
        ModuLoRAError: as ``finetune``.
    """
    distillation = Distillation(config.original, config.weight)
    result = finetune(config, resume=resume, method=distillation, **options)
    with together():
        if is_first():
            for file in (Path(config.out) / CHECKPOINTS).glob("predictions-*"):
                file.unlink()
    return result


class DistillingTrainer(AdapterTrainer):
    """A trainer of batches that bring the teacher's predictions along.

    Attributes:
        weight: of the teacher in the loss.
    """

    weight: float

    @override
    def row_loss(self, inputs: dict[str, Any]) -> RowLoss:
        tokens, log_p = (inputs.pop(name) for name in TEACHER)
        return TeacherLoss(tokens, log_p.exp(), self.weight)


class Distillation(Method):
    """The method of a recovery.

    Args:
        original: the dense model; weight: of its predictions in the loss.

    Attributes:
        predictions: the dense model's predictions of the training examples, after :meth:`begin`.
    """

    trainer_class = DistillingTrainer
    in_words = " with the predictions of the dense model"
    predictions: Predictions

    def __init__(self, original: str, weight: float) -> None:
        self._original, self._weight = original, weight

    @override
    def begin(
        self,
        config: FinetuneConfig,
        examples: Any,
        steps: int,
        tokenizer: Any,
        vocabulary: int,
        folder: Path,
    ) -> None:
        teacher = open_dense(self._original)
        _check_teacher(teacher, tokenizer, vocabulary, config.seq_len)
        seen = steps * config.batch_size * config.grad_accum * world_size()
        self.predictions = Predictions(teacher, examples, seen, config.seed, folder)
        self.nbytes = self.predictions.nbytes
        logger.info(
            "the predictions of %s for %s trained tokens take %s MiB in %s",
            self._original, f"{self.predictions.ends[-1]:,}",
            f"{self.nbytes / 2**20:,.1f}", folder,
        )  # fmt: skip

    @override
    def check_model(self, model: PreTrainedModel, name: str) -> None:
        if model.loss_function is not ForCausalLMLoss:
            raise OptionError(
                f"recover {name}: expected a model with transformers' causal loss, and "
                f"{type(model).__name__} has its own; train on the data alone, with finetune"
            )

    @override
    def trainer(self, parts: TrainerParts) -> AdapterRun:
        data = {**parts.data, "train": Distilled(self.predictions)}
        trainer = super().trainer(replace(parts, data=data))
        assert isinstance(trainer, DistillingTrainer)
        trainer.data_collator = DistilledCollator(trainer.data_collator)
        trainer.weight = self._weight
        return trainer

    @override
    def prepare(self, device: torch.device, progress: Display) -> None:
        with shown(progress, "predicting", "blocks") as show:
            self.predictions.compute(device, show)


def _check_teacher(teacher: ModelSource, tokenizer: Any, vocabulary: int, seq_len: int) -> None:
    name, config = teacher.location.model, teacher.config.get_text_config()
    if config.vocab_size != vocabulary or teacher.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise OptionError(
            f"original {name}: expected the tokenizer of the quantized model and its {vocabulary} "
            f"tokens, got another one, with {config.vocab_size}; give the model that it was "
            "quantized from"
        )
    longest = window_of(config)
    if longest is not None and longest < seq_len:
        raise OptionError(
            f"original {name}: expected a context of seq_len {seq_len}, got {longest} tokens"
        )
