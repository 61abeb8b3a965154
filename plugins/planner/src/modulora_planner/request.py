"""The request that a plan answers. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from modulora_core.errors import OptionError
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.devices import check_device, check_optimizer_name

if TYPE_CHECKING:
    from modulora_core.registry import Choice

SAMPLES, SEQ_LEN = 128, 512
"""Defaults of the calibration, as in :mod:`modulora_core.calibration`, which imports torch."""

UNPLANNED = frozenset({
    "model", "out", "data", "format", "eval_data", "eval_every", "adapter", "epochs", "lr",
    "scheduler", "warmup", "weight_decay", "max_grad_norm", "seed", "save_every",
    "matmul_precision", "quantizer", "report_to", "baseline", "lora_file", "parity_check",
})  # fmt: skip
"""Fields of a finetuning run that a plan does not use."""


def finetuning(options: Mapping[str, object]) -> FinetuneConfig:
    """Build the run to plan from fields of FinetuneConfig. Raises OptionError."""
    config = _built(options)
    if "optim" in config.model_fields_set:
        check_optimizer_name(config.optim)
    return config


def _built(options: Mapping[str, object]) -> FinetuneConfig:
    unimportant: dict[str, object] = {"model": "-", "out": "-", "data": ["-"]}
    return FinetuneConfig.build(unimportant | dict(options))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A model, a quantizer, a finetuning run, a device and a budget.

    Attributes:
        model: MODEL: a Hub id, a folder, a file, ``package:NAME``. config.json is enough.
        quantizer: None for a packed checkpoint, or for all installed quantizers.
        head, embeddings: quantizers of the output head and the input embedding; None keeps it
            dense.
        config: the finetuning run.
        device: the kind of device. The machine need not have one.
        budget: the limit in bytes; None for no limit.
        padded: the sequences of a batch differ in length, so attention needs a mask.
        calibration_samples: the number of calibration samples, ``calibration_seq_len`` tokens each.
        revision: a revision of a Hub model.
        processes: the processes of a distributed run; the plan is of each.

    Raises:
        OptionError: the settings do not fit the device.
    """

    model: str
    quantizer: Choice | None = None
    head: Choice | None = None
    embeddings: Choice | None = None
    config: FinetuneConfig = field(default_factory=lambda: finetuning({}))
    device: Literal["cpu", "cuda"] = "cpu"
    budget: int | None = None
    padded: bool = False
    calibration_samples: int = SAMPLES
    calibration_seq_len: int = SEQ_LEN
    revision: str | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise OptionError(f"device {self.device!r}: expected cpu or cuda")
        for name in ("calibration_samples", "calibration_seq_len", "processes"):
            if getattr(self, name) >= 2**32:
                raise OptionError(f"{name}: expected less than 2**32, got {getattr(self, name)}")
        if self.processes < 1:
            raise OptionError(f"processes: expected at least 1, got {self.processes}")
        check_device(self.config, self.device, processes=self.processes, shard=self.config.shard)

    @property
    def dtype(self) -> str:
        """The dtype of the activations."""
        automatic = "float32" if self.device == "cpu" else "bfloat16"
        return automatic if self.config.dtype == "auto" else self.config.dtype

    def changed(self, **fields: Any) -> PlanRequest:
        """Change fields of the finetuning run. Raises OptionError if they exclude each other."""
        given = self.config.model_dump(exclude_unset=True)
        return replace(self, config=_built(given | fields))
