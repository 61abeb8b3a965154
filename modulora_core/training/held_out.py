"""The loss on examples that a run did not reach, measured without being asked.

Nothing of the training changes: a run of few steps leaves most of its data unread anyway.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch.utils.data import Subset

from modulora_core.distributed import world_size
from modulora_core.lora.adapted import without_adapter
from modulora_core.training.run_log import HeldOut
from modulora_core.training.trainer import AdapterTrainer

MOST, LEAST = 32, 8
"""Number of examples; fewer than the least say little."""


def held_out(trainer: AdapterTrainer) -> HeldOut | None:
    """Measure the loss without and with the adapter, after training.

    The result is None after a whole epoch, in several processes, and for short runs. It reads at
    most a fifth as many examples as the run, twice. A forward pass makes a third of a training
    step's products, or half without gradient checkpointing. So it takes at most 2/15 of the run's
    time, or a fifth. The parts of joined examples don't see each other, as in training
    (:func:`modulora_core.training.batches.attending_within_parts`).
    """
    if world_size() > 1:
        return None
    batches = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    left = unreached(trainer, batches)
    count = min(MOST, len(left), batches * trainer.args.train_batch_size // 5)
    if count < LEAST:
        return None
    chosen = Subset(trainer.train_dataset, [left[i * len(left) // count] for i in range(count)])

    def loss() -> float:
        loader = trainer.get_eval_dataloader(chosen)
        found = trainer.evaluation_loop(loader, "held-out examples", prediction_loss_only=True)
        return float(found.metrics["eval_loss"])

    with without_adapter(trainer.model):
        before = loss()
    return HeldOut(before, loss(), count)


def unreached(trainer: AdapterTrainer, batches: int) -> list[int]:
    """The numbers of the examples after the first ``batches`` of the first epoch, in its order."""
    loader: Any = trainer.get_train_dataloader()
    loader.set_epoch(0)
    return list(itertools.chain(*itertools.islice(loader.batch_sampler, batches, None)))
