"""Settings of a new LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modulora_core.arguments import checked_class
from modulora_core.errors import OptionError
from modulora_core.lora.targets import ALL_LINEAR


@checked_class
@dataclass(frozen=True, slots=True)
class LoRASettings:
    """Settings of a new adapter. The defaults are the paper's (arXiv 2309.16119), except targets.

    Attributes:
        rank: r.
        alpha: α; the adapter is scaled by α / r.
        dropout: probability that training leaves out an entry of the adapter's input.
        targets: ``"all-linear"``, ``"attention"``, ``"experts"`` or names of layers, one or several
            (:mod:`modulora_core.lora.targets`).
        seed: seed of A's random values.
        train_scales: also train channel scales of linear layers.

    Raises OptionError: a value is out of range.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: str | Sequence[str] = ALL_LINEAR
    seed: int = 0
    train_scales: bool = False

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", 0 < self.alpha < math.inf, "more than 0"),
            ("dropout", 0 <= self.dropout < 1, "a probability in [0, 1)"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2³² − 1"),
            ("targets", bool(self.targets), f"{ALL_LINEAR!r} or names of layers"),
        ):
            if not is_valid:
                raise OptionError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
