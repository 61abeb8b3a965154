"""``modulora merge-packed``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from modulora_core.cli.arguments import Adapter, Model, Resume, Seed, argument, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands
from modulora_core.errors import OptionError
from modulora_core.progress import Bars

Out = Annotated[Path, argument("OUT", "A new folder, or a new file if MODEL is a file.")]
Calibration = Annotated[
    str | None,
    option("--calibration SOURCE", "Text like the training data: files, or pydoc.", default="none"),
]
Samples = Annotated[
    int | None, option("--samples N", "Segments of the text to merge with.", min=1, default="16")
]
SeqLen = Annotated[int | None, option("--seq-len N", "Tokens of a segment.", min=2, default="512")]
HeldBack = Annotated[
    int | None,
    option("--held-back N", "Further segments for the comparison; 0: none.", min=0, default="8"),
]


def command(
    model: Model,
    out: Out,
    adapter: Adapter = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    held_back: HeldBack = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> Report:
    """Merge an adapter into the packed weights of its model.

    OUT has the format, the types and the size of MODEL: weights move to other codes, and scales
    stay. Each layer is rounded so that its outputs on the text stay near the adapted ones. A
    decoder block is dense at a time.

    The command then compares MODEL, MODEL with the adapter beside it, and OUT, on segments of the
    text that merging did not see. An interrupted merge continues with --resume.

    Examples:
        modulora merge-packed smollm2-nf4 merged --adapter my-adapter --calibration notes.txt
        modulora merge-packed model.gguf merged.gguf --adapter my-adapter --calibration pydoc
    """
    if adapter is None:
        raise OptionError("--adapter: expected the adapter to merge, got none")
    if calibration is None:
        raise OptionError(
            "--calibration: expected a text like the training data, got none. Without it each "
            "weight would go to the nearest point of its grid, which loses the adapter: most of "
            "its changes are smaller than half a step"
        )
    from rich.console import Group

    from modulora_merge.merging import HELD_BACK, SAMPLES, SEQ_LEN, merge_packed

    merged = merge_packed(
        model, out, adapter=adapter, calibration=calibration, samples=samples or SAMPLES,
        seq_len=seq_len or SEQ_LEN, held_back=HELD_BACK if held_back is None else held_back,
        seed=seed, resume=resume, progress=Bars(terminal().progress),
    )  # fmt: skip
    name = shlex.quote(str(out))
    following = next_commands(f"modulora evaluate {name}", f"modulora chat {name}")
    return Report(merged.to_json(), Group(facts(merged.to_json()), following))
