"""``modulora dpo``. Its options are the fields of PreferenceConfig that preferences have."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from modulora_core.cli.finetune import CHECKS_PLACES as CHECKS_PLACES
from modulora_core.cli.finetune import PANELS as FINETUNE_PANELS
from modulora_core.cli.finetune import checked_request, described, note_eval, signature
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import next_commands
from modulora_core.progress import Bars
from modulora_core.training.resuming import check_new
from modulora_dpo.config import FIXED, PreferenceConfig

PANELS = {
    panel: tuple(name for name in names if name not in FIXED)
    for panel, names in FINETUNE_PANELS.items()
}


def command(config: str | None = None, resume: bool = False, **options: Any) -> Report:
    """Train a LoRA adapter so that a model prefers the chosen answers to the rejected ones.

    The data has prompt, chosen and rejected: strings, or lists of messages. TRL's DPOTrainer
    computes the loss (DPO, arXiv 2305.18290); its reference is the model at the start, with the
    adapter of --adapter. --trainer beta=0.1 sets an option of TRL's DPOConfig.

    OUT/finetune.yaml has all options; --config repeats the run with them.

    Examples:
        modulora dpo packed adapter --data preferences.jsonl
        modulora dpo packed adapter --data preferences.jsonl --adapter finetuned --epochs 2
        modulora dpo packed adapter --data preferences.jsonl --trainer beta=0.3
        modulora dpo packed adapter --data preferences.jsonl --steps 100 --resume
    """
    request = checked_request(PreferenceConfig, options, config)
    if not resume:
        check_new(Path(request.out))
    from rich.console import Group

    from modulora_dpo.dpo import dpo

    result = dpo(request, resume=resume, on_eval=note_eval, progress=Bars(terminal().progress))
    base, adapter = shlex.quote(result.model), shlex.quote(request.out)
    following = next_commands(
        f"modulora chat {base} --adapter {adapter}",
        f"modulora merge {base} MERGED --adapter {adapter}",
    )
    return Report(result.to_json(), Group(described(result), following))


command.__signature__ = signature(PreferenceConfig, *FIXED)  # type: ignore[attr-defined]  # typer's
