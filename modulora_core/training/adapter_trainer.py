"""transformers.Trainer for an adapter on packed weights: what it does otherwise.

Only the adapter is saved and restored. No logits are whole (:mod:`modulora_core.training.chunked_loss`). The loss on held-out data is a mean over
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput
from typing_extensions import override

from modulora_core.data.rendering import IGNORED
from modulora_core.training.chunked_loss import chunked_loss
from modulora_core.training.config import FinetuneConfig


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """How the adapter of the model in training is written to a folder, and read back from one."""

    save: Callable[[Path], None]
    restore: Callable[[Path], None]


class AdapterTrainer(Trainer):
    """A Trainer whose model is an adapter: the frozen base is neither saved nor loaded."""

    def __init__(self, *, files: AdapterFiles, config: FinetuneConfig, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._files = files
        self._config = config
        self.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to --json

    @override
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # instead of model.save_pretrained, and of the pickled TrainingArguments that Trainer adds
        if self.args.should_save:
            self._files.save(Path(output_dir or self.args.output_dir))

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._files.restore(Path(resume_from_checkpoint))

    @override
    def compute_loss(self, model: nn.Module, *arguments: Any, **options: Any) -> Any:
        offload = self._config.offload_activations and model.training
        with chunked_loss(self.model), save_on_cpu(pin_memory=True) if offload else nullcontext():
            return super().compute_loss(model, *arguments, **options)

    @override
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # channel scales, the one kind of vector that trains, are to stay near one: no decay towards zero
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    @override
    def evaluation_loop(self, *arguments: Any, **options: Any) -> EvalLoopOutput:
        # transformers' mean is over batches, and so depends on their size where examples differ in length
        self._nll, self._predicted = 0.0, 0
        output = super().evaluation_loop(*arguments, **options)
        output.metrics["eval_loss"] = self._nll / self._predicted
        return output

    @override
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        loss, logits, labels = super().prediction_step(model, inputs, *arguments, **options)
        predicted = int((inputs["labels"][:, 1:] != IGNORED).sum())
        self._nll += float(loss) * predicted
        self._predicted += predicted
        return loss, logits, labels

    @override
    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers estimates it from the parameters, and packed weights are none
