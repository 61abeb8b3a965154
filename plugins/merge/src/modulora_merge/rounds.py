"""Trains an adapter and merges it into the packed weights, once or in rounds.

The weights move by the sum of all adapters. So the change can have a higher rank than one adapter,
with one adapter's memory (Lialin et al. 2023, ReLoRA, arXiv 2307.05695), and later rounds can make
up for what an earlier merge lost. The result is one packed model of the same format, types and
size.

The learning rate has one schedule over all rounds. Each round begins with a fresh state of the
optimizer, and draws its examples anew.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modulora_evaluate.evaluate import evaluate
from modulora_kernels.feedback import merges
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from modulora_core.arguments import checked
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import only_writer, partial_name, write_file
from modulora_core.data import Source, token_segments
from modulora_core.distributed import world_size
from modulora_core.errors import OptionError, OutputError
from modulora_core.inference.opened import open_to_run
from modulora_core.models.folders import RUN_FILE
from modulora_core.models.locate import locate
from modulora_core.progress import Display
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune
from modulora_core.training.methods import Method
from modulora_core.training.trainer import AdapterRun, AdapterTrainer, TrainerParts
from modulora_merge.config import LEFT_OUT, RoundsConfig
from modulora_merge.merging import merge_packed

logger = logging.getLogger(__name__)

SEGMENTS = 40
"""Of the evaluation data, for the perplexities of the result."""


@dataclass(frozen=True, slots=True)
class RoundsResult:
    """A packed model that was trained in rounds.

    Attributes:
        losses: of each optimizer step of this call.
        changed: for each round of this call, the share of adapted weights with another value.
        perplexity_before, perplexity: of MODEL and of the result on ``eval_data``; None without.
    """

    out: str
    rounds: int
    losses: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    seconds: float = 0.0
    perplexity_before: float | None = None
    perplexity: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@checked
def finetune_packed(
    config: RoundsConfig,
    *,
    resume: bool = False,
    on_eval: Callable[[int, float], None] | None = None,
    progress: Display = True,
) -> RoundsResult:
    """Train in rounds, and write the packed model to ``config.out``.

    ``OUT.partial`` has the rounds until the end.

    Args:
        config: the run.
        resume: continue an interrupted run of the same config from its last whole step.
        on_eval: called with a round's step and its loss on the evaluation data.
        progress: as for :func:`~modulora_core.training.finetune.finetune`.

    Raises:
        OutputError: ``out`` exists, or without ``resume`` an unfinished run of it.
        OptionError: an option does not fit rounds, the unfinished run has another config, or a run
            of several processes.
        ModuLoRAError: as ``finetune`` and :func:`~modulora_merge.merging.merge_packed`.
    """
    started, out, steps = time.perf_counter(), Path(config.out), config.rounds()
    if world_size() > 1:
        raise OptionError(f"finetune-packed: expected one process, got {world_size()}")
    if out.exists() or out.is_symlink():
        raise OutputError(f"output {out}: expected a new place, found something; choose another")
    file = locate(config.model).file
    suffix = "" if file is None else file.format.spec.file_suffix
    if out.suffix.lower() != suffix and suffix:
        raise OutputError(f"output {out}: expected a name *{suffix}, as MODEL is such a file")
    work = partial_name(out)
    losses, changed, model = list[float](), list[float](), config.model
    with only_writer(work):
        _check_request(work, config, resume)
        _check_merge(config)
        before = _perplexity(config, config.model, progress)
        write_file(work / RUN_FILE, config.to_yaml())
        done = [n for n in range(len(steps)) if (work / f"merged-{n}{suffix}").exists()]
        begin = max(done, default=-1) + 1
        if done:
            model = str(work / f"merged-{done[-1]}{suffix}")
        for n in range(begin, len(steps)):
            logger.info("round %d of %d: %d steps", n + 1, len(steps), steps[n])
            adapter, merged = work / f"adapter-{n}", work / f"merged-{n}{suffix}"
            trained = finetune(
                _of_round(config, model, adapter, n, steps[n]), resume=adapter.exists(),
                on_eval=on_eval, method=_Round(sum(steps[:n]), sum(steps)), progress=progress,
            )  # fmt: skip
            losses += trained.losses
            made = merge_packed(
                model, merged, adapter=adapter, calibration=_merge_text(config),
                samples=config.merge_samples, seq_len=config.merge_seq_len, held_back=0,
                seed=config.seed, resume=resume, progress=progress,
            )  # fmt: skip
            changed.append(made.changed / made.weights)
            if n:
                _remove(Path(model))
            shutil.rmtree(adapter)
            model = str(merged)
        Path(model).replace(out)
        shutil.rmtree(work)
    after = _perplexity(config, str(out), progress)
    seconds = time.perf_counter() - started
    return RoundsResult(str(out), len(steps), losses, changed, seconds, before, after)


def _perplexity(config: RoundsConfig, model: str, progress: Display) -> float | None:
    if config.eval_data is None:
        return None
    opened = open_to_run(model)
    seq_len = min(config.seq_len, opened.window or config.seq_len)
    found = evaluate(
        opened, config.eval_data, seq_len=seq_len, segments=SEGMENTS, progress=progress
    )
    return float(found.perplexity)


def _check_merge(config: RoundsConfig) -> None:
    """Refuse, before the first round trains, what its merge would refuse.

    Raises:
        OptionError: no packed weight has a grid. DataError: the text for merging is too short.
    """
    checkpoint = open_packed(locate(config.model))
    quantizers = [checkpoint.quantizer(site) for site in checkpoint.record.sites]
    if not any(merges(quantizer) for quantizer in quantizers):
        names = ", ".join(dict.fromkeys(quantizer.spec.name for quantizer in quantizers))
        raise OptionError(
            f"{config.model}: expected a quantizer whose codes can move on a grid, got {names}; "
            "use `modulora finetune`, and keep the adapter beside the model"
        )
    token_segments(_merge_text(config), checkpoint.tokenizer(), config.merge_seq_len, 1)


def _merge_text(config: RoundsConfig) -> Source:
    return config.merge_data or config.data or ()


def _check_request(work: Path, config: RoundsConfig, resume: bool) -> None:
    """Compare the request with an unfinished run's. Raises OutputError, OptionError."""
    request = work / RUN_FILE
    if not any(work.iterdir()):
        return
    if not request.is_file():
        raise OutputError(f"temporary folder {work}: expected it free; remove or rename it")
    if not resume:
        raise OutputError(
            f"temporary folder {work}: expected it free, it holds an unfinished run; go on with it "
            "with --resume, or remove it"
        )
    differences = config.differences(RoundsConfig.build({}, file=request))
    if differences:
        raise OptionError(
            f"{work}: expected the options of the unfinished run, got {', '.join(differences)}; "
            "ask for the same, or remove the folder"
        )


def _of_round(
    config: RoundsConfig, model: str, adapter: Path, number: int, steps: int
) -> FinetuneConfig:
    """The config of one round: examples and the fresh adapter are drawn anew."""
    given = config.model_dump(exclude_unset=True, include={*FinetuneConfig.model_fields})
    assert config.steps is not None
    warmup = config.warmup if config.warmup >= 1 else round(config.warmup * config.steps)
    return FinetuneConfig.model_validate({
        **{name: value for name, value in given.items() if name not in LEFT_OUT},
        "model": model, "out": str(adapter), "steps": steps, "seed": config.seed + number,
        "warmup": warmup, "baseline": False,
    })  # fmt: skip


def _remove(merged: Path) -> None:
    if merged.is_dir():
        shutil.rmtree(merged)
    else:
        merged.unlink()


class _RoundTrainer(AdapterTrainer):
    """A trainer whose learning rate is at its place in a schedule over all rounds.

    Attributes:
        before: the steps of earlier rounds; total: the steps of all rounds.
    """

    before: int
    total: int

    @override
    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        whole = super().create_scheduler(self.total, optimizer)
        shifted = [self._shifted(factor) for factor in whole.lr_lambdas]
        self.lr_scheduler = LambdaLR(whole.optimizer, shifted)
        return self.lr_scheduler

    def _shifted(self, factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step + self.before)


class _Round(Method):
    """Supervised finetuning, as a part of a longer training."""

    trainer_class = _RoundTrainer

    def __init__(self, before: int, total: int) -> None:
        self._before, self._total = before, total

    @override
    def trainer(self, parts: TrainerParts) -> AdapterRun:
        trainer = super().trainer(parts)
        assert isinstance(trainer, _RoundTrainer)
        trainer.before, trainer.total = self._before, self._total
        return trainer
