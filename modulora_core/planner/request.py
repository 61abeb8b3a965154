"""What a plan is asked for. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from modulora_core.errors import OptionError
from modulora_core.training.config import FinetuneConfig

if TYPE_CHECKING:
    from modulora_core.registry import Choice

UNPLANNED = frozenset({"model", "out", "data", "format", "eval_data", "eval_every", "adapter", "epochs", "lr", "scheduler",
                       "warmup", "weight_decay", "seed", "save_every"})  # fmt: skip
"""Fields of a finetuning run that memory doesn't depend on, or that take files."""

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A question about memory.

    Attributes:
        model: MODEL: a folder, of which config.json is enough, a Hub id, a ``.gguf`` file, ``package:NAME``, or a packed checkpoint.
        quantizer: a quantizer's name; None for a packed checkpoint's own.
        options: of the quantizer.
        head, embeddings: quantizers for the output head and the input embedding, which stay dense without.
        config: the finetuning run; of its fields those that memory doesn't depend on are ignored. Without ``steps`` it is so long that
            every token has occurred.
        device: the kind of device that is planned for.
        budget: bytes that may be used; None for no limit.
        padded: whether the sequences of a batch may be of different lengths, as those of chats and instructions are: then attention gets a
            mask, which a full batch needs none of.
        calibration_samples: of how many samples quantizing is planned, where the quantizer wants calibration.
        calibration_seq_len: tokens in each of them.
        revision: of a Hub model.
    """

    model: str
    quantizer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    config: FinetuneConfig = field(default_factory=lambda: finetuning({}))
    device: Device = "cpu"
    budget: int | None = None
    padded: bool = False
    calibration_samples: int = 128
    calibration_seq_len: int = 512
    revision: str | None = None
    head: Choice | None = None
    embeddings: Choice | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise OptionError(
                f"device {self.device!r}: expected cpu or cuda, which is all that is planned for"
            )
        if self.config.mapped and self.device != "cpu":
            raise OptionError(
                f"mapped: expected the device cpu, got {self.device}, to which weights are copied; leave mapped out"
            )
        if self.config.dtype == "float16" and self.device == "cpu":
            raise OptionError(
                "dtype float16: training in it takes a GPU; on a CPU expected float32 or bfloat16"
            )

    @property
    def dtype(self) -> str:
        """Of the activations."""
        automatic = "float32" if self.device == "cpu" else "bfloat16"
        return automatic if self.config.dtype == "auto" else self.config.dtype

    def changed(self, **fields: Any) -> PlanRequest:
        """The same question about a run with other settings.

        Raises:
            OptionError: settings that don't go together.
        """
        given = self.config.model_dump(exclude_unset=True)
        return replace(self, config=finetuning(given | fields))


def finetuning(options: Mapping[str, object]) -> FinetuneConfig:
    """The finetuning run of which memory is planned: with ``options``, and anything for what they leave out.

    Raises:
        OptionError: as :meth:`FinetuneConfig.build`.
    """
    unimportant: dict[str, object] = {"model": "-", "out": "-", "data": ["-"]}
    long = {} if options.get("steps") is not None else {"epochs": 1}
    return FinetuneConfig.build(unimportant | long | dict(options))
