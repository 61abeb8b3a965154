"""``modulora init-adapter``."""

from __future__ import annotations

import shlex
from typing import Annotated

from modulora_core.cli.arguments import Model, argument, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands
from modulora_core.training.config import FinetuneConfig

Out = Annotated[str, argument("OUT", "The adapter folder to write, new or empty.")]
Dense = Annotated[str, option("--dense MODEL", "The model before quantization.")]
Calibration = Annotated[
    str, option("--calibration SOURCE", "Text for the inputs of the layers: files, or pydoc.")
]
Samples = Annotated[int | None, option("--samples N", "Segments of the text.", min=1, default="32")]
SeqLen = Annotated[int | None, option("--seq-len N", "Tokens of a segment.", min=1, default="512")]
Rank = Annotated[int, option("--rank N", "Rank r of the adapter.", min=1)]
Alpha = Annotated[float, option("--alpha X", "The adapter is multiplied by alpha / rank.")]
Targets = Annotated[str, option("--targets NAME", "Layers to adapt, separated by commas.")]
_RUN = FinetuneConfig.model_fields
"""The adapter has the defaults of finetune's."""

Seed = Annotated[int, option("--seed N", "Seed of samples and adapter.", min=0)]


def command(
    model: Model,
    out: Out,
    dense: Dense,
    calibration: Calibration,
    samples: Samples = None,
    seq_len: SeqLen = None,
    rank: Rank = _RUN["rank"].default,
    alpha: Alpha = _RUN["alpha"].default,
    targets: Targets = ",".join(_RUN["targets"].default),
    seed: Seed = 0,
) -> Report:
    """Make an adapter that starts by correcting the quantizer's errors.

    B and A are the best correction of each layer's outputs on the text, of rank r, by QERA's
    closed form. A decoder block of the dense model is in memory at a time. The result is an
    ordinary adapter: `finetune --adapter OUT` trains it further.

    Examples:
        modulora init-adapter packed start --dense MODEL --calibration notes.txt
        modulora finetune packed adapter --adapter start --data notes.txt
    """
    from rich.console import Group

    from modulora_core.calibration import CalibrationConfig
    from modulora_core.calibration.text import SEQ_LEN
    from modulora_core.lora.settings import LoRASettings
    from modulora_recover.init_adapter import CORRECTION_SAMPLES, init_adapter

    names = tuple(part.strip() for part in targets.split(","))
    settings = LoRASettings(rank, alpha, targets=names, seed=seed)
    text = CalibrationConfig(
        calibration, max_samples=samples or CORRECTION_SAMPLES, seq_len=seq_len or SEQ_LEN
    )
    with terminal().progress("correcting", "layers") as show:
        made = init_adapter(
            model, out, dense=dense, calibration=text, settings=settings, progress=show
        )
    base, start = shlex.quote(model), shlex.quote(out)
    following = next_commands(
        f"modulora finetune {base} ADAPTER --adapter {start} --data SOURCE",
        f"modulora evaluate {base} --adapter {start}",
    )
    return Report(made.to_json(), Group(facts(made.to_json()), following))
